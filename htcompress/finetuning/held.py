"""What is held out: the loss that tells which state is the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from htcompress.finetuning.objective import Objective
from htcompress.finetuning.scales import Scales, in_order, scales_of, spreads, usual
from htcompress.finetuning.stream import Item, Share
from htcompress.finetuning.taught import Answer
from htcompress.finetuning.together import Together
from htcompress.task import output_of


class HeldOut:
    """The held-out batches of this process, with the teacher's answers to them.

    What is computed of them is the same in all processes: each takes its share, and they exchange what came of it.
    """

    def __init__(self, objective: Objective, held: Sequence[Item], share: Share, together: Together) -> None:
        self._objective, self._together, self._group = objective, together, share.group
        self._items = share.own(held)
        self._answers = [objective.answer(arguments) for arguments, _ in self._items]
        self._scales: list[Scales | None] = [None for _ in self._items]
        if objective.teacher is None:
            return
        own = [spreads(Answer(answer, {})) for answer in self._answers]
        groups = in_order(together.gather(own), share.group)
        objective.usual = usual([batch for group in groups for batch in group])
        if share.group > 1:
            self._scales = list(share.own([scales for group in groups for scales in scales_of(group)]))

    def loss(self) -> float:
        """The mean loss; infinite where it is no number."""
        with torch.no_grad():
            mean = self._mean(self._loss)
        return mean if math.isfinite(mean) else math.inf

    def try_student(self) -> None:
        """Run the student on the first of the batches, if this process has any."""
        self._objective.student.eval()
        for arguments, _ in self._items[:1]:
            with torch.no_grad():
                output_of(self._objective.student, arguments, source="training()")

    def distance(self) -> float:
        """The mean distance of the student's outputs from the teacher's."""
        return self._mean(lambda a, _, answer, scales: self._objective.distance(a, answer, scales))

    def _loss(self, arguments: Sequence[Any], target: Any, answer: Any, scales: Scales | None) -> float:
        return float(self._objective(arguments, target, answer=answer, scales=scales))

    def _mean(self, ask: Callable[[Sequence[Any], Any, Any, Scales | None], float]) -> float:
        """The mean over the groups of the mean over their batches."""
        self._objective.student.eval()
        every = zip(self._items, self._answers, self._scales, strict=True)
        own = [ask(arguments, target, answer, scales) for (arguments, target), answer, scales in every]
        groups = in_order(self._together.gather(own), self._group)
        means = [sum(group) / len(group) for group in groups]
        return sum(means) / len(means)
