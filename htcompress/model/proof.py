"""Stand-ins prove themselves: a layer is compressed only where the model answers the same with a stand-in for it.

Before anything is decomposed each recurrent module is replaced by a drop-in with its own dense weights, and the model
is run on a batch. What then answers otherwise (a class with a forward of its own that the drop-in does not meet, a
hook that changes weights, code that asks for a type) stays as it is and is named. Without a batch only torch's own
classes, as they are, are taken.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils.parametrize import is_parametrized

from htcompress.isolation import seeded
from htcompress.model.plain import without_packing
from htcompress.model.replace import copied, dense_stand_ins, recurrent_modules, with_stand_ins
from htcompress.nn.adapted import plain_class
from htcompress.nn.settings import RecurrentSettings, is_recurrent
from htcompress.nn.states import kept_states
from htcompress.values import call, difference, fresh, precision_of


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model did on a batch.

    Attributes:
        output: what it returned.
        states: the tensors that its modules keep as attributes or buffers afterwards, by module and name.
        ran: the names of the recurrent modules that were called.
        outside: where the weights of recurrent modules lie that were called and are not the model's.
        autocast: in what recurrent modules computed under the model's own `torch.autocast`.
    """

    output: Any
    states: dict[str, list[torch.Tensor]]
    ran: set[str]
    outside: set[int]
    autocast: set[torch.dtype]

    def difference(self, other: Answer) -> float:
        """The largest relative difference of outputs and of states that both keep."""
        states = [difference(self.states[n], other.states[n]) for n in self.states.keys() & other.states.keys()]
        return max([difference(self.output, other.output), *states])


@dataclass(frozen=True, eq=False)
class Proof:
    """Which recurrent modules of a model may be compressed.

    Attributes:
        names: those that may, in the model's order; of modules that share all weights only the first.
        tied: the others of those, by name, and the name of the first.
        left: those that may not, by name, and why.
    """

    names: tuple[str, ...]
    tied: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def answer(model: nn.Module, arguments: Sequence[Any]) -> Answer:
    """Run a copy of a model on a batch, in evaluation mode, without gradients, from a fixed random state."""
    trial = copied(model, sharing=model.parameters()).eval()
    called: dict[int, nn.Module] = {}
    autocast: set[torch.dtype] = set()

    def note(module: nn.Module, _: Any) -> None:
        if is_recurrent(module):
            called[id(module)] = module
            kind = next((p.device.type for p in module.parameters()), "cpu")
            autocast.update([torch.get_autocast_dtype(kind)] if torch.is_autocast_enabled(kind) else [])

    handle = register_module_forward_pre_hook(note)
    try:
        with torch.no_grad(), seeded(0), without_packing(trial):
            output = call(trial, fresh(arguments))
    finally:
        handle.remove()
    own = {id(module): name for name, module in trial.named_modules()}
    strange = [module for number, module in called.items() if number not in own]
    places = {p.data_ptr() for module in strange for p in module.parameters(recurse=False)}
    return Answer(output, kept_states(trial), {own[number] for number in called if number in own}, places, autocast)


