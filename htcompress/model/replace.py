"""Finding the recurrent modules of a model, copying a model, and putting others in their place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from htcompress.nn.dense import DenseDirection
from htcompress.nn.recurrent import HTRecurrent, module_class
from htcompress.nn.settings import RecurrentSettings, is_recurrent
from htcompress.nn.standing_in import become


def recurrent_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Torch's recurrent layers and cells in a model, by their dotted names, in order of registration."""
    return {name: module for name, module in model.named_modules() if is_recurrent(module)}


def stand_ins(model: nn.Module) -> dict[str, HTRecurrent]:
    """The compressed layers in a model, by their dotted names, in order of registration."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HTRecurrent)}


def dense_stand_ins(model: nn.Module, names: Iterable[str]) -> dict[str, HTRecurrent]:
    """Drop-ins with the dense weights of the named recurrent modules, in their memory as far as biases are not merged.

    Each is in its module's dtype, on its device.
    """
    made = {}
    for name in names:
        module = model.get_submodule(name)
        tensors = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        settings = RecurrentSettings.of(module)
        matrices = [
            replace(direction.matrices(), shared=True) for direction in DenseDirection.read_all(settings, tensors)
        ]
        like = next(iter(tensors.values()))
        made[name] = module_class(settings).from_matrices(settings, matrices).to(like.device, like.dtype)
    return made


def copied(model: nn.Module, *, sharing: Iterable[Tensor] = (), instead: Mapping[int, Any] | None = None) -> nn.Module:
    """A copy of a model that shares nothing with it.

    What cannot be copied (a lock, a file) is shared; a tensor that is a result of others is copied without where it
    came from.

    Args:
        sharing: tensors whose memory both have: each holds it by a tensor or parameter of its own.
        instead: objects by the `id` of those in whose place they are to stand.
    """
    memo: dict[int, Any] = dict(instead or {})
    for tensor in sharing:
        own = tensor.detach()
        memo[id(tensor)] = nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
    with torch.inference_mode(False):
        memo |= _scripted(model, memo)
        try:
            return copy.deepcopy(model, dict(memo))
        except Exception:
            return _carefully(model, memo)


def _scripted(model: nn.Module, memo: Mapping[int, Any]) -> dict[int, Any]:
    """Copies of the modules of TorchScript in a model, by the `id` of these.

    With gradients recorded their parameters would be results of the originals'.
    """
    found: dict[int, Any] = {}
    inner: set[int] = set()
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule) and id(module) not in inner | memo.keys():
            inner |= {id(other) for other in module.modules()}
            with torch.no_grad():
                made = copy.deepcopy(module)
            for own, parameter in zip(made.parameters(), module.parameters(), strict=True):
                own.requires_grad_(parameter.requires_grad)
            found[id(module)] = made
    return found


def _carefully(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy module by module and attribute by attribute, for models that `deepcopy` cannot take."""
    modules = [module for module in model.modules() if id(module) not in memo]
    for module in modules:
        memo[id(module)] = module.__class__.__new__(module.__class__)
    for module in modules:
        vars(memo[id(module)]).update({name: _copied(value, memo) for name, value in vars(module).items()})
    for module in modules:
        if is_recurrent(module) and isinstance(module, nn.RNNBase):
            memo[id(module)]._init_flat_weights()
    found: nn.Module = memo[id(model)]
    return found


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor) and not value.is_leaf:
        memo[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
        return memo[id(value)]
    # The containers of modules' attributes; a class of the user's own copies itself.
    if type(value) in (list, tuple, set):
        return type(value)(_copied(part, memo) for part in value)
    if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
        made = copy.copy(value)
        for key, part in value.items():
            made[key] = _copied(part, memo)
        return made
    known = set(memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        for key in memo.keys() - known:
            del memo[key]
        return value


def replace_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the model with the named modules replaced, wherever the model holds them.

    The modules to be replaced are not copied; everything else is, so that the original and the new model
    share nothing. A module that is held under several names is replaced under all of them.

    Raises `KeyError` where a name is not in the model.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    return copied(model, instead={id(modules[name]): module for name, module in replacements.items()})


def with_stand_ins(model: nn.Module, made: Mapping[str, HTRecurrent], *, shared: bool = False) -> nn.Module:
    """A copy of the model whose named recurrent modules stand in for themselves with the weights of others.

    They keep what the model's own class, hooks and attributes add to them (see `become`). Modules that are given the
    same `gates` share them.

    Args:
        model: the dense model; it is not changed.
        made: drop-ins by the names of recurrent modules, each in the dtype and on the device it is to have.
        shared: whether all other parameters are the model's own memory.

    Raises:
        KeyError: a name is not in the model.
        TypeError: a module's class does not allow it; the message begins with its name.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    replaced = {name: modules[name] for name in made}
    elsewhere = {
        id(p)
        for module in model.modules()
        if not any(module is other for other in replaced.values())
        for p in module.parameters(recurse=False)
    }
    # Weights that are dropped need no copy.
    dropped = [p for m in replaced.values() for p in m.parameters(recurse=False) if id(p) not in elsewhere]
    compact = copied(model, sharing=model.parameters() if shared else dropped)
    for name, module in made.items():
        try:
            become(compact.get_submodule(name), module)
        except TypeError as error:
            raise TypeError(f"{name or '(top level)'}: {error}") from error
    return compact
