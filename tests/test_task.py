"""The user's task: what it may hold, and how its faults are told."""

from __future__ import annotations

import sys
from collections import namedtuple
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Tagger, clips, tagger, write_task
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from htcompress.data import arguments, training_item
from htcompress.errors import HTCompressError, ShapeError, TaskError
from htcompress.task import Task, load_task, metrics_of, output_of

X, Y = torch.zeros(2), torch.ones(1)
PACKED = pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)])
Pair = namedtuple("Pair", "first second")


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Task]:
    return lambda *added: load_task(write_task(tmp_path / "task.py", *added))


def complaint(action: Callable[[], object]) -> str:
    """The message of the `TaskError` that an action raises: a few sentences on one line."""
    with pytest.raises(TaskError) as caught:
        action()
    message = str(caught.value)
    assert message.endswith(".")
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    return message


# ---- what a whole task gives --------------------------------------------------------------------------------


def test_a_whole_task(task: Callable[..., Task]) -> None:
    whole = task()
    model = whole.model()
    assert type(model).__name__ == "Tagger"
    assert [tuple(x.shape) for x in whole.calibration()] == [(8, 5, 24)] * 4
    pairs = list(whole.training())
    assert len(pairs) == 8
    x, y = pairs[0]
    loss = whole.loss
    assert loss is not None
    assert torch.equal(loss(model(x), y), nn.functional.cross_entropy(model(x), y))
    metrics = whole.evaluate(model)
    assert list(metrics) == ["accuracy", "classes"]
    assert 0 <= metrics["accuracy"] <= 1
    assert whole.higher_is_better is None
    assert whole.can_train


def test_training_defaults_to_calibration_without_targets(task: Callable[..., Task]) -> None:
    bare = task("del training, loss, evaluate", "higher_is_better = False")
    assert torch.equal(next(iter(bare.training())), next(iter(bare.calibration())))
    assert len(list(bare.training())) == 4
    assert bare.loss is None
    assert bare.higher_is_better is False
    assert not bare.has("evaluate")


def test_none_stands_for_a_name_that_is_not_there(task: Callable[..., Task]) -> None:
    bare = task("evaluate = loss = training = calibration = None")
    assert bare.loss is None
    assert not bare.can_train
    assert not bare.has("evaluate")


def test_every_pass_starts_anew(task: Callable[..., Task]) -> None:
    whole = task()
    for _ in range(2):
        assert len(list(whole.calibration())) == 4
        assert len(list(whole.training())) == 8


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (X, (X,)),
        ((X, Y), (X, Y)),
        ((X,), (X,)),
        ({"x": X}, ({"x": X},)),
        (["a", "b"], (["a", "b"],)),
        (PACKED, (PACKED,)),
        ((PACKED, X), (PACKED, X)),
        (None, (None,)),
    ],
)
def test_arguments_of_an_item(item: Any, expected: tuple[Any, ...]) -> None:
    assert arguments(item) == expected


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ((X, Y), ((X,), Y)),
        (((X, X), Y), ((X, X), Y)),
        ((PACKED, Y), ((PACKED,), Y)),
        (PACKED, ((PACKED,), None)),
        (X, ((X,), None)),
        ((X,), ((X,), None)),
        ((X, X, X), ((X, X, X), None)),
        (Pair(X, Y), ((X,), Y)),
        (({"x": X}, {"y": Y}), (({"x": X},), {"y": Y})),
    ],
)
def test_arguments_and_target_of_an_item(item: Any, expected: tuple[Any, Any]) -> None:
    assert training_item(item) == expected


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (0.5, {"metric": 0.5}),
        (1, {"metric": 1.0}),
        (torch.tensor(0.25, requires_grad=True), {"metric": 0.25}),
        ({"wer": 0.5, "loss": torch.tensor([2.0])}, {"wer": 0.5, "loss": 2.0}),
        ({1: 2}, {"1": 2.0}),
    ],
)
def test_metrics(result: Any, expected: dict[str, float]) -> None:
    assert metrics_of(result, source="task.py") == expected


