"""Where fine-tuning stands, what it set out from, and both as JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from htcompress.errors import CheckpointError, TaskError
from htcompress.finetuning.objective import Objective
from htcompress.finetuning.stream import Item, Share
from htcompress.finetuning.taught import fingerprint
from htcompress.finetuning.together import Together
from htcompress.request import FineTuning
from htcompress.values import mapped


@dataclass(frozen=True)
class Progress:
    """Where fine-tuning stands: the step, that at which its stage ends, the held-out loss, and its best so far.

    Attributes:
        unmeasured: how often a batch, held out or not, has had no loss that is a number.
    """

    step: int
    steps: int
    loss: float
    best: float
    unmeasured: int = 0


@dataclass
class Standing:
    """Everything that decides how a run goes on, but for its tensors, its random sequences and its data.

    Attributes:
        stage: which of the stages.
        begin: the step after which it began; `end`: its last.
        step: the last that was taken.
        before: the best held-out loss when the stage began.
        left: seconds that it may take.
        peaks: the learning rate of each parameter at its highest.
        backtracks: how often the steps have been made shorter.
        since: looks at the held-out loss since its last best.
        history: these looks.
    """

    stage: int = 0
    begin: int = 0
    end: int = 0
    step: int = 0
    before: float = 0.0
    left: float | None = None
    peaks: list[float] = field(default_factory=list)
    backtracks: int = 0
    since: int = 0
    history: list[Progress] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The best held-out loss so far."""
        return self.history[-1].best

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> Standing:
        """The inverse of `asdict`."""
        return cls(**{**facts, "history": [Progress(**look) for look in facts["history"]]})


@dataclass(frozen=True)
class Origin:
    """What a run sets out from: what it was asked for, and digests of the model and of the data that is held out.

    Attributes:
        options: those of `FineTuning`, but for `accumulate`: what counts are the batches of a step.
        group: batches of a step, of all processes.
        teacher: whether there is a dense model.
        model: of the student before the first step.
        data: of what is held out; None where it is nothing that can be told apart.
    """

    options: dict[str, Any]
    group: int
    teacher: bool
    model: str | None
    data: str | None

    @classmethod
    def of(cls, objective: Objective, held: Sequence[Item], share: Share, options: FineTuning) -> Origin:
        """That of a run that has not begun."""
        state = objective.student.state_dict()
        asked = {name: value for name, value in asdict(options).items() if name != "accumulate"}
        model = [value for value in state.values() if isinstance(value, Tensor)]
        return cls(
            asked, share.group, objective.teacher is not None, _digest(model), _digest([given for given, _ in held])
        )

    def check_alike(self, together: Together) -> None:
        """Raise `TaskError` where another process has set out from something else than the first."""
        first, *others = together.gather(self)
        for process, other in enumerate(others, start=1):
            if other.model != first.model or other.options != first.options or other.group != first.group:
                raise TaskError(
                    f"Process {process} has another model or other options than process 0. Give all processes the "
                    f"same command and the same output directory."
                )
            if other.teacher != first.teacher:
                having, lacking = (process, 0) if other.teacher else (0, process)
                raise TaskError(
                    f"Process {having} finds the dense checkpoint and process {lacking} does not. Give a path with "
                    f"--teacher that all of them can read."
                )
            if other.data != first.data:
                raise TaskError(
                    f"training() yields other batches in process {process} than in process 0. Let it yield the same in "
                    f"every process, each of which takes its share: seed what it draws, and do not split the data."
                )

    def check_same(self, saved: Mapping[str, Any], source: Path) -> None:
        """Raise `CheckpointError` where a checkpoint belongs to a run that has set out from something else."""
        now = asdict(self)
        wanted, found = ({**facts["options"], "batches of a step": facts["group"]} for facts in (saved, now))
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise CheckpointError(
                    f"{source} is of a run with {name.replace('_', ' ')} {wanted.get(name)}; found {found.get(name)}. "
                    f"Give the same options, or remove it to begin anew."
                )
        for name, words in (
            ("model", "another model: the directory may have been written since. Remove it"),
            ("teacher", "a dense model that is not found now, or without one. Give --teacher as before, or remove it"),
            ("data", "other batches held out. Let training() yield the same each time, or remove it"),
        ):
            if saved[name] != now[name]:
                raise CheckpointError(f"{source} is of a run with {words} to begin anew.")


def _digest(value: Any) -> str | None:
    found = fingerprint(mapped(value, Tensor.cpu))
    return None if found is None else found.hex()
