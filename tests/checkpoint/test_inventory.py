"""Recurrent layers are recognised from names and shapes alone, and what is wrong with them is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from small import Twice, tagger
from torch import Tensor, nn

from htcompress.checkpoint.inventory import inventory, inventory_of_model, names_of, tensor_names
from htcompress.errors import CheckpointError
from htcompress.nn.settings import Kind, RecurrentSettings

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
    for slot in layer.slots.values():
        assert slot.ih.dtype == torch.float32


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
    slot = layer.slots["l0"]
    assert slot.ih.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(slot.ih.to(dtype), model.weight_ih_l0)


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
