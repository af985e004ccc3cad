"""A model of Keras, run by Keras on torch: its answers, and what passes through its recurrent layers."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from htcompress.errors import CheckpointError, RequestError, TaskError
from htcompress.graphs.feeds import Feed, Value
from htcompress.graphs.graph import Answers
from htcompress.nn.activations import ACTIVATIONS
from htcompress.sources.keras_config import WRAPPERS, code_in
from htcompress.sources.keras_file import KerasFile
from htcompress.sources.keras_layers import KerasLayer
from htcompress.sources.keras_modern import SLASH, modernised

_TYPES = {"float32": "float", "float64": "double"}
"""Where the word that feeds have for a type is another than Keras's."""


class KerasSession:
    """A model loaded by Keras, whose recurrent layers tell what passes through them.

    Attributes:
        inputs, outputs: of the model.
        passed: nothing; models of Keras keep their states.
    """

    def __init__(self, file: KerasFile, watched: Mapping[str, KerasLayer]) -> None:
        """Load it.

        Args:
            watched: layers of the file by what their values are to be called after.

        Raises:
            CheckpointError: the model runs code of its own, or Keras cannot load it.
            RequestError: Keras is not installed, or runs on another library than torch.
        """
        self._path = file.path
        self._keras = _keras(file.path)
        with self._quietly():
            self._model = _loaded(self._keras, file)
        if not getattr(self._model, "inputs", None):
            raise CheckpointError(f"{file.path} does not say what its inputs are. Save it with an Input layer.")
        own = dict(_layers(self._model, ""))
        if file.older:
            for layer in own.values():
                _with_older_activations(self._keras, layer)
        self._stateful = [layer for layer in own.values() if getattr(layer, "stateful", False)]
        self._tapes = {
            name: tape for name, layer in watched.items() if (tape := _Tape.of(own.get(layer.name), layer)) is not None
        }
        self.inputs = [_value(tensor.name, tensor) for tensor in self._model.inputs]
        self.passed: Mapping[str, str] = {}
        names = getattr(self._model, "output_names", None) or [self._model.layers[-1].name]
        pairs = zip(_apart(names), self._model.outputs, strict=True)
        self.outputs = [_value(name, tensor) for name, tensor in pairs]

    def answers(self, calls: Sequence[Feed], states: Mapping[str, str]) -> Answers:
        """See `Session`; what passes through a layer is called `layer/x` and so on, time first."""
        passed: Feed = {}
        found: Answers = []
        with self._quietly():
            for layer in self._stateful:
                layer.reset_states()
            for call in calls:
                feed = {**call, **passed}
                out = self._answer(feed)
                passed = {name: out[output] for name, output in states.items()}
                values = [tape.values(name) for name, tape in self._tapes.items()]
                found.append({**feed, **out, **{k: array for value in values for k, array in value.items()}})
        return found

    def _answer(self, feed: Feed) -> Feed:
        tree = self._keras.tree
        for tape in self._tapes.values():
            tape.clear()
        given = [torch.from_numpy(np.ascontiguousarray(feed[value.name])) for value in self.inputs]
        # A Sequential has one input, and no structure of such.
        structure = getattr(self._model, "input", None)
        try:
            taken = given[0] if structure is None else tree.pack_sequence_as(structure, given)
            result = self._model(taken, training=False)
        except Exception as error:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in feed.items())
            raise TaskError(f"Keras cannot run {self._path} on {shapes}: {_first_line(error)}.") from error
        arrays = [self._keras.ops.convert_to_numpy(one) for one in tree.flatten(result)]
        return {value.name: array for value, array in zip(self.outputs, arrays, strict=True)}

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """On the CPU, without gradients and without what Keras warns of."""
        with warnings.catch_warnings(), torch.no_grad(), self._keras.device("cpu"):
            warnings.simplefilter("ignore")
            yield


