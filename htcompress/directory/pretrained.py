"""Output directories by the names that users of Hugging Face's libraries know; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from htcompress.directory.read import load, read_modules, read_state
from htcompress.errors import CheckpointError


def from_pretrained(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load an output directory, as `load` does, in evaluation mode.

    >>> import htcompress
    >>> compact = htcompress.from_pretrained("out", OriginalModel())  # doctest: +SKIP

    Args:
        directory: as written by `htcompress convert` or `save_pretrained`, or a file in it; it has to be here.
        model: an instance of the original class; None where the whole model is one recurrent layer, which is made
            from the directory alone.

    Raises:
        CheckpointError: the directory is not here, is not one of htcompress, does not fit the model, or holds more
            than one recurrent layer while no model is given.
    """
    place = Path(directory)
    if not place.exists():
        raise CheckpointError(
            f"There is no directory {directory} here, and htcompress downloads nothing. Fetch it first, with "
            f"huggingface_hub.snapshot_download({str(directory)!r}) if it is a repository there, and give the folder "
            f"that it returns."
        )
    if place.is_file() and (place.parent / "config.json").is_file():
        place = place.parent
    if model is not None:
        return load(place, model).eval()
    state = read_state(place)
    found = read_modules(place, state)
    if [names for names, _ in found] == [[""]] and state.keys() == found[0][1].state_dict().keys():
        return found[0][1]
    named = ", ".join(repr(names[0]) for names, _ in found)
    raise CheckpointError(
        f"{place} holds a larger model, with the layers {named:.200}, whose class is not in it. Give an instance: "
        f"htcompress.from_pretrained({str(directory)!r}, YourModel())."
    )
