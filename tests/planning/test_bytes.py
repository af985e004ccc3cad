"""Budgets of bytes: held by what is stored, and never worse than rounding the dense weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from crossing import crossed, some
from safetensors.torch import load_file
from small import Outcome, Tagger, clips, save_tagger, tagger, write_task
from torch import nn

import htcompress
from htcompress.errors import UnreachableError
from htcompress.forms.dense import DenseMatrix
from htcompress.forms.rounding import rounded_plainly
from htcompress.matrix.weighted import WeightedMatrix
from htcompress.model.inventory import inventory_of_model
from htcompress.model.statistics import collect
from htcompress.observer import Observer
from htcompress.planning.direction import DirectionProblem
from htcompress.planning.plan import plan_model
from htcompress.report import read_report
from htcompress.request import FineTuning, Goal, Request
from htcompress.vocabulary import INTEGER_BITS, LayoutKind, Scope

MODELS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: nn.LSTM(20, 10, batch_first=True),
    "GRU": lambda: nn.GRU(20, 8, bidirectional=True, batch_first=True),
    "projection": lambda: nn.LSTM(20, 12, proj_size=5, batch_first=True),
    "RNN without biases": lambda: nn.RNN(20, 12, bias=False, batch_first=True),
    "half precision": lambda: nn.LSTM(20, 10, batch_first=True).to(torch.bfloat16),
    "double precision": lambda: nn.GRU(20, 12, batch_first=True).double(),
}


def batches(model: nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(20, 20, generator=generator) * torch.logspace(0, -1, 20)
    dtype = next(model.parameters()).dtype
    return [(torch.randn(8, 7, 20, generator=generator) @ mixing + 0.3).to(dtype) for _ in range(3)]


def reached(model: nn.Module, x: list[torch.Tensor], scope: Scope, budget: int) -> tuple[htcompress.Compressed, int]:
    """The result at a budget of bytes, or at the least that there is."""
    try:
        return htcompress.compress(model, budget=f"{budget}B", calibration=x, scope=scope), budget
    except UnreachableError as error:
        least, said = error.least, str(error)
    assert f"budget of {budget} bytes" in said
    assert least is not None
    assert budget < least
    return htcompress.compress(model, budget=f"{least} B", calibration=x, scope=scope), least


@pytest.mark.parametrize(
    ("name", "part", "scope"),
    crossed(list(product(MODELS, [0.03, 0.1, 0.3, 2.0], Scope)), 1),
)
def test_what_is_stored_is_what_was_asked_for(name: str, part: float, scope: Scope, tmp_path: Path) -> None:
    model = MODELS[name]()
    x = batches(model)
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    budget = int(part * dense)
    result, budget = reached(model, x, scope, budget)
    totals = result.report.totals
    assert totals.bytes_after <= budget
    htcompress.save(result, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in stored.values()) == totals.bytes_after
    back = htcompress.load(tmp_path / "out", MODELS[name]()).eval()
    assert result.model is not None
    assert torch.equal(back(x[0])[0], result.model(x[0])[0])
    if part > 1:
        # But that two biases of an LSTM or an RNN are one.
        assert torch.allclose(result.model(x[0])[0], model.eval()(x[0])[0], atol=1e-2 if "half" in name else 1e-5)


@pytest.mark.parametrize(
    ("name", "bits"), crossed(list(product(["LSTM", "GRU", "RNN without biases"], INTEGER_BITS)), 1)
)
def test_never_worse_than_rounding_all_at_equal_bytes(name: str, bits: int) -> None:
    model = MODELS[name]()
    layers, seen = inventory_of_model(model), collect(model, [(x,) for x in batches(model)])
    total, size = 0.0, 0
    for layer in layers:
        for direction, dense in layer.directions.items():
            problem = DirectionProblem(
                dense, seen[layer.name][direction], dense.parameters, Scope.SEPARATE, LayoutKind.AUTO
            )
            for part in problem.recipes[-1].parts:
                target: WeightedMatrix = part.search.target
                made = rounded_plainly(DenseMatrix(target.matrix.dense().double()), target, bits)
                total += part.weight * made.error
                size += made.bytes
            size += 2 * dense.biases
    plan = plan_model(layers, Goal(bytes=size), seen)
    chosen = [m for layer in plan.layers for d in layer.directions.values() for m in d.matrices]
    assert sum(m.choice.error for m in chosen) <= total * (1 + 1e-9)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@pytest.mark.parametrize("part", some([3, 5, 8, 12], 8))
def test_all_layouts_together_lose_no_more_than_svds_alone(name: str, part: int) -> None:
    """But for the luck of rounding; folded candidates leave truncated SVDs on the ladder."""
    kind = {"LSTM": nn.LSTM, "GRU": nn.GRU}[name]
    torch.manual_seed(part)
    model = kind(20, 32, batch_first=True)
    layers, seen = inventory_of_model(model), collect(model, [(x,) for x in batches(model)])
    size = sum(4 * p.numel() for p in model.parameters()) // part
    lost = {}
    for layout in (LayoutKind.AUTO, LayoutKind.SVD):
        plan = plan_model(layers, Goal(bytes=size, layout=layout), seen)
        lost[layout] = sum(m.choice.error for x in plan.layers for d in x.directions.values() for m in d.matrices)
    assert lost[LayoutKind.AUTO] <= 1.1 * lost[LayoutKind.SVD]


@pytest.mark.parametrize("bits", some([16, *INTEGER_BITS], 5))
def test_one_number_of_bits_for_all(bits: int) -> None:
    model = MODELS["GRU"]()
    numbers = sum(p.numel() for p in model.parameters())
    result = htcompress.compress(model, budget=f"{numbers // 2}B", calibration=batches(model), bits=bits)
    found = {(m.codec or {})["bits"] for layer in result.report.layers for m in layer.matrices if not m.kept_dense}
    assert found == {bits}


@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_in_few_bits(bits: int) -> None:
    model = MODELS["LSTM"]()
    x, goal = batches(model), {"budget": 800, "layout": "svd"}
    wide = htcompress.compress(model, calibration=x, **goal)  # type: ignore[arg-type]
    narrow = htcompress.compress(model, calibration=x, bits=bits, **goal)  # type: ignore[arg-type]
    assert narrow.report.totals.parameters_after == wide.report.totals.parameters_after
    assert narrow.report.totals.bytes_after < wide.report.totals.bytes_after / (24 / bits)
    errors = [[m.error["outputs"] or 0.0 for layer in r.report.layers for m in layer.matrices] for r in (wide, narrow)]
    # No more is lost than of a normal variable (Max 1960).
    for before, after in zip(*errors, strict=True):
        assert before < after <= (before**2 + {8: 1.04e-4, 4: 0.0115}[bits]) ** 0.5


def test_fine_tuning_ends_on_the_grid(tmp_path: Path, htc: Callable[..., Outcome]) -> None:
    save_tagger(tmp_path / "model.pt")
    write_task(tmp_path / "task.py")
    assert htc("convert", "model.pt", "--budget", "700B", "--task", "task.py", "--steps", "30", "-o", "out").code == 0
    report = read_report(tmp_path / "out")
    assert report.request["bytes"] == 700
    request = Request.of_report(report.request)
    assert request.goal == Goal(bytes=700)
    assert "--budget 700B" in request.command("model.pt")
    assert report.totals.bytes_after <= 700
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert any(t.dtype is torch.uint8 for t in stored.values())
    before = htc("evaluate", "out", "--task", "task.py").out
    assert before.split()[:2] == ["accuracy", f"{report.quality.finetuned:.6g}"]
    assert htc("finetune", "out", "--task", "task.py", "--steps", "5").code == 0
    assert read_report(tmp_path / "out").totals.bytes_after == report.totals.bytes_after
    assert htc("export", "out", "dense.pt", "--to", "dense").code == 0
    dense = Tagger().eval()
    dense.load_state_dict(torch.load(tmp_path / "dense.pt"), strict=True)
    assert torch.allclose(dense(clips()), htcompress.load(tmp_path / "out", Tagger()).eval()(clips()), atol=1e-5)
    assert htc("export", "out", "model.onnx", "--to", "onnx", "--task", "task.py").code == 0


def test_fine_tuning_knows_the_rounding() -> None:
    """What is trained is never what the model computes with, but for its rounding: the loss falls on stored numbers."""
    model = tagger()
    x = [(clips(),)] * 6
    losses: list[float] = []

    class Watched(Observer):
        def advance(self, done: int, detail: str = "") -> None:
            if "loss" in detail:
                losses.append(float(detail.split()[1].rstrip(",")))

    result = htcompress.compress(
        model, budget="400B", bits=3, calibration=x, training=x, finetuning=FineTuning(60), observer=Watched()
    )
    assert min(losses) < 0.8 * losses[0]
    assert result.report.totals.bytes_after <= 400
