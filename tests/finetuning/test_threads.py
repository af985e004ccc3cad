"""Small models have one thread, so that what is made of them is the same on any number of cores."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import htcompress
from htcompress.finetuning.distill import distill
from htcompress.model.threads import threads_for_matrices, threads_for_model
from htcompress.request import FineTuning


@pytest.fixture
def _three_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def _lasting(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), threads_for_model(lambda: model(x)):
        return torch.get_num_threads()


@pytest.mark.usefixtures("_three_threads")
@pytest.mark.parametrize(
    ("model", "shape", "threads"),
    [
        # In a time step batch x 4 hidden x hidden, and the inputs' product, which is one for all steps.
        (nn.LSTM(128, 128), (250, 1, 128), 1),  # 130 thousand in the mean
        (nn.LSTM(64, 64, 2), (100, 16, 64), 1),  # 520 thousand
        (nn.LSTM(128, 128), (100, 16, 128), 3),  # 2.1 million
        (nn.GRU(256, 256), (50, 32, 256), 3),  # 12 million
        (nn.Conv1d(64, 64, 9), (8, 64, 400), 3),
        (nn.ReLU(), (8, 400), 1),
    ],
    ids=["streaming", "small", "batch", "gru", "convolution", "nothing"],
)
def test_the_size_of_products_decides(model: nn.Module, shape: tuple[int, ...], threads: int) -> None:
    assert _lasting(model, torch.zeros(shape)) == threads
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("_three_threads")
def test_nothing_is_drawn_and_errors_leave_the_threads() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(ZeroDivisionError), threads_for_model(lambda: torch.rand(7)):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 3
    assert torch.equal(torch.rand(3), wanted)


class Seen(nn.Module):
    """Remembers how many threads it and its copies had where gradients were recorded."""

    threads: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.threads.add(torch.get_num_threads())
        return self.rnn(x)[0]


@pytest.mark.usefixtures("_three_threads")
def test_matrices_of_few_numbers_have_one_thread() -> None:
    for numbers, threads in ((1 << 20, 1), (1 << 22, 3)):
        with threads_for_matrices(numbers):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("_three_threads")
def test_small_models_are_calibrated_and_learn_by_one_thread() -> None:
    torch.manual_seed(0)
    dense = Seen().eval()
    data = [(torch.randn(4, 9, 6),) for _ in range(6)]
    Seen.threads.clear()
    student = htcompress.compress(dense, budget=900, calibration=data).model
    assert Seen.threads == {1}
    Seen.threads.clear()
    distill(student, dense, lambda: ((batch, None) for batch in data), options=FineTuning(steps=3))
    assert Seen.threads == {1}
    assert torch.get_num_threads() == 3
