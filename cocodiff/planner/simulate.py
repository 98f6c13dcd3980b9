"""Plays a program on links: when each piece of work runs, and what one forward takes. MODELLED seconds.

All ranks run the same program in step, so one rank's compute and lanes are played; what they send is on the links of
all ranks at once (`fabric.py`). Work that runs at the same time shares links and cores: each gets the same part of the
speed that it would have alone, and what one cannot use the others may (max-min fairness).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cocodiff.planner.program import Compute, Program, Send, Work

_NEVER = float("inf")


@dataclass(frozen=True)
class Transfer:
    """A send's needs.

    Attributes:
        latency: seconds before its bytes flow.
        seconds: of each shared resource, alone; the first is the rank's cores.
        work: seconds of the lane's own operators before it.
    """

    latency: float
    seconds: tuple[float, ...]
    work: float = 0.0


@dataclass
class Timing:
    """What one forward takes, in seconds.

    Attributes:
        total: from the first operator to the last.
        compute: of the compute's operators, alone.
        waiting: label of what was waited for -> how long the compute stood still for it.
        host: the time that the host needs to start everything; part of `total` where it is the limit.
    """

    total: float = 0.0
    compute: float = 0.0
    waiting: dict[str, float] = field(default_factory=dict)
    host: float = 0.0

    @property
    def exposed(self) -> float:
        return sum(self.waiting.values())


@dataclass
class _Job:
    """Work that is on a lane."""

    number: int
    transfer: Transfer
    after: int | None  # the job that makes its buffer
    begun: float | None = None  # when its latency began
    left: float = 1.0
    done: float | None = None


def simulate(
    program: Program,
    compute_seconds: Callable[[Sequence[Work]], float],
    transfer: Callable[[Send], Transfer],
    early: bool,
) -> Timing:
    """Play one forward.

    Args:
        compute_seconds: of some operators, alone on the device.
        transfer: what a send needs.
        early: messages of a lane leave as soon as their buffer exists and keep the link busy one after the other
            (gloo); else a lane's next work begins when the one before has ended.
    """
    return _Player(compute_seconds, transfer, early).play(program)


class _Player:
    def __init__(self, compute_seconds: Callable, transfer: Callable, early: bool) -> None:
        self._seconds, self._transfer, self._early = compute_seconds, transfer, early
        self._time = 0.0
        self._jobs: list[_Job] = []
        self._lanes: dict[tuple[int, str], list[_Job]] = {}  # jobs that have not ended, in order
        self._timing = Timing()

    def play(self, program: Program) -> Timing:
        costs: dict[tuple[Work, ...], float] = {}
        transfers: dict[Send, Transfer] = {}
        labels: list[str] = []
        for step in program.steps():
            if isinstance(step, Compute):
                if step.work not in costs:
                    costs[step.work] = self._seconds(step.work)
                self._timing.compute += costs[step.work]
                self._run(costs[step.work])
            elif isinstance(step, Send):
                if step not in transfers:
                    transfers[step] = self._transfer(step)
                after = None if step.after is None else len(self._jobs) - step.after
                job = _Job(len(self._jobs), transfers[step], after)
                self._jobs.append(job)
                labels.append(step.label)
                self._lanes.setdefault((step.lane, step.axis if self._early else ""), []).append(job)
            else:
                number = len(self._jobs) - step.back
                waited = self._until(self._jobs[number])
                self._timing.waiting[labels[number]] = self._timing.waiting.get(labels[number], 0.0) + waited
        for job in self._jobs:
            self._until(job)
        self._timing.total = self._time
        return self._timing

    def _run(self, seconds: float) -> None:
        """Compute for so long, as far as what is on the lanes leaves cores for it."""
        left = seconds
        while left > 0:
            self._begin()
            speeds, own = self._speeds(computing=True)
            step = min(left / own, self._next(speeds))
            left -= own * step
            self._advance(step, speeds)
            if left < 1e-12:
                break

    def _until(self, job: _Job) -> float:
        """Stand still until a job has ended; returns for how long."""
        start = self._time
        while job.done is None:
            self._begin()
            speeds, _ = self._speeds(computing=False)
            self._advance(self._next(speeds), speeds)
        return self._time - start

    def _begin(self) -> None:
        """Let jobs begin whose buffers exist and whose turn it is."""
        for jobs in self._lanes.values():
            for index, job in enumerate(jobs):
                if job.begun is None:
                    if job.after is not None and self._jobs[job.after].done is None:
                        break
                    if index and not self._early:
                        break
                    job.begun = self._time

    def _flowing(self) -> list[_Job]:
        """The first of each lane, if its latency has passed."""
        heads = [jobs[0] for jobs in self._lanes.values() if jobs]
        return [job for job in heads if job.begun is not None and self._time >= self._ready(job) - 1e-15]

    def _ready(self, job: _Job) -> float:
        assert job.begun is not None
        return job.begun + job.transfer.latency + job.transfer.work

    def _speeds(self, computing: bool) -> tuple[dict[int, float], float]:
        """How fast each flowing job runs, as a share of its whole a second; and the compute's share of its speed."""
        flowing = self._flowing()
        needs = [job.transfer.seconds for job in flowing]
        alone = [max(max(one), 1e-12) for one in needs]
        if computing:
            needs = [*needs, (1.0,)]
            alone = [*alone, 1.0]
        shares = fair_shares([[amount / total for amount in one] for one, total in zip(needs, alone, strict=True)])
        speeds = {job.number: share / total for job, share, total in zip(flowing, shares, alone, strict=False)}
        return speeds, max(shares[-1], 1e-3) if computing else 0.0

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
