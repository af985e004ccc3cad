"""The loss of fine-tuning against its definition, term by term."""

from __future__ import annotations

import copy

import pytest
import torch
from small import HIDDEN, INPUTS, Tagger, clips, tagger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

from htcompress import Compressed
from htcompress.finetuning.objective import Objective
from htcompress.model.replace import replace_modules
from htcompress.nn import HTLSTM


@pytest.fixture
def student(compressed: Compressed) -> Tagger:
    model = copy.deepcopy(compressed.model)
    assert isinstance(model, Tagger)
    return model


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b) ** 2).mean() / b.var(correction=0))


@torch.no_grad()
def test_the_sum_of_outputs_states_and_targets(student: Tagger) -> None:
    teacher, x = tagger(), clips(3, batch=8)
    target = torch.arange(8) % 3
    outputs = relative(student(x), teacher(x))
    states = relative(student.rnn(x)[0], teacher.rnn(x)[0])
    entropy = float(F.cross_entropy(student(x), target))
    objective = Objective(student, teacher, F.cross_entropy, hidden=0.25)
    assert float(objective((x,), target)) == pytest.approx(outputs + 0.25 * states + entropy, rel=1e-5)
    assert float(objective((x,), target, answer=objective.answer((x,)))) == pytest.approx(outputs + entropy, rel=1e-5)
    assert float(objective((x,), None)) == pytest.approx(outputs + 0.25 * states, rel=1e-5)
    assert objective.distance((x,), teacher(x)) == pytest.approx(outputs, rel=1e-5)
    assert states > 0.01


class Unrolled(nn.Module):
    """Two recurrent modules, one of them called step by step, the other on packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = nn.LSTM(INPUTS, HIDDEN)
        self.writer = nn.GRUCell(HIDDEN, HIDDEN)

    def forward(self, xs: list[Tensor]) -> Tensor:
        _, (state, _) = self.reader(pack_sequence(xs, enforce_sorted=False))
        out = state[0]
        for _ in range(3):
            out = self.writer(out, out)
        return out


@torch.no_grad()
def test_states_of_cells_and_packed_sequences() -> None:
    torch.manual_seed(0)
    teacher = Unrolled()
    student = copy.deepcopy(teacher)
    student.reader.weight_hh_l0 += 0.1
    student.writer.weight_hh += 0.1
    from htcompress import compress

    made = compress(student, error=0.0).model
    assert made is not None
    xs = [torch.randn(length, INPUTS) for length in (4, 7, 2)]
    read = [
        relative(a.data, b.data)
        for a, b in [(m(pack_sequence(xs, enforce_sorted=False))[0] for m in (student.reader, teacher.reader))]
    ]

    def written(model: Unrolled) -> Tensor:
        _, (state, _) = model.reader(pack_sequence(xs, enforce_sorted=False))
        states = [model.writer(state[0], state[0])]
        for _ in range(2):
            states.append(model.writer(states[-1], states[-1]))
        return torch.cat(states)

    expected = 0.5 * (read[0] + relative(written(student), written(teacher)))
    total = float(Objective(made, teacher, None, hidden=1.0)((xs,), None))
    assert total - relative(made(xs), teacher(xs)) == pytest.approx(expected, rel=1e-3)


def test_no_hooks_are_left_behind(student: Tagger) -> None:
    teacher = tagger()
    Objective(student, teacher, None, hidden=1.0)((clips(0),), None).backward()
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())
    assert isinstance(student.rnn, HTLSTM)
    assert replace_modules(teacher, {}) is not teacher
