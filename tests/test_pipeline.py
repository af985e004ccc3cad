"""From a trained model to a compact one: what is changed, counted, measured and kept."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import distance
from safetensors.torch import load_file, save_file, save_model
from small import INPUTS, Tagger, Twice, clips, equal, save_tagger, tagger, write_task
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import htcompress
from htcompress import FineTuning, Goal
from htcompress.checkpoint.directory import load, read_config, read_tensors
from htcompress.errors import CheckpointError, HTCompressError, RequestError, TaskError, UnreachableError
from htcompress.finetuning.distill import distill
from htcompress.matrix import LayoutKind
from htcompress.nn import HTRecurrent
from htcompress.observer import Observer
from htcompress.pipeline import to_device
from htcompress.report import read_report

SAMPLES = Path(__file__).parent.parent / "sample_models"
SVD = Goal(budget=400, layout=LayoutKind.SVD)
"""A goal that is planned fast; what is tested here does not depend on the layout."""


class Listener(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.messages: list[str] = []

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append(name)

    def message(self, text: str) -> None:
        self.messages.append(text)


def batches(count: int = 6, seed: int = 11) -> list[Tensor]:
    return [clips(seed + index, batch=8) for index in range(count)]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_tagger(tmp_path / "model.pt")


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_task(tmp_path / "task.py")


@pytest.fixture
def written(tmp_path: Path, checkpoint: Path) -> Path:
    """A checkpoint converted without a task."""
    htcompress.save(htcompress.convert(checkpoint, goal=SVD), tmp_path / "out")
    return tmp_path / "out"


# ---- compress -----------------------------------------------------------------------------------------------


def test_the_callers_things_are_not_touched() -> None:
    model = tagger()
    model.train()
    model.head.eval()
    model.head.weight.requires_grad_(False)
    state, modes = copy.deepcopy(model.state_dict()), {name: m.training for name, m in model.named_modules()}
    random = torch.random.get_rng_state()
    made = htcompress.compress(
        model,
        budget=400,
        layout="svd",
        calibration=batches(),
        training=batches(),
        evaluate=lambda m: m(clips()).mean(),
        finetuning=FineTuning(steps=5),
    )
    assert equal(model.state_dict(), state)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False, True]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert isinstance(made.model, Tagger)
    assert not any(m.training for m in made.model.modules())
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in made.model.parameters()}


def test_one_seed_one_result() -> None:
    def run(seed: int) -> dict[str, Tensor]:
        options = FineTuning(steps=6, seed=seed)
        data = {"calibration": batches(), "training": batches(), "finetuning": options}
        return htcompress.compress(tagger(), budget=300, layout="svd", seed=seed, **data).tensors

    assert equal(run(3), run(3))
    assert not equal(run(3), run(4))


@pytest.mark.parametrize(
    ("goal", "most"),
    [({"budget": 400}, 400), ({"ratio": 4}, 1088 // 4), ({"ratio": 1}, 1088), ({"budget": 5000}, 1056)],
)
def test_what_a_goal_allows(goal: dict[str, Any], most: int) -> None:
    made = htcompress.compress(tagger(), layout="svd", **goal)
    totals = made.report.totals
    assert totals.parameters_after == sum(p.numel() for p in made.modules["rnn"].parameters()) <= most
    assert totals.parameters_before == 1088
    assert totals.ratio == pytest.approx(1088 / totals.parameters_after, abs=0.05)
    for name in ("budget", "error", "ratio"):
        assert made.report.request[name] == goal.get(name)


def test_an_error_goal_is_kept_by_every_matrix() -> None:
    model = tagger()
    made = htcompress.compress(model, error=0.5, layout="svd", scope="separate")
    (slot,) = made.modules["rnn"].slots().values()
    for name, weight in slot.weights().items():
        dense = getattr(model.rnn, f"weight_{name}_l0")
        assert float((weight.dense() - dense).detach().norm() / dense.detach().norm()) <= 0.5


def test_only_the_chosen_layers_are_compressed_and_counted() -> None:
    model = nn.ModuleDict({"encoder": nn.LSTM(12, 8), "decoder": nn.GRU(8, 8), "head": nn.Linear(8, 2)})
    made = htcompress.compress(model, ratio=2, layout="svd", layers="enc*")
    assert list(made.modules) == ["encoder"]
    assert isinstance(made.model, nn.ModuleDict)
    assert isinstance(made.model["decoder"], nn.GRU)
    assert isinstance(made.model["encoder"], HTRecurrent)
    assert made.report.totals.parameters_before == sum(p.numel() for p in model["encoder"].parameters())
    assert made.report.totals.model_parameters_before == sum(p.numel() for p in model.parameters())
    assert made.report.totals.model_parameters_after == sum(p.numel() for p in made.model.parameters())
    with pytest.raises(RequestError, match=r"'lstm\*' matches none of the recurrent layers: 'encoder', 'decoder'"):
        htcompress.compress(model, ratio=2, layers="lstm*")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one goal"),
        ({"budget": 300, "ratio": 2.0}, "found budget and ratio"),
        ({"budget": 0}, "at least 1; found 0"),
        ({"error": 2.0}, "at least 0 and below 1"),
        ({"ratio": 0.5}, "at least 1"),
        ({"budget": 300, "scope": "all"}, "scope is one of auto, integrated, separate, input; found 'all'"),
        ({"budget": 300, "layout": "tt"}, "layout is one of auto, split, paired, svd; found 'tt'"),
    ],
)
def test_requests_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        htcompress.compress(tagger(), **options)


def test_a_model_without_recurrent_layers() -> None:
    with pytest.raises(CheckpointError, match=r"holds no torch\.nn\.LSTM, GRU or RNN"):
        htcompress.compress(nn.Linear(2, 2), budget=10)


def test_the_least_budget_that_is_named_works() -> None:
    with pytest.raises(UnreachableError) as caught:
        htcompress.compress(tagger(), budget=3, layout="svd")
    assert caught.value.exit_code == 3
    least = int(str(caught.value).split("at least ")[1].split(",")[0])
    assert htcompress.compress(tagger(), budget=least, layout="svd").report.totals.parameters_after <= least
    with pytest.raises(UnreachableError):
        htcompress.compress(tagger(), budget=least - 1, layout="svd")


# ---- data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "calibration", [batches, lambda: iter(batches()), lambda: batches, lambda: lambda: iter(batches())]
)
def test_calibration_in_any_form(calibration: Callable[[], Any]) -> None:
    made = htcompress.compress(tagger(), budget=300, layout="svd", calibration=calibration())
    known = htcompress.compress(tagger(), budget=300, layout="svd", calibration=batches())
    assert equal(made.tensors, known.tensors)
    errors = [m.error["outputs"] for layer in made.report.layers for m in layer.matrices]
    assert None not in errors


def test_calibration_weighs_the_outputs() -> None:
    # Only the first four inputs are ever non-zero: a decomposition weighed by data keeps their columns.
    seen = [batch * (torch.arange(INPUTS) < 4) for batch in batches()]
    model = tagger()
    errors = []
    for calibration in (None, seen):
        made = htcompress.compress(model, budget=300, layout="svd", calibration=calibration)
        assert made.model is not None
        with torch.no_grad():
            errors.append(float((made.model(seen[0]) - model(seen[0])).norm() / model(seen[0]).norm()))
    assert errors[1] < 0.5 * errors[0]


def test_an_error_goal_does_not_ask_the_data() -> None:
    listener = Listener()
    made = htcompress.compress(tagger(), error=0.5, layout="svd", calibration=batches(), observer=listener)
    assert "calibrating" not in listener.stages
    assert {m.error["outputs"] for layer in made.report.layers for m in layer.matrices} == {None}
    assert made.report.timings_s.statistics is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"calibration": []}, "yields nothing"),
        ({"calibration": [(clips(), clips())]}, r"cannot take a batch of calibration\(\) .*TypeError"),
        ({"calibration": [clips()[..., :5]]}, r"cannot take a batch of calibration\(\) \(\(4, 5, 5\)\)"),
        ({"training": [clips()]}, r"needs at least two batches, one of them held out; training\(\) yields 1"),
        ({"training": []}, "at least two batches"),
        ({"training": [clips()[..., :5]] * 3}, r"cannot take a batch of training\(\)"),
        ({"training": iter(batches())}, "ran out of data: called again, training.. yields 0 batches"),
        (
            {"training": [(clips(), 1)] * 9, "loss": lambda o, t: 0.5},
            "returned float; expected a tensor with one number",
        ),
        ({"training": [(clips(), 1)] * 9, "loss": lambda o, t: o}, r"returned a tensor of shape \(4, 3\)"),
        ({"evaluate": lambda m: "good"}, r"evaluate\(model\) in compress returned 'good'"),
        ({"evaluate": lambda m: {}}, "returned {}; expected a float"),
        ({"evaluate": lambda m: float("nan")}, "gave metric nan for the dense model; expected finite numbers"),
    ],
)
def test_data_that_does_not_serve(data: dict[str, Any], words: str) -> None:
    with pytest.raises(TaskError, match=words):
        htcompress.compress(tagger(), budget=300, layout="svd", finetuning=FineTuning(steps=20), **data)


def test_an_error_of_ours_is_not_blamed_on_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module, source: Iterator[Any], **options: Any) -> None:
        next(source)
        raise RuntimeError("ours")

    monkeypatch.setattr("htcompress.pipeline.collect", broken)
    with pytest.raises(RuntimeError, match="ours"):
        htcompress.compress(tagger(), budget=300, layout="svd", calibration=batches())


# ---- quality ------------------------------------------------------------------------------------------------


def test_every_stage_is_measured_once_in_evaluation_mode() -> None:
    seen: list[nn.Module] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert not any(module.training for module in model.modules())
        seen.append(model)
        return {"score": 0.1 * len(seen), "other": 7}

    listener = Listener()
    made = htcompress.compress(
        tagger().train(),
        budget=300,
        layout="svd",
        training=batches(),
        evaluate=evaluate,
        higher_is_better=False,
        finetuning=FineTuning(steps=3),
        observer=listener,
    )
    quality = made.report.quality
    assert (quality.dense, quality.decomposed, quality.finetuned) == pytest.approx((0.1, 0.2, 0.3))
    assert (quality.metric, quality.higher_is_better, quality.final) == ("score", False, quality.finetuned)
    assert {stage: values["other"] for stage, values in quality.metrics.items()} == dict.fromkeys(
        ("dense", "decomposed", "finetuned"), 7.0
    )
    assert isinstance(seen[0].rnn, nn.LSTM)
    assert isinstance(seen[1].rnn, HTRecurrent)
    assert listener.stages == [
        "evaluating the dense model",
        "decomposing",
        "evaluating the decomposed model",
        "fine-tuning",
        "evaluating the finetuned model",
    ]


def test_what_was_not_measured_is_none() -> None:
    report = htcompress.compress(tagger(), budget=300, layout="svd").report
    quality = report.quality
    assert (quality.metric, quality.dense, quality.decomposed, quality.finetuned, quality.final) == (None,) * 5
    times = report.timings_s
    assert (times.statistics, times.finetune, times.evaluate) == (None, None, None)
    assert times.decompose is not None


def test_a_compressed_model_without_a_finite_metric_is_not_measured() -> None:
    values = iter([1.0, float("inf"), 2.0])
    listener = Listener()
    made = htcompress.compress(
        tagger(),
        budget=300,
        layout="svd",
        training=batches(),
        evaluate=lambda m: {"perplexity": next(values)},
        finetuning=FineTuning(steps=3),
        observer=listener,
    )
    quality = made.report.quality
    assert (quality.dense, quality.decomposed, quality.finetuned) == (1.0, None, 2.0)
    assert listener.messages == ["The decomposed model has perplexity inf: it counts as not measured."]
    made.report.to_json()


# ---- convert ------------------------------------------------------------------------------------------------


def test_from_the_weights_alone(checkpoint: Path) -> None:
    made = htcompress.convert(checkpoint, goal=SVD)
    known = htcompress.compress(tagger(), budget=400, layout="svd")
    assert made.model is None
    assert equal(made.tensors, known.tensors)
    assert made.config["layers"]["rnn"]["weights"] == known.config["layers"]["rnn"]["weights"]
    assert [layer.matrices for layer in made.report.layers] == [layer.matrices for layer in known.report.layers]
    assert made.report.totals == known.report.totals
    assert made.report.source["file"] == "model.pt"
    assert made.report.source["path"] == str(checkpoint)
    assert made.report.request["task"] is None


def test_with_a_task(checkpoint: Path, task: Path) -> None:
    listener = Listener()
    made = htcompress.convert(checkpoint, goal=SVD, task=task, finetuning=FineTuning(steps=10), observer=listener)
    report = made.report
    assert report.request["task"] == str(task)
    assert report.quality.metric == "accuracy"
    assert None not in (report.quality.dense, report.quality.decomposed, report.quality.finetuned)
    assert None not in vars(report.timings_s).values()
    assert listener.stages[:3] == ["reading the checkpoint", "evaluating the dense model", "calibrating"]
    assert listener.messages == []
    plain = htcompress.convert(checkpoint, goal=SVD, task=task)
    assert plain.report.quality.finetuned is None
    assert plain.report.quality.dense == report.quality.dense


@pytest.mark.parametrize("removed", ["calibration, training", "evaluate", "calibration, training, evaluate, loss"])
def test_a_task_may_lack_what_it_has_not(checkpoint: Path, tmp_path: Path, removed: str) -> None:
    task = write_task(tmp_path / "task.py", f"del {removed}")
    made = htcompress.convert(checkpoint, goal=SVD, task=task, finetuning=FineTuning(steps=3))
    assert (made.report.quality.metric is None) == ("evaluate" in removed)
    assert (made.report.timings_s.statistics is None) == ("calibration" in removed)
    assert (made.report.timings_s.finetune is None) == ("training" in removed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_task", [False, True])
def test_other_dtypes(tmp_path: Path, task: Path, dtype: torch.dtype, with_task: bool) -> None:
    model = tagger().to(dtype)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    made = htcompress.convert(tmp_path / "model.pt", goal=SVD, task=task if with_task else None)
    htcompress.save(made, tmp_path / "out")
    assert made.report.totals.bytes_before == 1088 * dtype.itemsize
    # As for torch's own load_state_dict, the instance decides what is computed in.
    back = load(tmp_path / "out", Tagger())
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    if not with_task:
        assert made.tensors["head.weight"].dtype == dtype
        cores = {tensor.dtype for name, tensor in made.tensors.items() if name.startswith("rnn.")}
        assert cores == {torch.float64 if dtype == torch.float64 else torch.float32}
        full = htcompress.compress(model.float(), budget=400, layout="svd").model
        assert full is not None
        assert torch.allclose(back(clips()), full(clips()), atol=1e-5)


def test_other_tensors_are_kept_as_they_are(tmp_path: Path) -> None:
    shared = torch.randn(3, 2)
    extra = {
        "counter": torch.tensor(3),
        "table": torch.arange(6, dtype=torch.int16).reshape(2, 3).T,
        "nothing": torch.zeros(0, 4),
        "mask": torch.tensor([True, False]),
        "half": torch.randn(3).half(),
        "shared": shared,
        "shared_too": shared,
        "rnn.weight_hh_l0_raw": torch.randn(2),
    }
    torch.save(tagger().state_dict() | extra, tmp_path / "model.pt")
    made = htcompress.convert(tmp_path / "model.pt", goal=SVD)
    htcompress.save(made, tmp_path / "out")
    kept = load_file(tmp_path / "out" / "model.safetensors")
    expected = extra | {name: t for name, t in tagger().state_dict().items() if name.startswith("head.")}
    assert equal({name: kept[name] for name in expected}, expected)
    assert made.report.totals.model_parameters_after == sum(t.numel() for t in kept.values())
    assert not [name for name in kept if name.startswith("rnn.weight_ih")]


def test_the_state_dict_of_a_bare_module(tmp_path: Path) -> None:
    model = nn.LSTM(INPUTS, 8, batch_first=True)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    made = htcompress.convert(tmp_path / "model.pt", goal=SVD)
    htcompress.save(made, tmp_path / "out")
    back = load(tmp_path / "out", nn.LSTM(INPUTS, 8, batch_first=True))
    full = htcompress.compress(model, budget=400, layout="svd").model
    assert full is not None
    assert torch.equal(back(clips())[0], full(clips())[0])


@pytest.mark.parametrize("prefix", ["model.", "model.net.", "module.model."])
def test_a_wrappers_prefix_with_a_task(tmp_path: Path, task: Path, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in tagger().state_dict().items()}
    state |= {"criterion.weight": torch.ones(3)}
    torch.save({"state_dict": state, "epoch": 4, "hyper_parameters": {"lr": 0.1}}, tmp_path / "last.ckpt")
    made = htcompress.convert(tmp_path / "last.ckpt", goal=SVD, task=task)
    known = htcompress.convert(save_tagger(tmp_path / "model.pt"), goal=SVD, task=task)
    assert equal(made.tensors, known.tensors)
    assert made.report.totals == known.report.totals


def test_a_layer_held_twice(tmp_path: Path) -> None:
    model = Twice().eval()
    state = model.state_dict()
    torch.save(state, tmp_path / "model.pt")
    x = torch.randn(2, 5, 8)
    known = htcompress.compress(model, budget=200, layout="svd")
    assert known.model is not None
    assert known.model.first is known.model.second
    for made in (known, htcompress.convert(tmp_path / "model.pt", goal=Goal(budget=200, layout=LayoutKind.SVD))):
        htcompress.save(made, tmp_path / "out")
        tensors = read_tensors(tmp_path / "out")
        assert list(read_config(tmp_path / "out")["layers"]) == ["first"]
        back = load(tmp_path / "out", Twice())
        assert torch.equal(back(x), known.model(x))
        totals = made.report.totals
        assert totals.parameters_after == sum(t.numel() for n, t in tensors.items() if n.startswith("first.")) <= 200
        assert totals.model_parameters_after == sum(t.numel() for t in tensors.values())
        assert totals.parameters_before == sum(p.numel() for p in model.parameters())
        assert totals.bytes_before == 4 * totals.parameters_before
        assert totals.model_parameters_before == sum(t.numel() for t in state.values())


def test_a_file_that_keeps_a_shared_tensor_once(tmp_path: Path) -> None:
    # What safetensors itself writes for a model that holds a layer twice.
    (tmp_path / "twice.py").write_text("from small import Twice as model\n")
    model = Twice().eval()
    save_model(model, str(tmp_path / "model.safetensors"))
    made = htcompress.convert(
        tmp_path / "model.safetensors", goal=Goal(budget=200, layout=LayoutKind.SVD), task=tmp_path / "twice.py"
    )
    assert equal(made.tensors, htcompress.compress(model, budget=200, layout="svd").tensors)


def test_a_checkpoint_that_knows_more_than_the_model(tmp_path: Path, task: Path) -> None:
    path = save_tagger(tmp_path / "model.pt", ema=torch.zeros(2), **{f"old{i}": torch.zeros(1) for i in range(5)})
    listener = Listener()
    made = htcompress.convert(path, goal=SVD, task=task, observer=listener)
    assert listener.messages == [f"6 tensors of {path} are unknown to model(): ema, old0, old1, old2 and 2 more."]
    assert not [name for name in made.tensors if "old" in name]
    assert made.report.totals.model_parameters_before == 1115


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"head__weight": None}, r"lacks 1 of the 6 tensors of model\(\) in .*task.py: head.weight"),
        ({"head__weight": None, "head__bias": None}, "lacks 2 of the 6 tensors .*: head.weight, head.bias"),
        ({"head__bias": torch.zeros(4)}, r"head.bias has shape \(4,\); model\(\) in .*task.py has \(3,\)"),
        ({"rnn__weight_ih_l0": torch.zeros(32, 23)}, r"rnn.weight_ih_l0 has shape \(32, 23\); model\(\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_model(
    tmp_path: Path, task: Path, changed: dict[str, Tensor | None], words: str
) -> None:
    path = save_tagger(tmp_path / "model.pt", **changed)
    for use in (lambda: htcompress.convert(path, goal=SVD, task=task), lambda: htcompress.evaluate(path, task=task)):
        with pytest.raises(CheckpointError, match=words) as caught:
            use()
        assert "Give the checkpoint of this model, or correct model()" in str(caught.value)


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there(checkpoint: Path, task: Path, device: str) -> None:
    with pytest.raises(RequestError, match=f"The device '{device}' is not there: .* Try cpu"):
        htcompress.convert(checkpoint, goal=SVD, task=task, device=device)


# ---- finetune and evaluate ----------------------------------------------------------------------------------


def test_evaluate_a_checkpoint_and_a_directory(checkpoint: Path, task: Path, written: Path) -> None:
    expected = htcompress.convert(checkpoint, goal=SVD, task=task)
    assert htcompress.evaluate(checkpoint, task=task) == expected.report.quality.metrics["dense"]
    htcompress.save(expected, written)
    assert htcompress.evaluate(str(written), task=str(task)) == expected.report.quality.metrics["decomposed"]


def test_evaluate_needs_a_metric(checkpoint: Path, tmp_path: Path) -> None:
    task = write_task(tmp_path / "task.py", "del evaluate")
    with pytest.raises(TaskError, match=r"lacks evaluate\(\), which evaluation needs"):
        htcompress.evaluate(checkpoint, task=task)


def test_finetune_a_directory(written: Path, task: Path) -> None:
    before = read_report(written)
    listener = Listener()
    made = htcompress.finetune(written, task=task, options=FineTuning(steps=60), observer=listener)
    assert read_report(written) == before
    assert listener.messages == []
    htcompress.save(made, written)
    after = read_report(written)
    assert after.totals == before.totals
    assert after.source == before.source
    assert after.quality.dense == htcompress.evaluate(written.parent / "model.pt", task=task)["accuracy"]
    assert after.quality.finetuned == htcompress.evaluate(written, task=task)["accuracy"]
    assert after.quality.decomposed is not None
    assert after.timings_s.finetune is not None
    again = htcompress.finetune(written, task=task, options=FineTuning(steps=2))
    assert again.report.timings_s.finetune >= after.timings_s.finetune
    assert again.report.quality.decomposed == after.quality.decomposed


def test_states_in_another_order_are_not_taught(
    checkpoint: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal = Goal(budget=400, layout=LayoutKind.SPLIT)
    made = htcompress.convert(checkpoint, goal=goal, task=task, finetuning=None)
    assert [layer.units_reordered for layer in made.report.layers] == [True]
    plain = htcompress.convert(checkpoint, goal=SVD, task=task, finetuning=None)
    assert [layer.units_reordered for layer in plain.report.layers] == [False]
    htcompress.save(made, tmp_path / "out")
    model = load(tmp_path / "out", tagger())
    assert distance(model(clips(5)), made.model(clips(5))) < 1e-6
    given: list[FineTuning] = []

    def watched(*arguments: Any, options: FineTuning, **others: Any) -> Any:
        given.append(options)
        return distill(*arguments, options=options, **others)

    monkeypatch.setattr("htcompress.pipeline.distill", watched)
    htcompress.finetune(tmp_path / "out", task=task, options=FineTuning(steps=2))
    htcompress.convert(checkpoint, goal=goal, task=task, finetuning=FineTuning(steps=2))
    assert [options.hidden for options in given] == [0.0, FineTuning().hidden]


def test_finetune_keeps_tensors_that_the_model_does_not_know(tmp_path: Path, task: Path) -> None:
    path = save_tagger(tmp_path / "model.pt", ema=torch.ones(2))
    htcompress.save(htcompress.convert(path, goal=SVD), tmp_path / "out")
    listener = Listener()
    made = htcompress.finetune(tmp_path / "out", task=task, options=FineTuning(steps=2), observer=listener)
    assert torch.equal(made.tensors["ema"], torch.ones(2))
    assert f"1 tensors of {tmp_path / 'out'} are unknown to model(): ema." in listener.messages
    assert htcompress.evaluate(tmp_path / "out", task=task)


def test_the_teacher_is_found_where_the_directory_was_made_from(
    tmp_path: Path, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "results").mkdir()
    save_tagger(tmp_path / "runs" / "model.pt")
    monkeypatch.chdir(tmp_path)
    made = htcompress.convert("runs/model.pt", goal=SVD)
    htcompress.save(made, "results/out")
    assert read_report(Path("results/out")).source["path"] == os.path.join("..", "..", "runs", "model.pt")
    pure = write_task(tmp_path / "pure.py", "del loss, training, evaluate")
    listener = Listener()
    monkeypatch.chdir(tmp_path / "runs")
    tuned = htcompress.finetune("../results/out", task=pure, options=FineTuning(steps=2), observer=listener)
    assert listener.messages == []
    htcompress.save(tuned, "elsewhere/out")
    assert read_report(Path("elsewhere/out")).source["path"] == os.path.join("..", "..", "model.pt")
    # Moved together, they still find each other.
    shutil.move(tmp_path / "runs", tmp_path / "kept")
    monkeypatch.chdir(tmp_path)
    htcompress.finetune("kept/elsewhere/out", task=pure, options=FineTuning(steps=2), observer=listener)
    assert listener.messages == []


def test_a_teacher_that_is_gone(written: Path, task: Path, tmp_path: Path) -> None:
    moved = shutil.move(written.parent / "model.pt", tmp_path / "elsewhere.pt")
    listener = Listener()
    made = htcompress.finetune(written, task=task, options=FineTuning(steps=2), observer=listener)
    assert listener.messages == ["The dense checkpoint model.pt is not found: training on the task's loss alone."]
    assert made.report.quality.dense is None
    bare = write_task(tmp_path / "bare.py", "del loss")
    with pytest.raises(TaskError, match=r"model.pt that .*out was made from is not found, .* with --teacher"):
        htcompress.finetune(written, task=bare)
    given = htcompress.finetune(written, task=bare, teacher=moved, options=FineTuning(steps=2))
    assert given.report.quality.dense is not None


def test_a_teacher_that_has_changed_is_not_used(written: Path, task: Path) -> None:
    save_tagger(written.parent / "model.pt", seed=1)
    listener = Listener()
    htcompress.finetune(written, task=task, options=FineTuning(steps=2), observer=listener)
    assert "is no longer the checkpoint that" in listener.messages[0]


def test_a_model_compressed_in_memory_has_no_teacher_to_be_found(tmp_path: Path, task: Path) -> None:
    htcompress.save(htcompress.compress(tagger(), budget=400, layout="svd"), tmp_path / "out")
    listener = Listener()
    htcompress.finetune(tmp_path / "out", task=task, options=FineTuning(steps=2), observer=listener)
    assert listener.messages == ["The dense checkpoint Tagger is not found: training on the task's loss alone."]


def test_finetune_without_a_metric_forgets_the_old_one(checkpoint: Path, task: Path, tmp_path: Path) -> None:
    htcompress.save(htcompress.convert(checkpoint, goal=SVD, task=task), tmp_path / "out")
    bare = write_task(tmp_path / "bare.py", "del evaluate")
    listener = Listener()
    made = htcompress.finetune(tmp_path / "out", task=bare, options=FineTuning(steps=2), observer=listener)
    assert made.report.quality.final is None
    assert made.report.quality.dense is not None
    assert "has no evaluate(): the fine-tuned model is not measured" in listener.messages[0]


def test_finetune_with_another_metric_does_not_mix_them(checkpoint: Path, task: Path, tmp_path: Path) -> None:
    htcompress.save(htcompress.convert(checkpoint, goal=SVD, task=task), tmp_path / "out")
    other = write_task(
        tmp_path / "other.py", "def evaluate(model):\n    return {'loss': 7.0}", "higher_is_better = False"
    )
    quality = htcompress.finetune(tmp_path / "out", task=other, options=FineTuning(steps=2)).report.quality
    assert (quality.metric, quality.higher_is_better) == ("loss", False)
    assert (quality.dense, quality.decomposed, quality.finetuned) == (7.0, None, 7.0)
    assert set(quality.metrics) == {"dense", "finetuned"}


def test_finetune_needs_data(written: Path, tmp_path: Path) -> None:
    task = write_task(tmp_path / "task.py", "del calibration, training")
    with pytest.raises(TaskError, match=r"lacks training\(\), which fine-tuning needs"):
        htcompress.finetune(written, task=task)


@pytest.mark.parametrize("source", ["none", "model.pt"])
def test_finetune_of_what_is_no_directory(checkpoint: Path, task: Path, source: str) -> None:
    with pytest.raises(CheckpointError, match=f"{source}.*htcompress"):
        htcompress.finetune(checkpoint.parent / source, task=task)


# ---- small things -------------------------------------------------------------------------------------------


def test_values_move_to_a_device() -> None:
    meta = torch.device("meta")
    pair = namedtuple("pair", "a b")
    moved = to_device({"x": [torch.zeros(2), "text"], "y": (torch.zeros(1), pair(torch.zeros(3), 4)), "z": None}, meta)
    assert moved["x"][0].device == meta
    assert moved["x"][1] == "text"
    assert moved["y"][1].a.device == meta
    assert type(moved["y"][1]) is pair
    assert moved["y"][1].b == 4
    packed = to_device(pack_sequence([torch.zeros(2, 3)]), torch.device("cpu"))
    assert isinstance(packed, PackedSequence)


def test_every_error_is_of_one_family() -> None:
    for kind in (CheckpointError, TaskError, RequestError, UnreachableError):
        assert issubclass(kind, HTCompressError)
        assert kind.exit_code == (3 if kind is UnreachableError else 2)


# ---- a trained model, end to end ----------------------------------------------------------------------------


def test_a_trained_model_survives(tmp_path: Path) -> None:
    sample = SAMPLES / "japanese_vowels"
    made = htcompress.convert(
        sample / "model.pt",
        goal=Goal(budget=6000, layout=LayoutKind.SVD),
        task=sample / "task.py",
        finetuning=FineTuning(steps=40),
    )
    quality, totals = made.report.quality, made.report.totals
    assert totals.parameters_after <= 6000
    assert totals.ratio > 17
    assert quality.dense is not None
    assert quality.dense > 0.95
    assert quality.final is not None
    assert quality.final > quality.dense - 0.03
    htcompress.save(made, tmp_path / "out")
    assert htcompress.evaluate(tmp_path / "out", task=sample / "task.py") == quality.metrics["finetuned"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["totals"]["parameters_after"] == sum(
        t.numel() for n, t in read_tensors(tmp_path / "out").items() if n.startswith("rnn.")
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"it lacks rnn\.gates\.l0"):
        htcompress.evaluate(tmp_path / "out", task=sample / "task.py")
