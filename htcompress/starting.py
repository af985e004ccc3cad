"""`init`: a task file to begin with, for what a checkpoint holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from htcompress.errors import RequestError
from htcompress.files import replacing
from htcompress.model.inventory import inventory, names_of, tensor_names
from htcompress.nn.settings import RecurrentSettings
from htcompress.sources.read import read_checkpoint
from htcompress.sources.recognise import Container, recognise

_SHOWN = 40
"""Tensors beside the recurrent layers that are listed."""

_TEXT = '''\
"""The task of {file}: fill in what is marked TODO, then

    htcompress convert {file} --budget 20kB --task {task}
"""

import torch
from torch import nn

# Recurrent layers of the checkpoint:
{layers}
# Other tensors:
{others}


def model():
    """A fresh dense model, into which the checkpoint is loaded; names and shapes as above."""
    raise NotImplementedError("TODO: from your_package import YourModel; return YourModel(...)")


def calibration():
    """Inputs without labels, batch by batch: a tuple is the model's positional arguments, anything else its one."""
    raise NotImplementedError("TODO: for x in your_batches: yield x")
    yield torch.zeros(16, 50, {inputs})  # (batch, time, inputs), say


def training():
    """For fine-tuning: (inputs, target), or inputs alone; leave it out to train on calibration()."""
    raise NotImplementedError("TODO: for x, y in your_training_batches: yield x, y")
    yield None


def loss(output, target):
    """Added to distillation where there are targets; leave it out if you have none."""
    return nn.functional.cross_entropy(output, target)  # TODO: yours


def evaluate(model):
    """The metric of the report, on data that nothing above has seen."""
    raise NotImplementedError("TODO: return {{'accuracy': ...}}")


higher_is_better = True  # TODO: False for an error or a loss
'''


def write_task(
    checkpoint: str | Path, out: str | Path, *, weights: str | None = None, names: Mapping[str, str] | None = None
) -> Path:
    """Write a task file for a checkpoint, its layers and tensors listed, with what is to be filled in.

    Raises:
        CheckpointError: the checkpoint cannot be read, or has no recurrent layers.
        RequestError: the file exists, or cannot be written; or the model is of a kind that needs none.
    """
    place = Path(out)
    if place.exists():
        raise RequestError(f"{place} exists, and is left as it is. Give another with -o.")
    if not place.parent.is_dir() or not os.access(place.parent, os.W_OK):
        raise RequestError(f"The folder {place.parent} cannot be written to; give another file with -o.")
    file = Path(checkpoint)
    if file.is_file() and file.stat().st_size and recognise(file, file.stat().st_size) is Container.ONNX:
        raise RequestError(
            f"{checkpoint} is {Container.ONNX}, which runs from its own file and needs no task: record its inputs by "
            f"their names with numpy.savez, and run "
            f"htcompress convert {checkpoint} --budget 20kB --calibration inputs.npz."
        )
    read = read_checkpoint(checkpoint, weights=weights, names=names)
    layers = inventory(read.tensors, source=str(checkpoint))
    own = {tensor for layer in layers for name in names_of(layer, read.tensors) for tensor in tensor_names(layer, name)}
    others = {name: tuple(tensor.shape) for name, tensor in read.tensors.items() if name not in own}
    shown = [f"#   {name} {shape}" for name, shape in list(others.items())[:_SHOWN]]
    if len(others) > _SHOWN:
        shown.append(f"#   and {len(others) - _SHOWN} more")
    text = _TEXT.format(
        file=Path(checkpoint).name,
        task=place.name,
        layers="\n".join(f"#   {layer.name or '(top level)'}: {_said(layer.settings)}" for layer in layers),
        others="\n".join(shown) or "#   none",
        inputs=layers[0].settings.input_size,
    )
    with replacing(place) as partial:
        partial.write_text(text, encoding="utf-8")
    return place


def _said(s: RecurrentSettings) -> str:
    """A layer as one constructs it."""
    more = [f"num_layers={s.num_layers}"] * (s.num_layers > 1) + ["bidirectional=True"] * s.bidirectional
    more += [f"proj_size={s.proj_size}"] * bool(s.proj_size) + ["bias=False"] * (not s.bias)
    cls = s.recurrence.torch_cell if s.cell else s.recurrence.torch_layer
    return f"nn.{cls.__name__}({', '.join([str(s.input_size), str(s.hidden_size), *more])})"