def _keras(path: Path) -> Any:
    """Keras, running on torch."""
    if "keras" not in sys.modules:
        before = os.environ.get("KERAS_BACKEND")
        os.environ["KERAS_BACKEND"] = "torch"
        try:
            import keras
        except ImportError as error:
            raise RequestError(
                f"{path} is run by Keras, which needs the package {error.name}: pip install 'htcompress[keras]'."
            ) from error
        finally:
            del os.environ["KERAS_BACKEND"]
            if before is not None:
                os.environ["KERAS_BACKEND"] = before
    keras = sys.modules["keras"]
    if keras.config.backend() != "torch":
        raise RequestError(
            f"{path} is to be run by Keras on torch, and Keras runs on {keras.config.backend()} already. Set the "
            f"environment variable KERAS_BACKEND=torch before it is imported."
        )
    return keras


def _loaded(keras: Any, file: KerasFile) -> Any:
    found = code_in(file.config)
    if found is not None:
        raise CheckpointError(
            f"{file.path} holds {found}, which is not run. Its weights can be worked from all the same: give a task "
            f"with --task, whose model() is the model in torch, or leave out --calibration."
        )
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / f"model{file.suffix}"
        place.write_bytes(modernised(file))
        try:
            return keras.saving.load_model(place, compile=False, safe_mode=True)
        except Exception as error:  # whatever a layer of the model stumbles over
            said = _first_line(error).replace(str(place), file.path.name)
            raise CheckpointError(
                f"Keras {keras.__version__} cannot load {file.path}: {said}. Classes of its own can be defined in a "
                f"task (--task), by keras.saving.get_custom_objects()[name] = cls. Its weights can be worked from all "
                f"the same: leave out --calibration."
            ) from error


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _layers(model: Any, above: str) -> Iterator[tuple[str, Any]]:
    """The layers of a model by the names that files give them: those of models in models after theirs."""
    for layer in model.layers:
        yield from _named(layer, f"{above}{layer.name}".replace("/", ".").replace(SLASH, "."))


def _named(layer: Any, name: str) -> Iterator[tuple[str, Any]]:
    yield name, layer
    if type(layer).__name__ in WRAPPERS:
        yield from _named(layer.layer, name)
    elif hasattr(layer, "layers"):
        yield from _layers(layer, f"{name}.")
    elif hasattr(layer, "backward_layer"):
        yield f"{name}.forward", layer.forward_layer
        yield f"{name}.backward", layer.backward_layer


def _with_older_activations(keras: Any, layer: Any) -> None:
    """Let a layer of an older file compute as it did: the slope of its hard sigmoids was another."""
    older = ACTIVATIONS["hard_sigmoid"].apply
    cell = getattr(layer, "cell", None)
    # Cells first: layers have theirs from them. Several may be run as one.
    for owner in (*getattr(cell, "cells", ()), cell, layer):
        for name in ("activation", "recurrent_activation"):
            if getattr(owner, name, None) is keras.activations.hard_sigmoid:
                setattr(owner, name, older)


def _apart(names: Sequence[str]) -> list[str]:
    """Names of which each is given once."""
    return [name if name not in names[:k] else f"{name}_{k}" for k, name in enumerate(names)]


def _value(name: str, tensor: Any) -> Value:
    said = str(tensor.dtype)
    return Value(name.replace(SLASH, "/"), tuple(tensor.shape), f"tensor({_TYPES.get(said, said)})")


