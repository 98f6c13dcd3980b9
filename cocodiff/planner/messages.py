"""Plays a program whose transfers are messages between pairs of ranks (gloo), rank by rank. MODELLED seconds.

Ranks that share a link do not stay in step: what one of them sends first leaves first, so that its peers have their
data while another's still waits, and from then on some compute while others send. A message leaves when its sender has
it and its receiver has said that it waits for it; that word queues behind what goes the same way.
Whether this or ranks in step is nearer to what is measured differs by case (benchmarks/results/planner/cases.md).
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cocodiff.planner.program import Compute, Program, Send, Step, Work
from cocodiff.planner.simulate import SETTLING, STEADY, Timing

SEGMENT_BYTES = 65_536  # of a connection's data that the kernel has queued ahead of a word in the same direction
# Ranks differ by so much, drawn from a fixed seed. Without it all would meet at the same instants for ever.
JITTER = 0.005


class MessageCosts(Protocol):
    """What work and messages take.

    Attributes:
        capacity: bytes a second of each link.
        core_seconds_per_byte: of the sender's own cores.
    """

    capacity: Sequence[float]
    core_seconds_per_byte: float

    def compute_seconds(self, work: Sequence[Work]) -> float: ...

    def level(self, send: Send) -> int: ...

    def groups(self, axis: str) -> Sequence[Sequence[int]]:
        """All groups of ranks of an axis, each in its order."""

    def route(self, here: int, peer: int) -> tuple[tuple[int, ...], float]:
        """The links from one rank to another, in order, and the seconds of latency."""


@dataclass
class _Job:
    """One rank's part in a send."""

    send: Send
    missing: int  # messages that have not arrived
    begun: bool = False
    done: bool = False
    then: list[int] = field(default_factory=list)  # jobs whose buffer this makes


@dataclass
class _Rank:
    steps: Iterator[Step | int]
    time: float
    jobs: list[_Job] = field(default_factory=list)
    waits_for: int | None = None
    waited: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # by level
    compute: float = 0.0
    shared: float = 0.0
    readings: list[NDArray[np.float64]] = field(default_factory=list)

    def read(self) -> None:
        self.readings.append(np.array([self.time, self.compute, self.shared, *self.waited]))


def play_messages(program: Program, costs: MessageCosts) -> Timing:
    """Play one forward of all ranks."""
    levels = 1 + max((costs.level(send) for send, _ in program.sends()), default=0)
    played = _Messages(program, costs, levels)
    played.run()
    totals = [rank.readings[-1] for rank in played.ranks]
    left_out = np.zeros(3 + levels)
    for first, last, times in _repeated(program):
        some = np.mean([rank.readings[last] - rank.readings[first] for rank in played.ranks], axis=0)
        left_out += some * ((times - SETTLING - STEADY) / STEADY)
    total = max(one[0] for one in totals) + left_out[0]
    mean, compute, shared, *waiting = (np.mean(totals, axis=0) + left_out).tolist()
    waiting[-1] += total - mean  # for the last rank
    return Timing(float(total), compute, shared, 0.0, {level: one for level, one in enumerate(waiting) if one > 0})


def _repeated(program: Program) -> Iterator[tuple[int, int, int]]:
    """The readings between which a part runs evenly, and its repetitions."""
    at = 0
    for _, times in program.parts:
        played = min(times, SETTLING + STEADY)
        if times > played:
            yield at + SETTLING, at + played, times
        at += played


def _steps(program: Program) -> Iterator[Step | int]:
    """What a rank does; a number stands for a reading of its clocks."""
    yield 0
    for steps, times in program.parts:
        for _ in range(min(times, SETTLING + STEADY)):
            yield from steps
            yield 0


