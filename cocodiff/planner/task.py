"""From a transformer on the meta device and its inputs to a `Task` for the search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from torch import nn

from cocodiff.models import Family
from cocodiff.plan import RunPlan
from cocodiff.planner.functions import Known
from cocodiff.planner.program import Program
from cocodiff.planner.rates import Rates
from cocodiff.planner.search import Task
from cocodiff.planner.trace import Thinned, trace
from cocodiff.topology import Cluster


def task_of(
    transformer: nn.Module,
    family: Family,
    heads: int,
    inputs: tuple[Mapping[str, Any], Mapping[str, Any]],
    branches: int,
    cluster: Cluster,
    rates: Rates,
    memory_bytes: float | None,
) -> Task:
    """The task of planning for these.

    Args:
        transformer: on the meta device.
        heads: the fewest of an attention.
        inputs: of a forward of one branch of guidance, and of all branches that the family has in one batch.
        branches: of guidance.
    """
    known, thinned = Known(), Thinned.of(transformer, family)

    @cache
    def of(plan: RunPlan) -> Program:
        return trace(transformer, thinned, family, inputs[0 if plan.degrees.cfg > 1 else 1], cluster, plan, known)

    def traced(plan: RunPlan) -> Program:
        # Only the stages of a staged exchange depend on where ranks are.
        return of(plan if plan.exchange == "staged" else replace(plan, placement=None))

    itemsize = next(transformer.parameters()).itemsize
    forwards = 1 if branches > 1 and family.batched else branches
    return Task(cluster, rates, heads, itemsize, branches, forwards, traced, known, memory_bytes)
