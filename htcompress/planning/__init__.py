"""From dense layers, statistics and a goal to the matrices that will be stored."""

from htcompress.planning.goal import Goal, Scope, UnitOrder
from htcompress.planning.plan import LayerPlan, MatrixPlan, ModelPlan, SlotPlan, plan_layers, plan_model

__all__ = [
    "Goal",
    "LayerPlan",
    "MatrixPlan",
    "ModelPlan",
    "Scope",
    "SlotPlan",
    "UnitOrder",
    "plan_layers",
    "plan_model",
]
