"""From dense layers, statistics and a goal to the matrices that will be stored."""

from htcompress.planning.plan import Plan, PlannedLayer, PlannedMatrix, PlannedSlot, plan_model

__all__ = ["Plan", "PlannedLayer", "PlannedMatrix", "PlannedSlot", "plan_model"]
