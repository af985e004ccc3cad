"""What the configuration of a Keras model says of its layers; it is read, never run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from htcompress.nn.recurrence import recurrence_of, with_nonlinearity
from htcompress.sources.keras_layouts import NotUnderstoodError
from htcompress.vocabulary import Kind

_DEEPEST = 32

BIDIRECTIONAL = "Bidirectional"
WRAPPERS = ("TimeDistributed", "Wrapper", "SpectralNormalization")

_KINDS = {"LSTM": Kind.LSTM, "GRU": Kind.GRU, "SimpleRNN": Kind.RNN_TANH}
_ACTIVATIONS = ("tanh", "sigmoid", "relu", "softsign", "softplus", "elu", "linear")
"""Activations whose words are those of `htcompress.nn.activations`."""

_HARD = "hard_sigmoid"
_CUDNN = {"CuDNNLSTM": "LSTM", "CuDNNGRU": "GRU"}
_CELLS = {f"{name}Cell": name for name in _KINDS}
_RECURRENT = re.compile(r"(RNN|LSTM|GRU)(Cell|[123]D)?$|^RNN$")


@dataclass(frozen=True)
class Spec:
    """A layer as a configuration describes it.

    Attributes:
        cls: the name of its class.
        name: its own name.
        config: its settings.
        inner: the layers of a model, what a wrapper wraps, both directions of a Bidirectional.
        module: where the class comes from, as far as it is said.
    """

    cls: str
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    inner: tuple[Spec, ...] = ()
    module: str = ""

    @classmethod
    def of(cls, node: Any, depth: int = 0) -> Spec:
        """Of `{"class_name": ..., "config": {...}}`. Raises `ValueError` where it is no such thing."""
        if depth > _DEEPEST or not isinstance(node, Mapping) or not isinstance(node.get("class_name"), str):
            raise ValueError("its configuration is none of Keras")
        given = node.get("config")
        # Until Keras 2.2 the configuration of a Sequential is the list of its layers.
        config = {"layers": given} if isinstance(given, list) else given if isinstance(given, Mapping) else {}
        name = str(config.get("name") or node.get("name") or "")
        inner = [cls.of(layer, depth + 1) for layer in config.get("layers") or () if isinstance(layer, Mapping)]
        if isinstance(config.get("layer"), Mapping):
            inner = [cls.of(config["layer"], depth + 1)]
            if node["class_name"] == BIDIRECTIONAL:
                inner.append(_backward(config, inner[0], depth))
        return cls(node["class_name"], name, config, tuple(inner), str(node.get("module") or ""))

    @property
    def is_recurrent(self) -> bool:
        """Whether it is a recurrent layer, of whatever kind."""
        return bool(_RECURRENT.search(self.cls))

    @property
    def is_model(self) -> bool:
        """Whether it is a model of layers."""
        return isinstance(self.config.get("layers"), list)

    @property
    def goes_backwards(self) -> bool:
        """Whether it reads its sequences from the end."""
        return bool(self.config.get("go_backwards", False))

    def computes(self, *, older: bool) -> Computed:
        """What the layer does at every step; `older`: the file is of Keras before version 3.

        Raises `NotUnderstoodError` where nothing here does alike.
        """
        cls, config = _CUDNN.get(self.cls, self.cls), self.config
        if cls == "RNN":
            cell = Spec.of(config["cell"]) if isinstance(config.get("cell"), Mapping) else Spec("a cell", "")
            if cell.cls not in _CELLS:
                raise NotUnderstoodError(f"runs {cell.cls} step by step, which torch has not as one layer")
            cls, config = _CELLS[cell.cls], cell.config
        if cls not in _KINDS:
            raise NotUnderstoodError(f"is of the class {self.cls}, which torch has not")
        kind = _KINDS[cls]
        if self.cls in _CUDNN:
            return Computed(kind)
        words = [_word(config.get("activation", "tanh"), older=older)]
        if recurrence_of(kind).gates == 1:
            other = with_nonlinearity(words[0])
            kind = kind if other is None else other.kind
        else:
            words = [_word(config.get("recurrent_activation", "sigmoid"), older=older), *words]
        # Until TensorFlow 2 a GRU reset its state before the matrix, and files did not say so.
        before = recurrence_of(kind).has_reset and config.get("reset_after", False) is False
        native = recurrence_of(kind, tuple(words)).native
        return Computed(kind, () if native else tuple(words), before)


@dataclass(frozen=True)
class Computed:
    """What a layer does at every step; see `RecurrentSettings`."""

    kind: Kind
    activations: tuple[str, ...] = ()
    resets_before: bool = False


def _word(given: Any, *, older: bool) -> str:
    """The word of an activation."""
    name = _activation(given)
    if name == _HARD:
        # Version 3 has made it flatter.
        return _HARD if older else f"{_HARD}_sixth"
    if name not in _ACTIVATIONS:
        raise NotUnderstoodError(f"has the activation {name}, which is not known here")
    return name


def _backward(config: Mapping[str, Any], forward: Spec, depth: int) -> Spec:
    """The other direction of a Bidirectional: told, or the same the other way round."""
    if isinstance(config.get("backward_layer"), Mapping):
        return Spec.of(config["backward_layer"], depth + 1)
    return replace(forward, config={**forward.config, "go_backwards": not forward.goes_backwards})


def _activation(given: Any) -> str:
    """The name of an activation, as a string or as a configuration."""
    if isinstance(given, Mapping):
        inner = given.get("config")
        if isinstance(inner, Mapping) and inner:
            raise NotUnderstoodError(f"has the activation {given.get('class_name')} with settings of its own")
        return str(inner if isinstance(inner, str) else given.get("class_name"))
    return str(given)


def snake_case(name: str) -> str:
    """The name of a class as Keras writes it into files (keras.src.utils.naming)."""
    found = re.sub(r"\W+", "", name)
    found = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", found)
    return re.sub("([a-z])([A-Z])", r"\1_\2", found).lower()


def groups(layers: tuple[Spec, ...]) -> dict[str, Spec]:
    """The layers of a model by the names of their groups in files of Keras 3: the class, counted."""
    found: dict[str, Spec] = {}
    counts: dict[str, int] = {}
    for layer in layers:
        if ".ops." in layer.module:
            continue  # an operation between layers, which has no weights
        base = snake_case(layer.cls)
        counts[base] = counts.get(base, -1) + 1
        found[f"{base}_{counts[base]}" if counts[base] else base] = layer
    return found


def code_in(node: Any) -> str | None:
    """What in a configuration would run code of its own, in words; None where nothing does."""
    for part in _mappings(node):
        cls, config, module = part.get("class_name"), part.get("config"), part.get("module")
        if cls == "__lambda__" or (
            cls == "Lambda" and isinstance(config, Mapping) and isinstance(config.get("function"), list)
        ):
            return "a Lambda layer with Python code in it"
        outside = isinstance(module, str) and module.partition(".")[0] not in ("keras", "builtins", "tf_keras", "")
        if outside and isinstance(cls, str):
            return f"{cls} of the package {module}"
    return None


def _mappings(node: Any) -> Iterator[Mapping[str, Any]]:
    level = [node]
    while level:
        part = level.pop()
        if isinstance(part, Mapping):
            yield part
            level += part.values()
        elif isinstance(part, list):
            level += part
