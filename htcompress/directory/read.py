"""The output directory, read back into a model."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from htcompress.directory.cores import decoded
from htcompress.directory.extra import decoded_extra, inner_tensors
from htcompress.directory.structure import check_config
from htcompress.errors import CheckpointError
from htcompress.isolation import on_the_cpu, user_code
from htcompress.model.names import own_names, renamed, same_tensor
from htcompress.model.reparametrised import has_computed, with_plain_weights
from htcompress.model.replace import copied, recurrent_modules, stand_ins, with_stand_ins
from htcompress.nn.recurrence import recurrence_of
from htcompress.nn.recurrent import HTRecurrent, module_class
from htcompress.nn.settings import RecurrentSettings, is_recurrent

FORMAT = "htcompress.model/1"
_STRUCTURE = (
    *("kind", "input_size", "hidden_size", "num_layers", "bias", "bidirectional", "proj_size", "cell"),
    *("activations", "resets_before"),
)


def config_of(
    modules: Mapping[str, HTRecurrent],
    *,
    tied: Mapping[str, str] | None = None,
    orders: Mapping[str, Mapping[str, Tensor]] | None = None,
    assumed: Mapping[str, Sequence[str]] | None = None,
    shared: Sequence[Sequence[str]] = (),
) -> dict[str, Any]:
    """The contents of `config.json`: each layer's settings and the structure of its weights.

    Args:
        tied: further names of modules that share all weights with one of them, and its name.
        orders: the orders in which hidden units of a layer stand in the whole model, by layer and direction.
        assumed: the settings of a layer that its checkpoint does not tell.
        shared: the names of weights that are one tensor in the dense model.
    """
    layers: dict[str, Any] = {
        name: {"settings": module.settings.to_config(), "weights": module.to_config()}
        for name, module in modules.items()
    }
    for name, owner in (tied or {}).items():
        layers[owner].setdefault("also", []).append(name)
    for name, directions in (orders or {}).items():
        layers[name]["units"] = {direction: order.tolist() for direction, order in directions.items()}
    for name, settings in (assumed or {}).items():
        layers[name]["assumed"] = list(settings)
    found: dict[str, Any] = {"format": FORMAT, "layers": layers}
    return {**found, "shared": [list(names) for names in shared]} if shared else found


def read_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of an output directory. Raises `CheckpointError` where there is none."""
    path = directory / "config.json"
    if not directory.exists():
        raise CheckpointError(f"There is no directory {directory}. Give one that htcompress convert has written.")
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is not an output directory of htcompress: it has no config.json. Give one that htcompress "
            f"convert has written."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid: {error!s:.200}. Convert the model again.") from error
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has the format {found!r:.80}; this version reads {FORMAT!r}. Convert the model again."
        )
    return dict(config)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of an output directory by name; one that is stored once for several names stands under each.

    Raises `CheckpointError` where they cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = directory / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file is no dict
            # As `safetensors.torch.save_model` notes them.
            same = {name: other for name, other in (file.metadata() or {}).items() if other in tensors}
        return tensors | {name: tensors[other] for name, other in same.items() if name not in tensors}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!s:.200}. Convert the model again.") from error


