"""Plans a wrapped pipeline's call, when its first forward shows what it computes."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cocodiff.errors import ConfigError
from cocodiff.launch.agree import gather_json
from cocodiff.launch.environment import environment
from cocodiff.pipeline.forward import ShardedForward
from cocodiff.plan import RunPlan
from cocodiff.planner.measured import read_measurements
from cocodiff.planner.plan_file import plan_as_json, plan_of_json
from cocodiff.planner.rates import Rates, rates_here
from cocodiff.topology import Cluster

if TYPE_CHECKING:
    from cocodiff.planner.search import Candidate

_log = logging.getLogger(__name__)


def plan_call(forward: ShardedForward, given: Mapping[str, Any], branches: int) -> RunPlan:
    """The best plan in the model for such a forward; made once for each shape. Collective over all ranks.

    Args:
        given: the forward's arguments, whole.
        branches: of guidance.

    Raises:
        ConfigError: on all ranks: no plan is possible, or the transformer cannot be traced.
    """
    session = forward.session
    shapes = tuple((name, tuple(x.shape), x.dtype) for name, x in given.items() if isinstance(x, Tensor))
    key = type(forward.transformer), shapes, branches
    plan = session.planned.pop(key, None) or _of_first(forward, given, branches)
    session.planned[key] = plan  # the last one is how it ran last
    return plan


def _of_first(forward: ShardedForward, given: Mapping[str, Any], branches: int) -> RunPlan:
    """Rank 0 plans, the others take it: clocks and versions could make another choice elsewhere."""
    job, found = forward.session.job, dict[str, Any]()
    assert job.host_group is not None
    if job.is_main:
        began = time.perf_counter()
        try:
            best = _best(forward, given, branches)
            found = {"plan": plan_as_json(best.plan)}
            _say(best, time.perf_counter() - began, forward)
        except ConfigError as error:
            found = {"error": str(error)}
        except Exception as error:  # told to all ranks, which would wait for a plan
            cure = "leave plan out, or give degrees"
            found = {"error": f"the planner found no plan ({type(error).__name__}: {error}): {cure}."}
    found = gather_json(found, job.host_group)[0]
    if "error" in found:
        raise ConfigError(found["error"])
    return replace(plan_of_json(found["plan"]), schedule=forward.session.config.schedule)


def _best(forward: ShardedForward, given: Mapping[str, Any], branches: int) -> Candidate:
    from cocodiff.planner.search import search  # what it needs takes a while to import
    from cocodiff.planner.task import task_of

    family, transformer = forward.family, forward.transformer
    with torch.device("meta"):
        twin = type(transformer).from_config(transformer.config)
    torch.nn.Module.to(twin, transformer.dtype).eval()
    both = branches > 1 and family.batched
    half = {name: _half(x) if both and name in family.batched else x for name, x in given.items()}
    cluster, rates = _figures(forward)
    task = task_of(twin, family, forward.facts.heads, (half, given), branches, cluster, rates, None)
    return search(task, keep=1).candidates[0]


def _figures(forward: ShardedForward) -> tuple[Cluster, Rates]:
    """Links and rates: those measured, if they are of this machine, or those assumed."""
    session = forward.session
    plan = session.config.plan
    if plan is None or plan == "auto":
        return session.cluster, rates_here(session.device)
    measured = read_measurements(plan)
    measured.check(environment(session.job))
    if measured.cluster.sizes != session.cluster.sizes:
        there, here = ("x".join(map(str, one.sizes)) for one in (measured.cluster, session.cluster))
        raise ConfigError(f"plan={plan!r} was measured on levels of {there} parts, and here are {here}: measure again.")
    return measured.cluster, measured.rates


def _half(value: Any) -> Any:
    """One branch of a batch of two; one row is for all."""
    return value[: len(value) // 2] if isinstance(value, Tensor) and value.ndim and len(value) > 1 else value


def _say(best: Candidate, seconds: float, forward: ShardedForward) -> None:
    plan, rates = best.plan, _figures(forward)[1]
    placed = "" if plan.placement is None else f", placed {plan.placement}"
    pieces = "" if plan.pieces == 1 else f", {plan.pieces} pieces"
    _log.info(
        "plan: %s, %s%s%s: %.3g s a step in the model (rates of %s are %s); planned in %.1f s",
        plan.degrees, plan.exchange, pieces, placed, best.seconds, rates.name, rates.source, seconds,
    )  # fmt: skip
