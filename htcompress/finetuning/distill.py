"""Fine-tuning by distillation: the compressed model learns to answer as the dense one does."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from htcompress.finetuning.numbers import TrainedNumbers
from htcompress.finetuning.objective import Objective, TaskLoss
from htcompress.finetuning.stream import Batches, Stream
from htcompress.isolation import seeded
from htcompress.model.plain import without_packing
from htcompress.nn.recurrent import HTRecurrent
from htcompress.nn.states import cut_off, states_kept
from htcompress.request import FineTuning

_STAGE, _STAGES, _PASSES, _GAIN = 400, 3, 2, 0.02
"""Where no length is asked for: the steps of a first stage, how often it may go on with twice as many, and when it does
not: after so many passes over the data, or where the last stage has lowered the held-out loss by less than this part.
400 steps bring the samples to their plateau; the letters model, of which they are half a pass, gains for 1,600."""

_PEAK = 2e-2
"""The learning rate of a model that has nothing in common with its teacher: the largest that kept the samples and the
paper-scale models from going astray; a nearer model's falls with its distance."""

_ALONE = 1e-2
"""The learning rate without a teacher, by which there is no distance to go."""

_WARM = 0.05
"""The part of the schedule that warms up: as long as Adam's second moments take to settle."""

_LEAST_SIZE = 1e-2
"""The least root mean square by which a parameter's steps are scaled: one that is zero has to move, too."""

_BACKTRACK, _BACKTRACKS = 1 / 3, 3
"""By how much steps shorten when the held-out loss has not improved for long, and how often."""

_ASTRAY = 1.0
"""How far the held-out loss may be above its best, as a part of it, before that counts as long."""


