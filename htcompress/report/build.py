"""What a report says of layers, from what was planned and what was built."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from htcompress.finetuning.distill import FineTuning
from htcompress.formats import Format, NetworkMatrix
from htcompress.matrix import HTMatrix
from htcompress.matrix.factored import Factored
from htcompress.nn.recurrent import HTRecurrent
from htcompress.nn.settings import RecurrentSettings
from htcompress.nn.weights import FactoredWeight, GateWeights
from htcompress.planning import Goal, LayerPlan
from htcompress.report.report import LayerReport, MatrixReport, Totals


def request_of(goal: Goal, *, task: str | None, layers: str, finetuning: FineTuning | None) -> dict[str, Any]:
    """What was asked for, as the report keeps it."""
    return {
        "budget": goal.budget,
        "error": goal.error,
        "ratio": goal.ratio,
        "scope": goal.scope.value,
        "layout": goal.layout.value,
        "format": goal.format.value,
        "task": task,
        "layers": layers,
        "steps": 0 if finetuning is None else finetuning.steps,
        "time_limit": None if finetuning is None else finetuning.time_limit,
    }


def layer_reports(
    plans: Sequence[LayerPlan], modules: Mapping[str, HTRecurrent], reordered: Collection[str] = ()
) -> tuple[LayerReport, ...]:
    """The layers' part of the report, from what was planned and what was built, and whose units were moved."""
    return tuple(replace(_layer(plan, modules[plan.name]), units_reordered=plan.name in reordered) for plan in plans)


def totals_of(modules: Mapping[str, HTRecurrent], *, bytes_before: int, model_before: int, model_after: int) -> Totals:
    """The sums of the report, counted on the modules that will be stored."""
    before = sum(m.settings.dense_parameters for m in modules.values())
    after = sum(m.parameter_count for m in modules.values())
    return Totals(
        parameters_before=before,
        parameters_after=after,
        ratio=round(before / after, 1) if after else 0.0,
        bytes_before=bytes_before,
        bytes_after=sum(p.numel() * p.element_size() for m in modules.values() for p in m.parameters()),
        macs_per_step_before=sum(dense_macs(m.settings) for m in modules.values()),
        macs_per_step_after=sum(slot_macs(g) for m in modules.values() for g in m.slots().values()),
        model_parameters_before=model_before,
        model_parameters_after=model_after,
    )


def dense_macs(settings: RecurrentSettings) -> int:
    """Multiplications of the weight matrices for one time step of one sequence."""
    per_layer = (
        settings.rows * (settings.layer_input(layer) + settings.state_size) + settings.proj_size * settings.hidden_size
        for layer, _, _ in settings.slots()
    )
    return sum(per_layer)


def slot_macs(gates: GateWeights) -> int:
    """The same for compressed weights, as `resolve` hands them to the kernel."""
    s = gates.settings
    total = s.rows * s.state_size + s.proj_size * s.hidden_size
    weight = gates.joint or gates.ih
    if isinstance(weight, FactoredWeight) and weight.projects:
        return total + weight.matrix().rank * (gates.input_size + s.rows)
    return total + s.rows * gates.input_size


def _layer(plan: LayerPlan, module: HTRecurrent) -> LayerReport:
    matrices = []
    for slot, planned in plan.slots.items():
        for matrix in planned.matrices:
            own = f"{plan.name}.{slot}" if plan.name else slot
            name = own if matrix.name == "joint" else f"{own}.{matrix.name}"
            stored = matrix.choice.matrix
            error = {"weights": _rounded(matrix.weight_error), "outputs": _rounded(matrix.output_error)}
            described = _matrix_report(name, matrix.shape, stored, matrix.choice.parameters, error)
            spectrum = None if matrix.spectrum is None else tuple(float(f"{v:.4g}") for v in matrix.spectrum)
            matrices.append(replace(described, spectrum=spectrum))
    scopes = {slot.scope for slot in plan.slots.values()}
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
    stored: Factored | None,
    parameters: int,
    error: dict[str, float | None],
) -> MatrixReport:
    if stored is None:
        return MatrixReport(name, shape, "dense", (), (), [], {}, parameters, error, kept_dense=True)
    layout = stored.layout
    if isinstance(stored, NetworkMatrix):
        structure = stored.structure
        form = structure.format.value
        names = ("blocks", "rank") if structure.format is Format.BT else [f"r{k}" for k in range(len(structure.ranks))]
        ranks = dict(zip(names, structure.ranks, strict=True))
        modes = layout.row_modes, layout.col_modes
        return MatrixReport(name, shape, form, *modes, [], ranks, parameters, error, kept_dense=False)
    assert isinstance(stored, HTMatrix)
    config = layout.to_config()
    by_node = dict(zip((node.name for node in layout.tree.nodes), stored.tensor.ranks, strict=True))
    return MatrixReport(
        name,
        shape,
        layout.kind.value,
        layout.row_modes,
        layout.col_modes,
        config["tree"],
        by_node,
        parameters,
        error,
        kept_dense=False,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
