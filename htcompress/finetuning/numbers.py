"""The numbers that an optimiser trains, where they are not those that the model computes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor, nn

from htcompress.finetuning.together import Together
from htcompress.nn.recurrent import HTRecurrent

_SCALE = 1024.0
"""What a loss is multiplied by where gradients are in half precision, so that small ones do not vanish."""


@dataclass(frozen=True, eq=False)
class _Pair:
    """A parameter of the model, what is trained in its place, and what the latter is rounded to."""

    own: nn.Parameter
    trained: nn.Parameter
    rounded: Callable[[Tensor], Tensor] | None

    def settle(self) -> None:
        """Let the model compute with what was trained."""
        if self.own is not self.trained:
            self.own.copy_(self.trained if self.rounded is None else self.rounded(self.trained))


class TrainedNumbers:
    """The parameters as they are trained.

    Those in half precision are trained in float32. Those that will be stored in fewer bits are trained as they were
    before they were rounded, while the model always computes with what will be stored: the gradient at the rounded
    number moves the other (the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432).
    """

    def __init__(self, student: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        rounding = _roundings(student)
        half = [p.dtype in (torch.float16, torch.bfloat16) for p in parameters]
        self._pairs = [
            _Pair(p, nn.Parameter(p.detach().float().clone()) if coarse or p in rounding else p, rounding.get(p))
            for p, coarse in zip(parameters, half, strict=True)
        ]
        self.trained = [pair.trained for pair in self._pairs]
        self._scale = _SCALE if any(half) else 1.0

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss at the numbers that are trained; those that are no numbers count as zero."""
        for pair in self._pairs:
            pair.own.grad = pair.trained.grad = None
        (loss * self._scale).backward()
        for pair in self._pairs:
            if pair.own.grad is None:
                continue
            # Embeddings may give sparse ones, which neither a norm nor an optimiser of all takes.
            gradient = pair.own.grad.to_dense() if pair.own.grad.layout is not torch.strided else pair.own.grad
            if self._scale != 1.0:
                gradient = torch.nan_to_num(gradient.float() / self._scale, 0.0, 0.0, 0.0)
            pair.own.grad, pair.trained.grad = None, gradient.to(pair.trained.dtype)

    def gradients(self) -> list[Tensor | None]:
        """The gradients of what is trained; None where it takes no part."""
        return [number.grad for number in self.trained]

    def set_gradients(self, gradients: Sequence[Tensor | None], together: Together) -> None:
        """Put the sum of the gradients of all processes in the place of these; None where nobody has any."""
        if together.count > 1:
            gradients = self._added(gradients, together)
        for number, gradient in zip(self.trained, gradients, strict=True):
            number.grad = gradient

    def _added(self, gradients: Sequence[Tensor | None], together: Together) -> list[Tensor | None]:
        """One vector for all: the gradients, zeros where there are none, and behind them whether there are."""
        if not self.trained:
            return []
        place = self.trained[0].device
        kind = reduce(torch.promote_types, (number.dtype for number in self.trained))
        flags = torch.tensor([0.0 if g is None else 1.0 for g in gradients])
        parts = [
            *(torch.zeros_like(n) if g is None else g for n, g in zip(self.trained, gradients, strict=True)),
            flags,
        ]
        vector = torch.cat([part.detach().to(place, kind).reshape(-1) for part in parts])
        *sums, flags = together.add(vector).split([part.numel() for part in parts])
        return [
            part.view(number.shape).to(number.device, number.dtype) if flag else None
            for number, part, flag in zip(self.trained, sums, flags.tolist(), strict=True)
        ]

    def apart(self) -> dict[str, Tensor]:
        """What is trained that the model does not hold itself, by its place."""
        pairs = enumerate(self._pairs)
        return {str(i): pair.trained.detach() for i, pair in pairs if pair.own is not pair.trained}

    def put(self, numbers: Mapping[str, Tensor]) -> None:
        """The inverse of `apart`; what the model holds itself it has already."""
        with torch.no_grad():
            for place, number in numbers.items():
                self.trained[int(place)].copy_(number)

    def settle(self) -> None:
        """Let the model compute with what was trained, as it will be stored."""
        with torch.no_grad():
            for pair in self._pairs:
                pair.settle()

    def take(self) -> None:
        """Go on from what the model has now."""
        with torch.no_grad():
            for pair in self._pairs:
                if pair.own is not pair.trained:
                    pair.trained.copy_(pair.own)


def _roundings(student: nn.Module) -> dict[nn.Parameter, Callable[[Tensor], Tensor]]:
    """What the parameters of compressed layers are rounded to, of those that are stored in fewer bits."""
    found: dict[nn.Parameter, Callable[[Tensor], Tensor]] = {}
    for module in student.modules():
        if isinstance(module, HTRecurrent):
            for gates in module.directions().values():
                named = dict(gates.named_parameters())
                found |= {named[name]: partial(gates.rounded, name) for name in gates.codecs}
    return found