# ---- what passes through a layer ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Passage:
    """One call of a layer of one direction: tensors as Keras has them, samples first."""

    x: Tensor
    mask: Tensor | None
    initial: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class _Tape:
    """What has passed through a recurrent layer, direction by direction.

    Attributes:
        layers: of Keras, one for each direction.
        passages: of each.
    """

    layers: tuple[Any, ...]
    states: int
    passages: tuple[list[_Passage], ...] = field(default=())

    @classmethod
    def of(cls, layer: Any, stored: KerasLayer) -> _Tape | None:
        """Begin to listen to a layer; None where it is not as it is stored."""
        layers: tuple[Any, ...] = (layer,)
        if stored.settings.bidirectional:
            if not hasattr(layer, "backward_layer"):
                return None
            layers = (layer.forward_layer, layer.backward_layer)
            layers = layers[::-1] if layer.forward_layer.go_backwards else layers
        if any(not hasattr(one, "go_backwards") for one in layers):
            return None
        tape = cls(layers, stored.settings.recurrence.states, tuple([] for _ in layers))
        for one, passages in zip(layers, tape.passages, strict=True):
            # Else both directions may be run in one, past their calls.
            one.use_cudnn = False
            one.call = _listening(one, one.call, passages)
        return tape

    def clear(self) -> None:
        """Forget what has passed."""
        for passages in self.passages:
            passages.clear()

    def values(self, name: str) -> dict[str, np.ndarray]:
        """What has passed through in one run of the model, as a node of a graph has it; nothing where nothing has.

        Several calls are one with more samples. Steps that are masked are left out, for to a layer of Keras they are
        not there; samples of which all are masked, too.
        """
        if not all(self.passages):
            return {}
        parts = [self._part(every) for every in zip(*self.passages, strict=True)]
        lengths = torch.cat([part.pop("lengths") for part in parts])
        longest = max(len(part["x"]) for part in parts)
        found = {}
        for key, axis in _BATCH.items():
            if key in parts[0]:
                found[key] = torch.cat([_padded(part[key], longest, key) for part in parts], dim=axis)
        if not (lengths == longest).all():
            there = lengths > 0
            there[0] |= not there.any()
            chosen = there.nonzero()[:, 0]
            found = {key: value.index_select(_BATCH[key], chosen) for key, value in found.items()}
            found["lengths"] = lengths[chosen].clamp_min(1)
        return {f"{name}/{key}": value.numpy() for key, value in found.items()}

    def _part(self, every: Sequence[_Passage]) -> dict[str, Tensor]:
        """One call, of all directions, time first and masked steps left out."""
        x, mask = every[0].x, every[0].mask
        steps = x.shape[1]
        if mask is None:
            order, lengths = None, torch.full((len(x),), steps)
        else:
            order, lengths = torch.argsort((~mask).to(torch.int8), dim=1, stable=True), mask.sum(1)

        def compact(value: Tensor) -> Tensor:
            if order is not None:
                value = value.gather(1, order[:, :, None].expand_as(value))
                value = value * (torch.arange(steps) < lengths[:, None])[:, :, None]
            return value.transpose(0, 1)

        found = {"x": compact(x), "lengths": lengths}
        for k, state in enumerate(_STATES[: self.states]):
            found[f"{state}_0"] = torch.stack([passage.initial[k] for passage in every])
        if self.layers[0].return_sequences:
            ys = [
                p.outputs[0].flip(1) if one.go_backwards else p.outputs[0]
                for one, p in zip(self.layers, every, strict=True)
            ]
            found["y"] = torch.stack([compact(y) for y in ys], dim=1)
        else:
            found["h_n"] = torch.stack([passage.outputs[0] for passage in every])
        if self.layers[0].return_state:
            for k, state in enumerate(_STATES[: self.states]):
                found[f"{state}_n"] = torch.stack([passage.outputs[1 + k] for passage in every])
        return found


_STATES = ("h", "c")
_BATCH = {"x": 1, "y": 2, "h_0": 1, "c_0": 1, "h_n": 1, "c_n": 1}
"""The axis of the samples."""


def _padded(value: Tensor, steps: int, key: str) -> Tensor:
    """With as many time steps, where it has such."""
    if key not in ("x", "y") or len(value) == steps:
        return value
    return torch.cat([value, value.new_zeros(steps - len(value), *value.shape[1:])])


def _listening(layer: Any, call: Callable[..., Any], passages: list[_Passage]) -> Callable[..., Any]:
    """A layer's `call` that notes what passes through."""

    def listening(sequences: Any, initial_state: Any = None, mask: Any = None, training: Any = False) -> Any:
        given = layer.states if initial_state is None and layer.stateful else initial_state
        begun = [] if given is None else [*given] if isinstance(given, list | tuple) else [given]
        x = _real(sequences)
        units = layer.cell.units
        initial = [_real(getattr(state, "value", state)) for state in begun] or [
            x.new_zeros(len(x), units) for _ in layer.state_size
        ]
        result = call(sequences, initial_state=initial_state, mask=mask, training=training)
        outputs = result if isinstance(result, list | tuple) else (result,)
        seen = None if mask is None else torch.as_tensor(mask).detach().bool().reshape(x.shape[:2])
        passages.append(_Passage(x, seen, tuple(initial), tuple(_real(one) for one in outputs)))
        return result

    return listening


def _real(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().float().clone()
