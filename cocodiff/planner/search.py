"""Finds the best plans: a bound that drops most without playing them, then the simulator for the others. MODELLED.

Stage one reads one program of each mesh and bounds every plan of it from below: by its compute, by what the host starts,
and by the bytes on each link. Stage two plays plans in the order of their bounds, and stops at a bound above the best
that was played: in this model no better plan can be left. Cutting rows into pieces gains at most the time for which
the compute stands still; where that is under LEAST_GAIN of a step, plans of several pieces are not played.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cocodiff.errors import ConfigError
from cocodiff.parallel.mesh import Degrees
from cocodiff.plan import RunPlan
from cocodiff.planner.fabric import Fabric, telling
from cocodiff.planner.program import Program, Send, Work
from cocodiff.planner.rates import Rates
from cocodiff.planner.simulate import Timing, Transfer, simulate
from cocodiff.planner.space import meshes, ways
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
        memory_bytes: of a rank's device; None leaves memory out.
    """

    cluster: Cluster
    rates: Rates
    heads: int
    itemsize: int
    branches: int
    forwards: int
    trace: Trace
    memory_bytes: float | None = None


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
    """Candidates, best first, and how many plans were bounded, played, and left out by memory."""

    candidates: tuple[Candidate, ...]
    bounded: int
    played: int


class Costs:
    """The costs of one mesh on the task's cluster."""

    def __init__(self, task: Task, degrees: Degrees) -> None:
        self._task = task
        self.early = task.rates.launch_us == 0
        self.launch_seconds = task.rates.launch_us * 1e-6
        self.fabric = Fabric(task.cluster, degrees, peers_in_turn=self.early)
        self._links: Any = slice(None)

    def compute_seconds(self, work: tuple[Work, ...]) -> float:
        return self._task.rates.seconds(work, self._task.itemsize)

    def for_program(self, program: Program) -> Costs:
        """Costs that know which links matter to it."""
        made = copy.copy(self)
        made._links = telling([self.fabric.flow(send) for send in {send for send, _ in program.sends()}])
        return made

    def transfer(self, send: Send) -> Transfer:
        flow = self.fabric.flow(send)
        cores = flow.sent_bytes * self._task.rates.core_seconds_per_byte
        links = flow.seconds[self._links].tolist()
        return Transfer(flow.latency_seconds, (cores, *links), self.compute_seconds(send.work))


def search(task: Task, keep: int = 5) -> Found:
    """The best plans of a task, one of each mesh at most.

    Raises:
        ConfigError: no mesh is legal, with what rules each out.
    """
    waiting: list[tuple[float, int, RunPlan, Costs]] = []
    too_large: list[int] = []
    for degrees in meshes(task.cluster.num_ranks, task.heads, task.branches > 1):
        costs, plans = Costs(task, degrees), list(ways(task.cluster, degrees))
        program = task.trace(plans[0])
        needed = program.weight_bytes + program.kept_bytes
        if task.memory_bytes is not None and needed > task.memory_bytes:
            too_large.append(needed)
            continue
        forwards = task.forwards if degrees.cfg == 1 else 1
        bound = forwards * _bound(program, costs)
        waiting += [(bound, len(waiting) + index, plan, costs) for index, plan in enumerate(plans)]
    if not waiting:
        raise ConfigError(_none_is_legal(task, too_large))
    waiting.sort(key=lambda one: one[:2])
    played: list[Candidate] = []
    exposed: dict[tuple[Degrees, str], float] = {}
    for bound, _, plan, costs in waiting:
        way = plan.degrees, plan.exchange
        if plan.pieces != 1 and exposed[way] < LEAST_GAIN:
            continue
        best = sorted({str(one.plan.degrees): one.seconds for one in sorted(played, key=_worst_first)}.values())
        if len(best) >= keep and bound > best[keep - 1]:
            break
        forwards, program = task.forwards if plan.degrees.cfg == 1 else 1, task.trace(plan)
        timing = simulate(program, costs.for_program(program))
        exposed.setdefault(way, sum(timing.waiting.values()) / timing.total)
        played.append(Candidate(plan, forwards * timing.total, timing, program, bound, forwards))
    found: dict[Degrees, Candidate] = {}
    for one in sorted(played, key=lambda one: one.seconds):
        found.setdefault(one.plan.degrees, one)
    return Found(tuple(found.values())[:keep], len(waiting), len(played))


def _worst_first(candidate: Candidate) -> float:
    return -candidate.seconds


def _bound(program: Program, costs: Costs) -> float:
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
            f"no plan fits: the transformer and its activations need {needed:.1f} GB a rank, {needed / there:.1f} times "
            f"the {there:.1f} GB that there are. More ranks do not help, since every rank holds all weights: take a "
            "smaller dtype, or devices with more memory."
        )
    return (
        f"no mesh of {ranks} ranks is legal: every rank of the ulysses axis needs one of {task.heads} attention heads."
    )
