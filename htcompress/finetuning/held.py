"""What is held out: the loss that tells which state is the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch

from htcompress.finetuning.objective import Objective
from htcompress.finetuning.scales import Scales, in_order, scales_of, spreads, usual
from htcompress.finetuning.stream import Item, Share
from htcompress.finetuning.taught import Answer
from htcompress.finetuning.together import Together
from htcompress.nn.states import differing, put_states, states_of
from htcompress.task import output_of


class HeldOut:
    """The held-out batches of this process, with the teacher's answers to them.

    What is computed of them is the same in all processes: each takes its share, and they exchange what came of it.
    """

    def __init__(self, objective: Objective, held: Sequence[Item], share: Share, together: Together) -> None:
        self._objective, self._together, self._group = objective, together, share.group
        self._items = share.own(held)
        teacher = objective.teacher
        first = {} if teacher is None else states_of(teacher)
        self._answers = [objective.answer(arguments) for arguments, _ in self._items]
        # A model that keeps states from one call to the next begins each time where its teacher began.
        kept = set() if teacher is None else differing(first, states_of(teacher))
        self._states = {key: first[key] for key in kept & first.keys()}
        self._scales: list[Scales | None] = [None for _ in self._items]
        self._counts: list[list[bool]] | None = None
        if objective.teacher is None:
            return
        own = [spreads(Answer(answer, {})) for answer in self._answers]
        groups = in_order(together.gather(own), share.group)
        objective.usual = usual([batch for group in groups for batch in group])
        if share.group > 1:
            self._scales = list(share.own([scales for group in groups for scales in scales_of(group)]))

    def loss(self) -> float:
        """The mean loss; infinite where it is no number. Batches that had none at first are left out ever after."""
        with torch.no_grad():
            groups = self._asked(self._loss)
        if self._counts is None:
            finite = [[math.isfinite(own) for own in group] for group in groups]
            some = any(map(any, finite))
            self._counts = finite if some else [[True for _ in group] for group in groups]
            self._objective.unmeasured += sum(not own for group in self._counts for own in group)
        mean = _mean([list(compress(group, own)) for group, own in zip(groups, self._counts, strict=True)])
        return mean if math.isfinite(mean) else math.inf

    def try_student(self) -> None:
        """Run the student on the first of the batches, if this process has any."""
        self._objective.student.eval()
        for arguments, _ in self._items[:1]:
            with torch.no_grad():
                output_of(self._objective.student, arguments, source="training()")

    def distance(self) -> float:
        """The mean distance of the student's outputs from the teacher's."""
        return _mean(self._asked(lambda a, _, answer, scales: self._objective.distance(a, answer, scales)))

    def _loss(self, arguments: Sequence[Any], target: Any, answer: Any, scales: Scales | None) -> float:
        return float(self._objective(arguments, target, answer=answer, scales=scales))

    def _asked(self, ask: Callable[[Sequence[Any], Any, Any, Scales | None], float]) -> list[list[float]]:
        """What came of the batches of all processes, by groups."""
        student = self._objective.student.eval()
        before = states_of(student) if self._states else {}
        put_states(student, self._states)
        every = zip(self._items, self._answers, self._scales, strict=True)
        own = [ask(arguments, target, answer, scales) for (arguments, target), answer, scales in every]
        put_states(student, before)
        return in_order(self._together.gather(own), self._group)


def _mean(groups: Sequence[Sequence[float]]) -> float:
    """The mean over the groups of the mean over their batches, of those that have any."""
    means = [sum(group) / len(group) for group in groups if group]
    return sum(means) / len(means)
