"""What fine-tuning minimises: the distance from the dense model's answers and states, and the task's own loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from htcompress.errors import TaskError
from htcompress.finetuning.scales import OUTPUT, STATES, Scale, Scales
from htcompress.finetuning.taught import Answer, Taught, fingerprint
from htcompress.isolation import RandomState, seeded
from htcompress.nn.recurrent import HTRecurrent
from htcompress.spread import Spread
from htcompress.task import output_of
from htcompress.values import answered, answers_in, tensors_of

TaskLoss = Callable[[Any, Any], Tensor]

_PART = 0.5
"""Of what an output usually varies: a batch in which it varies less counts as if it varied so much."""

_GLANCED = 1 << 10
"""Numbers of each tensor of a batch by which it is told from others."""

_TRIED, _ALWAYS = 6, 1 << 30
"""Answers in which nothing is drawn, after which that is not looked for any more; and how many are looked at else."""

_LEAST = 1e-12
"""The least variance that a difference is divided by: what the teacher gives may be one number throughout."""


class Objective:
    """The loss of a student on one batch.

    The sum of three terms, each left out where there is nothing to compute it from: the squared difference
    of the outputs in units of the teacher's variance; `hidden` times the same of the states that the
    compressed layers put out, step by step; and the task's loss of output and target.

    `usual` has the variance of each output over many batches, once it is known: the numbers of a single batch may
    hardly vary, or be but one. Both models draw from the same random numbers: those that sample answer alike if they
    are.

    `places` tells, for layers whose hidden units stand in another order than the teacher's, where each of the
    teacher's outputs stands among the student's.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        loss: TaskLoss | None,
        *,
        hidden: float,
        places: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.student, self.teacher, self.loss, self.hidden = student, teacher, loss, hidden
        self.places = dict(places or {})
        self.usual: dict[str, float] = {}
        self.unmeasured = 0
        self.names = [name for name, module in student.named_modules() if isinstance(module, HTRecurrent)]
        self._taught = Taught(self._asked)
        self._draws = SameDraws()

    def taught(self, arguments: Sequence[Any]) -> Answer:
        """The teacher's output and states on a batch, computed once where batches repeat."""
        return self._taught(arguments)

    def answer(self, arguments: Sequence[Any]) -> Any:
        """The teacher's output on a batch; None without a teacher."""
        if self.teacher is None:
            return None
        with torch.no_grad(), self._draws(arguments):
            return output_of(self.teacher, arguments, source="training()")

    def _asked(self, arguments: Sequence[Any]) -> Answer:
        """The teacher's output, and the states of the layers that the student has compressed."""
        if self.teacher is None:
            raise RuntimeError("There is no teacher to ask.")
        with _states(self.teacher, self.names if self.hidden > 0 else []) as states:
            return Answer(self.answer(arguments), states)

    def distance(self, arguments: Sequence[Any], answer: Any, scales: Scales | None = None) -> float:
        """The squared difference of the student's output from the teacher's, relative to the latter's variance."""
        with torch.no_grad(), self._draws(arguments):
            output = output_of(self.student, arguments, source="training()")
            return float(self._distance(output, answer, scales))

    def __call__(
        self,
        arguments: Sequence[Any],
        target: Any,
        *,
        answer: Any = None,
        taught: Answer | None = None,
        scales: Scales | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            answer: the teacher's output, where it is known already; the states are left out then.
            taught: its output and states, where both are.
            scales: of the batch as one of several; None: it stands for itself.
        """
        if self.teacher is None and (target is None or self.loss is None):
            raise TaskError("Without the dense model, fine-tuning needs targets from training() and a loss().")
        names = self.names if answer is None and self.hidden > 0 and self.teacher is not None else []
        wanted_states: Mapping[str, list[Tensor]] = {}
        if self.teacher is not None and answer is None:
            # Before the student: a batch that fits neither is told in the words of the user's own model.
            taught = self._taught(arguments) if taught is None else taught
            answer, wanted_states = taught.output, taught.states
        with _states(self.student, names) as states, self._draws(arguments):
            output = output_of(self.student, arguments, source="training()")
        terms = []
        if self.teacher is not None:
            terms.append(self._distance(output, answer, scales))
            for name in names:
                found = states[name]
                if name in self.places:
                    found = [t.index_select(-1, self.places[name].to(t.device)) for t in found]
                apart = _trajectory(
                    found, wanted_states[name], None if scales is None else scales.get(f"{STATES}{name}")
                )
                terms += [] if apart is None else [self.hidden / len(names) * apart]
        if target is not None and self.loss is not None:
            own = _task_loss(self.loss, output, target)
            if self._is_number(own, answer, target):
                terms.append(own)
        return torch.stack([_wide(term) for term in terms]).sum()

    def _is_number(self, own: Tensor, answer: Any, target: Any) -> bool:
        """Whether the task's loss of a batch counts: not where the teacher's answer has none either.

        All targets of a batch may be left out, for one.
        """
        if self.teacher is None or self.loss is None or bool(torch.isfinite(own)):
            return True
        with torch.no_grad():
            counts = bool(torch.isfinite(_task_loss(self.loss, answer, target)))
        self.unmeasured += not counts
        return counts

    def _distance(self, output: Any, target: Any, scales: Scales | None) -> Tensor:
        wanted, found = answers_in(target), answers_in(output)
        if not wanted or [t.shape for t in wanted] != [t.shape for t in found]:
            raise TaskError(
                f"The dense and the compressed model gave outputs of shapes {[tuple(t.shape) for t in wanted]} and "
                f"{[tuple(t.shape) for t in found]}; distillation needs equal ones."
            )
        terms = []
        for place, (a, b) in enumerate(zip(found, wanted, strict=True)):
            name = f"{OUTPUT}{place}"
            scale = None if scales is None else scales.get(name)
            terms.append(_apart(_wide(a), _wide(b), scale, _PART * self.usual.get(name, 0.0)))
        return torch.stack([term.to(terms[0].device, terms[0].dtype) for term in terms]).mean()


class SameDraws:
    """The same random numbers for whoever is given the same arguments, others for others, as far as any are drawn."""

    def __init__(self) -> None:
        self._left = _TRIED

    @contextmanager
    def __call__(self, arguments: Sequence[Any]) -> Iterator[None]:
        if not self._left:
            yield
            return
        known = fingerprint(arguments, _GLANCED)
        with seeded(0 if known is None else int.from_bytes(known[:4], "little")):
            before = RandomState.now()
            yield
            # Models that have drawn nothing so far are taken for such that never do.
            self._left = self._left - 1 if before.is_now() else _ALWAYS


@contextmanager
def _states(model: nn.Module, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What the named recurrent modules put out while the context is open, call by call."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            first = next(tensors_of(output), None)
            if first is not None:
                seen[name].append(first)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _trajectory(found: list[Tensor], wanted: list[Tensor], scale: Scale | None) -> Tensor | None:
    """The relative squared difference of two trajectories; None where a model that decodes freely gives unlike ones."""
    pairs = [(_wide(a), _wide(b)) for a, b in zip(found, wanted, strict=False) if a.shape == b.shape]
    if not pairs:
        return None
    count, squares = sum(b.numel() for _, b in pairs), torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
    if scale is not None:
        return squares / max(count, 1) * (scale.weight / max(scale.variance, _LEAST))
    return squares / max(count * Spread.of([b for _, b in pairs]).variance, _LEAST)


def _apart(found: Tensor, wanted: Tensor, scale: Scale | None, usual: float) -> Tensor:
    known = answered(wanted)
    variance = Spread.of([wanted], known).variance if scale is None else scale.variance
    if not bool(known.all()):
        found, wanted = found[known], wanted[known]
    if wanted.numel() == 0:
        return found.sum() * 0.0
    weight = 1.0 if scale is None else scale.weight
    return (found - wanted).square().mean() * (weight / max(variance, usual, _LEAST))


def _wide(tensor: Tensor) -> Tensor:
    """At least in float32: squares of half precision overflow."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _task_loss(loss: TaskLoss, output: Any, target: Any) -> Tensor:
    value = loss(output, target)
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TaskError(f"loss(output, target) returned {found}; expected a tensor with one number.")
    return value.reshape(())
