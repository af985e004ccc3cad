"""At full rank every drop-in equals its torch original: outputs, states, gradients to the input."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from crossing import crossed
from layers import BATCH, HIDDEN, INPUTS, LAYOUTS, SCOPES, STEPS, TABLE, drop_in, make
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from htcompress.errors import ShapeError
from htcompress.nn import module_class


def close(a: object, b: object) -> bool:
    if isinstance(a, PackedSequence):
        return close(a.data, b.data) and all(
            (x is None and y is None) or torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True)
        )
    if isinstance(a, tuple):
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))
    return a.shape == b.shape and float((a - b).detach().abs().max()) < 1e-5


def agree(original: nn.Module, replaced: nn.Module, x: torch.Tensor, hx: object, wrap=lambda x: x) -> None:
    """Outputs, states, and the gradients of a random projection of them to the input."""
    gradients = []
    outputs = []
    for module in (original, replaced):
        leaf = x.clone().requires_grad_()
        result = module(wrap(leaf), hx)
        flat = [result] if isinstance(result, torch.Tensor) else list(itertools.chain(*map(_flat, result)))
        generator = torch.Generator().manual_seed(3)
        sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in flat).backward()
        gradients.append(leaf.grad)
        outputs.append(result)
    assert close(outputs[1], outputs[0])
    assert close(gradients[1], gradients[0])


def _flat(value: object) -> list[torch.Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, torch.Tensor) else list(value)


@pytest.mark.parametrize(("kind", "options", "scope", "layout"), crossed(TABLE), ids=str)
def test_equals_torch(kind: str, options: dict[str, object], scope: str, layout: str) -> None:
    module = make(kind, **options)
    stack = options["num_layers"] * (2 if options["bidirectional"] else 1)
    h0 = torch.randn(stack, BATCH, options.get("proj_size") or HIDDEN)
    hx = (h0, torch.randn(stack, BATCH, HIDDEN)) if kind == "LSTM" else h0
    single = tuple(t[:, 0] for t in hx) if kind == "LSTM" else hx[:, 0]
    x = torch.randn(BATCH, STEPS, INPUTS) if options["batch_first"] else torch.randn(STEPS, BATCH, INPUTS)
    replaced = drop_in(module, scope, layout)
    agree(module, replaced, x, None)
    agree(module, replaced, x, hx)
    agree(module, replaced, torch.randn(STEPS, INPUTS), single)
    for lengths in ([7, 5, 5, 1], [3, 7, 1, 5]):

        def pack(t: torch.Tensor, lengths: list[int] = lengths) -> PackedSequence:
            sizes = torch.tensor(lengths)
            return pack_padded_sequence(t, sizes, bool(options["batch_first"]), lengths == sorted(lengths)[::-1])

        agree(module, replaced, x, hx, pack)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "tanh", "relu"])
def test_cells_equal_torch(kind: str, bias: bool, scope: str) -> None:
    if kind in ("tanh", "relu"):
        module: nn.Module = nn.RNNCell(INPUTS, HIDDEN, bias=bias, nonlinearity=kind)
    else:
        module = getattr(nn, kind)(INPUTS, HIDDEN, bias=bias)
    for layout in LAYOUTS:
        replaced = drop_in(module, scope, layout)
        for batch in ((), (BATCH,)):
            h = torch.randn(*batch, HIDDEN)
            hx = (h, torch.randn(*batch, HIDDEN)) if kind == "LSTMCell" else h
            agree(module, replaced, torch.randn(*batch, INPUTS), hx)
            agree(module, replaced, torch.randn(*batch, INPUTS), None)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "tanh"])
def test_double_deepcopy_pickle_and_state_dict(kind: str) -> None:
    module = make(kind, num_layers=2, bidirectional=True).double()
    replaced = drop_in(module)
    assert {p.dtype for p in replaced.parameters()} == {torch.float64}
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    with torch.no_grad():
        expected = module(x)
        assert close(replaced(x), expected)
        assert close(copy.deepcopy(replaced)(x), expected)
        assert close(pickle.loads(pickle.dumps(replaced))(x), expected)
        empty = module_class(replaced.settings).from_config(replaced.settings, replaced.to_config()).double()
        assert not close(empty(x), expected)
        empty.load_state_dict(replaced.state_dict())
        assert close(empty(x), expected)


def test_kept_matrices_follow_the_parameters() -> None:
    replaced = drop_in(make("LSTM"))
    x = torch.randn(STEPS, BATCH, INPUTS)
    with torch.no_grad():
        before = replaced(x)[0]
        for p in replaced.parameters():
            p.mul_(0.5)
        after = replaced(x)[0]
        assert not torch.allclose(before, after)
        changed = replaced.double()(x.double())[0]
    assert torch.allclose(changed.float(), after, atol=1e-5)
    with torch.enable_grad():
        assert torch.allclose(replaced(x.double())[0], changed)


def test_dropout_is_between_layers_and_in_training_only() -> None:
    module = make("LSTM", num_layers=2, dropout=0.5)
    replaced = drop_in(module)
    x = torch.randn(STEPS, BATCH, INPUTS)
    assert close(replaced.eval()(x), module.eval()(x))
    replaced.train()
    assert not torch.allclose(replaced(x)[0], replaced(x)[0])
    drawn = torch.stack([replaced(x)[0] for _ in range(400)]).mean(0)
    reference = torch.stack([module.train()(x)[0] for _ in range(400)]).mean(0)
    assert float((drawn - reference).abs().max()) < 0.05


def test_it_answers_like_torch() -> None:
    replaced = drop_in(make("LSTM", num_layers=2, batch_first=True))
    assert (replaced.hidden_size, replaced.num_layers, replaced.batch_first) == (HIDDEN, 2, True)
    replaced.flatten_parameters()
    assert drop_in(make("relu")).nonlinearity == "relu"


@pytest.mark.parametrize(
    ("shape", "hx", "message"),
    [
        ((STEPS, BATCH, INPUTS + 1), None, "6 features"),
        ((INPUTS,), None, "2-D or 3-D"),
        ((STEPS, BATCH, INPUTS), torch.zeros(1, BATCH, HIDDEN), "pair"),
        ((STEPS, BATCH, INPUTS), (torch.zeros(1, 3, HIDDEN),) * 2, "expected (1, 4, 5)"),
    ],
)
def test_misfits_are_named(shape: tuple[int, ...], hx: object, message: str) -> None:
    with pytest.raises(ShapeError) as caught:
        drop_in(make("LSTM"))(torch.zeros(shape), hx)
    assert message in str(caught.value)
