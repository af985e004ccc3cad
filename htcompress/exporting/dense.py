"""The way back: an output directory as the state_dict of the original class."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from htcompress.directory.read import read_config, read_modules, read_state
from htcompress.errors import CheckpointError
from htcompress.nn.recurrent import HTRecurrent


def dense_weights(module: HTRecurrent) -> dict[str, Tensor]:
    """The weights of a compressed layer under torch's names (`weight_ih_l0`, ...).

    The biases, which are merged, stand in `bias_ih`; `bias_hh` is zero, except for what a GRU keeps apart.
    """
    named: dict[str, Tensor] = {}
    with torch.no_grad():
        for (_, _, suffix), gates in zip(module.settings.directions(), module.directions().values(), strict=True):
            whole = gates.written_out()
            parts = {
                "weight_ih": whole.ih,
                "weight_hh": whole.hh,
                "bias_ih": whole.bias_ih,
                "bias_hh": whole.bias_hh,
                "weight_hr": whole.hr,
            }
            # Each in memory of its own: slices of one matrix would be stored whole.
            named |= {name + suffix: t.detach().clone() for name, t in parts.items() if t is not None}
    return named


def dense_tensors(directory: str | Path) -> dict[str, Tensor]:
    """The state_dict that loads into the original class with `strict=True`.

    >>> model = OriginalModel()  # doctest: +SKIP
    >>> model.load_state_dict(dense_tensors("model-ht"))  # doctest: +SKIP
    <All keys matched successfully>

    Raises `CheckpointError` where the directory cannot be read, or the class has one tensor for what are several here.
    """
    directory = Path(directory)
    tensors = read_state(directory)
    for names, module in read_modules(directory, tensors):
        weights = dense_weights(module)
        for name in names:
            prefix = f"{name}." if name else ""
            for key in module.state_dict():
                del tensors[prefix + key]
            tensors |= {prefix + key: value.clone() for key, value in weights.items()}
    for first, *others in read_config(directory).get("shared", []):
        for other in others:
            if first in tensors and other in tensors and not torch.equal(tensors[first], tensors[other]):
                raise CheckpointError(
                    f"{first} and {other} are one tensor in the model that {directory} was made of, and two in what it "
                    f"became: no state_dict of its class holds both. htcompress.load({str(directory)!r}, model) does."
                )
    return tensors