class _Messages:
    def __init__(self, program: Program, costs: MessageCosts, levels: int) -> None:
        self._costs, self._free = costs, [0.0] * len(costs.capacity)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        self._offered: dict[tuple[int, int, int], float] = {}  # sender, receiver, job: bytes, until they leave
        self._awaited: set[tuple[int, int, int]] = set()
        self._draw = random.Random(0)
        self._seconds: dict[tuple[Work, ...], float] = {}
        self._places: dict[str, Mapping[int, tuple[Sequence[int], int]]] = {}
        self._routes: dict[tuple[int, int], tuple[tuple[int, ...], float]] = {}
        count = sum(len(group) for group in costs.groups("everyone"))
        self.ranks = [_Rank(_steps(program), 0.0, waited=np.zeros(levels)) for _ in range(count)]

    def run(self) -> None:
        for rank in range(len(self.ranks)):
            self._at(0.0, self._go_on, rank)
        while self._events:
            now, _, what, about = heapq.heappop(self._events)
            what(now, *about)
        assert all(rank.waits_for is None for rank in self.ranks), "a rank waits for what was not sent"

    def _at(self, when: float, what: Callable[..., None], *about: Any) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, what, about))

    def _go_on(self, now: float, number: int) -> None:
        """Let a rank run until it computes, waits or ends."""
        rank = self.ranks[number]
        rank.time = max(rank.time, now)
        for step in rank.steps:
            if isinstance(step, int):
                rank.read()
            elif isinstance(step, Compute):
                seconds = self._of(step.work) * (1 + JITTER * self._draw.gauss(0, 1))
                rank.compute, rank.time = rank.compute + seconds, rank.time + seconds
                return self._at(rank.time, self._go_on, number)
            elif isinstance(step, Send):
                self._submit(number, step)
            else:
                job = len(rank.jobs) - step.back
                if not rank.jobs[job].done:
                    rank.waits_for = job
                    return None
        return None

    def _of(self, work: tuple[Work, ...]) -> float:
        if work not in self._seconds:
            self._seconds[work] = self._costs.compute_seconds(work)
        return self._seconds[work]

    def _submit(self, number: int, send: Send) -> None:
        rank, job = self.ranks[number], len(self.ranks[number].jobs)
        group, _ = self._place(send.axis, number)
        several = len(group) > 1
        rank.jobs.append(_Job(send, 0 if not several else len(group) - 1 if send.pattern == "all_to_all" else 1))
        own = sum(send.bytes_to[1:]) if send.pattern == "all_to_all" else send.bytes_to[0] * several
        slower = own * self._costs.core_seconds_per_byte
        rank.time, rank.shared = rank.time + slower, rank.shared + slower
        before = None if send.after is None else rank.jobs[job - send.after]
        if before is None or before.done:
            self._at(rank.time + self._of(send.work), self._begin, number, job)
        else:
            before.then.append(job)

    def _begin(self, now: float, number: int, job: int) -> None:
        """The buffer exists: offer what goes out, and tell those who send here that they may."""
        mine = self.ranks[number].jobs[job]
        mine.begun = True
        group, place = self._place(mine.send.axis, number)
        size, all_to_all = len(group), mine.send.pattern == "all_to_all"
        for distance in range(1, size if all_to_all else min(size, 2)):
            there, back = (place + distance) % size, group[(place - distance) % size]
            sent = mine.send.bytes_to[there] if all_to_all else mine.send.bytes_to[0]
            self._offered[number, group[there], job] = sent
            self._leave(now, number, group[there], job)
            links, latency = self._route(number, back)
            queued = max(min(self._free[link] - now, SEGMENT_BYTES / self._costs.capacity[link]) for link in links)
            self._at(now + latency + max(queued, 0.0), self._may_leave, back, number, job)
        self._check(now, number, job)

    def _may_leave(self, now: float, here: int, peer: int, job: int) -> None:
        self._awaited.add((here, peer, job))
        self._leave(now, here, peer, job)

    def _leave(self, now: float, here: int, peer: int, job: int) -> None:
        """Put a message on its links, if both ends are ready for it: behind all that was put there before."""
        if (here, peer, job) not in self._awaited or (here, peer, job) not in self._offered:
            return
        self._awaited.remove((here, peer, job))
        sent = self._offered.pop((here, peer, job))
        links, latency = self._route(here, peer)
        begun = max(now, self._free[links[0]])
        ended = begun
        for link in links:
            ended = max(ended, max(begun, self._free[link]) + sent / self._costs.capacity[link])
            self._free[link] = ended
        self._at(ended + latency, self._arrived, peer, job)

    def _arrived(self, now: float, number: int, job: int) -> None:
        self.ranks[number].jobs[job].missing -= 1
        self._check(now, number, job)

    def _check(self, now: float, number: int, job: int) -> None:
        """Go on where all of a job is there."""
        rank, mine = self.ranks[number], self.ranks[number].jobs[job]
        if not mine.begun or mine.missing or mine.done:
            return
        mine.done = True
        for other in mine.then:
            self._at(now + self._of(rank.jobs[other].send.work), self._begin, number, other)
        if rank.waits_for == job:
            rank.waits_for = None
            rank.waited[self._costs.level(mine.send)] += now - rank.time
            self._go_on(now, number)

    def _place(self, axis: str, number: int) -> tuple[Sequence[int], int]:
        if axis not in self._places:
            groups = self._costs.groups(axis)
            self._places[axis] = {rank: (group, place) for group in groups for place, rank in enumerate(group)}
        return self._places[axis][number]

    def _route(self, here: int, peer: int) -> tuple[tuple[int, ...], float]:
        if (here, peer) not in self._routes:
            self._routes[here, peer] = self._costs.route(here, peer)
        return self._routes[here, peer]
