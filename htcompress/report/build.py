"""What a report says of layers, from what was planned and what was built."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from htcompress.matrix.stored import StoredMatrix
from htcompress.model.inventory import tensor_names
from htcompress.nn.dense import DenseLayer
from htcompress.nn.gates import GateWeights
from htcompress.nn.order import words_of
from htcompress.nn.recurrent import HTRecurrent
from htcompress.nn.settings import RecurrentSettings
from htcompress.nn.stepwise import pays_at
from htcompress.planning import PlannedLayer
from htcompress.report.report import LayerReport, MatrixReport, Totals
from htcompress.storage.registry import PLAIN


def layer_reports(
    plans: Sequence[PlannedLayer], modules: Mapping[str, HTRecurrent], reordered: Collection[str] = ()
) -> tuple[LayerReport, ...]:
    """The layers' part of the report, from what was planned and what was built, and whose units were moved."""
    return tuple(replace(_layer(plan, modules[plan.name]), units_reordered=plan.name in reordered) for plan in plans)


@dataclass(frozen=True)
class Counted:
    """Stored numbers and bytes: of the recurrent layers before, of the whole model before and after.

    A tensor that is held under several names counts once.
    """

    parameters_before: int
    bytes_before: int
    model_before: int
    model_after: int

    @classmethod
    def of(cls, layers: Sequence[DenseLayer], before: Mapping[str, Any], after: Mapping[str, Any]) -> Counted:
        """Count the layers' own tensors in a state `before`, and all tensors in it and in the state `after`."""
        replaced = _distinct(before[name] for layer in layers for name in tensor_names(layer) if name in before)
        return cls(
            sum(t.numel() for t in replaced),
            sum(t.numel() * t.element_size() for t in replaced),
            sum(t.numel() for t in _distinct(before.values())),
            sum(t.numel() for t in _distinct(t for name, t in after.items() if not _is_scale(name, after)))
            - sum(t.numel() - words_of(t.numel()) for t in _distinct(_exponents(after))),
        )


def _exponents(state: Mapping[str, Any]) -> list[Tensor]:
    """The exponents of inputs in a state: bytes, of which words are counted."""
    return [t for name, t in state.items() if name.endswith(".input_exponents") and isinstance(t, Tensor)]


def _is_scale(name: str, state: Mapping[str, Any]) -> bool:
    """Whether a tensor is what codes are multiplied by, kept beside a core: that is no parameter of the model."""
    own = state[name]
    core = name.removesuffix("_scales")
    return core != name and core in state and isinstance(own, Tensor) and own.dtype is torch.int16


def _distinct(values: Iterable[Any]) -> list[Tensor]:
    found: dict[Any, Tensor] = {}
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            place = (value.data_ptr(), value.shape, value.stride()) if value.numel() else index
            found.setdefault(place, value)
    return list(found.values())


def totals_of(modules: Mapping[str, HTRecurrent], counted: Counted) -> Totals:
    """The sums of the report, counted on the modules that will be stored."""
    directions = [gates for module in modules.values() for gates in module.directions().values()]
    after = sum(gates.parameter_count for gates in directions)
    return Totals(
        parameters_before=counted.parameters_before,
        parameters_after=after,
        ratio=round(counted.parameters_before / after, 1) if after else 0.0,
        bytes_before=counted.bytes_before,
        bytes_after=sum(gates.bytes for gates in directions),
        macs_per_step_before=sum(dense_macs(m.settings) for m in modules.values()),
        macs_per_step_after=sum(direction_macs(gates) for gates in directions),
        model_parameters_before=counted.model_before,
        model_parameters_after=counted.model_after,
    )


def dense_macs(settings: RecurrentSettings) -> int:
    """Multiplications of the weight matrices for one time step of one sequence."""
    per_layer = (
        settings.rows * (settings.layer_input(layer) + settings.state_size) + settings.proj_size * settings.hidden_size
        for layer, _, _ in settings.directions()
    )
    return sum(per_layer)


_STEPS, _BATCH = 16, 16
"""Time steps and sequences at which multiplications are counted: how weights are computed with depends on them."""


def direction_macs(gates: GateWeights) -> int:
    """The same for compressed weights, as they run on a batch of 16 sequences of 16 steps."""
    s = gates.settings
    with torch.no_grad():
        weights = gates.resolve(_STEPS * _BATCH)
    stepwise = pays_at(_STEPS, _BATCH, [weights], learning=False)
    total = s.proj_size * s.hidden_size
    if stepwise and weights.factors is not None:
        total += sum(factor.numel() for factor in weights.factors)
    else:
        total += s.rows * s.state_size
    if isinstance(weights.reduce, Tensor):
        return total + weights.reduce.shape[0] * (gates.input_size + s.rows)
    if weights.reduce is not None and weights.reduce.network is not None:
        flops, _ = weights.reduce.network.cost(_STEPS * _BATCH)
        return total + round(flops / (_STEPS * _BATCH)) + (0 if stepwise else s.rows**2)
    return total + s.rows * gates.input_size


def _layer(plan: PlannedLayer, module: HTRecurrent) -> LayerReport:
    matrices = []
    for direction, planned in plan.directions.items():
        for matrix in planned.matrices:
            own = f"{plan.name}.{direction}" if plan.name else direction
            name = own if matrix.name == "joint" else f"{own}.{matrix.name}"
            stored = matrix.choice.matrix
            error = {"weights": _rounded(matrix.weight_error), "outputs": _rounded(matrix.output_error)}
            described = _matrix_report(name, matrix.shape, stored, matrix.choice.parameters, error)
            spectrum = None if matrix.spectrum is None else tuple(float(f"{v:.4g}") for v in matrix.spectrum)
            gates = module.directions()[direction]
            prefix = f"{matrix.name}."
            codec = next((codec for own, codec in gates.codecs.items() if own.startswith(prefix)), PLAIN)
            said: dict[str, str | int] = {"name": codec.name, "bits": codec.bits or 8 * plan.dtype.itemsize}
            matrices.append(replace(described, spectrum=spectrum, bytes=gates.bytes_of(prefix), codec=said))
    scopes = {direction.scope for direction in plan.directions.values()}
    scope = next(iter(scopes)) if len(scopes) == 1 else "mixed"
    return LayerReport(
        name=plan.name,
        kind=plan.settings.kind.value,
        settings=plan.settings.to_config(),
        parameters_before=plan.settings.dense_parameters,
        parameters_after=module.parameter_count,
        scope=None if scope is None else str(scope),
        matrices=tuple(matrices),
    )


def _matrix_report(
    name: str,
    shape: tuple[int, int],
    stored: StoredMatrix | None,
    parameters: int,
    error: dict[str, float | None],
) -> MatrixReport:
    if stored is None:
        return MatrixReport(name, shape, "dense", (), (), [], {}, parameters, error, kept_dense=True)
    form = stored.description()
    return MatrixReport(
        name,
        shape,
        form.layout,
        form.row_modes,
        form.col_modes,
        form.tree,
        form.ranks,
        parameters,
        error,
        kept_dense=False,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