def read_state(directory: Path) -> dict[str, Any]:
    """The whole state of an output directory by name: its tensors, those stored once for several names, extra state.

    Raises `CheckpointError` where it cannot be read.
    """
    config, tensors = _read(directory)
    return _whole_state(config, tensors, directory)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`config.json` and the tensors, which fit each other."""
    config = read_config(directory)
    tensors = read_tensors(directory)
    check_config(config, str(directory / "config.json"), tensors)
    return config, tensors


def _whole_state(config: Mapping[str, Any], tensors: Mapping[str, Tensor], directory: Path) -> dict[str, Any]:
    try:
        extra = config.get("extra", {})
        inside = set().union(*map(inner_tensors, extra.values()))
        state: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if name not in inside}
        state = decoded(config, state)
        state |= {name: decoded_extra(value, tensors) for name, value in extra.items()}
        return state
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _damaged(directory, error) from error


def _damaged(directory: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{directory / 'config.json'} is damaged ({type(error).__name__}: {error!s:.200}). Convert the model again."
    )


def read_modules(directory: Path, state: Mapping[str, Any]) -> list[tuple[list[str], HTRecurrent]]:
    """The compressed layers of an output directory without the model around them, and the names of each.

    A layer that the model holds under several names stands once.

    Args:
        directory: as written by `htcompress convert`.
        state: see `read_state`.

    Raises `CheckpointError` where `config.json` and the tensors do not fit each other.
    """
    config = read_config(directory)
    found = []
    for name, layer in config["layers"].items():
        try:
            settings = RecurrentSettings.from_config(layer["settings"])
            module = module_class(settings).from_config(settings, layer["weights"])
            own = _under(name, module, state)
            if own is None:
                raise ValueError("tensors are missing or have other shapes")
            module.to(next(t for t in own.values() if t.is_floating_point()).dtype).load_state_dict(own)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{directory / 'config.json'} does not fit model.safetensors at layer {name!r} "
                f"({type(error).__name__}: {error!s:.200}). Convert the model again."
            ) from error
        last = next(reversed(own))
        others = [key.removesuffix(last).removesuffix(".") for key in state if key == last or key.endswith("." + last)]
        tied = [n for n in others if n not in config["layers"] and _under(n, module, state) is not None]
        found.append(([name, *dict.fromkeys([*layer.get("also", []), *tied])], module.eval()))
    return found


def _under(name: str, module: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The tensors of a module under a name; None where they are not all there or have other shapes."""
    prefix = f"{name}." if name else ""
    found: dict[str, Tensor] = {}
    for key, like in module.state_dict().items():
        tensor = state.get(prefix + key)
        if tensor is None or tensor.shape != like.shape:
            return None
        found[key] = tensor
    return found


def load(directory: str | Path, model: nn.Module, *, strict: bool = True) -> nn.Module:
    """Load an output directory into a dense model: a copy with its recurrent modules replaced.

    What a state_dict cannot tell (`batch_first`, `dropout`, the nonlinearity of an RNN) is taken from the
    instance, and so are its mode, device and dtype.

    >>> import htcompress
    >>> compact = htcompress.load("out", OriginalModel())  # doctest: +SKIP

    Args:
        directory: as written by `htcompress convert` or `htcompress.save`.
        model: an instance of the original class; it is not changed.
        strict: whether tensors that the model does not know are an error; else they are left out.

    Raises:
        CheckpointError: the directory is not one of htcompress, or does not fit the model.
    """
    directory = Path(directory)
    config, tensors = _read(directory)
    return assembled(config, _whole_state(config, tensors, directory), model, directory, strict=strict)


def assembled(
    config: Mapping[str, Any], state: Mapping[str, Any], model: nn.Module, directory: Path, *, strict: bool = True
) -> nn.Module:
    """A copy of a dense model with the layers that a `config.json` describes, and a whole state in it.

    Arguments and errors are those of `load`; `directory` is what messages name.
    """
    try:
        with on_the_cpu():
            if has_computed(model.state_dict()):
                model = copied(model)
                # What was converted without its class has layers that stayed dense as they were.
                with_plain_weights(model, kept=state.keys())
            built = _modules(config, model, directory)
        compact = with_stand_ins(model, built)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _damaged(directory, error) from error
    own = own_names(compact)
    state = renamed(state, own)
    try:
        with user_code():
            missing, unknown = _loaded(compact, state)
        problems = [f"has {name}, unknown to the model" for name in unknown] if strict else []
        held = compact.state_dict()
        here = [held[name] for name in held if name in state]
        problems = [f"lacks {n}" for n in missing if not any(same_tensor(held.get(n), t) for t in here)] + problems
        for module in stand_ins(compact).values():
            for gates in module.directions().values():
                gates.places()  # raises ValueError where the words of an order are none
    except Exception as error:
        held = compact.state_dict()
        problems = [
            f"has {name} of shape {tuple(state[name].shape)}, the model {tuple(tensor.shape)}"
            for name, tensor in held.items()
            if isinstance(tensor, Tensor) and isinstance(state.get(name), Tensor) and state[name].shape != tensor.shape
        ] or [f"cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]})"]
    if problems:
        raise CheckpointError(
            f"{directory / 'model.safetensors'} does not fit the model: it {'; it '.join(problems[:4])}. Give an "
            f"instance of the class that the checkpoint was trained with."
        )
    return compact


