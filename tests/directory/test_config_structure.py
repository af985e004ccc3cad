"""What config.json announces is held against what the tensors are, before anything is built."""

from __future__ import annotations

import copy
import json
import random
import time
import tracemalloc
from collections.abc import Callable
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from crossing import crossed, some
from hypothesis import given, settings
from hypothesis import strategies as st
from small import tagger
from torch import Tensor, nn

import htcompress
from htcompress.directory.read import config_of
from htcompress.directory.structure import check_config
from htcompress.errors import CheckpointError, UnreachableError
from htcompress.forms.ht import HTMatrix, stored_shapes
from htcompress.matrix import Layout
from htcompress.nn.recurrent import HTRecurrent
from htcompress.nn.weights import Weight
from htcompress.tensor import DimensionTree, HTTensor

Made = tuple[dict[str, Any], dict[str, Tensor]]

MODULES: list[nn.Module] = [
    nn.LSTM(12, 8, num_layers=2, bidirectional=True),
    nn.GRU(24, 16),
    nn.GRU(24, 16, bias=False),
    nn.RNN(24, 16),
    nn.LSTM(24, 16, proj_size=5),
    nn.LSTMCell(24, 16),
    nn.GRUCell(24, 16),
]


def made(model: nn.Module, budget: int, **how: Any) -> Made:
    """The config.json and the tensors of a compressed model, as they stand in a directory."""
    compact = htcompress.compress(model, budget=budget, **how).model
    modules = {name: module for name, module in compact.named_modules() if isinstance(module, HTRecurrent)}
    return json.loads(json.dumps(config_of(modules))), dict(compact.state_dict())


@pytest.mark.parametrize(
    ("module", "scope"),
    crossed(list(product(MODULES, ["auto", "integrated", "separate", "input"])), 1),
    ids=lambda m: repr(m).replace(" ", ""),
)
def test_what_is_written_is_right(module: nn.Module, scope: str) -> None:
    for share in (0.2, 0.6):
        budget = int(share * sum(p.numel() for p in module.parameters()))
        try:
            config, tensors = made(module, budget, scope=scope)
        except UnreachableError:
            continue
        check_config(config, "config.json", tensors)
        check_config(config, "config.json")


@pytest.mark.parametrize("form", some(["tt", "tr", "bt"], "tt"))
def test_the_formats_to_compare_with_are_right(form: str) -> None:
    config, tensors = made(nn.LSTM(32, 24), 1500, format=form)
    check_config(config, "config.json", tensors)


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(2, 6))
def test_the_cores_are_those_that_the_module_stores(rng: random.Random, order: int) -> None:
    def nested(leaves: list[int]) -> Any:
        if len(leaves) == 1:
            return leaves[0]
        cut = rng.randrange(1, len(leaves))
        return nested(leaves[:cut]), nested(leaves[cut:])

    tree = DimensionTree(nested(rng.sample(range(order), order)))
    modes = [rng.randrange(1, 5) for _ in range(order)]
    ranks: list[int] = []
    for node in tree.nodes:
        size = modes[node.leaves[0]] if node.children is None else prod(ranks[child] for child in node.children)
        ranks.append(1 if node.parent is None else rng.choice([size, rng.randint(1, size)]))
    layout = Layout(prod(modes), 1, tuple(modes), (1,) * order, tree)
    module = Weight(HTMatrix(layout, HTTensor.zeros(tree, modes, ranks)))
    expected = {name: tuple(core.shape) for name, core in module.state_dict().items()}
    assert stored_shapes(layout, ranks) == expected


@pytest.fixture(scope="module")
def whole() -> Made:
    torch.manual_seed(0)
    model = tagger()
    with torch.no_grad():
        model.rnn.weight_ih_l0.copy_(torch.kron(torch.randn(4, 4), torch.randn(8, 6)))
    return made(model, 150)


def layer_of(config: dict[str, Any]) -> dict[str, Any]:
    return config["layers"]["rnn"]


