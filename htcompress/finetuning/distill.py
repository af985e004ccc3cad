"""Fine-tuning by distillation: the compressed model learns to answer as the dense one does."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from htcompress.errors import TaskError
from htcompress.finetuning.checkpoints import Checkpoints, Saved, random_facts, random_state
from htcompress.finetuning.held import HeldOut
from htcompress.finetuning.numbers import TrainedNumbers
from htcompress.finetuning.objective import Objective, TaskLoss
from htcompress.finetuning.scales import Scales, in_order, scales_of, spreads
from htcompress.finetuning.schedule import optimizer_of, schedule
from htcompress.finetuning.standing import Origin, Progress, Standing
from htcompress.finetuning.stream import Batches, Group, Share, Stream
from htcompress.finetuning.taught import Answer
from htcompress.finetuning.together import Alone, Together
from htcompress.isolation import RandomState, seeded
from htcompress.model.plain import without_packing
from htcompress.model.threads import threads_for_model
from htcompress.nn.recurrent import HTRecurrent
from htcompress.nn.states import cut_off, states_kept
from htcompress.request import FineTuning

_STAGE, _STAGES, _GAIN = 400, 3, 0.02
"""Where no length is asked for: the steps of a first stage, how many stages there are, each of twice as many as the one
before, and by which part of it a stage has to lower the held-out loss for another to follow."""

_PASSES, _NEAR = 2, 0.02
"""After so many passes over the data no stage follows where the outputs are nearer the teacher's than this, a mean
square in units of theirs: what is left to learn of the teacher would hardly be seen."""

_PEAK = 2e-2
"""The learning rate of a model that has nothing in common with its teacher: the largest that kept the samples and the
paper-scale models from going astray; a nearer model's falls with its distance."""

_ALONE = 1e-2
"""The learning rate without a teacher, by which there is no distance to go."""

_BACKTRACK, _BACKTRACKS = 1 / 3, 3
"""By how much steps shorten when the held-out loss has not improved for long, and how often."""

