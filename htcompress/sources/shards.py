"""A folder of weights, as Hugging Face's libraries write it: one file, or shards with an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from htcompress.errors import CheckpointError
from htcompress.sources.checkpoint import Checkpoint

INDEX = ".index.json"
"""How the name of an index of shards ends."""

FILES = ("model.safetensors", "pytorch_model.bin")
"""What weights are called in a folder, the preferred first."""

_MOST_INDEX = 1 << 26


def holds_weights(folder: Path) -> bool:
    """Whether a folder has a file of weights, or an index of shards, under a name that is known."""
    return any((folder / f"{name}{end}").is_file() for name in FILES for end in ("", INDEX))


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder, or the index of its shards.

    Raises `CheckpointError` where there is none, or the folder is an output directory of htcompress.
    """
    config = folder / "config.json"
    if config.is_file() and b'"htcompress.model/' in config.read_bytes()[:4096]:
        raise CheckpointError(
            f"{folder} is a directory of htcompress, compressed already; expected a dense checkpoint. Give the one it "
            f"was made from; evaluate, finetune, export and check take such directories."
        )
    for name in FILES:
        for place in (folder / name, folder / f"{name}{INDEX}"):
            if place.is_file():
                return place
    raise CheckpointError(
        f"{folder} is a directory without {' or '.join(FILES)}; expected a checkpoint file (.pt, .pth, .ckpt, "
        f".safetensors), an ONNX file, a directory of Hugging Face, or one of .npy files."
    )


def read_shards(index: Path, read: Callable[[Path], Checkpoint]) -> Checkpoint:
    """All shards that an index names, as one checkpoint.

    Args:
        read: reads one of them.

    Raises `CheckpointError` where the index is none, or a shard is missing.
    """
    try:
        if index.stat().st_size > _MOST_INDEX:
            raise ValueError("it is too large")
        said = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in said.values()})
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it names no files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of shards ({error}). Download the model again.") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {len(names)} shards, of which {missing[0]} is missing. Download the model again."
        )
    shards = [read(index.parent / name) for name in names]
    tensors = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    digest = hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()
    return Checkpoint(index, digest, tensors, sum(shard.size for shard in shards))
