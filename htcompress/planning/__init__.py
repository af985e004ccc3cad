"""From dense layers, statistics and a goal to the matrices that will be stored."""

from htcompress.planning.goal import Goal, Scope
from htcompress.planning.plan import LayerPlan, MatrixPlan, SlotPlan, plan_layers

__all__ = ["Goal", "LayerPlan", "MatrixPlan", "Scope", "SlotPlan", "plan_layers"]
