"""What a recurrent layer is, apart from its weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from htcompress.nn.recurrence import RECURRENCES, TORCH_CLASSES, Recurrence, recurrence_of
from htcompress.vocabulary import Kind

_ADAPTED = ("activations", "resets_before")
"""Settings that torch's modules have not; they are told only where they are not torch's."""


class StandIn:
    """Marks what stands in for a recurrent module of torch, and is an instance of its class, without its weights."""


@dataclass(frozen=True)
class RecurrentSettings:
    """The constructor arguments of `torch.nn.LSTM` and its kin, checked once; and what files of others may ask for.

    `activations` are the words of those of the gates and of all else, `hard_sigmoid,tanh`, or of an RNN's one, and
    empty for torch's; with
    `resets_before` a GRU multiplies its reset gate with the state before the candidate's matrix (see `Recurrence`).

    >>> settings = RecurrentSettings(Kind.LSTM, 3600, 64)
    >>> settings.dense_parameters
    938496
    """

    kind: Kind
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    proj_size: int = 0
    cell: bool = False
    activations: str = ""
    resets_before: bool = False

    @property
    def recurrence(self) -> Recurrence:
        """What its kind does, with its activations and its reset gate."""
        return recurrence_of(self.kind, self.words, resets_before=self.resets_before)

    @property
    def words(self) -> tuple[str, ...]:
        """The activations, one by one."""
        return tuple(self.activations.split(",")) if self.activations else ()

    @property
    def gates(self) -> int:
        """How many blocks of `hidden_size` rows the weight matrices have."""
        return self.recurrence.gates

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def state_size(self) -> int:
        """The size of h: the projection's, where there is one."""
        return self.proj_size or self.hidden_size

    @property
    def rows(self) -> int:
        """The rows of every weight matrix: gates * hidden_size."""
        return self.gates * self.hidden_size

    def layer_input(self, layer: int) -> int:
        """The size of what enters a layer."""
        return self.input_size if layer == 0 else self.state_size * self.num_directions

    def directions(self) -> Iterator[tuple[int, int, str]]:
        """Layer, direction and torch's suffix (`_l0`, `_l0_reverse`, or nothing for a cell)."""
        for layer in range(self.num_layers):
            for direction in range(self.num_directions):
                yield layer, direction, "" if self.cell else f"_l{layer}{'_reverse' if direction else ''}"

    @property
    def mode(self) -> str:
        """What torch's modules call their kind: `LSTM`, `GRU`, `RNN_TANH`, `RNN_RELU`."""
        return self.kind.value.upper()

    @property
    def weight_names(self) -> list[list[str]]:
        """Torch's names of the tensors of each direction, in its order: `weight_ih_l0`, `weight_hh_l0`, ..."""
        keys = ["weight_ih", "weight_hh"]
        if self.bias:
            keys += ["bias_ih", "bias_hh"]
        if self.proj_size:
            keys.append("weight_hr")
        return [[key + suffix for key in keys] for _, _, suffix in self.directions()]

    @property
    def direction_names(self) -> list[str]:
        """The names of the directions, in order: `l0`, `l0_reverse`, ...; `cell` for a cell."""
        return [suffix.removeprefix("_") or "cell" for _, _, suffix in self.directions()]

    @property
    def dense_parameters(self) -> int:
        """The numbers that torch stores: weights, both biases, projections."""
        total = 0
        for layer, _, _ in self.directions():
            total += self.rows * (self.layer_input(layer) + self.state_size + 2 * self.bias)
            total += self.proj_size * self.hidden_size
        return total

    def to_config(self) -> dict[str, Any]:
        """The settings as JSON values."""
        found = {name: value for name, value in asdict(self).items() if name not in _ADAPTED or value}
        return {**found, "kind": self.kind.value}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RecurrentSettings:
        return cls(**{**config, "kind": Kind(config["kind"])})

    @classmethod
    def of(cls, module: nn.Module) -> RecurrentSettings:
        """The settings of a torch recurrent module or cell."""
        own = getattr(module, "settings", None)
        # What stands for layers that torch has no class for keeps its settings; see `htcompress.nn.adapted`.
        if isinstance(own, RecurrentSettings):
            return own
        cell = isinstance(module, nn.RNNCellBase)
        nonlinearity = getattr(module, "nonlinearity", None)
        kind = next(
            (
                r.kind
                for r in RECURRENCES
                if isinstance(module, (r.torch_layer, r.torch_cell)) and nonlinearity == r.nonlinearity
            ),
            None,
        )
        if kind is None:
            raise TypeError(f"{type(module).__name__} is not a recurrent module of torch.nn.")
        names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
        found = {name: getattr(module, name) for name in names if hasattr(module, name)}
        return cls(kind, **found, proj_size=getattr(module, "proj_size", 0), cell=cell)


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module is a recurrent layer or cell of torch, or of a class derived from one, with its own weights."""
    return isinstance(module, TORCH_CLASSES) and not isinstance(module, StandIn)


def torch_class(module: type[nn.Module]) -> type[nn.Module]:
    """The recurrent class of torch that a class is, or is derived from."""
    return next(cls for cls in TORCH_CLASSES if issubclass(module, cls))
