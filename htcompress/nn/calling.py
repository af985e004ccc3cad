"""The calling convention of torch's recurrent modules: inputs and states of whatever layout in, the same out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from htcompress.errors import ShapeError
from htcompress.nn.recurrence import State
from htcompress.nn.settings import RecurrentSettings


class WithStates:
    """A module with settings, whose state is h, or h and c of an LSTM."""

    settings: RecurrentSettings

    def _zeros(self, like: Tensor, *shape: Any) -> State:
        """The initial state: h, and c for an LSTM, whose size differs where there is a projection."""
        h = like.new_zeros(*shape, self.settings.state_size)
        return (h, like.new_zeros(*shape, self.settings.hidden_size)) if self.settings.recurrence.states > 1 else (h,)

    def _given(self, hx: Any, expected: tuple[Any, ...]) -> State:
        """The caller's state as a tuple, its shapes checked."""
        if self.settings.recurrence.states > 1:
            if not (isinstance(hx, tuple | list) and len(hx) == 2):
                raise ShapeError("The initial state of an LSTM is a pair (h_0, c_0).")
            state, sizes = tuple(hx), [self.settings.state_size, self.settings.hidden_size]
        else:
            state, sizes = (hx,), [self.settings.state_size]
        for name, tensor, size in zip(("h_0", "c_0"), state, sizes, strict=False):
            if tuple(tensor.shape) != (*expected, size):
                raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected {(*expected, size)}.")
        return state

    def _as_torch(self, state: State) -> Any:
        return state if self.settings.recurrence.states > 1 else state[0]


class CalledAsLayers(WithStates):
    """Called as `nn.LSTM`, `nn.GRU` and `nn.RNN` are; `_run` computes."""

    if TYPE_CHECKING:
        batch_first: bool  # torch's module has it

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Tensor | PackedSequence, Any]:
        """The call of torch's module, with its shapes.

        Args:
            input: (time, batch, features), (batch, time, features) with `batch_first`, (time, features)
                without a batch, or a packed sequence.
            hx: h_0, or (h_0, c_0) for an LSTM: (layers * directions, batch, size); zeros if None.

        Returns:
            the outputs of the last layer and the last state of every layer, as torch's module does.

        Raises:
            ShapeError: the input or the state does not fit the settings.
        """
        s = self.settings
        if isinstance(input, PackedSequence):
            data, batch_sizes, order, back = input
            self._check_features(data, (2,))
            # Without sequences of its own order the batch is as large as the first time step.
            state = self._state(data, int(batch_sizes[0]), hx, order)
            data, state = self._run(data, batch_sizes, state)
            if back is not None:
                state = tuple(t.index_select(1, back) for t in state)
            return PackedSequence(data, batch_sizes, order, back), self._as_torch(state)
        self._check_features(input, (2, 3))
        batched = input.ndim == 3
        x = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        if hx is not None and not batched:
            given = self._given(hx, (s.num_layers * s.num_directions,))
            hx = self._as_torch(tuple(t.unsqueeze(1) for t in given))
        out, state = self._run(x, None, self._state(x, x.shape[1], hx, None))
        if not batched:
            return out.squeeze(1), self._as_torch(tuple(t.squeeze(1) for t in state))
        return (out.transpose(0, 1) if self.batch_first else out), self._as_torch(state)

    def _run(self, x: Tensor, batch_sizes: Tensor | None, state: State) -> tuple[Tensor, State]:
        """All layers: x (time, batch, features) or (rows, features) of a packed sequence, and the last states."""
        raise NotImplementedError

    def _check_features(self, x: Tensor, dims: tuple[int, ...]) -> None:
        if x.ndim not in dims or x.shape[-1] != self.settings.input_size:
            expected = " or ".join(f"{d}-D" for d in dims)
            raise ShapeError(
                f"{type(self).__name__} expects a {expected} input with {self.settings.input_size} features "
                f"last; found shape {tuple(x.shape)}."
            )

    def _state(self, like: Tensor, batch: Any, hx: Any, order: Tensor | None) -> State:
        stack = self.settings.num_layers * self.settings.num_directions
        if hx is None:
            return self._zeros(like, stack, batch)
        state = self._given(hx, (stack, batch))
        return state if order is None else tuple(t.index_select(1, order) for t in state)
