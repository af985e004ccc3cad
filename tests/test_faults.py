"""What use has shown: the smallest case of each kind of fault, and what would be right."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from crossing import crossed, some
from small import Listener, Outcome, Tagger, clips, save_tagger, tagger, write_task
from torch import Tensor, nn
from torch.distributions import Categorical

import htcompress
from htcompress.errors import CheckpointError, HTCompressError, RequestError, TaskError
from htcompress.report import read_report
from htcompress.request import FineTuning, Goal

BEYOND = 10**7
"""A budget beyond all need: the result equals the model."""

Command = Callable[..., Outcome]


def near(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - wanted).norm() <= tolerance * wanted.norm())


def compact(model: nn.Module, **options: Any) -> nn.Module:
    made = htcompress.compress(model, **{"budget": BEYOND, **options}).model
    assert made is not None
    return made


class Around(nn.Module):
    """A model around one recurrent module, with a head."""

    def __init__(self, rnn: nn.Module, size: int = 8) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


# ---- 1: the user's code -------------------------------------------------------------------------------------


class Normed(Tagger):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def test_1_an_evaluation_that_trains_changes_nobody(tmp_path: Path) -> None:
    model = Normed().eval()
    before = copy.deepcopy(model.state_dict())

    def evaluate(given: nn.Module) -> float:
        given.train()
        value = float(given(clips()).detach().square().mean())
        given.train()
        return value

    result = htcompress.compress(model, budget=300, calibration=[clips()], evaluate=evaluate, higher_is_better=True)
    assert result.model is not None
    assert not any(module.training for module in (*model.modules(), *result.model.modules()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(result.model.norm.running_mean, before["norm.running_mean"])
    htcompress.save(result, tmp_path / "out")
    assert torch.equal(htcompress.load(tmp_path / "out", Normed().eval())(clips()), result.model(clips()))


def test_1_what_a_task_leaves_behind(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task.py", "torch.set_grad_enabled(False)\ntorch.set_default_dtype(torch.float64)")
    task.write_text(task.read_text().replace("generator=generator)", "generator=generator, dtype=torch.float32)", 1))
    text = task.read_text().replace("return Tagger()", "return Tagger().float()")
    task.write_text(text)
    made = htcompress.convert(
        save_tagger(tmp_path / "model.pt"), goal=Goal(budget=300), task=task, finetuning=FineTuning(steps=3)
    )
    assert made.report.quality.finetuned is not None
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


def test_1_the_process_is_as_it_was() -> None:
    def evaluate(model: nn.Module) -> float:
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_grad_enabled(False)
        return float(torch.rand(()))

    threads, model = torch.get_num_threads(), tagger()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    made = htcompress.compress(model, budget=300, calibration=[clips()], evaluate=evaluate)
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    # The same draws for every stage.
    assert made.report.quality.dense == made.report.quality.decomposed


class Streaming(nn.Module):
    """Keeps its state from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(24, 8, batch_first=True)
        self.hidden: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        out, self.hidden = self.rnn(x, self.hidden)
        self.attention = out.softmax(-1)
        return out


def test_1_states_that_a_forward_keeps() -> None:
    model = Streaming().eval()
    data = [clips(seed) for seed in range(4)]
    result = htcompress.compress(
        model, budget=300, calibration=data, training=data, finetuning=FineTuning(steps=4, check_every=2)
    )
    assert result.model is not None
    assert model.hidden is None
    assert result.model.hidden is None
    full = compact(model, calibration=data)
    for x in data:
        assert near(full(x), model(x))


# ---- 2: a stand-in that is not the user's module ------------------------------------------------------------


class Plus(nn.LSTM):
    def forward(self, x: Tensor, hx: Any = None) -> Any:
        out, state = super().forward(x, hx)
        return out + 1, state