_ASTRAY = 1.0
"""How far the held-out loss may be above its best, as a part of it, before that counts as long."""


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Batches,
    *,
    loss: TaskLoss | None = None,
    options: FineTuning | None = None,
    places: Mapping[str, Tensor] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    together: Together | None = None,
    checkpoints: Checkpoints | None = None,
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
        together: the processes that take part, each of which calls this alike; see `joined`.
        checkpoints: where the state is kept, and whether to go on from what is there.

    Returns:
        the held-out loss over the steps.

    Raises:
        TaskError: the data has fewer than two batches, runs out, or does not fit the models, or the outputs of
            both models do not compare; or processes have read other data or models than the first.
        CheckpointError: the checkpoint is none, or of another run.
        RequestError: there is one, and the run is not to go on from it; or it cannot be written.
    """
    options = options or FineTuning()
    objective = Objective(student, teacher, loss, hidden=options.hidden, places=places)
    quiet = states_kept(teacher), states_kept(student), evaluating(teacher), without_packing(teacher)
    with ExitStack() as stack:
        for context in (*quiet, _without_dropout(student), seeded(options.seed), torch.enable_grad()):
            stack.enter_context(context)
        try:
            return _Run(objective, batches, options, on_progress, together or Alone(), checkpoints).go()
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
    """One run: what it works on, where it stands (`at`), and the best state so far."""

    def __init__(
        self,
        objective: Objective,
        batches: Batches,
        options: FineTuning,
        on_progress: Callable[[Progress], None] | None,
        together: Together,
        checkpoints: Checkpoints | None,
    ) -> None:
        self.objective, self.student = objective, objective.student
        self.options, self.on_progress = options, on_progress
        self.together, self.checkpoints = together, checkpoints
        self.began = self._now()
        self.share = Share(together.count, together.index, options.accumulate)
        apart = self.share.group > 1 or checkpoints is not None
        self.stream = Stream(batches, options.held_out, self.share, apart=apart)
        self.origin = Origin.of(objective, self.stream.held, self.share, options) if apart else None
        if self.origin is not None:
            self.origin.check_alike(together)
        self.held = HeldOut(objective, self.stream.held, self.share, together)
        self.stream.held = []  # of the other processes
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        self.numbers = TrainedNumbers(self.student, parameters)
        self.best_state: dict[str, Any] = {}
        self.at, self.every = Standing(), None if checkpoints is None else checkpoints.every
        self.optimizer: torch.optim.Optimizer | None = None

    def go(self) -> list[Progress]:
        with threads_for_model(self.held.try_student):
            return self._gone()

    def _gone(self) -> list[Progress]:
        o = self.options
        steps = o.steps
        if o.epochs is not None:
            steps = max(1, round(o.epochs * self.stream.length()))
        stages = [_STAGE * 2**i for i in range(_STAGES)] if steps is None else [steps]
        if not self._resumed():
            self._look(0, stages[0])
        at = self.at
        for number in range(at.stage, len(stages)):
            optimizer = self._begun(number, stages[number]) if self.optimizer is None else self.optimizer
            self._stage(optimizer)
            self.optimizer = None
            self._go_back()
            if self._is_enough():
                break
        return at.history

    def _is_enough(self) -> bool:
        """Whether another stage would not be worth its time; asked where the student is at its best."""
        at, limit = self.at, self.options.time_limit
        late = limit is not None and self._now() - self.began >= limit
        if late or not math.isfinite(at.best) or at.before - at.best < _GAIN * abs(at.before):
            return True
        if self.stream.passes < _PASSES:
            return False
        return self.objective.teacher is None or self.held.distance() <= _NEAR

    def _begun(self, number: int, length: int) -> torch.optim.Optimizer:
        """Begin a stage from the best state so far: a schedule of its own, and an optimiser that knows nothing."""
        at, o = self.at, self.options
        # Steps are counted as if the stages before had been taken to their ends.
        at.stage, at.before, at.begin, at.end = number, at.best, at.end, at.end + length
        at.step = at.begin
        self.stage_began = self._now()
        at.left = None if o.time_limit is None else max(1e-9, o.time_limit - (self.stage_began - self.began))
        optimizer = optimizer_of(self.numbers.trained, self._learning_rate())
        at.peaks = [group["lr"] for group in optimizer.param_groups]
        at.backtracks = at.since = 0
        return optimizer

    def _stage(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the steps of a stage that are left."""
        o, at = self.options, self.at
        for step in range(at.step + 1, at.end + 1):
            done = (step - 1 - at.begin) / (at.end - at.begin)
            if at.left is not None:
                done = max(done, (self._now() - self.stage_began) / at.left)
            for group, peak in zip(optimizer.param_groups, at.peaks, strict=True):
                group["lr"] = peak * schedule(done) * _BACKTRACK**at.backtracks
            self._step(optimizer)
            at.step = step
            if (step - at.begin) % o.check_every == 0 or step == at.end or done >= 1:
                better = self._look(step, at.end)
                at.since = 0 if better else at.since + 1
                if done >= 1:
                    return
                now, best = at.history[-1].loss, at.best
                # Losses of tasks may be negative.
                if at.since == o.patience or now - best > _ASTRAY * abs(best):
                    if at.backtracks == _BACKTRACKS:
                        return
                    # The steps were too long, or there is nothing left to gain: shorter ones will tell.
                    self._go_back()
                    optimizer.state.clear()
                    at.backtracks, at.since = at.backtracks + 1, 0
            if self.every is not None and step % self.every == 0:
                self._keep(optimizer)

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        group = self.stream.take()
        _learning_mode(self.student, taught=self.objective.teacher is not None)
        self._backward(group)
        norm = torch.nn.utils.clip_grad_norm_(self.numbers.trained, self.options.clip)
        if not bool(torch.isfinite(norm)):
            # After a step by what is no number, nothing is one.
            self.objective.unmeasured += 1
            return
        optimizer.step()
        self.numbers.settle()

    def _backward(self, group: Group) -> None:
        """The gradients of the mean loss of a group, of all processes."""
        objective, alone = self.objective, self.share.group == 1
        taught = [None if objective.teacher is None else objective.taught(a) for a, _ in group.own]
        scales = [None] if alone else self._scales(taught)
        total: list[Tensor | None] = [None for _ in self.numbers.trained]
        for (arguments, target), scale in zip(group.own, scales, strict=True):
            with self._precision():
                loss = objective(arguments, target, taught=taught.pop(0), scales=scale)
            if not loss.requires_grad:
                raise TaskError(
                    "The model's answers in evaluation mode have no gradients, so nothing can be learnt. Let forward() "
                    "compute them without no_grad() or detach(), or convert with --no-finetune."
                )
            self.numbers.backward(loss if alone else loss / group.count)
            for model in (self.student, objective.teacher):
                if model is not None:
                    cut_off(model)
            if not alone:
                pairs = zip(total, self.numbers.gradients(), strict=True)
                total = [b if a is None else a if b is None else a + b for a, b in pairs]
        if not alone:
            self.numbers.set_gradients(total, self.together)

    def _scales(self, taught: list[Answer | None]) -> list[Scales | None]:
        """Those of the batches of this process in the group."""
        if self.objective.teacher is None:
            return [None for _ in taught]
        parts = self.together.gather([spreads(answer) for answer in taught if answer is not None])
        return list(
            self.share.own([scales for group in in_order(parts, self.share.group) for scales in scales_of(group)])
        )

    def _precision(self) -> AbstractContextManager[Any]:
        """Where the student's answers are computed in mixed precision; the teacher's never are."""
        if self.options.mixed_precision == "no":
            return nullcontext()
        kind = next((p.device.type for p in self.student.parameters()), "cpu")
        return torch.autocast(kind, torch.bfloat16)

    def _look(self, step: int, steps: int) -> bool:
        """Look at the held-out loss, and keep the state where it is the best; whether it is."""
        at = self.at
        now = self.held.loss()
        better = not at.history or now < at.best
        if better:
            self.best_state = copy.deepcopy(self.student.state_dict())
        at.history.append(Progress(step, steps, now, now if better else at.best, self.objective.unmeasured))
        if self.on_progress is not None:
            self.on_progress(at.history[-1])
        return better

    def _go_back(self) -> None:
        self.student.load_state_dict(self.best_state)
        self.numbers.take()

    def _learning_rate(self) -> float:
        if self.options.learning_rate is not None:
            return self.options.learning_rate
        if self.objective.teacher is None:
            return _ALONE
        mean = self.held.distance()
        return _PEAK * math.sqrt(min(1.0, mean) if math.isfinite(mean) else 1.0)

    def _now(self) -> float:
        """Seconds by the first process's clock, by which all go; only for differences."""
        return self.together.of_first(time.monotonic)

    # ---- checkpoints ----------------------------------------------------------------------------------------

    def _keep(self, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint; the first process does."""
        if self.checkpoints is None or self.origin is None:
            raise RuntimeError("There is no place for checkpoints.")
        draws, now = self.together.gather(random_facts(RandomState.now())), self._now()
        if self.together.index == 0:
            state = optimizer.state_dict()["state"]
            tensors = {f"optimizer.{i}.{name}": value for i, own in state.items() for name, value in own.items()}
            for place, numbers in (("model", self.student.state_dict()), ("best", self.best_state)):
                tensors |= {f"{place}.{name}": value for name, value in numbers.items() if isinstance(value, Tensor)}
            tensors |= {f"trained.{i}": number for i, number in self.numbers.apart().items()}
            facts = {
                "origin": asdict(self.origin),
                "standing": asdict(self.at),
                "taken": self.stream.taken,
                "draws": draws,
                "seconds": [now - self.began, now - self.stage_began],
                "every": self.every,
            }
            self.checkpoints.keep(Saved(facts, tensors).to_bytes())

    def _resumed(self) -> bool:
        """Go on from the last checkpoint, if that is asked for and there is one; whether there is."""
        checkpoints, origin = self.checkpoints, self.origin
        if checkpoints is None or origin is None:
            return False
        content = self.together.of_first(checkpoints.last)
        if content is None:
            return False
        saved = Saved.of_bytes(content, checkpoints.file)
        facts = saved.facts
        origin.check_same(facts["origin"], checkpoints.file)
        self.at = Standing.of_facts(facts["standing"])
        self.every = checkpoints.every or facts["every"]
        self.began, self.stage_began = (self._now() - seconds for seconds in facts["seconds"])
        own = self.student.state_dict()
        self.best_state = copy.deepcopy({**own, **{n: t.to(own[n].device) for n, t in saved.under("best.").items()}})
        self.student.load_state_dict({**own, **saved.under("model.")})
        self.numbers.put(saved.under("trained."))
        self.optimizer = optimizer_of(self.numbers.trained, 0.0)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in saved.under("optimizer.").items():
            number, _, key = name.partition(".")
            state.setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.stream.skip(facts["taken"])
        draws = facts["draws"]
        random_state(draws[self.together.index % len(draws)]).restore()
        if self.on_progress is not None:
            self.on_progress(self.at.history[-1])
        return True


def _learning_mode(model: nn.Module, *, taught: bool) -> None:
    """Evaluation mode, in which models answer what is taught: no noise, no heads that only training has.

    But for what cuDNN learns in no other mode: recurrent layers that stay dense on a GPU. Without a teacher it is
    training mode, in which the task's loss was made; layers whose noise or running statistics would blur are not.
    """
    model.train(not taught)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.modules.dropout._DropoutNd | HTRecurrent):
            module.eval()
        if isinstance(module, nn.RNNBase) and any(p.is_cuda for p in module.parameters(recurse=False)):
            module.train()


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Dense recurrent layers without noise, in training mode, too."""
    layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    before = [layer.dropout for layer in layers]
    for layer in layers:
        layer.dropout = 0.0
    try:
        yield
    finally:
        for layer, dropout in zip(layers, before, strict=True):
            layer.dropout = dropout