def _loaded(model: nn.Module, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Load a state as one of its modules' oldest versions, or else of their own; what is missing, and what unknown."""
    try:
        found = model.load_state_dict(state, strict=False)
    except Exception:
        # Modules that were never without a version know no older one.
        whole = OrderedDict(state)
        whole._metadata = getattr(model.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
        found = model.load_state_dict(whole, strict=False)
    return found.missing_keys, found.unexpected_keys


def _modules(config: Mapping[str, Any], model: nn.Module, directory: Path) -> dict[str, HTRecurrent]:
    """The compressed modules that a `config.json` describes, still zero, by the names that the model has for them."""
    dense = recurrent_modules(model)
    every = [name for name, module in model.named_modules(remove_duplicate=False) if is_recurrent(module)]
    asked = {other: name for name, layer in config["layers"].items() for other in [name, *layer.get("also", [])]}
    # A layer is named as the tensors in it are.
    here = renamed({_inner(name): name for name in asked}, [_inner(name) for name in every])
    places = {asked_name: inner.removesuffix("w").removesuffix(".") for inner, asked_name in here.items()}
    built: dict[str, HTRecurrent] = {}
    for name, layer in config["layers"].items():
        place = places.get(name, name)
        if place not in every:
            raise CheckpointError(
                f"{directory} has a compressed layer {name!r}; the model has {', '.join(map(repr, dense)) or 'none'}. "
                f"Give an instance of the class that the checkpoint was trained with."
            )
        saved = RecurrentSettings.from_config(layer["settings"])
        original = model.get_submodule(place)
        settings = _fitting(saved, original, name, directory)
        module = module_class(settings).from_config(settings, layer["weights"])
        built[place] = module.to(next(original.parameters(recurse=False)))
        for other in layer.get("also", []):
            also = places.get(other, other)
            if also in every and model.get_submodule(also) is not original:
                own = _fitting(saved, model.get_submodule(also), other, directory)
                built[also] = module_class(own)(own, list(built[place].directions().values()))
    return built


def _inner(name: str) -> str:
    return f"{name}.w" if name else "w"


def _fitting(saved: RecurrentSettings, module: nn.Module, name: str, directory: Path) -> RecurrentSettings:
    """The settings of a model's module, which those that were saved must fit."""
    here = RecurrentSettings.of(module)
    wrong = [f for f in _STRUCTURE if not _same(f, getattr(saved, f), getattr(here, f))]
    if wrong:
        shown = ", ".join(f"{f}: {getattr(saved, f)} in the directory, {getattr(here, f)} here" for f in wrong)
        raise CheckpointError(
            f"Layer {name!r} of {directory} does not fit the model: {shown}. Give an instance of the class that "
            f"the checkpoint was trained with."
        )
    return here


def _same(field: str, saved: Any, here: Any) -> bool:
    # A state_dict does not tell tanh from relu: the instance does.
    return bool(
        saved == here
        or (field == "kind" and None not in (recurrence_of(saved).nonlinearity, recurrence_of(here).nonlinearity))
    )


def is_ours(directory: Path) -> bool:
    """Whether a directory is an output directory of htcompress."""
    try:
        read_config(directory)
    except CheckpointError:
        return False
    return True