class Lengths(nn.GRU):
    """Takes lengths, and masks what is behind them."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Any:
        out, state = super().forward(x)
        if lengths is None:
            return out, state
        return out * (torch.arange(x.shape[1])[None, :, None] < lengths[:, None, None]), state


class LayerNormCell(nn.LSTMCell):
    def __init__(self, inputs: int, size: int) -> None:
        super().__init__(inputs, size)
        self.norm = nn.LayerNorm(4 * size)

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        h, c = hx if hx is not None else (x.new_zeros(len(x), self.hidden_size),) * 2
        gates = nn.functional.linear(x, self.weight_ih, self.bias_ih)
        gates = self.norm(gates + nn.functional.linear(h, self.weight_hh, self.bias_hh))
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class Stepped(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.first = nn.GRU(24, 24, batch_first=True)
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in self.first(x)[0].unbind(1):
            state = self.cell(step, state)
        assert state is not None
        return state[0]


def doubled(module: nn.Module, inputs: Any, output: Any) -> Any:
    return output[0] * 2, output[1]


def hooked() -> nn.Module:
    model = Around(nn.LSTM(24, 8, batch_first=True))
    model.rnn.register_forward_hook(doubled)
    model.rnn.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1, *inputs[1:]))
    return model


class Asking(Around):
    """Asks for the type, the mode and the weights."""

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.rnn, nn.LSTM)
        assert self.rnn.mode == "LSTM"
        assert (self.rnn.input_size, self.rnn.hidden_size, self.rnn.num_layers) == (24, 8, 1)
        assert [tuple(w.shape) for w in self.rnn.all_weights[0]] == [(32, 24), (32, 8), (32,), (32,)]
        self.rnn.flatten_parameters()
        return super().forward(x) + self.rnn.weight_hh_l0.sum()


class Helping(nn.LSTM):
    def strength(self) -> Tensor:
        return self.weight_ih_l0.norm() + self.gain

    gain = 2.0


class Helped(Around):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.rnn.strength()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Around(Plus(24, 8, batch_first=True)),
        lambda: Around(Lengths(24, 8, batch_first=True)),
        hooked,
        lambda: Asking(nn.LSTM(24, 8, batch_first=True)),
        lambda: Helped(Helping(24, 8, batch_first=True)),
        lambda: Stepped(LayerNormCell(24, 8)),
    ],
    ids=["forward", "lengths", "hooks", "questions", "helper", "cell"],
)
@pytest.mark.parametrize("budget", some([BEYOND, 700], BEYOND))
def test_2_whatever_is_added_to_a_layer_stays(make: Callable[[], nn.Module], budget: int, tmp_path: Path) -> None:
    model = make().eval()
    result = htcompress.compress(model, budget=budget, calibration=[clips()])
    assert result.model is not None
    if budget == BEYOND:
        assert near(result.model(clips()), model(clips()))
    htcompress.save(result, tmp_path / "out")
    assert torch.equal(htcompress.load(tmp_path / "out", make().eval())(clips()), result.model(clips()))
    assert torch.equal(copy.deepcopy(result.model)(clips()), result.model(clips()))


def test_2_a_cell_with_equations_of_its_own_is_named_and_left() -> None:
    listener = Listener()
    result = htcompress.compress(Stepped(LayerNormCell(24, 8)), budget=2000, calibration=[clips()], observer=listener)
    assert list(result.modules) == ["first"]
    assert "does not go through torch's" in result.report.left["cell"]
    assert any("cell stays dense" in message for message in listener.messages)
    with pytest.raises(CheckpointError, match="None of the recurrent layers can be compressed"):
        htcompress.compress(Stepped(LayerNormCell(24, 8)), budget=2000, layers="cell", calibration=[clips()])


class Typed(Around):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if type(self.rnn) is nn.LSTM else 2)


def patched() -> nn.Module:
    model = Around(nn.LSTM(24, 8, batch_first=True))
    original = model.rnn.forward
    model.rnn.forward = lambda x: (original(x)[0] + 1, None)
    return model


class Closed(Around):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__(rnn)
        self.run = lambda x: rnn(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(x))


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return Around(nn.utils.weight_norm(nn.LSTM(24, 8, batch_first=True), "weight_hh_l0"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Typed(nn.LSTM(24, 8, batch_first=True)), "outputs differ by"),
        (patched, "replaced on the instance"),
        (lambda: Closed(nn.LSTM(24, 8, batch_first=True)), "outside of the model's modules"),
        (old_weight_norm, "weight_norm"),
        (
            lambda: Around(nn.utils.parametrizations.weight_norm(nn.LSTM(24, 8, batch_first=True), "weight_hh_l0")),
            "parametri",
        ),
    ],
    ids=["type", "patch", "closure", "old weight norm", "weight norm"],
)
def test_2_what_no_stand_in_can_do_is_named(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        htcompress.compress(make(), budget=700, calibration=[clips()])


@pytest.mark.parametrize("make", [hooked, lambda: Around(Plus(24, 8, batch_first=True))])
def test_2_without_data_nothing_is_taken_on_trust(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(CheckpointError, match="without data nothing shows what it does"):
        htcompress.compress(make(), budget=700)


# ---- 3: stale weights ---------------------------------------------------------------------------------------


def by_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.add_(1.0)


def by_set(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 0.5


def by_averaging(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.lerp_(torch.ones_like(p), 0.5)


def by_numpy(model: nn.Module) -> None:
    for p in model.parameters():
        p.detach().numpy()[...] *= 0.3


def by_loading(model: nn.Module) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()}, assign=True)


def by_fused_adam(model: nn.Module) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    with torch.enable_grad():
        model(torch.randn(3, 2, 32))[0].square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("change", "layout", "scope"),
    crossed(
        list(
            product(
                [by_data, by_set, by_averaging, by_numpy, by_loading, by_fused_adam],
                ["svd", "split", "paired"],
                ["integrated", "separate"],
            )
        ),
        1,
    ),
)
def test_3_outputs_are_those_of_the_present_parameters(
    change: Callable[[nn.Module], None], layout: str, scope: str
) -> None:
    model = compact(nn.LSTM(32, 24), budget=1500, layout=layout, scope=scope)
    x = torch.randn(3, 2, 32)
    with torch.no_grad():
        before = model(x)[0]
        assert torch.equal(model(x)[0], before)
        change(model)
        assert near(model(x)[0], copy.deepcopy(model)(x)[0], 1e-6)
        assert not near(model(x)[0], before, 1e-3)


def test_3_a_frozen_layer_does_not_look() -> None:
    model = compact(nn.LSTM(32, 24), budget=1500, layout="split")
    assert isinstance(model, htcompress.nn.HTRecurrent)
    x = torch.randn(3, 2, 32)
    with torch.no_grad():
        model.freeze()
        before = model(x)[0]
        by_data(model)
        assert torch.equal(model(x)[0], before)
        model.freeze(False)
        assert not torch.equal(model(x)[0], before)


# ---- 4: the order of units ----------------------------------------------------------------------------------


class Prototypes(nn.Module):
    """Its class means live in a buffer that only `predict` reads; its last state is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(24, 32, batch_first=True)
        self.head = nn.Linear(32, 3)
        self.register_buffer("means", torch.randn(4, 32))

    def forward(self, x: Tensor) -> Tensor:
        states, (self.last, _) = self.rnn(x)
        return self.head(states[:, -1])

    def predict(self, x: Tensor) -> Tensor:
        return torch.cdist(self.rnn(x)[0][:, -1], self.means)