def matrix_of(config: dict[str, Any]) -> dict[str, Any]:
    """A matrix in HT form with three leaves or more."""
    directions = layer_of(config)["weights"].values()
    matrices = [m for direction in directions for m in direction.values() if isinstance(m, dict) and m["form"] == "ht"]
    return next(m for m in matrices if len(m["ranks"]) > 3)


def test_there_is_such_a_matrix(whole: Made) -> None:
    matrix_of(whole[0])
    check_config(whole[0], "config.json", whole[1])


def test_keys_to_come_are_passed_over(whole: Made) -> None:
    config, tensors = copy.deepcopy(whole)
    head = next(name for name in tensors if name.startswith("head"))
    config |= {"aliases": {"tied.weight": head}, "extra": {"bn._extra_state": {"dict": [["steps", 3]]}}, "made_by": "x"}
    units = layer_of(config)["settings"]["hidden_size"]
    layer_of(config).update(also=["second"], units={"l0": [*range(units)][::-1]}, assumed=["batch_first"], later={})
    check_config(config, "config.json", tensors)
    direction = next(iter(layer_of(config)["weights"]))
    layer_of(config)["weights"][direction]["order"] = 2
    with pytest.raises(CheckpointError, match="order of shape"):
        check_config(config, "config.json", tensors)
    tensors[f"rnn.gates.{direction}.order"] = torch.zeros(2, dtype=torch.int32)
    check_config(config, "config.json", tensors)
    layer_of(config)["weights"][direction]["input_exponents"] = True
    with pytest.raises(CheckpointError, match="input_exponents of shape"):
        check_config(config, "config.json", tensors)
    inputs = layer_of(config)["settings"]["input_size"]
    tensors[f"rnn.gates.{direction}.input_exponents"] = torch.zeros(inputs)
    with pytest.raises(CheckpointError, match="input_exponents as bytes with a sign"):
        check_config(config, "config.json", tensors)
    tensors[f"rnn.gates.{direction}.input_exponents"] = torch.zeros(inputs, dtype=torch.int8)
    check_config(config, "config.json", tensors)


