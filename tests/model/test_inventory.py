"""Recurrent layers are recognised from names and shapes alone, and what is wrong with them is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from small import Twice, tagger
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from htcompress.errors import CheckpointError
from htcompress.model.inventory import inventory, inventory_of_model, names_of, same_memory, tensor_names
from htcompress.nn.settings import RecurrentSettings
from htcompress.vocabulary import Kind

State = dict[str, Tensor]

MODULES: list[nn.Module] = [
    nn.LSTM(6, 5),
    nn.GRU(6, 5),
    nn.RNN(6, 5),
    nn.LSTM(5, 5, num_layers=3),
    nn.GRU(6, 5, num_layers=2, bidirectional=True),
    nn.RNN(6, 5, bias=False),
    nn.LSTM(6, 5, bias=False, bidirectional=True),
    nn.LSTM(6, 5, proj_size=3),
    nn.LSTM(6, 5, num_layers=2, bidirectional=True, proj_size=2),
    nn.LSTM(1, 1),
    nn.GRU(6, 12),
    nn.LSTMCell(6, 5),
    nn.GRUCell(6, 5, bias=False),
    nn.RNNCell(6, 5),
]


def shown(module: nn.Module) -> str:
    return repr(module).replace(" ", "")


def state_of(module: nn.Module, name: str = "") -> State:
    return {f"{name}.{key}" if name else key: tensor for key, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", ["", "rnn", "encoder.blocks.0.rnn"])
@pytest.mark.parametrize("module", MODULES, ids=shown)
def test_recognised_from_names_and_shapes(module: nn.Module, name: str) -> None:
    state = state_of(module, name) | {"head.weight": torch.zeros(3, 5), "head.bias": torch.zeros(3)}
    (layer,) = inventory(state)
    assert layer.name == name
    assert layer.settings == RecurrentSettings.of(module)
    assert layer.settings.dense_parameters == sum(p.numel() for p in module.parameters())
    assert sorted(tensor_names(layer)) == sorted(state_of(module, name))
    for direction in layer.directions.values():
        assert direction.ih.dtype == torch.float32


@pytest.mark.parametrize(
    ("module", "left_at_default"),
    [
        (nn.LSTM(6, 5, num_layers=2, batch_first=True, dropout=0.3), {"batch_first": False, "dropout": 0.0}),
        (nn.RNN(6, 5, nonlinearity="relu"), {"kind": Kind.RNN_TANH}),
    ],
    ids=shown,
)
def test_what_a_state_dict_does_not_tell(module: nn.Module, left_at_default: dict[str, object]) -> None:
    (layer,) = inventory(state_of(module))
    assert layer.settings == RecurrentSettings(**asdict(RecurrentSettings.of(module)) | left_at_default)
    (layer,) = inventory_of_model(module)
    assert layer.settings == RecurrentSettings.of(module)


def test_several_layers_come_in_order() -> None:
    model = nn.ModuleDict(
        {"a": nn.LSTM(3, 4), "b": nn.Linear(4, 4), "c": nn.ModuleList([nn.GRU(4, 2), nn.GRUCell(2, 2)])}
    )
    for found in (inventory(model.state_dict()), inventory_of_model(model)):
        assert [layer.name for layer in found] == ["a", "c.0", "c.1"]
        assert [layer.settings.kind for layer in found] == [Kind.LSTM, Kind.GRU, Kind.GRU]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_are_the_checkpoints(dtype: torch.dtype) -> None:
    model = nn.LSTM(6, 5).to(dtype)
    (layer,) = inventory(model.state_dict())
    direction = layer.directions["l0"]
    assert direction.ih.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(direction.ih.to(dtype), model.weight_ih_l0)


def test_a_layer_held_twice_is_one_layer() -> None:
    state = Twice().state_dict()
    (layer,) = inventory(state)
    assert layer.name == "first"
    assert names_of(layer, state) == ["first", "second"]
    copied = {name: tensor.clone() for name, tensor in state.items()}
    assert [layer.name for layer in inventory(copied)] == ["first", "second"]


def test_a_layer_that_shares_a_tensor_only_is_its_own() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(4, 4), "b": nn.LSTM(4, 4)})
    model["b"].weight_hh_l0 = model["a"].weight_hh_l0
    assert [layer.name for layer in inventory(model.state_dict())] == ["a", "b"]


@pytest.mark.parametrize(
    "other", ["my_weight_hh_l0", "rnn.weight_hh_l0_raw", "rnn.weight_hh_l0.original0", "weight_hhh"]
)
def test_names_that_only_look_alike_are_left_alone(other: str) -> None:
    state = state_of(nn.LSTM(6, 5), "lstm") | {other: torch.zeros(2, 2)}
    assert [layer.name for layer in inventory(state)] == ["lstm"]


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def instead(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    return lambda state: {**state, name: make(state[name])}


def with_one(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[3] = value
        return changed

    return change


TWO = nn.LSTM(6, 5, num_layers=2, bidirectional=True)

WRONG: dict[str, tuple[nn.Module, Callable[[State], State], list[str]]] = {
    **{
        f"{name} is missing": (TWO, without(f"rnn.{name}"), [f"model.pt lacks rnn.{name}", "saved whole?"])
        for name in TWO.state_dict()
    },
    "all hidden weights": (
        nn.GRU(6, 5),
        without("rnn.weight_hh_l0"),
        ["lacks rnn.weight_hh_l0, which layer rnn needs", "saved whole?"],
    ),
    "a projection": (nn.LSTM(6, 5, 2, proj_size=3), without("rnn.weight_hr_l1"), ["lacks rnn.weight_hr_l1"]),
    "nan": (
        nn.LSTM(6, 5),
        instead("rnn.weight_ih_l0", with_one(float("nan"))),
        ["rnn.weight_ih_l0 has 1 of 120 values that are NaN or infinite", "take an earlier checkpoint"],
    ),
    "infinite bias": (nn.LSTM(6, 5), instead("rnn.bias_hh_l0", with_one(float("inf"))), ["rnn.bias_hh_l0 has 1 of 20"]),
    "nan in half": (
        nn.LSTM(6, 5).half(),
        instead("rnn.weight_hh_l0", with_one(float("nan"))),
        ["rnn.weight_hh_l0 has 1 of 100"],
    ),
    "integers": (
        nn.LSTM(6, 5),
        instead("rnn.weight_ih_l0", lambda t: (t * 100).to(torch.int8)),
        ["rnn.weight_ih_l0 holds torch.int8", "expected floating-point", "before it is quantised"],
    ),
    "a flat matrix": (
        nn.LSTM(6, 5),
        instead("rnn.weight_ih_l0", Tensor.flatten),
        ["layer rnn has weights of shapes (120,) and (20, 5)", "expected two matrices"],
    ),
    "a flat projection": (
        nn.LSTM(6, 5, proj_size=3),
        instead("rnn.weight_hr_l0", Tensor.flatten),
        ["layer rnn has weights of shapes"],
    ),
    "another size": (
        nn.LSTM(6, 5, num_layers=2),
        instead("rnn.weight_ih_l1", lambda t: t[:, :-1]),
        ["rnn.weight_ih_l1 has shape (20, 4); expected (20, 5)"],
    ),
    "a short bias": (nn.GRU(6, 5), instead("rnn.bias_ih_l0", lambda t: t[1:]), ["shape (14,); expected (15,)"]),
    "no kind": (
        nn.LSTM(6, 5),
        lambda state: {name: torch.cat([t, t[:5]]) for name, t in state.items()},
        ["weight_hh_l0 of shape (25, 5)", "4, 3 or 1 times the hidden size", "--layers"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str) -> None:
    module, change, words = WRONG[case]
    with pytest.raises(CheckpointError) as caught:
        inventory(change(state_of(module, "rnn")), source="model.pt")
    message = str(caught.value)
    for word in words:
        assert word in message
    assert message.startswith("model.pt")


@pytest.mark.parametrize("name", ["bias_ih_l0", "bias_hh_l0"])
def test_half_of_the_biases_is_not_taken_for_none(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        inventory(without(name)(state_of(nn.LSTM(6, 5))))


def test_no_recurrent_layers() -> None:
    linear = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(
        CheckpointError, match=r"x\.pt has no recurrent layers: none of its 6 tensors \(0\.weight, .*\.\.\.\)"
    ):
        inventory(linear.state_dict(), source="x.pt")
    with pytest.raises(CheckpointError, match=r"holds no torch\.nn\.LSTM"):
        inventory_of_model(linear)


def test_a_model_with_broken_weights() -> None:
    model = tagger()
    with torch.no_grad():
        model.rnn.weight_hh_l0[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"The model: rnn.weight_hh_l0 has 1 of 256"):
        inventory_of_model(model)


def old_weight_norm(module: nn.Module, name: str) -> None:
    torch.nn.utils.weight_norm(module, name)


def old_spectral_norm(module: nn.Module, name: str) -> None:
    torch.nn.utils.spectral_norm(module, name)


def weight_drop(module: nn.Module, name: str) -> None:
    weight = module._parameters.pop(name)
    module.register_parameter(f"{name}_raw", weight)


CHANGED: dict[str, tuple[Callable[[nn.Module, str], object], list[str]]] = {
    "pruned": (
        lambda m, n: prune.l1_unstructured(m, n, amount=0.5),
        ["is pruned (weight_hh_l0_mask, weight_hh_l0_orig)", 'prune.remove(model.rnn, "weight_hh_l0")'],
    ),
    "weight norm": (old_weight_norm, ["under weight_norm", 'remove_weight_norm(model.rnn, "weight_hh_l0")']),
    "spectral norm": (old_spectral_norm, ["under spectral_norm", "remove_spectral_norm"]),
    "weight drop": (weight_drop, ["under weight drop (weight_hh_l0_raw)", "weight_hh_l0_raw)"]),
    "parametrised": (
        parametrizations.orthogonal,
        ["is parametrised (original)", 'remove_parametrizations(model.rnn, "weight_hh_l0")'],
    ),
    "new weight norm": (parametrizations.weight_norm, ["is parametrised (original0, original1)"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CHANGED)
def test_weights_computed_of_others_are_named_with_the_remedy(case: str) -> None:
    change, words = CHANGED[case]
    model = nn.ModuleDict({"rnn": nn.LSTM(6, 5)})
    change(model["rnn"], "weight_hh_l0")
    for look in (
        lambda: inventory(model.state_dict(), source="m.pt"),
        lambda: inventory_of_model(model, source="m.pt"),
    ):
        with pytest.raises(CheckpointError) as caught:
            look()
        message = str(caught.value)
        assert message.startswith("m.pt: rnn.weight_hh_l0 is ")
        for word in words:
            assert word in message
    # Beside an ordinary layer it is left, and told.
    model["other"] = nn.GRU(3, 2)
    told: dict[str, str] = {}
    (layer,) = inventory(model.state_dict(), on_left=told.__setitem__)
    assert layer.name == "other"
    assert list(told) == ["rnn"]
    assert words[0] in told["rnn"]


@pytest.mark.filterwarnings("ignore")
def test_the_remedies_are_remedies() -> None:
    remedies: list[tuple[Callable[[nn.Module, str], object], Callable[[nn.Module, str], object]]] = [
        (lambda m, n: prune.l1_unstructured(m, n, amount=0.5), prune.remove),
        (old_weight_norm, torch.nn.utils.remove_weight_norm),
        (old_spectral_norm, torch.nn.utils.remove_spectral_norm),
        (parametrizations.orthogonal, parametrize.remove_parametrizations),
    ]
    for change, remedy in remedies:
        model = nn.ModuleDict({"rnn": nn.LSTM(6, 5)})
        change(model["rnn"], "weight_hh_l0")
        remedy(model["rnn"], "weight_hh_l0")
        assert [layer.name for layer in inventory(model.state_dict())] == ["rnn"]


LEFT = {
    case: WRONG[case]
    for case in ("all hidden weights", "a projection", "integers", "a flat matrix", "another size", "no kind")
} | {
    "of the meta device": (
        nn.LSTM(6, 5),
        instead("rnn.weight_ih_l0", lambda t: t.to("meta")),
        ["without numbers (of the meta device)"],
    ),
    "sparse": (nn.LSTM(6, 5), instead("rnn.weight_ih_l0", Tensor.to_sparse), ["is sparse; expected dense"]),
    "eight bits": (
        nn.LSTM(6, 5),
        instead("rnn.weight_ih_l0", lambda t: t.to(torch.float8_e4m3fn)),
        ["torch.float8_e4m3fn", "before it is quantised"],
    ),
    "quantised": (
        nn.LSTM(6, 5),
        instead("rnn.weight_ih_l0", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
        ["torch.qint8"],
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LEFT)
def test_a_layer_that_cannot_be_is_left_beside_one_that_can(case: str) -> None:
    module, change, words = LEFT[case]
    broken = change(state_of(module, "rnn"))
    told: dict[str, str] = {}
    (layer,) = inventory({**broken, **state_of(nn.GRU(3, 2), "other")}, on_left=told.__setitem__)
    assert layer.name == "other"
    assert list(told) == ["rnn"]
    with pytest.raises(CheckpointError) as caught:
        inventory(broken, source="m.pt")
    assert words[-1] in told["rnn"]
    assert words[-1] in str(caught.value)


@pytest.mark.parametrize("case", ["nan", "infinite bias"])
def test_weights_that_are_not_finite_are_never_left(case: str) -> None:
    module, change, _ = WRONG[case]
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        inventory({**change(state_of(module, "rnn")), **state_of(nn.GRU(3, 2), "other")}, on_left=lambda *_: None)


def test_one_memory_is_told_from_another() -> None:
    a = torch.arange(12.0).reshape(3, 4)
    same = [(a, a), (a, a.view(3, 4)), (a, a.detach()), (a[0].expand(5, 4), a[0].expand(5, 4))]
    other = [
        (a, a.clone()),
        (a, a.view(4, 3)),
        (a, a.T),
        (a, a[:2]),
        (a, a.view(torch.int32)),
        (a[:1], a[:1].expand(3, 4)),
        (a.to("meta"), a.to("meta")),
        (a.to_sparse(), a.to_sparse()),
        (a, None),
        (None, None),
    ]
    assert all(same_memory(x, y) for x, y in same)
    assert not any(same_memory(x, y) for x, y in other)


def test_tied_layers_without_inputs_are_one() -> None:
    # Weights of no numbers have no place in memory; the others tell.
    empty = nn.LSTM(1, 3).state_dict() | {"weight_ih_l0": torch.empty(12, 0)}
    state = {f"{name}.{key}": value for name in ("a", "b") for key, value in empty.items()}
    (layer,) = inventory(state)
    assert names_of(layer, state) == ["a", "b"]
    apart = {key: value.clone() for key, value in state.items()}
    assert [layer.name for layer in inventory(apart)] == ["a", "b"]


def test_names_that_claim_layers_without_end() -> None:
    state = state_of(nn.LSTM(6, 5), "rnn")
    started = time.monotonic()
    for number in ("999999", "1"):
        with pytest.raises(CheckpointError, match=r"lacks rnn\.weight_ih_l1"):
            inventory({**state, f"rnn.weight_hh_l{number}": torch.zeros(20, 5)})
    assert len(inventory({**state, f"rnn.weight_hh_l{'9' * 5000}": torch.zeros(20, 5)})) == 1
    assert time.monotonic() - started < 1


def test_four_times_the_layers_take_no_sixteen_times_as_long() -> None:
    cell = nn.RNNCell(2, 2).state_dict()

    def seconds(layers: int) -> float:
        state = {f"{k}.{key}": value.clone() for k in range(layers) for key, value in cell.items()}
        started = time.process_time()
        assert len(inventory(state)) == layers
        return time.process_time() - started

    seconds(10)
    assert seconds(600) < 9 * seconds(150)


class Normed(nn.LSTMCell):
    """A cell of somebody's own, with the names of torch's."""

    def __init__(self) -> None:
        super().__init__(6, 5)
        self.norm = nn.LayerNorm(20)


def test_cells_that_hold_more_than_torchs_are_left() -> None:
    model = nn.ModuleDict({"cell": Normed(), "other": nn.GRUCell(5, 4)})
    told: dict[str, str] = {}
    (layer,) = inventory(model.state_dict(), on_left=told.__setitem__)
    assert layer.name == "other"
    assert "cell also holds cell.norm.weight, cell.norm.bias, which torch's cells do not" in told["cell"]
    del model["other"]
    with pytest.raises(CheckpointError, match="only a task shows what that computes"):
        inventory(model.state_dict())