def test_4_nobody_sees_the_order_of_units(tmp_path: Path) -> None:
    model = Prototypes().eval()
    data = [clips(seed) for seed in range(6)]
    result = htcompress.compress(model, budget=4000, layout="split", calibration=data)
    assert result.model is not None
    direction = result.modules["rnn"].directions()["l0"]
    assert direction.order is not None, "the case is about a stored order"
    assert result.report.totals.parameters_after == sum(
        value.numel() for name, value in result.tensors.items() if name.startswith("rnn.")
    )
    x = clips(9)
    wanted, _ = model.rnn(x)
    found, _ = result.model.rnn(x)
    # Each unit is most like itself.
    alike = torch.corrcoef(torch.cat([found.flatten(0, 1).T, wanted.flatten(0, 1).T]))[:32, 32:]
    assert float((alike.argmax(1) == torch.arange(32)).float().mean()) > 0.7
    htcompress.save(result, tmp_path / "out")
    again = htcompress.load(tmp_path / "out", Prototypes().eval())
    assert torch.equal(again.predict(x), result.model.predict(x))


def test_4_the_order_costs_nothing_where_nothing_is_folded() -> None:
    data = [clips(seed) for seed in range(4)]
    result = htcompress.compress(Prototypes(), budget=1500, layout="svd", calibration=data)
    assert result.modules["rnn"].directions()["l0"].order is None