def setting(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: layer_of(config)["settings"].__setitem__(key, value)


def folding(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: matrix_of(config)["layout"].__setitem__(key, value)


def part(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: matrix_of(config).__setitem__(key, value)


def ordered(units: int) -> dict[str, Any]:
    """A layer of so many units, in little: an RNN whose matrices are of rank one, with an order."""

    def matrix(cols: int) -> dict[str, Any]:
        layout = {"rows": units, "cols": cols, "row_modes": [units, 1], "col_modes": [1, cols], "tree": [0, 1]}
        return {"form": "ht", "layout": layout, "ranks": [1, 1, 1]}

    direction = {"ih": matrix(1), "hh": matrix(units), "biases": [], "order": 7}
    settings = {"kind": "rnn_tanh", "input_size": 1, "hidden_size": units, "bias": False}
    return {"settings": settings, "weights": {"l0": direction}}


def deep(times: int) -> Any:
    found: Any = 0
    for _ in range(times):
        found = [found, 1]
    return found


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "layers a list": (lambda c: c.__setitem__("layers", [1]), "does not fit: layers: expected object, got array"),
    "no layers": (lambda c: c.pop("layers"), "does not fit: layers: expected object, got null"),
    "a layer a number": (
        lambda c: c["layers"].__setitem__("rnn", 3),
        "layer 'rnn' does not fit: expected object, got int",
    ),
    "no settings": (lambda c: layer_of(c).pop("settings"), "it lacks settings"),
    "no kind": (lambda c: layer_of(c)["settings"].pop("kind"), "settings: it lacks kind"),
    "another kind": (setting("kind", "transformer"), "settings.kind: invalid enum value 'transformer'"),
    "a list for a kind": (setting("kind", ["lstm"]), "settings.kind: expected str"),
    "an unknown setting": (setting("colour", 1), "unknown setting 'colour'"),
    "negative units": (setting("hidden_size", -4), "hidden_size -4; expected a whole number"),
    "huge units": (setting("hidden_size", 10**15), "hidden_size 1000000000000000"),
    "huge inputs": (setting("input_size", 1 << 23), "expected"),
    "units past all measure": (setting("hidden_size", 10**400), "hidden_size a huge number"),
    "half a unit": (setting("hidden_size", 8.5), "settings.hidden_size: expected int, got float"),
    "a whole float": (setting("hidden_size", 8.0), "settings.hidden_size: expected int, got float"),
    "true for units": (setting("hidden_size", True), "settings.hidden_size: expected int, got bool"),
    "a million layers": (setting("num_layers", 1_000_000), "num_layers 1000000"),
    "ten thousand layers": (setting("num_layers", 10_000), "has weights for"),
    "no layers at all": (setting("num_layers", 0), "num_layers 0"),
    "a projection": (setting("proj_size", 4), "expected joint, hr"),
    "dropout": (setting("dropout", float("nan")), "dropout NaN"),
    "bias a text": (setting("bias", "yes"), "settings.bias: expected bool, got str"),
    "no bias": (setting("bias", False), "expected 32 x 32"),
    "directions": (lambda c: layer_of(c)["weights"].clear(), "has weights for nothing"),
    "another direction": (lambda c: layer_of(c)["weights"].update(l7={"biases": []}), "in that order"),
    "no biases": (lambda c: [s.pop("biases") for s in layer_of(c)["weights"].values()], "it lacks biases"),
    "biases twice": (
        lambda c: [s.update(biases=["bias", "bias"]) for s in layer_of(c)["weights"].values()],
        "has the biases",
    ),
    "no matrices": (
        lambda c: [[s.pop(k) for k in ("ih", "hh", "joint") if k in s] for s in layer_of(c)["weights"].values()],
        "has the matrices none",
    ),
    "both kinds": (
        lambda c: [s.update(joint=matrix_of(c), ih=matrix_of(c)) for s in layer_of(c)["weights"].values()],
        "has the matrices",
    ),
    "an unknown form": (part("form", "wavelets"), 'in the form "wavelets"'),
    "a list for a form": (part("form", ["ht"]), ".form: expected str"),
    "rows": (folding("rows", 7), "as 7 x"),
    "rows a float": (folding("rows", 32.0), "layout.rows: expected int, got float"),
    "negative modes": (folding("row_modes", [-4, -8, 1]), "layout.row_modes[0]: expected int >= 1"),
    "zero modes": (folding("col_modes", [0, 0, 0]), "layout.col_modes[0]: expected int >= 1"),
    "huge modes": (folding("row_modes", [1 << 27, 1 << 27, 1]), "which hold"),
    "small modes": (folding("row_modes", [1, 1, 1]), "which hold 1"),
    "many modes": (folding("row_modes", [1] * 1000), "layout.row_modes: expected array of length <= 64"),
    "modes a text": (folding("row_modes", "4 8"), "layout.row_modes: expected array, got str"),
    "a tree with itself twice": (folding("tree", [[0, 1], [0, 2]]), "over the leaves"),
    "a tree without a leaf": (folding("tree", [0, 5]), "over the leaves"),
    "a tree of three": (folding("tree", [0, 1, 2]), "in the tree"),
    "a tree of texts": (folding("tree", ["0", "1"]), "in the tree"),
    "a tree of truth": (folding("tree", [False, True]), "in the tree"),
    "a deep tree": (folding("tree", deep(500)), "more than 64 leaves"),
    "a bottomless tree": (folding("tree", deep(100_000)), "more than 64 leaves"),
    "an empty tree": (folding("tree", []), "in the tree"),
    "no tree": (folding("tree", None), "in the tree"),
    "a negative rank": (lambda c: matrix_of(c)["ranks"].__setitem__(0, -1), "ranks[0]: expected int >= 1"),
    "a huge rank": (lambda c: matrix_of(c)["ranks"].__setitem__(0, 10**9), "where at most"),
    "a rank too large by one": (
        lambda c: matrix_of(c)["ranks"].__setitem__(0, max(matrix_of(c)["layout"]["row_modes"]) * 64 + 1),
        "where at most",
    ),
    "a rank too few": (lambda c: matrix_of(c)["ranks"].pop(), "one for each of its"),
    "a root of two": (lambda c: matrix_of(c)["ranks"].__setitem__(-1, 2), "the root's 1"),
    "ranks an object": (part("ranks", {"0": 1}), ".ranks: expected array"),
    "also a number": (lambda c: layer_of(c).update(also=3), "also: expected array, got int"),
    "units a number": (lambda c: layer_of(c).update(units={"l0": 3}), "expected array, got int"),
    "units repeated": (
        lambda c: layer_of(c).update(units={"l0": [0] * layer_of(c)["settings"]["hidden_size"]}),
        "missing or repeated",
    ),
    "an order without end": (
        lambda c: [s.update(order=10**12) for s in layer_of(c)["weights"].values()],
        ".order: expected int <=",
    ),
    "an order of many units": (
        lambda c: c.update(layers={"rnn": ordered(1 << 17)}),
        "an order of 131072 units in l0; expected 65536 at most",
    ),
    "an alias of nothing": (lambda c: c.update(aliases={"a": "b"}), "has the alias 'a' of 'b'"),
    "an alias of itself": (lambda c: c.update(aliases={"a": "a"}), "has the alias"),
    "an alias of a number": (lambda c: c.update(aliases={"a": 1}), "expected str, got int"),
    "bottomless extra state": (lambda c: c.update(extra={"a": deep(100_000)}), "nested deeper"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told(whole: Made, case: str) -> None:
    config, tensors = copy.deepcopy(whole)
    change, words = WRONG[case]
    change(config)
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        check_config(config, "out/config.json", tensors)
    assert time.monotonic() - started < 2
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith("out/config.json")
    assert words in message
    assert message.endswith("Convert the model again.")
    assert len(message) < 600


@pytest.mark.parametrize("value", [None, 3, [], "text", True])
def test_no_object_at_all(value: Any) -> None:
    with pytest.raises(CheckpointError, match="expected an object"):
        check_config(value, "config.json")


CORES: dict[str, tuple[Callable[[dict[str, Tensor], str], object], str]] = {
    "missing": (lambda t, core: t.pop(core), "which model.safetensors lacks"),
    "larger": (lambda t, core: t.__setitem__(core, t[core].repeat_interleave(2, 0)), "model.safetensors has"),
    "flat": (lambda t, core: t.__setitem__(core, t[core].flatten()), "model.safetensors has"),
    "not a number": (lambda t, core: t.__setitem__(core, t[core] * float("nan")), "that are NaN or infinite"),
    "infinite": (lambda t, core: t.__setitem__(core, t[core] + float("inf")), "that are NaN or infinite"),
    "surplus": (lambda t, core: t.__setitem__(f"{core}_1", t[core]), "has no place for"),
    "of another direction": (
        lambda t, core: t.__setitem__("rnn.gates.l9.bias", t[core]),
        "has no place for rnn.gates.l9.bias",
    ),
    "dense beside": (
        lambda t, core: t.__setitem__("rnn.weight_ih_l0", t[core]),
        "has no place for rnn.weight_ih_l0",
    ),
}


@pytest.mark.parametrize("case", CORES)
def test_cores_that_do_not_fit_are_told(whole: Made, case: str) -> None:
    config, tensors = whole[0], dict(whole[1])
    change, words = CORES[case]
    change(tensors, next(name for name, core in tensors.items() if "gates." in name and core.ndim > 1))
    check_config(config, "config.json")
    with pytest.raises(CheckpointError, match="layer 'rnn'") as caught:
        check_config(config, "config.json", tensors)
    assert words in str(caught.value)


def test_a_directory_as_it_is_written(whole: Made, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    htcompress.save(htcompress.compress(nn.LSTM(32, 24, num_layers=2), budget=2000), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    check_config(config, "config.json", load_file(tmp_path / "out" / "model.safetensors"))
