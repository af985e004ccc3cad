"""What a directory that was made from weights alone does not know of its layers, and who can tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from htcompress.errors import RequestError
from htcompress.nn.recurrence import with_nonlinearity
from htcompress.nn.recurrent import HTRecurrent
from htcompress.observer import Observer
from htcompress.report import Report

Modules = list[tuple[list[str], HTRecurrent]]


def unknown_settings(config: Mapping[str, Any], report: Report) -> dict[str, list[str]]:
    """By layer the settings that were assumed, for names and shapes of tensors do not tell them.

    Directories of earlier versions do not note them: what was converted from weights alone knows neither the
    nonlinearity nor `batch_first`.
    """
    told = any(report.request.get(name) is not None for name in ("task", "model", "data"))
    bare = not told and report.source.get("sha256") is not None
    earlier = ["nonlinearity", "batch_first"] if bare else []
    return {name: layer.get("assumed", earlier) for name, layer in config["layers"].items()}


def told_apart(
    modules: Modules, unknown: Mapping[str, Sequence[str]], nonlinearity: str | None, place: Path, observer: Observer
) -> Modules:
    """The layers as they were told to be; what is still assumed of their layout is said in a message.

    Args:
        modules: the layers with their names, the first of them that of the configuration.
        unknown: see `unknown_settings`.
        nonlinearity: what the user says that RNNs compute.
        place: the directory, for messages.
        observer: is told which layout was assumed.

    Raises `RequestError` where an RNN's nonlinearity is not known, or something else is said of one that is.
    """
    if nonlinearity is not None and with_nonlinearity(nonlinearity) is None:
        raise RequestError(f"--nonlinearity is tanh or relu; found {nonlinearity!r}.")
    found: list[tuple[list[str], HTRecurrent]] = []
    open_rnns, assumed = [], []
    for names, given in modules:
        module, settings, missing = given, given.settings, unknown.get(names[0], ())
        shown = names[0] or "(top level)"
        own = settings.recurrence.nonlinearity
        if own is not None:
            told = None if nonlinearity is None else with_nonlinearity(nonlinearity)
            if "nonlinearity" in missing and told is None:
                open_rnns.append(shown)
            elif "nonlinearity" not in missing and told is not None and told.kind != settings.kind:
                raise RequestError(
                    f"Layer {shown} of {place} is known to compute {own}, so "
                    f"--nonlinearity {nonlinearity} does not fit it; leave it out."
                )
            elif told is not None:
                module = type(module)(replace(settings, kind=told.kind), list(module.directions().values())).eval()
        if "batch_first" in missing and not settings.cell:
            assumed.append(shown)
        found.append((names, module))
    if nonlinearity is not None and all(module.settings.recurrence.nonlinearity is None for _, module in found):
        kinds = ", ".join(dict.fromkeys(module.settings.kind.value for _, module in found))
        raise RequestError(f"--nonlinearity is for RNNs; the layers of {place} are of another kind ({kinds}).")
    if open_rnns:
        raise RequestError(
            f"Whether {', '.join(open_rnns)} computes tanh or relu cannot be told from weights, and {place} was made "
            f"from them: say it with --nonlinearity tanh or --nonlinearity relu, or give the --task."
        )
    if assumed:
        orders = {module.settings.batch_first for names, module in found if (names[0] or "(top level)") in assumed}
        order = "(batch, time, features)" if orders == {True} else "(time, batch, features)"
        observer.message(
            f"{place} was made from weights alone, which do not tell batch_first: {', '.join(assumed)} reads {order}, "
            f"torch's default. With --task the model's own layout is taken."
        )
    return found