@pytest.mark.parametrize("unit_order", ["keep", "readers", "auto"])
def test_4_a_switch(unit_order: str, tmp_path: Path) -> None:
    model = Around(nn.LSTM(24, 32, batch_first=True), 32).eval()
    data = [clips(seed) for seed in range(6)]
    result = htcompress.compress(
        model,
        budget=1200,
        layout="split",
        calibration=data,
        training=data,
        unit_order=unit_order,
        finetuning=FineTuning(steps=2),
    )
    assert result.report.layers[0].units_reordered == (unit_order == "readers")
    assert (result.modules["rnn"].directions()["l0"].order is not None) == (unit_order == "auto")
    assert ("units" in result.config["layers"]["rnn"]) == (unit_order == "readers")


# ---- 6, 7: what is reported ---------------------------------------------------------------------------------


def test_6_multiplications_are_counted_as_they_run() -> None:
    made = htcompress.compress(nn.LSTM(256, 256), budget=12_000, layout="svd", scope="integrated")
    (direction,) = made.modules[""].directions().values()
    assert direction.joint is not None
    rank = direction.joint.rank or 0
    assert made.report.totals.macs_per_step_after == rank * (256 + 1024) + rank * (256 + 1024)


@pytest.mark.parametrize("name", ["mse", "loss", "val_loss", "error", "wer", "CER", "der", "eer", "ppl", "rmse", "mae"])
def test_7_the_direction_of_an_error_is_asked_for(name: str) -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        return {name: 1.0}

    with pytest.raises(TaskError, match="higher_is_better = False"):
        htcompress.compress(tagger(), budget=300, evaluate=evaluate)
    made = htcompress.compress(tagger(), budget=300, evaluate=evaluate, higher_is_better=False)
    assert made.report.quality.higher_is_better is False


@pytest.mark.parametrize("name", ["accuracy", "f1", "metric", "accuracy_per_class", "bleu", "percent_right", "auc"])
def test_7_other_names_need_no_word(name: str) -> None:
    made = htcompress.compress(tagger(), budget=300, evaluate=lambda model: {name: 1.0})
    assert made.report.quality.higher_is_better is True


# ---- 8: tied layers -----------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(24, 24, batch_first=True)
        self.second = nn.LSTM(24, 24, batch_first=True)
        for name, parameter in list(self.first.named_parameters()):
            setattr(self.second, name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[0])[0]


@pytest.mark.parametrize("with_data", [False, True])
def test_8_tied_layers_are_one(with_data: bool, tmp_path: Path) -> None:
    model = Tied().eval()
    data = {"calibration": [clips()]} if with_data else {}
    numbers = sum(p.numel() for p in model.parameters())
    result = htcompress.compress(model, budget=1500, **data)
    assert result.model is not None
    assert list(result.modules) == ["first"]
    assert result.report.totals.parameters_before == numbers
    assert 1000 < result.report.totals.parameters_after <= 1500
    words = sum(b.numel() for b in result.model.buffers())
    assert sum(p.numel() for p in result.model.parameters()) + words == result.report.totals.parameters_after
    htcompress.save(result, tmp_path / "out")
    assert torch.equal(htcompress.load(tmp_path / "out", Tied().eval())(clips()), result.model(clips()))
    assert near(compact(model, **data)(clips()), model(clips()))


