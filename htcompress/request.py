"""What is asked of a compression: validated once, kept whole from the command line to the report. It costs no torch."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from htcompress.construction import Constructed, DataFile
from htcompress.errors import RequestError
from htcompress.numbers import budget_of, real, whole
from htcompress.vocabulary import BITS, HARMLESS, INTEGER_BITS, WIDEST, Format, LayoutKind, Scope, UnitOrder, one_of

PRECISIONS = ("no", "bf16")
"""In which fine-tuning may compute. Not in float16, which needs a scale for every loss."""


@dataclass(frozen=True)
class Goal:
    """Exactly one of a budget, an error and a ratio; and the forms to look at.

    Args:
        budget: stored numbers of the recurrent layers, biases included, that are not exceeded.
        error: relative Frobenius error of each weight matrix that is not exceeded.
        ratio: how many times fewer numbers than the checkpoint's; a budget in other words.
        bits: in which each number is stored, at most; 32: in the precision of the model. None: that, or under a
            budget of bytes whatever is best, matrix by matrix.
        bytes: instead of a budget of numbers, the bytes that they take as they are stored, scales and all.

    `format` is Hierarchical Tucker unless another is to be compared with it; truncated SVD is HT of order two.

    Raises:
        RequestError: none or several of the three, or a value that makes no sense.
    """

    budget: int | None = None
    error: float | None = None
    ratio: float | None = None
    scope: Scope = Scope.AUTO
    layout: LayoutKind = LayoutKind.AUTO
    format: Format = Format.HT
    units: UnitOrder = UnitOrder.AUTO
    bits: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("budget", "error", "ratio", "bytes") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise RequestError(
                f"A compression needs exactly one goal: a budget (such as 5000, or 20kB), an error (such as 0.1) or a "
                f"ratio (such as 100); found {found}."
            )
        if self.budget is not None and self.budget < 1:
            raise RequestError(f"The budget is a number of parameters, at least 1; found {self.budget}.")
        if self.bytes is not None and self.bytes < 1:
            raise RequestError(f"The budget is a number of bytes, at least 1; found {self.bytes}.")
        if self.error is not None and not 0 <= self.error < 1:
            raise RequestError(
                f"The error is relative to the norm of a weight matrix: at least 0 and below 1 (such as 0.1); "
                f"found {self.error}."
            )
        if self.bits not in (None, *BITS):
            raise RequestError(f"Numbers are stored in {_either(BITS)} bits; found {self.bits}.")
        if self.error is not None and self.width in INTEGER_BITS:
            raise RequestError(
                f"An error is kept by matrices in 32 or 16 bits; ask for a budget (such as 20kB) to have numbers in "
                f"fewer. Found --bits {self.bits}."
            )
        if self.error is not None and self.width < WIDEST and self.error < HARMLESS:
            raise RequestError(
                f"Storing numbers in {self.bits} bits alone may change a matrix by {HARMLESS:g}; ask for an error of "
                f"at least that, or for 32 bits. Found {self.error}."
            )
        if not self.format.has_layouts and self.layout is not LayoutKind.AUTO:
            raise RequestError(
                f"The format {self.format} has one family of layouts; leave the layout at auto. Found {self.layout}."
            )
        if self.ratio is not None and not (self.ratio >= 1 and math.isfinite(self.ratio)):
            raise RequestError(f"The ratio is how many times smaller, at least 1 (such as 100); found {self.ratio}.")

    @property
    def folds(self) -> bool:
        """Whether matrices are folded into tensors; a truncated SVD takes them as they are."""
        return self.layout is not LayoutKind.SVD and self.format.folds

    @property
    def width(self) -> int:
        """The most bits of a number."""
        return WIDEST if self.bits is None else self.bits

    def budget_for(self, parameters: int) -> int | None:
        """The stored numbers allowed, of layers that store `parameters` now; None for an error goal."""
        if self.ratio is not None:
            return int(parameters / self.ratio)
        return self.budget


def _either(values: Sequence[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


@dataclass(frozen=True)
class FineTuning:
    """How to fine-tune.

    Args:
        steps: optimiser steps, at most. None: as `epochs` says, or as many as help: 400, then up to two further stages,
            each of twice as many, while the last lowered the held-out loss by 2 % and the data has not been passed
            over twice, or the outputs are not yet near the teacher's.
        epochs: instead, passes over the training data, which is counted first.
        time_limit: seconds after which it ends; the schedule shortens with it.
        learning_rate: the peak of a schedule that warms up and then falls along a cosine; the length of a
            step as a part of the root mean square of each parameter tensor. None: 0.02 times the relative
            distance of the two models' outputs at the start, so that a model near its teacher stays near;
            0.01 without a teacher.
        hidden: what the states of the compressed layers count beside the model's output.
        clip: the largest norm of a gradient step.
        check_every: steps between two looks at the held-out batches.
        patience: looks without a new best, after which it goes back to the best state with shorter steps, and
            in the end stops.
        held_out: batches kept apart to choose the best state by. None: a quarter of the first 48, at most 12.
        seed: of torch's generator during fine-tuning; the caller's is restored afterwards.
        accumulate: batches of a step, which count as one in which they are joined; they pass through the model one
            after the other. Of several processes each takes so many.
        mixed_precision: `bf16`: the student's steps are computed in bfloat16 where torch holds that safe; its numbers,
            the teacher and the held-out loss stay as precise as they are. `no`: all is.

    Raises:
        RequestError: a value makes no sense.
    """

    steps: int | None = None
    epochs: float | None = None
    time_limit: float | None = None
    learning_rate: float | None = None
    hidden: float = 0.5
    clip: float = 1.0
    check_every: int = 25
    patience: int = 10
    held_out: int | None = None
    seed: int = 0
    accumulate: int = 1
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        bounds: dict[str, tuple[float, bool]] = {
            "steps": (0, True),
            "epochs": (0, False),
            "time_limit": (0, False),
            "learning_rate": (0, True),
            "hidden": (0, True),
            "clip": (0, False),
            "check_every": (1, True),
            "patience": (1, True),
            "held_out": (1, True),
            "accumulate": (1, True),
        }
        for name, (least, included) in bounds.items():
            value = getattr(self, name)
            if value is None:
                continue
            kinds = int if name in ("steps", "check_every", "patience", "held_out", "accumulate") else (int, float)
            fits = isinstance(value, kinds) and math.isfinite(value) and not isinstance(value, bool)
            if not fits or not (value >= least if included else value > least):
                limit = f"at least {least}" if included else f"more than {least}"
                raise RequestError(f"Fine-tuning takes {name.replace('_', ' ')} of {limit}; found {value!r}.")
        if self.steps is not None and self.epochs is not None:
            raise RequestError("Fine-tuning takes steps or epochs, not both; leave out one of them.")
        if self.mixed_precision not in PRECISIONS:
            raise RequestError(
                f"Fine-tuning takes a mixed precision of {' or '.join(PRECISIONS)}; found {self.mixed_precision!r}. "
                f"Give --mixed-precision, which goes before what Accelerate is configured for."
            )

    @property
    def trains(self) -> bool:
        """Whether any step is taken."""
        return self.steps is None or self.steps > 0


@dataclass(frozen=True)
class Request:
    """One compression as it was asked for.

    Args:
        goal: how small or how exact, and in which forms.
        layers: which recurrent modules, as a glob over their names; others stay dense.
        finetuning: how to fine-tune; None: not at all.
        seed: of everything else that is drawn at random.
        task: the task file or module; None where there is none.
        weights: the state_dict to take of a file that holds several.
        device: where calibration, fine-tuning and evaluation run.
        names: torch's names for tensors that the file calls otherwise.
        model: in place of a task, a class and its data.
        data: of a model that is run from its own file; None: its weights alone are worked from.
    """

    goal: Goal
    layers: str = "*"
    finetuning: FineTuning | None = field(default_factory=FineTuning)
    seed: int = 0
    task: str | None = None
    weights: str | None = None
    device: str = "cpu"
    names: Mapping[str, str] | None = None
    model: Constructed | None = None
    data: DataFile | None = None

    @classmethod
    def of_options(
        cls,
        *,
        budget: str | None = None,
        error: str | None = None,
        ratio: str | None = None,
        scope: str = Scope.AUTO.value,
        layout: str = LayoutKind.AUTO.value,
        format: str = Format.HT.value,
        unit_order: str = UnitOrder.AUTO.value,
        bits: str | None = None,
        **others: Any,
    ) -> Request:
        """A request in the words of the command line; `others` are those of `Request`.

        >>> Request.of_options(budget="5k", scope="integrated").goal.budget
        5000

        Raises `RequestError`, naming the option, where a word makes no sense.
        """
        count, stored = budget_of(budget, "--budget")
        numbers = (
            count,
            None if error is None else real(error, "--error", "0.1"),
            None if ratio is None else real(ratio, "--ratio", "100"),
        )
        if all(number is None for number in (*numbers, stored)):
            raise RequestError(
                "convert needs a goal: --budget N (numbers to store, such as 5000, or bytes, such as 20kB), --error E "
                "(relative error of the weights, such as 0.1) or --ratio R (times smaller, such as 100)."
            )
        goal = Goal(
            *numbers,
            scope=one_of(Scope, scope, "--scope"),
            layout=one_of(LayoutKind, layout, "--layout"),
            format=one_of(Format, format, "--format"),
            units=one_of(UnitOrder, unit_order, "--unit-order"),
            bits=None if bits in (None, "auto") else whole(bits, "--bits", "8"),
            bytes=stored,
        )
        return cls(goal, **others)

    def to_report(self) -> dict[str, Any]:
        """The request as JSON values; what a report keeps of it."""
        goal, tuning = self.goal, self.finetuning
        return {
            "budget": goal.budget,
            "error": goal.error,
            "ratio": goal.ratio,
            "scope": goal.scope.value,
            "layout": goal.layout.value,
            "format": goal.format.value,
            "unit_order": goal.units.value,
            "bits": "auto" if goal.bits is None and goal.bytes is not None else goal.width,
            "bytes": goal.bytes,
            "task": self.task,
            "layers": self.layers,
            "weights": self.weights,
            "device": self.device,
            "names": None if self.names is None else dict(self.names),
            "model": None if self.model is None else self.model.to_report(),
            "data": None if self.data is None else self.data.to_report(),
            "steps": 0 if tuning is None else tuning.steps,
            "epochs": None if tuning is None else tuning.epochs,
            "time_limit": None if tuning is None else tuning.time_limit,
            "finetuning": None if tuning is None else asdict(tuning),
        }

    @classmethod
    def of_report(cls, request: Mapping[str, Any], *, seed: int = 0) -> Request:
        """The inverse of `to_report`; of a report that knows less, what it knows.

        Raises `RequestError` where it is none.
        """
        try:
            # What a later version knows beside is passed over.
            known, tuning = {field.name for field in fields(FineTuning)}, request.get("finetuning")
            steps = request.get("steps", 0)
            if tuning is None and steps:
                tuning = {"steps": steps, "time_limit": request.get("time_limit"), "seed": seed}
            names, model, data = (request.get(name) for name in ("names", "model", "data"))
            if names is not None and not all(isinstance(word, str) for pair in names.items() for word in pair):
                raise TypeError("its names are no text")
            goal = Goal(
                request.get("budget"),
                request.get("error"),
                request.get("ratio"),
                scope=one_of(Scope, request.get("scope", Scope.AUTO), "scope"),
                layout=one_of(LayoutKind, request.get("layout", LayoutKind.AUTO), "layout"),
                format=one_of(Format, request.get("format", Format.HT), "format"),
                units=one_of(UnitOrder, request.get("unit_order", UnitOrder.AUTO), "unit_order"),
                bits=None if request.get("bits") == "auto" else request.get("bits"),
                bytes=request.get("bytes"),
            )
            return cls(
                goal,
                request.get("layers", "*"),
                None if tuning is None else FineTuning(**{k: v for k, v in tuning.items() if k in known}),
                seed,
                request.get("task"),
                request.get("weights"),
                request.get("device", "cpu"),
                names,
                None if model is None else Constructed.of_report(model),
                None if data is None else DataFile.of_report(data),
            )
        except (TypeError, AttributeError, KeyError) as error:
            raise RequestError(f"This is no request of a compression: {error}.") from error

    def command(self, checkpoint: str, output: str | None = None) -> str:
        """The command line that asks for the same, whatever the default of another version is for the seed.

        >>> Request(Goal(budget=5000, scope=Scope.INTEGRATED), task="task.py").command("model.pt")
        'htcompress convert model.pt --budget 5000 --task task.py --scope integrated --seed 0'

        What only the library can ask for (`FineTuning` beyond steps and time limit) is not in it.
        """
        goal, tuning = self.goal, self.finetuning
        modelled = self.task is not None or self.model is not None or self.data is not None
        tunes = modelled and tuning is not None and tuning.trains
        words: list[Any] = ["htcompress", "convert", checkpoint]
        options = (
            ("--budget", goal.budget if goal.bytes is None else f"{goal.bytes}B", None),
            ("--error", goal.error, None),
            ("--ratio", goal.ratio, None),
            ("--task", self.task, None),
            *(() if self.model is None else self.model.options()),
            *(() if self.data is None else self.data.options()),
            ("--output", output, None),
            ("--scope", goal.scope, Scope.AUTO),
            ("--layout", goal.layout, LayoutKind.AUTO),
            ("--format", goal.format, Format.HT),
            ("--unit-order", goal.units, UnitOrder.AUTO),
            ("--bits", goal.bits, None if goal.bytes is not None else WIDEST),
            ("--layers", self.layers, "*"),
            ("--weights", self.weights, None),
            ("--names", None if self.names is None else json.dumps(dict(self.names)), None),
            ("--device", self.device, "cpu"),
            ("--steps", tuning.steps if tunes and tuning is not None else None, None),
            ("--epochs", None if tuning is None else tuning.epochs, None),
            ("--time-limit", None if tuning is None else tuning.time_limit, None),
        )
        for option, value, default in options:
            if value is not None and value != default:
                words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
        if modelled and not tunes:
            words.append("--no-finetune")
        return shlex.join([*words, "--seed", str(self.seed)])
