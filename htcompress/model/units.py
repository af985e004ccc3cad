"""The order of the hidden units: free to choose, and what decides how well rows fold.

Hidden units may be permuted (rows of every gate, columns of W_hh and of whatever reads h, alike) without changing
the function. In a trained network their order is arbitrary; put next to units that do alike, the rows of a weight
matrix become smooth, and a folded row factor takes far fewer numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from htcompress.model.inventory import inventory_of_model
from htcompress.model.plain import without_packing
from htcompress.model.proof import answer
from htcompress.model.replace import copied
from htcompress.model.statistics import DirectionStatistics
from htcompress.nn.dense import DenseDirection, DenseLayer
from htcompress.nn.settings import RecurrentSettings, is_recurrent
from htcompress.values import call, fresh, precision_of

_SAMPLES, _FEATURES = 256, 8
"""Time steps by which units are compared, and how many principal components of what they do are kept."""

Orders = dict[str, Tensor]
"""A permutation of the hidden units for each direction of a module."""


@dataclass(frozen=True, eq=False)
class Arranged:
    """A model that computes the same with its hidden units in another order.

    Attributes:
        model: the arranged copy.
        statistics: those of the model, in the new order.
        orders: the orders of the recurrent modules whose units were moved, by name.
    """

    model: nn.Module
    statistics: dict[str, dict[str, DirectionStatistics]]
    orders: dict[str, Orders]

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the recurrent modules whose units were moved."""
        return tuple(self.orders)


def unit_orders(
    layers: Sequence[DenseLayer], statistics: Mapping[str, Mapping[str, DirectionStatistics]]
) -> dict[str, Orders]:
    """A good order of the hidden units for every direction of which something was seen, by layer."""
    return {
        layer.name: {
            name: unit_order(direction, statistics[layer.name][name])
            for name, direction in layer.directions.items()
            if name in statistics[layer.name]
        }
        for layer in layers
        if layer.name in statistics
    }


def arrange_units(
    model: nn.Module,
    statistics: Mapping[str, Mapping[str, DirectionStatistics]],
    batches: Sequence[Sequence[Any]],
    *,
    cautious: bool = False,
) -> Arranged:
    """Put alike units next to each other wherever the model's outputs stay what they are.

    Which modules read a layer's states is not known but found out: those of the right size that run are
    permuted with it, all of them or one, and what the model answers on some batches decides. Where none of that leaves
    it unchanged, the units of the last layer stay as they are, or those of all layers.

    Args:
        model: the dense model; it is not changed.
        statistics: what was seen of its recurrent layers; those of others are left alone.
        batches: the arguments of some calls.
        cautious: leave layers alone whose states something else might read or give, by its size: an initial state that
            is learnt, say, which no batch need show.
    """
    current = model
    moved: dict[str, Orders] = {}
    seen = {name: dict(directions) for name, directions in statistics.items()}
    wanted = [answer(model, arguments) for arguments in batches]
    running = set[str]().union(*(_running(model, arguments) for arguments in batches))
    tolerance = precision_of(model)

    def unchanged(trial: nn.Module) -> bool:
        pairs = zip(batches, wanted, strict=True)
        return all(answer(trial, arguments).difference(own) <= tolerance for arguments, own in pairs)

    for name in list(seen):
        (layer,) = inventory_of_model(current, names=[name])
        if any(direction not in seen[name] for direction in layer.directions):
            continue
        orders = {direction: unit_order(dense, seen[name][direction]) for direction, dense in layer.directions.items()}
        for some, readers in _attempts(current, layer, orders, running):
            if cautious and _may_be_known(current, layer, readers):
                continue
            trial = copied(current, sharing=current.parameters())
            permute_units(trial, name, layer.settings, some, readers)
            if unchanged(trial):
                current = trial
                seen |= _permuted_statistics(layer, seen, some, readers)
                moved[name] = some
                break
    return Arranged(current, seen, moved)