def prove(
    model: nn.Module, names: Collection[str], arguments: Sequence[Any] | None = None, wanted: Answer | None = None
) -> Proof:
    """Find the recurrent modules that a drop-in can stand in for.

    Args:
        model: the dense model; it is not changed.
        names: the recurrent modules that are asked for.
        arguments: a batch that the model can be called with; None: nothing can be tried.
        wanted: its answer to the batch, where that is known already.
    """
    modules = {name: module for name, module in recurrent_modules(model).items() if name in names}
    left = {name: reason for name, module in modules.items() if (reason := _impossible(module))}
    candidates = [name for name in modules if name not in left]
    unproven = {name: reason for name in candidates if (reason := _unusual(modules[name]))}
    if arguments is None:
        left |= {name: f"{reason}, and without data nothing shows what it does" for name, reason in unproven.items()}
        return _sorted(modules, [name for name in candidates if name not in unproven], left)
    wanted = wanted or answer(model, arguments)
    tolerance = precision_of(model, wanted.autocast)

    def fault(some: Sequence[str]) -> str | None:
        """What differs with drop-ins for some modules; None where nothing does."""
        try:
            trial = with_stand_ins(model, dense_stand_ins(model, some), shared=True)
            found = answer(trial, arguments)
        except Exception as error:
            return f"the model fails with a stand-in for it ({_said(error)})"
        if found.outside & {p.data_ptr() for name in some for p in modules[name].parameters(recurse=False)}:
            return "a function outside of the model's modules holds it"
        lost = found.difference(wanted)
        return None if lost <= tolerance else f"with a stand-in for it the model's outputs differ by {lost:.2g}"

    def judged(name: str, found: str) -> str:
        return f"{reason}; {found}" if (reason := unproven.get(name)) else found

    if fault(candidates) is not None:
        if answer(model, arguments).difference(wanted) > tolerance:
            left |= dict.fromkeys(
                candidates, "the model does not answer twice alike on one batch, so nothing shows what a stand-in does"
            )
            return _sorted(modules, [], left)
        good: list[str] = []
        for name in candidates:
            # Alone first: it is its own fault, and not that of one that was taken before.
            found = fault([name]) or (fault([*good, name]) if good else None)
            if found is None:
                good.append(name)
            else:
                left[name] = judged(name, found)
        candidates = good
    idle = [name for name in candidates if name in unproven and name not in wanted.ran]
    left |= {name: f"{unproven[name]}, and the calibration data does not run it" for name in idle}
    return _sorted(modules, [name for name in candidates if name not in idle], left)


def without_unseen(model: nn.Module, proof: Proof, seen: Collection[str]) -> Proof:
    """The proof without modules of which the calibration data has shown nothing, not even that they are run."""
    unseen = {}
    for name in proof.names:
        module = model.get_submodule(name)
        if name not in seen:
            unseen[name] = "no batch of the calibration data passes through it"
            if type(module).forward is not plain_class(type(module)).forward:
                unseen[name] = (
                    f"its class {type(module).__name__} has a forward() of its own that does not go through torch's"
                )
    return Proof(
        tuple(name for name in proof.names if name not in unseen),
        {name: owner for name, owner in proof.tied.items() if owner not in unseen},
        {**proof.left, **unseen},
    )


def _sorted(modules: Mapping[str, nn.Module], names: Sequence[str], left: dict[str, str]) -> Proof:
    """The proof, with modules that share all their weights counted once."""
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    for name in names:
        module = modules[name]
        s = RecurrentSettings.of(module)
        key: tuple[Any, ...] = (s.kind, s.num_layers, s.bidirectional, s.cell, s.activations, s.resets_before)
        key += tuple(p.data_ptr() for p in module.parameters(recurse=False) if p.numel())
        if (owner := first.setdefault(key, name)) != name:
            tied[name] = owner
    return Proof(tuple(n for n in modules if n in first.values()), tied, {n: left[n] for n in modules if n in left})


def _impossible(module: nn.Module) -> str | None:
    """Why no drop-in can take a module's place; None where one may."""
    if "forward" in vars(module):
        return "its forward() was replaced on the instance; derive a class instead"
    if is_parametrized(module):
        names = ", ".join(getattr(module, "parametrizations", {}))
        return (
            f"its {names} is parametrised; take that off first with torch.nn.utils.parametrize.remove_parametrizations"
        )
    stored = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    missing = [name for names in RecurrentSettings.of(module).weight_names for name in names if name not in stored]
    if missing:
        return (
            f"its {missing[0]} is computed from other tensors; take weight_norm off with "
            f"torch.nn.utils.remove_weight_norm, pruning with torch.nn.utils.prune.remove"
        )
    return None


def _unusual(module: nn.Module) -> str | None:
    """What a module has beyond torch's class, so that only a trial shows whether a drop-in does the same."""
    cls, torchs = type(module), plain_class(type(module))
    if any(getattr(cls, name) is not getattr(torchs, name) for name in ("forward", "__call__")):
        return f"its class {cls.__name__} has a forward() of its own"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks"
    return None


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
