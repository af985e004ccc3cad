"""Fine-tuning by distillation: the compressed model learns to answer as the dense one does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from htcompress.errors import TaskError
from htcompress.nn.recurrent import HTRecurrent
from htcompress.statistics.collect import tensors_of
from htcompress.task import output_of

Batches = Callable[[], Iterator[tuple[tuple[Any, ...], Any]]]
"""Starts a pass over the training data: pairs of positional arguments and target (None: no target)."""

TaskLoss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class FineTuning:
    """How to fine-tune.

    Args:
        steps: optimiser steps.
        learning_rate: the peak of a schedule that warms up and then falls along a cosine.
        clip: the largest norm of a gradient step.
        check_every: steps between two looks at the held-out batches.
        held_out: batches kept apart to choose the best state by.
        seed: of torch's generator during fine-tuning; the caller's is restored afterwards.
    """

    steps: int = 400
    learning_rate: float = 5e-3
    clip: float = 1.0
    check_every: int = 25
    held_out: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """Where fine-tuning stands: the step, and the held-out loss, now and at its best."""

    step: int
    steps: int
    loss: float
    best: float


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Batches,
    *,
    loss: TaskLoss | None = None,
    options: FineTuning | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Progress]:
    """Train the student in place towards the teacher's outputs, and towards the targets where there are any.

    The loss is the squared difference of the outputs in units of the teacher's variance, plus the task's
    loss. A few batches are held out; the state that does best on them is kept, the state before the first
    step included, so that fine-tuning never ends worse on them than it began.

    Args:
        student: the compressed model; all of its parameters that require gradients are trained.
        teacher: the dense model, left as it is; None: only the task's loss is trained on.
        batches: starts a pass over the data; called again whenever a pass ends.
        loss: of output and target, added where a batch has a target.

    Returns:
        the held-out loss over the steps.

    Raises:
        TaskError: the data has fewer than two batches, runs out, or does not fit the models, or the outputs of
            both models do not compare.
    """
    options = options or FineTuning()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with evaluating(teacher), torch.random.fork_rng(devices=devices):
        torch.manual_seed(options.seed)
        try:
            return _Run(student, teacher, batches, loss, options, on_progress).go()
        finally:
            student.eval()


@contextmanager
def evaluating(model: nn.Module | None) -> Iterator[None]:
    """A model in evaluation mode; afterwards each of its modules is in the mode it was in."""
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    if model is not None:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Run:
    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        batches: Batches,
        loss: TaskLoss | None,
        options: FineTuning,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.loss, self.options, self.on_progress = loss, options, on_progress
        self.batches = batches
        self.held: list[tuple[tuple[Any, ...], Any]] = []

    def go(self) -> list[Progress]:
        o = self.options
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=o.learning_rate, weight_decay=0.0)
        warm = max(1, o.steps // 20)

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, o.steps - warm))) + 1e-3

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        stream = self._stream()
        best = self._held_out_loss()
        best_state = copy.deepcopy(self.student.state_dict())
        history = [Progress(0, o.steps, best, best)]
        self._report(history[-1])
        for step in range(1, o.steps + 1):
            arguments, target = next(stream)
            _train_mode(self.student)
            optimizer.zero_grad(set_to_none=True)
            value = self._loss(arguments, target)
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, o.clip)
            optimizer.step()
            schedule.step()
            if step % o.check_every == 0 or step == o.steps:
                now = self._held_out_loss()
                if now < best:
                    best, best_state = now, copy.deepcopy(self.student.state_dict())
                history.append(Progress(step, o.steps, now, best))
                self._report(history[-1])
        self.student.load_state_dict(best_state)
        return history

    def _stream(self) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Batches without end; the first few of the first pass are held out, and skipped in every later one."""
        first = iter(self.batches())
        buffered = []
        for item in first:
            buffered.append(item)
            if len(buffered) > self.options.held_out:
                break
        if len(buffered) < 2:
            raise TaskError(
                f"Fine-tuning needs at least two batches, one of them held out; training() yields {len(buffered)}. "
                f"Yield smaller batches, or convert with --no-finetune."
            )
        self.held = buffered[:-1]

        def endless() -> Iterator[tuple[tuple[Any, ...], Any]]:
            yield buffered[-1]
            yield from first
            while True:
                count = 0
                for count, item in enumerate(self.batches(), start=1):
                    if count > len(self.held):
                        yield item
                if count <= len(self.held):
                    raise TaskError(
                        f"Fine-tuning ran out of data: called again, training() yields {count} batches, no more than "
                        f"are held out. Let every call start a new pass; a generator can be read only once."
                    )

        return endless()

    def _loss(self, arguments: tuple[Any, ...], target: Any) -> Tensor:
        if self.teacher is None and (target is None or self.loss is None):
            raise TaskError("Without the dense model, fine-tuning needs targets from training() and a loss().")
        wanted = None
        if self.teacher is not None:
            # Before the student: a batch that fits neither is told in the words of the user's own model.
            with torch.no_grad():
                wanted = output_of(self.teacher, arguments, source="training()")
        output = output_of(self.student, arguments, source="training()")
        terms = []
        if self.teacher is not None:
            terms.append(self._distance(output, wanted))
        if target is not None and self.loss is not None:
            terms.append(self._task_loss(output, target))
        return torch.stack(terms).sum()

    def _task_loss(self, output: Any, target: Any) -> Tensor:
        assert self.loss is not None
        value = self.loss(output, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TaskError(f"loss(output, target) returned {found}; expected a tensor with one number.")
        return value.reshape(())

    def _distance(self, output: Any, target: Any) -> Tensor:
        wanted, found = list(tensors_of(target)), list(tensors_of(output))
        if not wanted or [t.shape for t in wanted] != [t.shape for t in found]:
            raise TaskError(
                f"The dense and the compressed model gave outputs of shapes {[tuple(t.shape) for t in wanted]} and "
                f"{[tuple(t.shape) for t in found]}; distillation needs equal ones."
            )
        terms = [
            (a - b).square().mean() / b.var(correction=0).clamp_min(1e-12) for a, b in zip(found, wanted, strict=True)
        ]
        return torch.stack(terms).mean()

    def _held_out_loss(self) -> float:
        self.student.eval()
        with torch.no_grad():
            losses = [float(self._loss(*item)) for item in self.held]
        mean = sum(losses) / len(losses)
        return mean if math.isfinite(mean) else math.inf

    def _report(self, progress: Progress) -> None:
        if self.on_progress is not None:
            self.on_progress(progress)


def _train_mode(model: nn.Module) -> None:
    """Training mode, but for layers whose noise or running statistics would only blur what is taught."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.modules.dropout._DropoutNd | HTRecurrent):
            module.eval()
