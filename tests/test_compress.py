"""From a trained model to a compact one in memory: what is changed, counted, measured and kept."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small import INPUTS, Listener, Tagger, clips, equal, tagger
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import htcompress
from htcompress.data import to_device
from htcompress.errors import CheckpointError, HTCompressError, RequestError, TaskError, UnreachableError
from htcompress.nn import HTRecurrent
from htcompress.request import FineTuning, Goal
from htcompress.vocabulary import LayoutKind

SVD = Goal(budget=400, layout=LayoutKind.SVD)
"""A goal that is planned fast; what is tested here does not depend on the layout."""


def batches(count: int = 6, seed: int = 11) -> list[Tensor]:
    return [clips(seed + index, batch=8) for index in range(count)]


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
    (direction,) = made.modules["rnn"].directions().values()
    for name, weight in direction.weights().items():
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
        ({"training": [clips()]}, r"needs at least two batches, one of them held out; what there is to train on has 1"),
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

    monkeypatch.setattr("htcompress.stages.collect", broken)
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
        "trying stand-ins",
        "decomposing",
        "evaluating the decomposed model",
        "fine-tuning",
        "evaluating the finetuned model",
        "measuring latency",
    ]


def test_what_was_not_measured_is_none() -> None:
    report = htcompress.compress(tagger(), budget=300, layout="svd").report
    quality = report.quality
    assert (quality.metric, quality.dense, quality.decomposed, quality.finetuned, quality.final) == (None,) * 5
    times = report.timings_s
    assert (times.statistics, times.finetune, times.evaluate) == (None, None, None)
    assert times.decompose is not None


def test_fine_tuning_that_gains_nothing_is_told() -> None:
    listener = Listener()
    options = FineTuning(steps=3, learning_rate=0.0)
    htcompress.compress(tagger(), budget=300, layout="svd", training=batches(), finetuning=options, observer=listener)
    assert listener.messages == ["Fine-tuning has gained nothing in 3 steps: the model stays as it was."]


def test_a_compressed_model_without_a_finite_metric_is_not_measured() -> None:
    values = iter([1.0, float("inf"), 2.0])
    listener = Listener()
    made = htcompress.compress(
        tagger(),
        budget=300,
        layout="svd",
        training=batches(),
        evaluate=lambda m: {"perplexity": next(values)},
        higher_is_better=False,
        finetuning=FineTuning(steps=3),
        observer=listener,
    )
    quality = made.report.quality
    assert (quality.dense, quality.decomposed, quality.finetuned) == (1.0, None, 2.0)
    assert listener.messages == ["The decomposed model has perplexity inf: it counts as not measured."]
    made.report.to_json()


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
