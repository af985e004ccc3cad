"""The ways to read the inputs: one function, whichever is chosen; and the cost model chooses as a clock would."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import pytest
import torch
from oracles import distance, random_ht
from torch import Tensor, nn

from htcompress.errors import RequestError
from htcompress.forms import DenseMatrix
from htcompress.forms.ht import HTMatrix
from htcompress.matrix import Layout
from htcompress.matrix.network import Network
from htcompress.nn import HTGRU, HTLSTM, HTRNN, HTRecurrent
from htcompress.nn.execution import Execution, execution_costs, execution_for
from htcompress.nn.gates import GateMatrices
from htcompress.nn.recurrence import recurrence_of
from htcompress.nn.settings import RecurrentSettings
from htcompress.vocabulary import Kind

LAYOUTS = {
    "paired": Layout.paired((4, 3, 2), (3, 2, 4)),
    "padded": Layout.paired((5, 5), (5, 5), rows=24, cols=23),
    "one leaf": Layout.paired((24,), (24,)),
    "mixed": Layout(24, 24, (4, 1, 6), (1, 24, 1), Layout.paired((1, 1, 1), (1, 1, 1)).tree),
    "split": Layout.split((4, 6), (4, 6)),
}


def matrix_of(name: str, rank: int = 3) -> HTMatrix:
    layout = LAYOUTS[name]
    ranks = [rank] * (len(layout.tree.nodes) - 1) + [1]
    return HTMatrix(layout, random_ht(layout.tree, layout.shape, ranks))


def form_of(matrix: HTMatrix) -> tuple[Network, int | None]:
    """What the cost model looks at."""
    return matrix.network, matrix.rank


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_contraction_is_the_product(name: str) -> None:
    matrix = matrix_of(name)
    x = torch.randn(5, 2, matrix.layout.cols, dtype=torch.float64)
    assert distance(matrix.network.times(matrix.operands(), x), x @ matrix.dense().T) < 1e-12


CASES: list[tuple[type[HTRecurrent], type[nn.Module], Kind]] = [
    (HTLSTM, nn.LSTM, Kind.LSTM),
    (HTGRU, nn.GRU, Kind.GRU),
    (HTRNN, nn.RNN, Kind.RNN_TANH),
]


def drop_in(kind: Kind, form: type[HTRecurrent], layout: str, directions: int, *, scaled: bool = False) -> HTRecurrent:
    """A layer of 24 rows with 23 or 24 inputs."""
    torch.manual_seed(0)
    hidden = 24 // recurrence_of(kind).gates
    matrix = matrix_of(layout)
    settings = RecurrentSettings(kind, matrix.layout.cols, hidden, bidirectional=directions == 2)
    hh = HTMatrix.from_dense(0.3 * torch.randn(24, hidden).double(), Layout.order_two(24, hidden), max_rank=1)
    bias_hn = torch.randn(hidden, dtype=torch.float64) if kind is Kind.GRU else None
    exponents = torch.arange(matrix.layout.cols) % 3 - 1 if scaled else None
    bias = torch.randn(24, dtype=torch.float64)
    gates = GateMatrices(ih=matrix, hh=hh, bias=bias, bias_hn=bias_hn, input_exponents=exponents)
    return form.from_matrices(settings, [gates] * directions)


def run(model: HTRecurrent, x: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    model.zero_grad()
    out, last = model(x)
    data = out.data if isinstance(out, nn.utils.rnn.PackedSequence) else out
    data.square().sum().backward()
    state = last[0] if isinstance(last, tuple) else last
    return data.detach(), state.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layout", ["padded", "split"])
@pytest.mark.parametrize(("form", "dense", "kind"), CASES, ids=[kind.value for _, _, kind in CASES])
def test_every_plan_gives_the_same_outputs_states_and_gradients(
    form: type[HTRecurrent],
    dense: type[nn.Module],
    kind: Kind,
    layout: str,
    directions: int,
    packed: bool,
    scaled: bool,
) -> None:
    model = drop_in(kind, form, layout, directions, scaled=scaled)
    x: Any = torch.randn(7, 3, model.settings.input_size, dtype=torch.float64)
    if packed:
        x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([7, 4, 2]))
    results = {}
    for plan in execution_costs(*form_of(matrix_of(layout)), 1, False):
        model.use_execution(plan)
        results[plan] = run(model, x)
        with torch.no_grad():  # where what is written out is kept
            again = model(x)[0]
        data = again.data if packed else again
        assert distance(data, results[plan][0]) < 1e-12
    (out, state, gradients), *others = results.values()
    assert len(others) == 1
    for other_out, other_state, other_gradients in others:
        assert distance(other_out, out) < 1e-10
        assert distance(other_state, state) < 1e-10
        assert len(other_gradients) == len(gradients) > 0
        for a, b in zip(other_gradients, gradients, strict=True):
            assert distance(a, b) < 1e-9


def test_a_plan_that_a_layout_does_not_admit_is_named() -> None:
    model = drop_in(Kind.LSTM, HTLSTM, "padded", 1)
    with pytest.raises(
        RequestError, match="paired layout cannot be read by 'project'; choose among auto, contract, mater"
    ):
        model.use_execution("project")
    with pytest.raises(RequestError, match="split layout cannot be read by 'contract'"):
        drop_in(Kind.LSTM, HTLSTM, "split", 1).use_execution("contract")


def test_a_changed_plan_is_followed_at_once() -> None:
    model = drop_in(Kind.LSTM, HTLSTM, "split", 1)
    (gates,) = model.directions().values()
    with torch.no_grad():
        model.use_execution(Execution.PROJECT)
        assert gates.resolve(4).reduce is not None
        model.use_execution(Execution.MATERIALISE)
        assert gates.resolve(4).reduce is None


RANKED = {
    "wide split": (Layout.split((32, 32), (120, 160)), 12, 96),
    "wide paired": (Layout.paired((4, 8, 16), (24, 40, 40)), 3, 6),
    "narrow paired": (Layout.paired((8, 8, 8), (4, 4, 4)), 30, 2000),
}


@pytest.mark.parametrize("name", RANKED)
def test_the_cost_model_ranks_plans_as_a_clock_does(name: str) -> None:
    """Where it says that one plan costs three times the other, the other is faster; medians of interleaved rounds."""
    layout, rank, vectors = RANKED[name]
    sizes = layout.shape
    ranks = tuple(min(rank, sizes[n.leaves[0]]) if n.is_leaf else rank for n in layout.tree.nodes[:-1])
    matrix = HTMatrix(layout, random_ht(layout.tree, sizes, (*ranks, 1)).map(lambda core: core.float()))
    settings = RecurrentSettings(Kind.RNN_TANH, layout.cols, layout.rows)
    hh = HTMatrix.from_dense(torch.ones(layout.rows, layout.rows), Layout.order_two(layout.rows, layout.rows), rtol=0.1)
    model = HTRNN.from_matrices(settings, [GateMatrices(ih=matrix, hh=hh, bias=torch.zeros(layout.rows))])
    (gates,) = model.directions().values()
    x = torch.randn(vectors, layout.cols)
    costs = execution_costs(*form_of(matrix), vectors, False)
    seconds: dict[Execution, list[float]] = {plan: [] for plan in costs}
    with torch.no_grad():
        for turn in range(8):
            for plan in costs:
                model.use_execution(plan)
                w = gates.resolve(vectors)  # written out before the clock starts, as it is kept
                began = time.perf_counter()
                features = w.features(x)
                _ = features if w.ih is None else nn.functional.linear(features, w.ih)
                if turn:
                    seconds[plan].append(time.perf_counter() - began)
    cheap, dear = sorted(costs, key=lambda plan: costs[plan])
    assert execution_for(*form_of(matrix), vectors, learning=False) is cheap
    assert costs[dear] > 3 * costs[cheap], "the case should be clear"
    assert median(seconds[cheap]) < median(seconds[dear])


def test_a_dense_projection_beside_a_joint_matrix_whose_inputs_are_scaled() -> None:
    """Its one parameter is passed on, where two factors would be without exponents."""
    generator = torch.Generator().manual_seed(0)
    joint = HTMatrix.from_dense(torch.randn(20, 9, generator=generator), Layout.order_two(20, 9))
    hr = DenseMatrix(torch.randn(3, 5, generator=generator))
    exponents = torch.tensor([3, -2, 0, 1, 0, 0])
    settings = RecurrentSettings(Kind.LSTM, 6, 5, proj_size=3, bias=False)
    model = HTLSTM.from_matrices(settings, [GateMatrices(joint=joint, hr=hr, input_exponents=exponents)])
    x = torch.randn(7, 4, 6, generator=generator)
    outputs = []
    for plan in ("project", "materialise"):
        model.use_execution(plan)
        with torch.no_grad():
            outputs.append(model(x)[0])
    assert distance(outputs[0], outputs[1]) < 1e-6
