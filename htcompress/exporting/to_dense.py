"""`export --to dense`: a state_dict with the matrices written out, for the original class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from htcompress.exporting.dense import dense_tensors
from htcompress.exporting.export import Exported, Wish
from htcompress.files import replacing
from htcompress.nn.settings import RecurrentSettings
from htcompress.observer import Observer


def export_as(wish: Wish, observer: Observer) -> Exported:
    """Write the state_dict; see `htcompress.export`."""
    observer.stage("writing out the matrices")
    _save(dense_tensors(wish.place), wish.file)
    settings = {name: RecurrentSettings.from_config(layer["settings"]) for name, layer in wish.config["layers"].items()}
    notes = [
        f"{name or '(top level)'} has {s.recurrence.said}: torch's own class would compute otherwise with these weights"
        for name, s in settings.items()
        if not s.recurrence.native
    ]
    return Exported((wish.file,), notes=tuple(notes))


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    with replacing(file) as partial:
        if file.suffix == ".safetensors":
            from safetensors.torch import save_file

            whole = {name: t.contiguous() for name, t in tensors.items()}
            _written(lambda: save_file(whole, partial, metadata={"format": "pt"}))
        else:
            _written(lambda: torch.save(dict(tensors), partial))


def _written(write: Callable[[], None]) -> None:
    """Let a library write a file of tensors; that it fails is an `OSError`, whatever the library says instead."""
    from safetensors import SafetensorError

    try:
        write()
    except (RuntimeError, SafetensorError) as error:
        raise OSError(str(error).splitlines()[0]) from error
