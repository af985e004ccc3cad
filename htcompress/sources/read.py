"""Reading a checkpoint: any common container of a state_dict, never code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from htcompress.errors import CheckpointError
from htcompress.sources import naming, nesting
from htcompress.sources.checkpoint import MAKE_ONE, PREFIXES, Checkpoint, unreadable
from htcompress.sources.keras_file import read_keras
from htcompress.sources.numpy_file import holds_arrays, read_folder, read_npz
from htcompress.sources.recognise import Container, Foreign, recognise
from htcompress.sources.safetensors_file import read_safetensors, unreadable_safetensors
from htcompress.sources.saved_model import is_saved_model, read_saved_model
from htcompress.sources.shards import INDEX, holds_weights, read_shards, weights_in
from htcompress.sources.torch_checkpoint import read_torch
from htcompress.sources.torch_file import read_archive, read_legacy, read_program

__all__ = ["NESTED_KEYS", "PREFIXES", "READERS", "Checkpoint", "read_checkpoint"]

NESTED_KEYS = nesting.KNOWN
"""Where training scripts put the state_dict beside an optimizer's and an epoch's."""

READERS: dict[Container, Callable[[Path, str, int, str | None], Checkpoint]] = {
    Container.ARCHIVE: partial(read_torch, read_archive),
    Container.TORCHSCRIPT: partial(read_torch, read_archive),
    Container.PROGRAM: partial(read_torch, read_program),
    Container.LEGACY: partial(read_torch, read_legacy),
    Container.SAFETENSORS: read_safetensors,
    Container.KERAS: read_keras,
    Container.HDF5: read_keras,
    Container.NUMPY: read_npz,
}
"""All sources: of a path, the file's digest and size, and the key of the weights that are asked for."""


def read_checkpoint(
    path: str | Path, *, weights: str | None = None, names: Mapping[str, str] | None = None
) -> Checkpoint:
    """Read a state_dict from a file of `torch.save`, of safetensors or of TorchScript, whatever the file is called.

    Also from a program of `torch.export`, from a directory of Hugging Face or an index of shards, from an `.npz`
    archive or a folder of `.npy` files, and from files of Keras, whose layers come by torch's names. Nothing of the
    file is run: objects of unknown classes, whole modules among them, are looked through for tensors. The state_dict
    may stand under `state_dict`, `model`, `model_state` or `model_state_dict`, or be the only one, or several that
    then belong together (`{"encoder": ..., "decoder": ...}` gives `encoder.rnn.weight_ih_l0`). Its names may begin
    with `module.` or `_orig_mod.`.

    Args:
        path: the file.
        weights: the dotted key of the state_dict to take, such as `state_dict_ema`; by default the usual one.
        names: torch's names for tensors that are called otherwise; see `htcompress.sources.naming.renamed`.

    Raises:
        CheckpointError: the file is missing, empty, broken, holds pickled objects, no state_dict, or none at `weights`;
            or `names` does not fit it.
    """
    found, of_numpy = _read(path, weights)
    if names:
        found = naming.renamed(found, names)
    if of_numpy and not naming.has_recurrent(found.tensors):
        raise naming.unnamed(found)
    return found


def _read(path: str | Path, weights: str | None) -> tuple[Checkpoint, bool]:
    """What a file or a folder holds, and whether it is of NumPy, where torch's names are not to be expected."""
    path = Path(path)
    if path.is_dir() and is_saved_model(path):
        return read_saved_model(path), False
    if path.is_dir() and not holds_weights(path) and holds_arrays(path):
        return read_folder(path, weights), True
    if path.is_dir():
        path = weights_in(path)
    if path.name.endswith(INDEX) and path.is_file():
        return read_shards(path, read_checkpoint), False
    what, digest, size = identified(path)
    if isinstance(what, Container) and what in READERS:
        return READERS[what](path, digest, size, weights), what is Container.NUMPY
    if isinstance(what, Container):
        raise CheckpointError(
            f"{path} is {what}: inspect and convert take it as it is; this needs a state_dict. {MAKE_ONE}"
        )
    if what is not None:
        raise CheckpointError(f"{path} is {what.what}; expected a state_dict or an ONNX file. {what.step}")
    if path.suffix == ".safetensors":
        raise unreadable_safetensors(path, "its header is not one")
    raise unreadable(path, "")


def identified(path: str | Path) -> tuple[Container | Foreign | None, str, int]:
    """What a file is (see `recognise`), its sha256 and its size in bytes.

    Raises `CheckpointError` where it is missing, empty or no file.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"There is no file {path}. Give the path of a trained checkpoint (.pt, .safetensors).")
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory; expected a checkpoint file (.pt, .pth, .ckpt, .safetensors).")
    if not path.is_file():
        raise CheckpointError(f"{path} is a device or a pipe; expected a checkpoint file (.pt, .safetensors).")
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes): the checkpoint was not written. Save it again.")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        what = recognise(path, size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return what, digest, size