@pytest.mark.parametrize(
    "result", [None, "0.9", True, {}, {"a": None}, {"a": "x"}, [0.5], torch.zeros(2), X.bool(), object()]
)
def test_what_is_no_metric(result: Any) -> None:
    message = complaint(lambda: metrics_of(result, source="task.py"))
    assert "evaluate(model) in task.py returned" in message
    assert "expected a float, or a dict of floats" in message


# ---- loading ------------------------------------------------------------------------------------------------


def test_a_module_is_found_beside_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_package").mkdir()
    write_task(tmp_path / "some_package" / "speech_task.py")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert load_task("some_package.speech_task").has("model")
    assert sys.path == path
    # A folder of the module's name is no task file.
    with pytest.raises(TaskError, match=r"some_package lacks model\(\)"):
        load_task("some_package")


def test_a_file_sees_its_own_folder_while_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "helper_of_a_task.py").write_text("SIZE = 7\n")
    path = list(sys.path)
    found = load_task(write_task(tmp_path / "task.py", "import helper_of_a_task\nSIZE = helper_of_a_task.SIZE"))
    assert found.module.SIZE == 7
    assert sys.path == path


def test_two_files_of_one_name_do_not_mix(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        write_task(tmp_path / name / "task.py", f"NAME = {name!r}")
    tasks = [load_task(tmp_path / name / "task.py") for name in "ab"]
    assert [t.module.NAME for t in tasks] == ["a", "b"]


FAULTS: dict[str, tuple[str, list[str]]] = {
    "empty": ("", ["lacks model(), which every command needs", "Define a function"]),
    "model no function": ("model = 3", ["lacks model()"]),
    "syntax": ("def model(:\n    pass", ["has a syntax error in line 1"]),
    "null byte": ("\0", ["has a syntax error"]),
    "raises": ("x = 1\nraise ValueError('no\\nlicence')", ["while it was imported: ValueError: no licence (line 2)"]),
    "no message": ("raise RuntimeError", ["imported: RuntimeError (line 1)"]),
    "import": ("import no_such_library", ["ModuleNotFoundError: No module named 'no_such_library' (line 1)"]),
    "exit": ("import sys\nsys.exit(3)", ["imported: SystemExit: 3 (line 2)"]),
    "helper": ("import broken_helper", ["syntax error in line 2 of ", "broken_helper.py"]),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_file_that_does_not_load(case: str, tmp_path: Path) -> None:
    text, words = FAULTS[case]
    path = tmp_path / "task.py"
    path.write_text(text)
    (tmp_path / "broken_helper.py").write_text("x = 1\ny = (\n")
    modules = set(sys.modules)
    message = complaint(lambda: load_task(path))
    for word in [*words, str(path)]:
        assert word in message
    if case not in ("empty", "model no function"):
        assert not [name for name in set(sys.modules) - modules if "htcompress_task" in name]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("none.py", "There is no task file none.py. Give a Python file (task.py) or a module (package.module)."),
        ("folder/none.py", "There is no task file folder/none.py"),
        (
            "no_such_module",
            "There is no module no_such_module. Give a Python file (task.py) or a module (package.module)",
        ),
        ("no_such_package.task", "There is no module no_such_package.task"),
        ("json", "The task json lacks model()"),
        ("not a name", "There is no module not a name"),
        ("", "failed while it was imported: ValueError"),
        (".relative", "failed while it was imported: TypeError"),
    ],
)
def test_nothing_to_load(source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in complaint(lambda: load_task(source))


def test_a_file_of_a_package_is_told_its_name(tmp_path: Path) -> None:
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "net.py").write_text("model = dict")
    (package / "task.py").write_text("\nfrom .net import model\n")
    said = complaint(lambda: load_task(package / "task.py"))
    assert "imports from its package by a dot (line 2)" in said
    assert "Give own_package.task in its place, in the folder that holds own_package/." in said


