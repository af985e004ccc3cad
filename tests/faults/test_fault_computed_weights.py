"""Models whose recurrent weights are computed of others: pruned, normed, parametrised, dropped in training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import Outcome
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import htcompress
from htcompress.model.reparametrised import plain_tensors
from htcompress.report import read_report

Command = Callable[..., Outcome]


class Dropping(nn.Module):
    """Drops weights of the layer inside of it, which it holds itself: as fastai does."""

    def __init__(self, module: nn.Module, share: float = 0.5, inside: bool = False) -> None:
        super().__init__()
        self.module, self.share = module, share
        self.holder = (lambda: module) if inside else (lambda: self)
        weight = module.weight_hh_l0
        del module.weight_hh_l0
        self.holder().register_parameter("weight_hh_l0_raw", nn.Parameter(weight.detach()))
        self.set()

    def set(self) -> None:
        raw = self.holder().weight_hh_l0_raw
        dropped = functional.dropout(raw, self.share, self.training)
        self.module.weight_hh_l0 = dropped if self.training else raw.clone()

    def forward(self, *arguments: Tensor) -> tuple[Tensor, object]:
        self.set()
        return self.module(*arguments)


class Inside(Dropping):
    """The same, with the weight in the layer: as Merity's AWD-LSTM did."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, inside=True)


def orthogonal(rnn: nn.Module, name: str) -> None:
    with torch.no_grad():
        square = nn.init.orthogonal_(torch.empty(64, 16))
        rnn.weight_hh_l0.copy_(square)
    parametrizations.orthogonal(rnn, name)


COMPUTED: dict[str, Callable[[nn.Module], object]] = {
    "pruned": lambda rnn: prune.l1_unstructured(rnn, "weight_hh_l0", amount=0.5),
    "old weight norm": lambda rnn: weight_norm(rnn, "weight_hh_l0"),
    "spectral norm": lambda rnn: spectral_norm(rnn, "weight_hh_l0"),
    "weight norm": lambda rnn: parametrizations.weight_norm(rnn, "weight_hh_l0"),
    "orthogonal": lambda rnn: orthogonal(rnn, "weight_hh_l0"),
    "dropped": Dropping,
    "dropped inside": Inside,
}


class Tagger(nn.Module):
    """A layer, and scores for each step."""

    def __init__(self, case: str) -> None:
        super().__init__()
        rnn = nn.LSTM(12, 16, batch_first=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = COMPUTED[case](rnn)
        self.rnn = made if isinstance(made, Dropping) else rnn
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def trained(case: str) -> Tagger:
    """After a few steps, so that what was computed first is no longer so."""
    torch.manual_seed(0)
    model, x = Tagger(case), clips()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


def clips() -> Tensor:
    return torch.randn(24, 7, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", COMPUTED)
def test_a_model(case: str) -> None:
    model, x = trained(case), clips()
    before = [*model.state_dict()]
    with torch.no_grad():
        wanted = model(x)
    whole = htcompress.compress(model, ratio=1.0, calibration=[x])
    assert list(whole.modules) == ["rnn"]
    assert whole.model is not None
    assert whole.report.totals.parameters_before == 4 * 16 * (12 + 16 + 2)
    with torch.no_grad():
        assert float((whole.model(x) - wanted).abs().max()) < 1e-4
        # The user's model is as it was.
        assert [*model.state_dict()] == before
        assert float((model(x) - wanted).abs().max()) < 1e-6


@pytest.mark.parametrize("case", COMPUTED)
def test_a_file_and_a_task(case: str, htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, x = trained(case), clips()
    torch.save(model.state_dict(), "model.pt")
    torch.save(x, "x.pt")
    Path("task.py").write_text(
        "import torch\n"
        f"from {__name__} import Tagger\n"
        f"def model():\n    return Tagger({case!r})\n"
        "def calibration():\n    return torch.load('x.pt').split(4)\n"
        "def evaluate(model):\n    return {'sum': float(model(torch.load('x.pt')).detach().sum())}\n"
    )
    ended = htc("convert", "model.pt", "--task", "task.py", "--budget", "900", "--steps", "6", "-o", "out")
    assert ended.code == 0, ended.err
    assert "rnn" in ended.err
    report = read_report(tmp_path / "out")
    compact = htcompress.load("out", Tagger(case)).eval()
    with torch.no_grad():
        assert report.quality.dense == pytest.approx(float(model(x).sum()), rel=1e-4, abs=1e-4)
        assert report.quality.finetuned == pytest.approx(float(compact(x).sum()), rel=1e-4, abs=1e-4)
    assert not [name for name in compact.state_dict() if "raw" in name or "orig" in name]


ALONE = ("pruned", "old weight norm", "dropped", "dropped inside")


@pytest.mark.parametrize("case", ALONE)
def test_weights_alone(case: str, htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, x = trained(case), clips()
    torch.save(model.state_dict(), "model.pt")
    ended = htc("convert", "model.pt", "--ratio", "1", "-o", "out", "--no-finetune")
    assert ended.code == 0, ended.err
    assert [layer.name for layer in read_report(tmp_path / "out").layers] == ["rnn"]
    compact = htcompress.load("out", Tagger(case)).eval()
    with torch.no_grad():
        assert float((compact(x) - model(x)).abs().max()) < 1e-4
    assert "1 recurrent layer" in htc("inspect", "model.pt").out


@pytest.mark.parametrize("within", ["", "module."])
def test_several_raw_weights(within: str) -> None:
    rnn = nn.LSTM(6, 5, num_layers=2)
    given = {f"net.module.{name}": value for name, value in rnn.state_dict().items()}
    for weight in ("weight_hh_l0", "weight_hh_l1"):
        given[f"net.{within}{weight}_raw"] = given.pop(f"net.module.{weight}")
    given["head.weight"] = torch.zeros(2, 5)
    found = plain_tensors(given)
    assert set(found) == {f"net.{name}" for name in rnn.state_dict()} | {"head.weight"}
    assert all(torch.equal(found[f"net.{name}"], value) for name, value in rnn.state_dict().items())
    # A weight that is there is not computed of another.
    assert plain_tensors({**rnn.state_dict(), "weight_hh_l0_raw": torch.zeros(2)}).keys() == {
        *rnn.state_dict(),
        "weight_hh_l0_raw",
    }
