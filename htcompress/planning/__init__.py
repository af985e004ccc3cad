"""From dense layers, statistics and a goal to the matrices that will be stored."""

from htcompress.planning.plan import Plan, PlannedDirection, PlannedLayer, PlannedMatrix, has_room_for, plan_model

__all__ = ["Plan", "PlannedDirection", "PlannedLayer", "PlannedMatrix", "has_room_for", "plan_model"]