@dataclass(frozen=True)
class Progress:
    """Where fine-tuning stands: the step, that at which its stage ends, the held-out loss, and its best so far."""

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
    places: Mapping[str, Tensor] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Progress]:
    """Train the student in place towards the teacher's outputs, and towards the targets where there are any.

    The loss is that of `Objective`: outputs, states of the compressed layers, and the task's own. A few batches
    are held out; the state that does best on them is kept, the state before the first step included, so that
    fine-tuning never ends worse on them than it began.

    Args:
        student: the compressed model; all of its parameters that require gradients are trained.
        teacher: the dense model, left as it is; None: only the task's loss is trained on.
        batches: starts a pass over the data; called again whenever a pass ends.
        loss: of output and target, added where a batch has a target.
        places: of hidden units that stand in another order than the teacher's; see `Objective`.

    Returns:
        the held-out loss over the steps.

    Raises:
        TaskError: the data has fewer than two batches, runs out, or does not fit the models, or the outputs of
            both models do not compare.
    """
    options = options or FineTuning()
    objective = Objective(student, teacher, loss, hidden=options.hidden, places=places)
    quiet = states_kept(teacher), states_kept(student), evaluating(teacher), without_packing(teacher)
    with ExitStack() as stack:
        for context in (*quiet, seeded(options.seed), torch.enable_grad()):
            stack.enter_context(context)
        try:
            return _Run(objective, batches, options, on_progress).go()
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
        objective: Objective,
        batches: Batches,
        options: FineTuning,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.objective, self.student = objective, objective.student
        self.options, self.on_progress = options, on_progress
        self.began = time.monotonic()
        self.stream = Stream(batches, options.held_out)
        self.answers = [objective.answer(arguments) for arguments, _ in self.stream.held]
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        self.numbers = TrainedNumbers(self.student, parameters)
        self.history: list[Progress] = []
        self.best_state: dict[str, Any] = {}

    def go(self) -> list[Progress]:
        o = self.options
        steps = o.steps
        if o.epochs is not None:
            steps = max(1, round(o.epochs * self.stream.length()))
        stages = [_STAGE * 2**i for i in range(_STAGES)] if steps is None else [steps]
        self._look(0, stages[0])
        end = 0
        for length in stages:
            before = self.history[-1].best
            end += length
            self._stage(end - length, end)
            gained = before - self.history[-1].best
            late = o.time_limit is not None and time.monotonic() - self.began >= o.time_limit
            if late or self.stream.passes >= _PASSES or gained < _GAIN * abs(before):
                break
        self.student.load_state_dict(self.best_state)
        return self.history

    def _stage(self, begin: int, end: int) -> None:
        """Take steps along one schedule, from the best state so far."""
        o, numbers, began = self.options, self.numbers, time.monotonic()
        left = None if o.time_limit is None else max(1e-9, o.time_limit - (began - self.began))
        if begin:
            self._go_back()
        optimizer = _optimizer(numbers.trained, self._learning_rate())
        peaks = [group["lr"] for group in optimizer.param_groups]
        backtracks = since = 0
        for step in range(begin + 1, end + 1):
            done = (step - 1 - begin) / (end - begin)
            if left is not None:
                done = max(done, (time.monotonic() - began) / left)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * _schedule(done) * _BACKTRACK**backtracks
            self._step(optimizer)
            if (step - begin) % o.check_every == 0 or step == end or done >= 1:
                better = self._look(step, end)
                since = 0 if better else since + 1
                if done >= 1:
                    return
                now, best = self.history[-1].loss, self.history[-1].best
                # Losses of tasks may be negative.
                if since == o.patience or now - best > _ASTRAY * abs(best):
                    if backtracks == _BACKTRACKS:
                        return
                    # The steps were too long, or there is nothing left to gain: shorter ones will tell.
                    self._go_back()
                    optimizer.state.clear()
                    backtracks, since = backtracks + 1, 0

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        arguments, target = next(self.stream)
        _train_mode(self.student)
        self.numbers.backward(self.objective(arguments, target))
        for model in (self.student, self.objective.teacher):
            if model is not None:
                cut_off(model)
        torch.nn.utils.clip_grad_norm_(self.numbers.trained, self.options.clip)
        optimizer.step()
        self.numbers.settle()

    def _look(self, step: int, steps: int) -> bool:
        """Look at the held-out loss, and keep the state where it is the best; whether it is."""
        now = self._held_out_loss()
        better = not self.history or now < self.history[-1].best
        if better:
            self.best_state = copy.deepcopy(self.student.state_dict())
        self.history.append(Progress(step, steps, now, now if better else self.history[-1].best))
        if self.on_progress is not None:
            self.on_progress(self.history[-1])
        return better

    def _go_back(self) -> None:
        self.student.load_state_dict(self.best_state)
        self.numbers.take()

    def _learning_rate(self) -> float:
        if self.options.learning_rate is not None:
            return self.options.learning_rate
        if self.objective.teacher is None:
            return _ALONE
        self.student.eval()
        apart = [
            self.objective.distance(a, answer) for (a, _), answer in zip(self.stream.held, self.answers, strict=True)
        ]
        mean = sum(apart) / len(apart)
        return _PEAK * math.sqrt(min(1.0, mean) if math.isfinite(mean) else 1.0)

    def _held_out_loss(self) -> float:
        self.student.eval()
        with torch.no_grad():
            pairs = zip(self.stream.held, self.answers, strict=True)
            losses = [float(self.objective(a, target, answer=answer)) for (a, target), answer in pairs]
        mean = sum(losses) / len(losses)
        return mean if math.isfinite(mean) else math.inf


def _optimizer(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW whose steps are relative to the size of the numbers in each tensor.

    Cores differ in size by orders of magnitude: one step for all would stand still in some and wreck others.
    """
    groups = []
    for parameter in parameters:
        size = float(parameter.detach().double().square().mean().sqrt()) if parameter.numel() else 0.0
        groups.append({"params": [parameter], "lr": learning_rate * max(size, _LEAST_SIZE)})
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)


def _schedule(done: float) -> float:
    """The learning rate as a part of its peak, by the part of the way that is done: a short rise, then a cosine."""
    if done < _WARM:
        return (done + 0.1 * _WARM) / (1.1 * _WARM)
    return 0.5 * (1 + math.cos(math.pi * (min(done, 1.0) - _WARM) / (1 - _WARM))) + 1e-3


def _train_mode(model: nn.Module) -> None:
    """Training mode, but for layers whose noise or running statistics would only blur what is taught."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.modules.dropout._DropoutNd | HTRecurrent):
            module.eval()
