"""How Keras keeps the weights of recurrent layers, and torch's weights made of them, both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from htcompress.nn.recurrence import Recurrence, recurrence_of
from htcompress.vocabulary import Kind

_ORDERS: Mapping[Kind, tuple[int, ...]] = {Kind.LSTM: (0, 1, 2, 3), Kind.GRU: (1, 0, 2)}
"""Torch's gate k is Keras's gate order[k]: i f c o of both; z r h of Keras, r z n of torch."""

PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class NotUnderstoodError(Exception):
    """A layer does what no module of torch does; the text says what, as what follows the layer's name."""


@dataclass(frozen=True)
class Layout:
    """The arrays of one direction of a layer: the kernel (inputs, gates * units), the recurrent one, the bias.

    Attributes:
        kind: of the recurrence.
        cudnn: whether each gate's block is stored transposed, as CuDNNLSTM and CuDNNGRU do: a block of shape (inputs,
            units) that holds the numbers of (units, inputs).
        biases: how many bias vectors there are: none, one, or those of the inputs and then those of the state.
    """

    kind: Kind
    cudnn: bool = False
    biases: int = 1

    @property
    def recurrence(self) -> Recurrence:
        return recurrence_of(self.kind)

    @classmethod
    def of(cls, kind: Kind, shapes: Sequence[tuple[int, ...]]) -> Layout:
        """The layout of arrays of these shapes: the kernel, the recurrent kernel, and the bias if there is one.

        Raises `NotUnderstoodError` where they are not those of the kind, or torch's kernel does not compute so.
        """
        gates = recurrence_of(kind).gates
        shown = ", ".join(map(str, shapes))
        if len(shapes) not in (2, 3) or any(len(shape) != 2 for shape in shapes[:2]):
            raise NotUnderstoodError(f"has weights of shapes {shown}; expected a kernel, a recurrent kernel and a bias")
        units = shapes[1][0]
        rows = gates * units
        if not units or shapes[1] != (units, rows) or shapes[0][1] != rows:
            raise NotUnderstoodError(f"has weights of shapes {shown}, which are not those of {gates} gates")
        if len(shapes) == 2:
            return cls(kind, biases=0)
        bias = shapes[2]
        if bias == (2 * rows,) and gates > 1:
            return cls(kind, cudnn=True, biases=2)
        if bias == (2, rows):
            return cls(kind, biases=2)
        if bias != (rows,):
            raise NotUnderstoodError(f"has a bias of shape {bias}, which is not that of {gates} gates of {units} units")
        return cls(kind)

    def to_torch(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Torch's tensors, by `PARTS`."""
        found = {"weight_ih": self._rows(arrays[0]), "weight_hh": self._rows(arrays[1])}
        if self.biases:
            both = arrays[2].reshape(self.biases, -1)
            both = both if self.biases == 2 else np.stack([both[0], np.zeros_like(both[0])])
            found |= {name: self._ordered(row) for name, row in zip(PARTS[2:], both, strict=True)}
        return found

    def from_torch(self, tensors: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Keras's arrays, of which `to_torch` makes these tensors; two biases that Keras adds up stand in one.

        Raises `ValueError` where Keras has no place for a bias that is there.
        """
        made = [self._columns(tensors["weight_ih"]), self._columns(tensors["weight_hh"])]
        biases = [self._ordered(tensors[name], back=True) for name in PARTS[2:] if name in tensors]
        if biases and not self.biases:
            raise ValueError("The layer has no bias in Keras.")
        if self.biases == 1:
            made.append(np.sum(biases, axis=0))
        elif self.biases:
            made.append(np.concatenate(biases) if self.cudnn else np.stack(biases))
        return made

    def _blocks(self, rows: np.ndarray) -> list[np.ndarray]:
        return np.split(rows, self.recurrence.gates)

    def _ordered(self, rows: np.ndarray, *, back: bool = False) -> np.ndarray:
        """Blocks of rows in torch's order, or back in Keras's."""
        order = _ORDERS.get(self.kind, (0,))
        blocks = self._blocks(rows)
        return np.concatenate([blocks[k] for k in (np.argsort(order) if back else order)])

    def _rows(self, kernel: np.ndarray) -> np.ndarray:
        """(inputs, gates * units) of Keras as (gates * units, inputs) of torch."""
        inputs = kernel.shape[0]
        blocks = np.split(kernel, self.recurrence.gates, axis=1)
        turned = [np.ascontiguousarray(b).reshape(-1, inputs) if self.cudnn else b.T for b in blocks]
        return self._ordered(np.concatenate(turned))

    def _columns(self, rows: np.ndarray) -> np.ndarray:
        """The inverse of `_rows`."""
        inputs = rows.shape[1]
        blocks = self._blocks(self._ordered(rows, back=True))
        turned = [np.ascontiguousarray(b).reshape(inputs, -1) if self.cudnn else b.T for b in blocks]
        return np.concatenate(turned, axis=1)
