"""Arrays by the names of a graph's inputs: cut into batches, calls in a row, constants; what does not fit is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from htcompress.errors import TaskError
from htcompress.graphs.feeds import Feeds, Value, read_feeds

X = Value("x", (None, None, 20), "tensor(float)")
X_OF = ("x", (None, None, 20), "tensor(float)")
FRAME = Value("frame", (1, 10), "tensor(float)")
STATE = Value("state", (1, 1, 12), "tensor(float)")
RATE = Value("rate", (), "tensor(int64)")
Y = Value("y", (None, None, 5), "tensor(float)")
OUT = Value("stateN", (1, 1, 12), "tensor(float)")


def saved(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path / "x.npz", **arrays)  # type: ignore[arg-type]
    return path / "x.npz"


def shapes(feeds: Feeds, name: str) -> list[list[tuple[int, ...]]]:
    return [[call[name].shape for call in calls] for calls in feeds.sequences()]


def test_batches_along_the_first_axis(tmp_path: Path) -> None:
    feeds = read_feeds(saved(tmp_path, x=np.zeros((600, 7, 20), np.float64)), [X], [Y])
    assert (feeds.samples, feeds.calls) == (600, False)
    found = shapes(feeds, "x")
    assert found[0] == [(16, 7, 20)]
    assert sum(calls[0][0] for calls in found) == 600
    assert next(feeds.sequences())[0]["x"].dtype == np.float32
    # Few samples make small batches: some are trained on, others held out.
    assert shapes(feeds.part(0, 40), "x") == [[(2, 7, 20)]] * 20


def test_samples_that_stand_along_another_axis(tmp_path: Path) -> None:
    """Cut along its steps, a graph would be shown one step at a time, and its states be learned from nothing."""
    value = Value("x", (None, None, 20), "tensor(float)", ("time", "batch", ""))
    with pytest.raises(
        TaskError, match=r"takes \(time, batch, 20\), whose samples stand along batch; .* whole inputs"
    ) as told:
        read_feeds(saved(tmp_path, x=np.zeros((7, 16, 20))), [value], [Y])
    assert "(samples, time, 1, 20)" in str(told.value)
    feeds = read_feeds(saved(tmp_path, x=np.zeros((3, 7, 1, 20))), [value], [Y])
    assert shapes(feeds, "x") == [[(7, 1, 20)]] * 3
    for axes in (
        ("batch", "time", ""),
        ("n", "batch_size", ""),
        ("", "batch", ""),
        ("samples", "n", ""),
        ("bsz", "n", ""),
        (),
    ):
        feeds = read_feeds(saved(tmp_path, x=np.zeros((600, 7, 20))), [Value(*X_OF, axes)], [Y])
        assert feeds.samples == 600


def test_a_fixed_batch_is_filled(tmp_path: Path) -> None:
    value = Value("x", (4, None, 20), "tensor(float)")
    feeds = read_feeds(saved(tmp_path, x=np.zeros((10, 7, 20))), [value], [Y])
    assert shapes(feeds, "x") == [[(4, 7, 20)], [(4, 7, 20)]]


def test_too_few_for_a_fixed_batch(tmp_path: Path) -> None:
    value = Value("x", (4, None, 20), "tensor(float)")
    with pytest.raises(TaskError, match="has 3 samples, and the model takes 4 at a time"):
        read_feeds(saved(tmp_path, x=np.zeros((3, 7, 20))), [value], [Y])


def test_one_array_needs_no_name_and_whole_inputs_come_one_by_one(tmp_path: Path) -> None:
    feeds = read_feeds(saved(tmp_path, anything=np.zeros((3, 2, 7, 20))), [X], [Y])
    assert shapes(feeds, "x") == [[(2, 7, 20)]] * 3


def test_calls_in_a_row_with_states_and_constants(tmp_path: Path) -> None:
    arrays = {"frame": np.arange(240.0).reshape(6, 4, 10), "rate": np.array(16000)}
    feeds = read_feeds(saved(tmp_path, **arrays), [FRAME, STATE, RATE], [Y, OUT])
    assert feeds.calls
    assert dict(feeds.states) == {"state": "stateN"}
    assert shapes(feeds, "frame") == [[(1, 10)] * 4] * 6
    first = next(feeds.sequences())
    assert [call["frame"][0, 0] for call in first] == [0, 10, 20, 30]
    assert first[0]["rate"] == np.int64(16000)
    assert first[0]["rate"].shape == ()
    assert not first[0]["state"].any()


def test_a_state_of_one_size_is_that_of_one_sample(tmp_path: Path) -> None:
    """An open first axis is then the steps of one sample: samples are never put behind each other in it."""
    value = Value("steps", (None, 10), "tensor(float)")
    feeds = read_feeds(saved(tmp_path, steps=np.arange(1920.0).reshape(48, 4, 10)), [value, STATE], [Y, OUT])
    assert feeds.calls
    assert shapes(feeds, "steps") == [[(1, 10)] * 4] * 48
    feeds = read_feeds(saved(tmp_path, steps=np.arange(1920.0).reshape(8, 2, 12, 10)), [value, STATE], [Y, OUT])
    assert feeds.calls
    assert shapes(feeds, "steps") == [[(12, 10)] * 2] * 8
    first, second = next(feeds.sequences())
    assert (first["steps"].min(), second["steps"].min()) == (0, 120)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, ("holds nothing", "x (any, any, 20)")),
        (
            {"z": np.zeros((3, 7, 20)), "x": np.zeros((3, 7, 20))},
            ("holds z, x", "Leave out z, or name what is measured against with --targets z"),
        ),
        ({"x": np.zeros((3, 7, 21))}, ("shape (3, 7, 21)", "takes (any, any, 20)")),
        ({"x": np.zeros((3, 20))}, ("shape (3, 20)", "first axis is the samples")),
        ({"x": np.zeros((0, 7, 20))}, ("unlike numbers of samples (x 0)",)),
    ],
)
def test_what_does_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], words: tuple[str, ...]) -> None:
    with pytest.raises(TaskError) as caught:
        read_feeds(saved(tmp_path, **arrays), [X], [Y])
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_input_that_nothing_is_passed_on_to(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no array for the input rate \(\), and no output"):
        read_feeds(saved(tmp_path, frame=np.zeros((6, 4, 10))), [FRAME, STATE, RATE], [Y, OUT])


def test_no_archive(tmp_path: Path) -> None:
    with pytest.raises(
        TaskError, match=r"no file .*Give an .npz file with an array for each input: x \(any, any, 20\)"
    ):
        read_feeds(tmp_path / "none.npz", [X], [Y])
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(TaskError, match=r"is no .npz file of plain arrays"):
        read_feeds(tmp_path / "bad.npz", [X], [Y])
    np.savez(tmp_path / "objects.npz", x=np.array([object()]))
    with pytest.raises(TaskError, match=r"is no .npz file of plain arrays"):
        read_feeds(tmp_path / "objects.npz", [X], [Y])
