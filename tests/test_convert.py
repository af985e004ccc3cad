"""From a checkpoint to a compact one: what is read, kept and refused; a trained model, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from small import INPUTS, Listener, Tagger, Twice, clips, equal, save_tagger, tagger, write_task
from torch import Tensor, nn

import htcompress
from htcompress.directory.read import load, read_config, read_tensors
from htcompress.errors import CheckpointError, RequestError
from htcompress.request import FineTuning, Goal
from htcompress.vocabulary import LayoutKind

SAMPLES = Path(__file__).parent.parent / "sample_models"
SVD = Goal(budget=400, layout=LayoutKind.SVD)
"""A goal that is planned fast; what is tested here does not depend on the layout."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_tagger(tmp_path / "model.pt")


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_task(tmp_path / "task.py")


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
    assert listener.stages[:3] == ["reading the checkpoint", "evaluating the dense model", "trying stand-ins"]
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
        assert cores == {dtype}
        full = htcompress.compress(model.float(), budget=400, layout="svd").model
        assert full is not None
        # Cores are rounded to what the checkpoint has its weights in.
        assert torch.allclose(back(clips()), full(clips()), atol=10 * torch.finfo(dtype).eps, rtol=1e-5)


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
    kept = read_tensors(tmp_path / "out")
    assert "shared_too" not in load_file(tmp_path / "out" / "model.safetensors")
    expected = extra | {name: t for name, t in tagger().state_dict().items() if name.startswith("head.")}
    assert equal({name: kept[name] for name in expected}, expected)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert made.report.totals.model_parameters_after == sum(t.numel() for t in stored.values())
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
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert totals.model_parameters_after == sum(t.numel() for t in stored.values())
        assert totals.parameters_before == sum(p.numel() for p in model.parameters())
        assert totals.bytes_before == 4 * totals.parameters_before
        assert totals.model_parameters_before == sum(p.numel() for p in model.parameters())


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
    with pytest.raises(CheckpointError, match=r"needs rnn\.gates\.l0.* which model.safetensors lacks"):
        htcompress.evaluate(tmp_path / "out", task=sample / "task.py")
