"""Checkpoints of safetensors."""

from __future__ import annotations

from pathlib import Path

from htcompress.errors import CheckpointError
from htcompress.sources.checkpoint import MAKE_ONE, Checkpoint, checked_name, first_line, wrappers


def read_safetensors(path: Path, digest: str, size: int, weights: str | None) -> Checkpoint:
    """The tensors of a safetensors file, of which there is one state_dict."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    if weights:
        raise CheckpointError(
            f"{path} is a safetensors file, which holds one state_dict; found weights {weights!r} asked for. Leave it "
            f"out."
        )
    try:
        tensors = dict(load_file(path))
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
    except Exception as error:  # other libraries' words for damage
        raise unreadable_safetensors(path, first_line(error)) from error
    # safetensors.torch.save_model keeps the further names of a tensor there, beside the format (pt).
    tied = {name: of for name, of in said.items() if name not in tensors and of in tensors and name != "format"}
    tensors |= {name: tensors[of] for name, of in tied.items()}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; expected a state_dict (names to tensors). {MAKE_ONE}")
    tensors = {checked_name(name, path): tensor for name, tensor in tensors.items()}
    prefix = wrappers(tensors)
    return Checkpoint(path, digest, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, size)


def unreadable_safetensors(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a readable safetensors file ({reason}). It may be cut short or of another format; save or "
        f"download it again."
    )
