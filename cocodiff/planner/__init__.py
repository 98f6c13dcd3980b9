"""Which plan a pipeline runs by. Today one rule; it is asked for a `RunPlan` in one place (`Session.plan`)."""

from cocodiff.planner.at_call import plan_call
from cocodiff.planner.rule import choose_degrees, outward_bytes, plan_run

__all__ = ["choose_degrees", "outward_bytes", "plan_call", "plan_run"]
