"""Finds the best plans: a bound that drops most without playing them, then the simulator for the others. MODELLED.

Stage one reads one program of each mesh and bounds every plan of it from below: by its compute, by what the host
starts, and by the bytes on each link. Stage two plays plans in the order of their bounds, and stops at a bound above
the best that was played: in this model no better plan can be left. Cutting rows into pieces gains at most the time for
which the compute stands still; where that is under LEAST_GAIN of a step, plans of several pieces are not played.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cocodiff.errors import ConfigError
from cocodiff.parallel.mesh import Degrees
from cocodiff.plan import RunPlan
from cocodiff.planner.costs import MeshCosts
from cocodiff.planner.functions import Known
from cocodiff.planner.program import Program
from cocodiff.planner.rates import Rates
from cocodiff.planner.simulate import Timing
from cocodiff.planner.space import meshes, spreadings, ways
from cocodiff.topology import Cluster

LEAST_GAIN = 0.01

Trace = Callable[[RunPlan], Program]


@dataclass(frozen=True)
class Task:
    """What is to be planned for.

    Attributes:
        heads: the fewest of an attention.
        itemsize: bytes of an element.
        branches: of guidance, which a cfg axis of two runs side by side.
        forwards: a step on a cfg axis of one: a family may have both branches in one batch.
        trace: gives the program of a plan, of one forward of a rank.
        known: the operators of all traces so far.
        memory_bytes: of a rank's device; None leaves memory out.
    """

    cluster: Cluster
    rates: Rates
    heads: int
    itemsize: int
    branches: int
    forwards: int
    trace: Trace
    known: Known
    memory_bytes: float | None = None

    def calls(self, degrees: Degrees) -> int:
        """Forwards of one rank in a step."""
        return self.forwards if degrees.cfg == 1 else 1


@dataclass(frozen=True)
class Candidate:
    """A plan that was played. `seconds` are of one step: all branches."""

    plan: RunPlan
    seconds: float
    timing: Timing
    program: Program
    bound: float
    forwards: int

    @property
    def memory_bytes(self) -> int:
        """Of one rank: the transformer's weights, and the most of its activations at once."""
        return self.program.weight_bytes + self.program.kept_bytes


@dataclass(frozen=True)
class Found:
    """Candidates, best first, and how many plans were bounded and played."""

    candidates: tuple[Candidate, ...]
    bounded: int
    played: int


def search(task: Task, keep: int = 5) -> Found:
    """The best plans of a task, one of each mesh at most.

    Raises:
        ConfigError: no mesh is legal, with what rules each out.
    """
    waiting: list[tuple[float, int, RunPlan, MeshCosts]] = []
    too_large: list[int] = []
    for degrees in meshes(task.cluster.num_ranks, task.heads, task.branches > 1):
        program = task.trace(RunPlan(degrees, exchange="flat", pieces=1))
        needed = program.weight_bytes + program.kept_bytes
        if task.memory_bytes is not None and needed > task.memory_bytes:
            too_large.append(needed)
            continue
        for placement in spreadings(task.cluster.sizes, degrees):
            costs = MeshCosts(task.cluster, task.rates, task.itemsize, degrees, placement)
            bound = task.calls(degrees) * _bound(program, costs)
            plans = ways(degrees, placement, costs.fabric.crossed("ulysses"))
            waiting += [(bound, len(waiting) + index, plan, costs) for index, plan in enumerate(plans)]
    if not waiting:
        raise ConfigError(_none_is_legal(task, too_large))
    waiting.sort(key=lambda one: one[:2])
    best: dict[Degrees, Candidate] = {}
    exposed: dict[RunPlan, float] = {}
    seconds: dict[RunPlan, float] = {}
    gains: dict[RunPlan, float] = {}  # of the last number of pieces over a whole plan
    played = 0
    for bound, _, plan, costs in waiting:
        whole, mesh_best = replace(plan, pieces=1), best.get(plan.degrees)
        others = sorted(one.seconds for one in best.values())
        if len(others) >= keep and bound > others[keep - 1]:
            break
        if mesh_best is not None and bound > mesh_best.seconds:
            continue
        if plan.pieces != 1 and exposed.get(whole, 0.0) < LEAST_GAIN:
            continue
        if plan.pieces is not None and plan.pieces > 2 and gains.get(whole, 0.0) <= 0:
            continue
        program, played = task.trace(plan), played + 1
        timing = costs.play(program)
        exposed[plan] = sum(timing.waiting.values()) / timing.total
        seconds[plan] = timing.total
        gains[whole] = seconds[whole] - timing.total
        forwards = task.calls(plan.degrees)
        if mesh_best is None or forwards * timing.total < mesh_best.seconds:
            best[plan.degrees] = Candidate(plan, forwards * timing.total, timing, program, bound, forwards)
    found = sorted(best.values(), key=lambda one: one.seconds)[:keep]
    return Found(tuple(found), len(waiting), played)


def _bound(program: Program, costs: MeshCosts) -> float:
    """Seconds that no plan of this mesh is under: of a whole, unstaged exchange, which has the fewest operators."""
    compute = costs.compute_seconds(tuple(program.work()))
    host = sum(one.count for one in program.work()) * costs.launch_seconds
    links = sum((times * costs.fabric.flow(send).seconds for send, times in program.sends()), start=0.0)
    return max(compute, host, float(max(links)) if not isinstance(links, float) else 0.0)


def _none_is_legal(task: Task, too_large: list[int]) -> str:
    ranks = task.cluster.num_ranks
    if too_large and task.memory_bytes is not None:
        needed, there = min(too_large) / 1e9, task.memory_bytes / 1e9
        return (
            f"no plan fits: the transformer and its activations need {needed:.1f} GB a rank, {needed / there:.1f} "
            f"times the {there:.1f} GB that there are. More ranks do not help, since every rank holds all weights: "
            "take a smaller dtype, or devices with more memory."
        )
    return (
        f"no mesh of {ranks} ranks is legal: every rank of the ulysses axis needs one of {task.heads} attention heads."
    )
