"""Recurrent weights that a state_dict holds as what they are computed of: pruned, normed or dropped ones."""

from __future__ import annotations

import re
from collections.abc import Iterable

_WEIGHT = r"(?:weight|bias)_(?:ih|hh|hr)(?:_l[0-9]+(?:_reverse)?)?"
_OLD = re.compile(rf"^(?:(?P<layer>.+)\.)?(?P<weight>{_WEIGHT})_(?P<part>orig|mask|g|v|u|raw)$")
_NEW = re.compile(rf"^(?:(?P<layer>.+)\.)?parametrizations\.(?P<weight>{_WEIGHT})\.(?P<part>original[0-9]*)$")

_UNDONE: tuple[tuple[frozenset[str], str, str], ...] = (
    (frozenset({"orig", "mask"}), "pruned", 'torch.nn.utils.prune.remove({module}, "{weight}")'),
    (frozenset({"orig", "u"}), "under spectral_norm", 'torch.nn.utils.remove_spectral_norm({module}, "{weight}")'),
    (frozenset({"g", "v"}), "under weight_norm", 'torch.nn.utils.remove_weight_norm({module}, "{weight}")'),
    (
        frozenset({"raw"}),
        "under weight drop",
        "{module}.{weight} = torch.nn.Parameter({module}.{weight}_raw), with the wrapper taken off",
    ),
    (
        frozenset({"original"}),
        "parametrised",
        'torch.nn.utils.parametrize.remove_parametrizations({module}, "{weight}")',
    ),
)


def reparametrised(names: Iterable[str]) -> dict[str, str]:
    """The recurrent layers that lack weights because they are computed of others: by name, the reason and the remedy.

    >>> print(reparametrised(["rnn.weight_hh_l0_g", "rnn.weight_hh_l0_v", "rnn.weight_ih_l0"])["rnn"])
    rnn.weight_hh_l0 is under weight_norm (weight_hh_l0_g, weight_hh_l0_v), not stored itself. Call \
torch.nn.utils.remove_weight_norm(model.rnn, "weight_hh_l0"), and so for the layer's other weights that are, then \
save the state_dict again.

    Args:
        names: of all tensors of a state_dict.
    """
    given = dict.fromkeys(names)
    parts: dict[tuple[str, str], set[str]] = {}
    for name in given:
        match = _OLD.match(name) or _NEW.match(name)
        if match is None:
            continue
        layer, weight, part = match["layer"] or "", match["weight"], match["part"]
        if (f"{layer}.{weight}" if layer else weight) not in given:
            parts.setdefault((layer, weight), set()).add(part)
    found: dict[str, str] = {}
    for (layer, weight), own in parts.items():
        for needed, state, call in _UNDONE:
            if needed <= {part.rstrip("0123456789") for part in own} and layer not in found:
                new = "original" in needed
                shown = ", ".join(part if new else f"{weight}_{part}" for part in sorted(own))
                module = f"model.{layer}" if layer else "model"
                found[layer] = (
                    f"{layer + '.' if layer else ''}{weight} is {state} ({shown}), not stored itself. Call "
                    f"{call.format(module=module, weight=weight)}, and so for the layer's other weights that are, "
                    f"then save the state_dict again."
                )
    return found