def test_8_tied_layers_without_a_task(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    model = Tied().eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    save_model(model, str(tmp_path / "model.safetensors"))
    for name in ("model.pt", "model.safetensors"):
        made = htcompress.convert(tmp_path / name, goal=Goal(budget=BEYOND))
        assert made.report.totals.parameters_before == sum(p.numel() for p in model.parameters())
        htcompress.save(made, tmp_path / "out")
        assert near(htcompress.load(tmp_path / "out", Tied().eval())(clips()), model(clips()))
    assert (
        tmp_path / "out" / "model.safetensors"
    ).stat().st_size < 1.2 * 4 * made.report.totals.parameters_after + 3000


# ---- 9, 10, 20: files -----------------------------------------------------------------------------------------


def test_10_averaged_weights_are_named_and_can_be_chosen(tmp_path: Path, htc: Command) -> None:
    raw, averaged = tagger(0).state_dict(), tagger(1).state_dict()
    torch.save({"state_dict": raw, "state_dict_ema": averaged}, tmp_path / "model.pt")
    write_task(tmp_path / "task.py")
    arguments = ("convert", "model.pt", "--budget", "10m", "--task", "task.py", "--no-finetune", "-o")
    plain = htc(*arguments, "raw")
    assert "also holds state_dict_ema" in plain.err
    assert htc(*arguments, "ema", "--weights", "state_dict_ema").code == 0
    assert near(htcompress.load(tmp_path / "raw", Tagger())(clips()), tagger(0)(clips()))
    assert near(htcompress.load(tmp_path / "ema", Tagger())(clips()), tagger(1)(clips()))


SPLIT_TASK = """
def model():
    from net import Tagger
    return Tagger()

def calibration():
    from torch.utils.data import DataLoader
    from data import Clips
    for x, _ in DataLoader(Clips(), batch_size=4, num_workers=2, multiprocessing_context="spawn"):
        yield x
"""

NET = """
import torch
from torch import nn

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(24, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        from late import last
        return self.head(last(self.rnn(x)[0]))
"""

DATA = """
import torch

class Clips(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        import late
        return torch.randn(5, 24, generator=torch.Generator().manual_seed(index)), 1
"""


def test_20_a_tasks_neighbours_are_found_at_any_time(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    for name, text in {
        "task": SPLIT_TASK,
        "net": NET,
        "data": DATA,
        "late": "def last(x):\n    return x[:, -1]\n",
    }.items():
        (folder / f"{name}.py").write_text(text)
    save_tagger(folder / "model.pt")
    program = "from htcompress_cli.main import run\nif __name__ == '__main__':\n    run()\n"
    (tmp_path / "main.py").write_text(program)
    command = ["main.py", "convert", "deep/model.pt", "--budget", "300", "--task", "deep/task.py", "--no-finetune"]
    ended = subprocess.run(
        [sys.executable, *command, "-o", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "report.json").is_file()


def test_20_classes_of_a_task_reach_spawned_workers(tmp_path: Path) -> None:
    text = (
        "class Own(torch.utils.data.Dataset):\n    def __len__(self):\n        return 8\n"
        "    def __getitem__(self, index):\n        return torch.full((5, 24), float(index))\n\n"
        "def calibration():\n    return torch.utils.data.DataLoader(Own(), batch_size=4, num_workers=1, "
        'multiprocessing_context="spawn")'
    )
    write_task(tmp_path / "task.py", text)
    made = htcompress.convert(
        save_tagger(tmp_path / "model.pt"), goal=Goal(budget=300), task=tmp_path / "task.py", finetuning=None
    )
    assert made.report.timings_s.statistics is not None


# ---- 11 to 16: crashes, or refusals of sound input ------------------------------------------------------------


def test_12_one_unit_stays_dense() -> None:
    model = nn.LSTM(16, 1)
    result = htcompress.compress(model, ratio=1.1, calibration=[torch.randn(6, 4, 16)])
    assert result.model is not None
    assert near(
        compact(model, calibration=[torch.randn(6, 4, 16)])(torch.ones(2, 1, 16))[0], model(torch.ones(2, 1, 16))[0]
    )


class Words(nn.Module):
    def __init__(self, sparse: bool = False, size: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, size, sparse=sparse)
        self.rnn = nn.LSTM(size, size, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.embed(x))[0]


def test_13_inputs_of_low_rank() -> None:
    tokens = torch.randint(60, (16, 70))
    model = Words(size=256)
    result = htcompress.compress(model, budget=300_000, calibration=[tokens], scope="input", layout="svd")
    assert result.report.totals.parameters_after <= 300_000


@pytest.mark.parametrize(
    ("kind", "dtype"),
    crossed(list(product([nn.LSTM, nn.GRU, nn.RNN], [torch.float16, torch.bfloat16, torch.float32, torch.float64])), 1),
)
def test_14_every_precision(dtype: torch.dtype, kind: type[nn.Module], tmp_path: Path) -> None:
    model = Around(kind(24, 8, batch_first=True)).to(dtype).eval()
    x = clips().to(dtype)
    data = [clips(seed).to(dtype) for seed in range(4)]
    plain = htcompress.compress(model, budget=400)
    assert plain.model is not None
    assert plain.model(x).dtype == dtype
    tuned = htcompress.compress(
        model, budget=400, calibration=data, training=data, finetuning=FineTuning(steps=5, check_every=5)
    )
    assert tuned.model is not None
    assert {p.dtype for p in tuned.model.parameters()} == {dtype}
    assert torch.isfinite(tuned.model(x)).all()
    htcompress.save(tuned, tmp_path / "out")
    again = htcompress.load(tmp_path / "out", Around(kind(24, 8, batch_first=True)).to(dtype).eval())
    assert torch.equal(again(x), tuned.model(x))
    tolerance = 30 * torch.finfo(dtype).eps
    assert near(compact(model, calibration=data)(x).double(), model(x).double(), tolerance)


def test_15_every_tensor_has_a_home_of_its_own() -> None:
    # A device that holds no numbers: whatever meets it by mistake fails at once.
    torch.set_default_device("meta")
    try:
        model = Around(nn.LSTM(24, 8, batch_first=True, device="cpu")).to_empty(device="cpu")
        with torch.device("cpu"):
            model = tagger()
            data = [clips(seed) for seed in range(4)]
        result = htcompress.compress(
            model, budget=400, calibration=data, training=data, finetuning=FineTuning(steps=3, check_every=2)
        )
    finally:
        torch.set_default_device(None)
    assert result.model is not None
    assert torch.isfinite(result.model(data[0])).all()


class Uncopyable(Tagger):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.extra = nn.utils.spectral_norm(nn.Linear(3, 3))
        self.result = self.head.weight.sum() * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(super().forward(x)) * self.result


def test_16_models_that_cannot_be_copied() -> None:
    model = Uncopyable()
    model(clips())
    model.eval()
    with pytest.raises((RuntimeError, TypeError)):
        copy.deepcopy(model)
    result = htcompress.compress(
        model, budget=BEYOND, calibration=[clips()], evaluate=lambda m: float(m(clips()).sum())
    )
    assert result.model is not None
    assert near(result.model(clips()), model(clips()))


# ---- 17: loading ----------------------------------------------------------------------------------------------


NORMED = """
class Normed(Tagger):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.norm(super().forward(x)) * self.scale

    def _load_from_state_dict(self, state, prefix, *rest):
        if prefix + "gain" in state:
            state[prefix + "scale"] = state.pop(prefix + "gain")
        super()._load_from_state_dict(state, prefix, *rest)

    def get_extra_state(self):
        return {"version": 3, "names": ("a", "b")}

    def set_extra_state(self, state):
        self.seen = state

def model():
    return Normed()
"""


@pytest.mark.parametrize("with_task", [True, False])
def test_17_load_state_dict_is_the_judge(tmp_path: Path, with_task: bool) -> None:
    write_task(tmp_path / "task.py", NORMED)
    scope: dict[str, Any] = {}
    exec((tmp_path / "task.py").read_text(), scope)
    model = scope["Normed"]().eval()
    with torch.no_grad():
        model.scale.mul_(torch.tensor([1.0, 2.0, 3.0]))
    state = dict(model.state_dict())
    del state["norm.num_batches_tracked"]
    state["gain"] = state.pop("scale")
    state["_extra_state"] = {"version": 3, "names": ("a", "b")}
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "model.pt")
    task = tmp_path / "task.py" if with_task else None
    made = htcompress.convert(tmp_path / "model.pt", goal=Goal(budget=BEYOND), task=task, finetuning=None)
    htcompress.save(made, tmp_path / "out")
    again = htcompress.load(tmp_path / "out", scope["Normed"]().eval())
    assert near(again(clips()), model(clips()))
    assert again.seen == {"version": 3, "names": ("a", "b")}


@pytest.mark.parametrize(
    ("stored", "own"),
    [
        ("rnn.", "module.rnn."),
        pytest.param("module.rnn.", "rnn.", marks=pytest.mark.full),
        ("net._orig_mod.rnn.", "net.rnn."),
        pytest.param("model.rnn.", "rnn.", marks=pytest.mark.full),
    ],
)
def test_17_prefixes_on_either_side(tmp_path: Path, stored: str, own: str) -> None:
    wrapped = "rnn"
    lines = ["class Box(nn.Module):", "    def __init__(self, inner, name):", "        super().__init__()"]
    lines += ["        setattr(self, name, inner)", "        self.name = name"]
    lines += ["    def forward(self, x):", "        return getattr(self, self.name)(x)", "", "def model():"]
    lines += ["    made = nn.LSTM(24, 8, batch_first=True)"]
    for name in reversed(own.removesuffix(".").split(".")):
        lines.append(f"    made = Box(made, {name!r})")
    lines.append("    return made")
    task = write_task(tmp_path / "task.py", "\n".join(lines), "del evaluate, training, loss")
    lstm = nn.LSTM(24, 8, batch_first=True)
    torch.save({stored + name: value for name, value in lstm.state_dict().items()}, tmp_path / "model.pt")
    made = htcompress.convert(tmp_path / "model.pt", goal=Goal(budget=BEYOND), task=task, finetuning=None)
    assert made.model is not None
    assert near(made.model(clips())[0], lstm(clips())[0])
    plain = htcompress.convert(tmp_path / "model.pt", goal=Goal(budget=BEYOND))
    htcompress.save(plain, tmp_path / "out")
    scope: dict[str, Any] = {}
    exec(task.read_text(), scope)
    assert near(htcompress.load(tmp_path / "out", scope["model"]())(clips())[0], lstm(clips())[0])
    assert wrapped in stored


# ---- 18: data and outputs -------------------------------------------------------------------------------------


Pair = namedtuple("Pair", "logits states")


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


class Putting(Tagger):
    def __init__(self, put: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.put = put

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Any:
        out = self.rnn(x)[0]
        if lengths is not None:
            out = out * (torch.arange(x.shape[1])[None, :, None] < lengths[:, None, None])
        return self.put(self.head(out[:, -1]))


@pytest.mark.parametrize(
    "put",
    [
        lambda x: {"logits": x},
        lambda x: Pair(x, [x]),
        Output,
        lambda x: Categorical(logits=x),
        lambda x: [x, None, "a"],
    ],
    ids=["dict", "named tuple", "dataclass", "distribution", "list"],
)
def test_18_outputs_of_every_sort(put: Callable[[Tensor], Any]) -> None:
    data = [clips(seed) for seed in range(4)]
    result = htcompress.compress(
        Putting(put), budget=400, calibration=data, training=data, finetuning=FineTuning(steps=3, check_every=3)
    )
    assert result.report.layers[0].matrices[0].error["outputs"] is not None


LENGTHS = torch.tensor([5, 3, 2, 4])


def forms() -> Iterator[Any]:
    x, y = torch.cat([clips(seed) for seed in range(4)]), torch.randint(3, (16,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    yield pytest.param(loader, loader, id="a loader for both")
    alone = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
    yield pytest.param(alone, loader, id="lists")
    pairs = [(clips(seed), LENGTHS) for seed in range(4)]
    yield pytest.param(pairs, pairs, id="lengths without targets")
    yield pytest.param(pairs, [(pair, y[:4]) for pair in pairs], id="lengths with targets")
    named = [{"x": clips(seed), "lengths": LENGTHS} for seed in range(4)]
    yield pytest.param(named, named, id="dicts")
    yield pytest.param(named, [(item, y[:4]) for item in named], id="dicts with targets")
    yield pytest.param(None, [(*pair, y[:4]) for pair in pairs], id="triples")


@pytest.mark.parametrize(("calibration", "training"), list(forms()))
def test_18_data_as_loaders_give_it(calibration: Any, training: Any) -> None:
    seen: list[Any] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(target)
        return nn.functional.cross_entropy(output, target)

    model = Putting(lambda x: x)
    htcompress.compress(
        model, budget=400, calibration=calibration, training=training, loss=loss, finetuning=FineTuning(steps=2)
    )
    assert all(target.dtype == torch.int64 and target.shape == (4,) for target in seen)
    assert not any(torch.equal(target, LENGTHS) for target in seen)


# ---- 19: tracing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["svd", "split", "paired"])
def test_19_export_trace_compile(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = htcompress.compress(tagger(), budget=400, layout=layout)
    assert result.model is not None
    model, x = result.model, clips()
    wanted = model(x)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    program = torch.export.export(model, (x,), dynamic_shapes=({**sizes},), strict=False).module()
    longer = torch.randn(7, 9, 24)
    assert near(program(longer), model(longer))
    # Sizes are tensors while torch traces: no shapes in signatures to be checked.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,))
        assert near(traced(longer), model(longer))
    assert near(torch.compile(model, backend="eager")(x), wanted)


# ---- 21: the rest ---------------------------------------------------------------------------------------------


def test_21_sparse_gradients() -> None:
    tokens = [torch.randint(60, (4, 7)) for _ in range(4)]
    result = htcompress.compress(
        Words(sparse=True), budget=4000, calibration=tokens, training=tokens, finetuning=FineTuning(steps=3)
    )
    assert result.report.totals.parameters_after <= 4000


@pytest.mark.parametrize(
    "options",
    [
        {"steps": -3},
        {"steps": 2.5},
        {"check_every": 0},
        {"time_limit": 0},
        {"time_limit": float("nan")},
        {"learning_rate": -1},
        {"patience": 0},
        {"held_out": 0},
        {"clip": 0},
        {"hidden": -1},
    ],
)
def test_21_fine_tuning_is_validated(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options)).replace("_", " ")):
        FineTuning(**options)


def test_21_a_layers_second_name(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.LSTM(24, 8, batch_first=True)
            self.alias = self.encoder

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(x)[0]

    assert list(htcompress.compress(Named(), budget=400, layers="alias").modules) == ["encoder"]


def test_21_subprocesses_do_not_write_into_the_json(tmp_path: Path) -> None:
    write_task(tmp_path / "task.py", "import subprocess\nsubprocess.run(['echo', 'hello'])\nprint('loaded')")
    save_tagger(tmp_path / "model.pt")
    command = ["convert", "model.pt", "--budget", "300", "--task", "task.py", "--no-finetune", "--json", "-o", "out"]
    ended = subprocess.run(
        [sys.executable, "-c", "from htcompress_cli.main import run; run()", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert htcompress.Report.from_json(ended.stdout).totals == read_report(tmp_path / "out").totals
    assert "hello" in ended.stderr


def test_every_refusal_is_ours() -> None:
    for error in (CheckpointError, RequestError, TaskError):
        assert issubclass(error, HTCompressError)