def test_an_interrupt_while_a_file_loads_is_an_interrupt(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_task(tmp_path / "task.py")


# ---- running ------------------------------------------------------------------------------------------------


Use = Callable[[Task], object]
USES: dict[str, Use] = {
    "model": Task.model,
    "calibration": lambda t: list(t.calibration()),
    "training": lambda t: list(t.training()),
    "loss": lambda t: t.loss and t.loss(X, Y),
    "evaluate": lambda t: t.evaluate(tagger()),
}


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise ValueError('no data')", "raised ValueError: no data (line "),
        ("raise KeyError", "raised KeyError (line "),
        ("import sys; sys.exit(1)", "raised SystemExit: 1 (line "),
        ("assert False", "raised AssertionError (line "),
    ],
)
def test_what_a_function_raises_is_told(task: Callable[..., Task], name: str, body: str, words: str) -> None:
    broken = task(f"def {name}(*args):\n    {body}")
    message = complaint(lambda: USES[name](broken))
    line = len(Path(broken.source).read_text().splitlines())
    assert f"{name}() in {broken.source} {words}{line})" in message
    assert "--debug shows the traceback" in message


def test_a_fault_after_some_batches_is_told(task: Callable[..., Task]) -> None:
    broken = task("def calibration():\n    yield torch.zeros(1)\n    raise OSError('disk gone')")
    assert "calibration() in" in complaint(lambda: list(broken.calibration()))


@pytest.mark.parametrize("name", ["calibration", "training"])
def test_batches_that_were_not_yielded(task: Callable[..., Task], name: str) -> None:
    broken = task(f"def {name}():\n    pass")
    message = complaint(lambda: USES[name](broken))
    assert f"{name}() in {broken.source} returned NoneType; expected batches. Yield them" in message


def test_a_list_and_a_loader_are_batches(task: Callable[..., Task]) -> None:
    listed = task("def calibration():\n    return [torch.zeros(1), torch.ones(1)]")
    assert [float(x) for x in listed.calibration()] == [0, 1]
    loaded = task("def calibration():\n    return torch.utils.data.DataLoader(torch.arange(6.0), batch_size=3)")
    assert [tuple(x.shape) for x in loaded.calibration()] == [(3,), (3,)]


@pytest.mark.parametrize("made", ["None", "Tagger", "{}", "Tagger().state_dict()"])
def test_a_model_that_is_none(task: Callable[..., Task], made: str) -> None:
    broken = task(f"def model():\n    return {made}")
    assert "expected a torch.nn.Module" in complaint(broken.model)


@pytest.mark.parametrize("name", ["calibration", "training", "evaluate"])
def test_a_name_that_is_no_function(task: Callable[..., Task], name: str) -> None:
    broken = task(f"{name} = [1, 2]")
    message = complaint(lambda: USES[name](broken))
    assert f"lacks {name}()" in message
    assert "Define a function of that name" in message


def test_an_interrupt_in_a_function_is_an_interrupt(task: Callable[..., Task]) -> None:
    broken = task("def evaluate(model):\n    raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        broken.evaluate(tagger())


# ---- the model on a batch -----------------------------------------------------------------------------------


def test_an_output() -> None:
    model = tagger()
    assert torch.equal(output_of(model, (clips(),), source="calibration()"), model(clips()))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((torch.zeros(4, 5, 23),), ["calibration() ((4, 5, 23)): RuntimeError", "Expected 24, got 23"]),
        ((clips(), torch.zeros(4)), ["((4, 5, 24), (4,)): TypeError", "positional"]),
        (([clips()],), ["(list): "]),
        ((), ["TypeError"]),
    ],
)
def test_a_batch_that_does_not_fit(given: tuple[Any, ...], words: list[str]) -> None:
    message = complaint(lambda: output_of(tagger(), given, source="calibration()"))
    for word in [
        *words,
        "The model cannot take a batch of calibration()",
        "A tuple is the model's positional arguments",
    ]:
        assert word in message


def test_errors_of_our_own_pass_through() -> None:
    class Picky(Tagger):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ShapeError("five, not six")

    with pytest.raises(HTCompressError, match="five, not six"):
        output_of(Picky(), (clips(),), source="training()")


def test_an_odd_mapping_is_a_mapping() -> None:
    class Metrics(Mapping[str, float]):
        def __getitem__(self, key: str) -> float:
            return 0.5

        def __iter__(self) -> Any:
            return iter(["eer"])

        def __len__(self) -> int:
            return 1

    assert metrics_of(Metrics(), source="task.py") == {"eer": 0.5}
