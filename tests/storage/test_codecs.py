"""Codecs alone, and from the request to the directory and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import Outcome, Tagger, clips, save_tagger, tagger, write_task
from torch import nn

import htcompress
from htcompress.errors import RequestError
from htcompress.report import read_report
from htcompress.request import FineTuning, Goal, Request
from htcompress.storage import CODECS, Codec, codec_of, codec_within
from htcompress.vocabulary import BITS


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_what_is_decoded_is_encoded_again_without_loss(codec: Codec) -> None:
    for shape in ((7,), (3, 4), (2, 3, 4), (1, 1)):
        for scale in (1e-3, 1.0, 1e3):
            core = scale * torch.randn(shape)
            scales = codec.scales(core)
            parts = codec.encode(core, scales)
            assert {part: tuple(t.shape) for part, t in parts.items()} == codec.parts(shape)
            assert sum(t.numel() * t.element_size() for t in parts.values()) == codec.bytes(shape, core.dtype)
            once = codec.rounded(core, scales)
            assert once.dtype == core.dtype
            assert torch.equal(codec.rounded(once, scales), once)
            assert torch.equal(codec.decode(parts, shape), once)
            # Half a step of the widest scale that cuts nothing off.
            step = float(core.abs().max()) * (2.0**-10 if codec.bits in (0, 16) else 1 / (2**codec.bits - 1))
            assert (once - core).norm() <= 1.01 * step * core.numel() ** 0.5
    assert codec_of(codec.to_config()) == codec


def test_every_number_of_bits_has_a_codec() -> None:
    for bits in BITS:
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            codec = codec_within(bits, dtype)
            assert codec.bits == bits or dtype.itemsize * 8 <= bits or bits == 32
    assert codec_within(16, torch.bfloat16).name == "plain"
    assert codec_within(16, torch.float32).name == "float16"


def test_half_precision_leaves_out_what_it_cannot_hold() -> None:
    half = codec_of({"name": "float16"})
    assert half.holds(torch.randn(9))
    assert not half.holds(1e5 * torch.randn(9))
    assert not half.holds(1e-7 * torch.randn(9))
    assert half.holds(torch.zeros(3))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_a_model_in_half_the_bytes(kind: type[nn.Module], options: dict[str, object], tmp_path: Path) -> None:
    model = kind(24, 16, **options)
    x = [torch.randn(5, 3, 24) for _ in range(3)]
    before = sum(p.numel() for p in model.parameters())
    wide = htcompress.compress(model, budget=before // 2, layout="svd", calibration=x)
    narrow = htcompress.compress(model, budget=before // 2, layout="svd", calibration=x, bits=16)
    a, b = wide.report.totals, narrow.report.totals
    assert a.parameters_after == b.parameters_after <= before // 2
    words = sum(t.numel() for n, t in narrow.tensors.items() if n.endswith(".order"))  # of 4 bytes each
    assert 2 * (b.bytes_after - 4 * words) == a.bytes_after - 4 * words
    htcompress.save(narrow, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for n, t in stored.items() if not n.endswith("order")} == {torch.float16}
    assert sum(t.numel() * t.element_size() for t in stored.values()) == b.bytes_after
    back = htcompress.load(tmp_path / "out", kind(24, 16, **options)).eval()
    for batch in x:
        assert torch.equal(back(batch)[0], narrow.model(batch)[0])
        assert torch.allclose(back(batch)[0], wide.model(batch)[0], atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tagger().to(dtype)
    result = htcompress.compress(model, budget=400, bits=16)
    htcompress.save(result, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    cores = {t.dtype for n, t in stored.items() if n.startswith("rnn.") and not n.endswith("order")}
    assert cores == {torch.float16 if dtype is torch.float64 else dtype}
    back = htcompress.load(tmp_path / "out", Tagger().to(dtype)).eval()
    assert torch.equal(back(clips().to(dtype)), result.model(clips().to(dtype)))


def test_from_the_command_line_to_the_export(tmp_path: Path, htc: Callable[..., Outcome]) -> None:
    save_tagger(tmp_path / "model.pt")
    write_task(tmp_path / "task.py")
    asked = ("--budget", "400", "--bits", "16", "--task", "task.py", "--steps", "10")
    assert htc("convert", "model.pt", *asked, "-o", "out").code == 0
    report = read_report(tmp_path / "out")
    assert report.request["bits"] == 16
    assert Request.of_report(report.request).goal.bits == 16
    assert "--bits 16" in Request.of_report(report.request).command("model.pt")
    matrices = [matrix for layer in report.layers for matrix in layer.matrices]
    assert {(m.codec or {})["bits"] for m in matrices} == {16}
    assert [m.bytes for m in matrices] == [2 * m.parameters for m in matrices]
    finetuned = report.quality.finetuned
    assert htc("evaluate", "out", "--task", "task.py").out.split()[:2] == ["accuracy", f"{finetuned:.6g}"]
    assert htc("finetune", "out", "--task", "task.py", "--steps", "5").code == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for n, t in stored.items() if n.startswith("rnn.") and "order" not in n} == {torch.float16}
    assert htc("export", "out", "dense.pt", "--to", "dense").code == 0
    dense = Tagger().eval()
    dense.load_state_dict(torch.load(tmp_path / "dense.pt"), strict=True)
    compact = htcompress.load(tmp_path / "out", Tagger()).eval()
    assert torch.allclose(dense(clips()), compact(clips()), atol=1e-5)
    assert htc("export", "out", "model.onnx", "--to", "onnx", "--task", "task.py").code == 0


def test_other_numbers_of_bits_are_refused(tmp_path: Path, htc: Callable[..., Outcome]) -> None:
    save_tagger(tmp_path / "model.pt")
    with pytest.raises(RequestError, match="3 or 2 bits; found 9"):
        Goal(budget=400, bits=9)
    ended = htc("convert", "model.pt", "--budget", "400", "--bits", "9")
    assert ended.code == 2
    assert "3 or 2 bits" in ended.err
    with pytest.raises(RequestError, match="ask for a budget"):
        Goal(error=0.1, bits=8)


def test_an_error_is_that_of_what_is_stored() -> None:
    model = nn.LSTM(24, 16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for error in (0.3, 0.05, 2e-3):
        result = htcompress.compress(model, error=error, scope="separate", bits=16)
        for name in ("weight_ih_l0", "weight_hh_l0"):
            lost = getattr(result.model, name).detach() - before[name]
            assert lost.norm() <= error * before[name].norm()
    with pytest.raises(RequestError, match=r"in 16 bits alone may change a matrix by 0\.001"):
        Goal(error=1e-4, bits=16)


def test_tied_layers_are_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.GRU(12, 8)
            self.b = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)[0].repeat(1, 1, 2)[..., :12])[0]

    x = torch.randn(4, 2, 12)
    result = htcompress.compress(
        Tied(), budget=250, calibration=[x], training=[x, x], bits=16, finetuning=FineTuning(3)
    )
    htcompress.save(result, tmp_path / "out")
    assert torch.equal(htcompress.load(tmp_path / "out", Tied())(x), result.model(x))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == result.report.totals.parameters_after
