"""Finding the recurrent modules of a model, and putting others in their place."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from htcompress.nn.settings import is_recurrent


def recurrent_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Torch's recurrent layers and cells in a model, by their dotted names, in order of registration."""
    return {name: module for name, module in model.named_modules() if is_recurrent(module)}


def replace_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the model with the named modules replaced, wherever the model holds them.

    The modules to be replaced are not copied; everything else is, so that the original and the new model
    share nothing. A module that is held under several names is replaced under all of them.

    Raises `KeyError` where a name is not in the model.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    # deepcopy asks its memo first: what stands there already is taken in place of a copy.
    memo = {id(modules[name]): module for name, module in replacements.items()}
    return copy.deepcopy(model, memo)