def unit_order(direction: DenseDirection, seen: DirectionStatistics) -> Int[Tensor, " hidden"]:
    """An order of the hidden units in which neighbours do alike, at every scale.

    A unit is known by what its gates see on the calibration data, weighted by the gradients, and by how its
    state is read. The units are halved at the median of their first principal component, and so on.
    """
    size, gates = direction.settings.hidden_size, direction.settings.gates
    step = max(1, len(seen.inputs) // _SAMPLES)
    ih, hh = direction.ih.cpu().float(), direction.hh.cpu().float()
    inputs = seen.inputs[::step][:_SAMPLES]
    columns = ih.shape[1]
    moment = seen.gradients_ih
    weight = (moment if moment.ndim == 1 else moment.diagonal()).sqrt().float()[:, None]
    gate = weight * (ih @ inputs[:, :columns].T + hh @ inputs[:, columns:].T)
    writes = gate.reshape(gates, size, -1).transpose(0, 1).flatten(1)
    if direction.hr is not None:
        reads = direction.hr.cpu().float().T
    else:
        reads = (weight * hh).T * inputs[:, columns:].square().mean(0).sqrt()[:, None]
    return _halved(torch.cat([_leading(writes), _leading(reads)], dim=1))


def _leading(features: Float[Tensor, "units n"]) -> Float[Tensor, "units k"]:
    """The scores of the first principal components, of norm one together; the sign is of no matter."""
    centred = (features - features.mean(0)).double()
    scale = torch.linalg.vector_norm(centred)
    if scale == 0:
        return centred[:, :0]
    small = min(_FEATURES, *centred.shape)
    if centred.shape[0] <= centred.shape[1]:
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        scores = vectors[:, -small:] * values[-small:].clamp_min(0).sqrt()
    else:
        scores = centred @ torch.linalg.eigh(centred.T @ centred)[1][:, -small:]
    return scores / scale


def _halved(features: Float[Tensor, "units n"]) -> Int[Tensor, " units"]:
    def ordered(units: Tensor) -> Iterator[Tensor]:
        part = features[units]
        part = part - part.mean(0)
        along = torch.linalg.eigh(part.T @ part)[1][:, -1]
        units = units[torch.argsort(part @ along, stable=True)]
        if len(units) <= 2:
            yield units
            return
        half = len(units) // 2
        yield from ordered(units[:half])
        yield from ordered(units[half:])

    if features.shape[1] == 0:
        return torch.arange(len(features))
    return torch.cat(list(ordered(torch.arange(len(features)))))


# ---- moving them --------------------------------------------------------------------------------------------


def permute_units(
    model: nn.Module, name: str, settings: RecurrentSettings, orders: Orders, readers: Sequence[str]
) -> None:
    """Permute the hidden units of a recurrent module in place, and the columns of the modules that read its states.

    Args:
        name: the module.
        orders: the permutation of each direction; directions without one stay as they are.
        readers: modules whose last weight axis is the module's output.
    """
    tensors = dict(model.get_submodule(name).named_parameters())
    directions = list(zip(settings.directions(), settings.direction_names, strict=True))
    for (_, _, suffix), direction in directions:
        if direction not in orders:
            continue
        order = orders[direction]
        rows = _rows(settings, order)
        for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            if key + suffix in tensors:
                _reorder(tensors[key + suffix], rows, 0)
        # With a projection it is the projection that reads the units, and h itself does not move.
        _reorder(tensors[("weight_hr" if settings.proj_size else "weight_hh") + suffix], order, 1)
    if settings.proj_size:
        return
    for layer in range(settings.num_layers):
        own = [orders.get(direction) for (at, _, _), direction in directions if at == layer]
        if all(order is None for order in own):
            continue
        columns = _output_order(settings, own)
        for (reader, _, suffix), _ in directions:
            if reader == layer + 1:
                _reorder(tensors["weight_ih" + suffix], columns, 1)
        if layer == settings.num_layers - 1:
            for path in readers:
                for parameter in _read_by(model.get_submodule(path)):
                    _reorder(parameter, columns, parameter.ndim - 1)


def _output_order(settings: RecurrentSettings, orders: Sequence[Tensor | None]) -> Tensor:
    size = settings.hidden_size
    parts = [torch.arange(size) if order is None else order for order in orders]
    return torch.cat([part + index * size for index, part in enumerate(parts)])


def _reorder(parameter: Tensor, order: Tensor, axis: int) -> None:
    parameter.data = parameter.data.index_select(axis, order.to(parameter.device)).contiguous()


def _attempts(
    model: nn.Module, layer: DenseLayer, orders: Orders, running: set[str]
) -> Iterator[tuple[Orders, list[str]]]:
    """What to try, the most first: all units with their readers, then those that nobody outside can see."""
    settings = layer.settings
    if settings.proj_size:
        yield orders, []
        return
    width = settings.hidden_size * settings.num_directions
    fitting = [
        path
        for path, module in model.named_modules()
        if path != layer.name and any(p.shape[-1] == width for p in _read_by(module))
    ]
    # A module that fits but does not run may read the states elsewhere: no output here would tell.
    if all(path in running for path in fitting):
        groups = [fitting, *([path] for path in fitting)] if len(fitting) > 1 else [fitting]
        yield from ((orders, group) for group in groups if group)
    last = settings.num_layers - 1
    inner = {
        name: orders[name]
        for (depth, _, _), name in zip(settings.directions(), settings.direction_names, strict=True)
        if depth < last
    }
    if inner:
        yield inner, []


def _may_be_known(model: nn.Module, layer: DenseLayer, readers: Sequence[str]) -> bool:
    """Whether a tensor outside of recurrent modules and readers has an axis of as many numbers as there are units."""
    sizes = {layer.settings.hidden_size, layer.settings.hidden_size * layer.settings.num_directions}
    told = [module for path, module in model.named_modules() if is_recurrent(module) or path in readers]
    own = {id(tensor) for module in told for tensor in chain(module.parameters(), module.buffers())}
    every = chain(model.parameters(), model.buffers())
    return any(id(tensor) not in own and sizes & set(tensor.shape) for tensor in every)


def _read_by(module: nn.Module) -> list[Tensor]:
    """The parameters of a module whose last axis is its input."""
    if isinstance(module, nn.Linear):
        return [module.weight]
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1 and module.elementwise_affine:
        return [p for p in (module.weight, module.bias) if p is not None]
    if is_recurrent(module):
        ends = ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")
        return [p for name, p in module.named_parameters() if name in ends]
    return []


# ---- checking it --------------------------------------------------------------------------------------------


def _running(model: nn.Module, arguments: Sequence[Any]) -> set[str]:
    """The names of the modules that run on a batch."""
    running: set[str] = set()
    trial = copied(model, sharing=model.parameters()).eval()
    for path, module in trial.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: running.add(path))
    with torch.no_grad(), without_packing(trial):
        call(trial, fresh(arguments))
    return running


