"""Plays a program on links: when each piece of work runs, and what one forward takes. MODELLED seconds.

All ranks run the same program in step, as collectives make them, so one rank's compute and lanes are played; what they
send is on the links of all ranks at once (`fabric.py`). Transfers that run at the same time share links: each gets the
same part of the speed that it would have alone, and what one cannot use the others may (max-min fairness). What takes
the messages of single ranks apart is in `messages.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cocodiff.planner.program import Compute, Program, Send, Step, Work

LAUNCHES_PER_SEND = 4  # of the host, in launches of an operator: events, the collective, its bookkeeping. ASSUMED
# Of a part that is repeated often, so many repetitions are played until it runs evenly, and so many more are timed;
# those stand for the others.
SETTLING, STEADY = 3, 3
_NEVER = float("inf")


@dataclass(frozen=True)
class Transfer:
    """A send's needs.

    Attributes:
        latency: seconds before its bytes flow.
        seconds: of each link, alone.
        work: seconds of the lane's own operators before it.
    """

    latency: float
    seconds: tuple[float, ...]
    work: float = 0.0


@dataclass(frozen=True)
class Timing:
    """What one forward takes, in seconds.

    Attributes:
        total: from the first operator to the last.
        compute: of the compute's operators, alone.
        shared: by how much that took longer because the rank's own cores send.
        host: how long it stood still for the host, which starts every operator.
        waiting: level of the cluster -> how long the compute stood still for what travels through it.
    """

    total: float
    compute: float
    shared: float
    host: float
    waiting: Mapping[int, float]


@dataclass
class _Job:
    """Work that is on a lane."""

    number: int
    level: int
    transfer: Transfer
    after: int | None  # the job that makes its buffer
    begun: float | None = None  # when its latency began
    left: float = 1.0
    done: float | None = None


class Costs(Protocol):
    """What work and transfers take.

    Attributes:
        launch_seconds: of the host for one operator; the device runs behind it.
    """

    launch_seconds: float

    def compute_seconds(self, work: Sequence[Work]) -> float:
        """Of some operators, alone on the device."""

    def transfer(self, send: Send) -> Transfer: ...

    def level(self, send: Send) -> int:
        """The level of the cluster whose lane carries it."""


def simulate(program: Program, costs: Costs) -> Timing:
    """Play one forward."""
    levels = 1 + max((costs.level(send) for send, _ in program.sends()), default=0)
    return _Player(costs, levels).play(program)


class _Player:
    def __init__(self, costs: Costs, levels: int) -> None:
        self._costs = costs
        self._time = self._host = 0.0  # where the device is, and how far the host has come
        self._compute = self._waited_host = 0.0
        self._waiting = [0.0] * levels
        self._left_out = np.zeros(3 + levels)  # of repetitions that were not played
        self._jobs: list[_Job] = []
        self._lanes: dict[int, list[_Job]] = {}  # jobs that have not ended, in order
        self._known_work: dict[tuple[Work, ...], float] = {}
        self._known_sends: dict[Send, Transfer] = {}
        self._known_speeds: dict[tuple[int, ...], list[float]] = {}  # of transfers that run at once, each known above

    def play(self, program: Program) -> Timing:
        for steps, times in program.parts:
            for _ in range(min(times, SETTLING)):
                self._part(steps)
            if times <= SETTLING + STEADY:
                for _ in range(times - SETTLING):
                    self._part(steps)
                continue
            before = self._reading()
            for _ in range(STEADY):
                self._part(steps)
            self._left_out += (self._reading() - before) * ((times - SETTLING - STEADY) / STEADY)
        for job in self._jobs:
            self._still(job)
        total, compute, host, *waiting = (self._reading() + self._left_out).tolist()
        return Timing(total, compute, 0.0, host, {level: one for level, one in enumerate(waiting) if one})

    def _reading(self) -> NDArray[np.float64]:
        return np.array([self._time, self._compute, self._waited_host, *self._waiting])

    def _part(self, steps: Sequence[Step]) -> None:
        for step in steps:
            if isinstance(step, Compute):
                if step.work not in self._known_work:
                    self._known_work[step.work] = self._costs.compute_seconds(step.work)
                seconds = self._known_work[step.work]
                self._compute += seconds
                self._hosted(1)
                self._play_until(self._time + seconds)
                self._hosted(sum(one.count for one in step.work) - 1)
            elif isinstance(step, Send):
                if step not in self._known_sends:
                    self._known_sends[step] = self._costs.transfer(step)
                after = None if step.after is None else len(self._jobs) - step.after
                level = self._costs.level(step)
                job = _Job(len(self._jobs), level, self._known_sends[step], after)
                self._jobs.append(job)
                self._lanes.setdefault(level, []).append(job)
                self._hosted(LAUNCHES_PER_SEND + sum(one.count for one in step.work))
            else:
                self._still(self._jobs[len(self._jobs) - step.back])

    def _hosted(self, operators: int) -> None:
        """The host starts so many operators; the device cannot be ahead of it."""
        self._host += operators * self._costs.launch_seconds
        if self._time < self._host:
            self._waited_host += self._host - self._time
            self._play_until(self._host)

    def _still(self, job: _Job) -> None:
        """Stand still until a job has ended."""
        start = self._time
        self._play_until(_NEVER, job)
        self._waiting[job.level] += self._time - start

    def _play_until(self, time: float, job: _Job | None = None) -> None:
        """Let the lanes go on until a time, or until a job has ended."""
        while self._time < time - 1e-15 and (job is None or job.done is None):
            self._begin()
            speeds = self._speeds()
            self._advance(min(self._next(speeds), time - self._time), speeds)

    def _begin(self) -> None:
        """Let jobs begin whose buffers exist and whose turn it is."""
        for job in (jobs[0] for jobs in self._lanes.values() if jobs):
            if job.begun is None and (job.after is None or self._jobs[job.after].done is not None):
                job.begun = self._time

    def _flowing(self) -> list[_Job]:
        """The first of each lane, if its latency has passed."""
        heads = [jobs[0] for jobs in self._lanes.values() if jobs]
        return [job for job in heads if job.begun is not None and self._time >= self._ready(job) - 1e-15]

    def _ready(self, job: _Job) -> float:
        assert job.begun is not None
        return job.begun + job.transfer.latency + job.transfer.work

    def _speeds(self) -> dict[int, float]:
        """How fast each flowing job runs, as a share of its whole a second."""
        flowing = self._flowing()
        together = tuple(id(job.transfer) for job in flowing)
        if together not in self._known_speeds:
            self._known_speeds[together] = _speeds([job.transfer for job in flowing])
        return {job.number: speed for job, speed in zip(flowing, self._known_speeds[together], strict=True)}

    def _next(self, speeds: dict[int, float]) -> float:
        """Seconds until something ends or begins to flow."""
        times = [self._jobs[number].left / speed for number, speed in speeds.items()]
        for jobs in self._lanes.values():
            if jobs and jobs[0].begun is not None and jobs[0].number not in speeds:
                times.append(self._ready(jobs[0]) - self._time)
        return max(min(times, default=_NEVER), 0.0)

    def _advance(self, seconds: float, speeds: dict[int, float]) -> None:
        assert seconds < _NEVER, "nothing will ever happen: a wait for what was not sent"
        self._time += seconds
        for number, speed in speeds.items():
            job = self._jobs[number]
            job.left -= speed * seconds
            if job.left <= 1e-9:
                job.done = self._time
                for jobs in self._lanes.values():
                    if jobs and jobs[0] is job:
                        jobs.pop(0)


def _speeds(transfers: Sequence[Transfer]) -> list[float]:
    """How fast each of these runs beside the others, as a share of its whole a second."""
    alone = [max(max(one.seconds), 1e-12) for one in transfers]
    needs = [[amount / total for amount in one.seconds] for one, total in zip(transfers, alone, strict=True)]
    return [share / total for share, total in zip(fair_shares(needs), alone, strict=True)]


def fair_shares(needs: Sequence[Sequence[float]]) -> list[float]:
    """The share of its full speed that each of several gets where they share resources, max-min fair.

    Args:
        needs: of each, what part of each resource it takes at full speed; shorter ones need nothing of the others.

    >>> fair_shares([(1.0,), (1.0,), (0.0, 1.0)])
    [0.5, 0.5, 1.0]
    >>> fair_shares([(0.5, 1.0), (0.5,)])
    [1.0, 1.0]
    """
    shares: list[float] = [0.0] * len(needs)
    open_ones, resources = set(range(len(needs))), max((len(one) for one in needs), default=0)
    free = [1.0] * resources
    level = 0.0
    while open_ones:
        growth, full = 1.0 - level, None
        for resource in range(resources):
            demand = sum(needs[one][resource] for one in open_ones if resource < len(needs[one]))
            if demand > 1e-12 and free[resource] / demand < growth - 1e-12:
                growth, full = free[resource] / demand, resource
        level += growth
        for resource in range(resources):
            free[resource] -= growth * sum(needs[one][resource] for one in open_ones if resource < len(needs[one]))
        ended = (
            set(open_ones)
            if full is None
            else {one for one in open_ones if full < len(needs[one]) and needs[one][full] > 1e-12}
        )
        for one in ended:
            shares[one] = level
        open_ones -= ended
    return shares