def _permuted_statistics(
    layer: DenseLayer, seen: Mapping[str, dict[str, DirectionStatistics]], orders: Orders, readers: Sequence[str]
) -> dict[str, dict[str, DirectionStatistics]]:
    """The statistics that change: those of the layer, and of recurrent layers among its readers."""
    settings = layer.settings
    directions = list(zip(settings.directions(), settings.direction_names, strict=True))

    def outputs(depth: int) -> Tensor:
        return _output_order(settings, [orders.get(name) for (at, _, _), name in directions if at == depth])

    own = {}
    for (depth, _, _), name in directions:
        statistics = seen[layer.name][name]
        if not settings.proj_size:
            if depth > 0:
                statistics = _with_columns(statistics, outputs(depth - 1), 0)
            if name in orders:
                statistics = _with_columns(statistics, orders[name], settings.layer_input(depth))
        if name in orders:
            statistics = statistics.reordered(rows=_rows(settings, orders[name]))
        own[name] = statistics
    changed = {layer.name: own}
    for path in readers:
        if path in seen:
            columns = outputs(settings.num_layers - 1)
            first = ("cell", "l0", "l0_reverse")
            changed[path] = {
                name: _with_columns(statistics, columns, 0) if name in first else statistics
                for name, statistics in seen[path].items()
            }
    return changed


def _with_columns(statistics: DirectionStatistics, order: Tensor, start: int) -> DirectionStatistics:
    columns = torch.arange(statistics.inputs.shape[1])
    columns[start : start + len(order)] = start + order
    return statistics.reordered(columns=columns)


def _rows(settings: RecurrentSettings, order: Tensor) -> Tensor:
    return torch.cat([order + gate * settings.hidden_size for gate in range(settings.gates)])
