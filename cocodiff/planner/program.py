"""What one rank does in one forward, as data: compute, sends and waits in the order in which the real code issues them.

A `Program` is read from a run of the real code on a recording transport (`trace.py`), never written by hand. It has no
seconds: `cost.py` knows rates, `simulate.py` plays it on links.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Work:
    """Equal operators: `count` of them, each with so many FLOPs and bytes read and written.

    Attributes:
        kind: "matmul", "attention" (a whole attention counts as one operator), or "other", bound by memory.
    """

    kind: str
    flops: float
    bytes: float
    count: int = 1


@dataclass(frozen=True)
class Compute:
    """Operators of the compute between two sends or waits, in order, equal neighbours joined."""

    label: str
    work: tuple[Work, ...]


@dataclass(frozen=True)
class Send:
    """Work submitted to a lane: bytes for the ranks of one axis, on the lane of the outermost level that this crosses.

    Attributes:
        axis: "ulysses", "ring", "cfg", "sequence", "everyone", or "level N", a stage of the ulysses axis.
        pattern: "all_to_all", or "pass_on": to the next place, around a ring, as gathers do it, too.
        bytes_to: for each place on the axis, this rank's own included; of "pass_on", for the next one.
        after: how many sends before this one the lane's work that makes its buffer was submitted; None where the
            buffer exists.
        work: operators that the lane runs first.
        label: "v", "k", "q", "o", "gather", ...
    """

    axis: str
    pattern: str
    bytes_to: tuple[int, ...]
    after: int | None
    work: tuple[Work, ...]
    label: str


@dataclass(frozen=True)
class Wait:
    """The compute waits for the send that was submitted `back` sends ago: 1 is the last one."""

    back: int


Step = Compute | Send | Wait


@dataclass(frozen=True)
class Program:
    """Steps of one rank in one forward, as parts with how often each is repeated.

    Attributes:
        parts: a stretch of steps (a block, or what comes before and after all blocks) and its repetitions.
        weight_bytes: of the transformer's parameters.
        kept_bytes: the most activations that were alive at once, MODELLED from the tensors of the run.
    """

    parts: tuple[tuple[tuple[Step, ...], int], ...]
    weight_bytes: int = 0
    kept_bytes: int = 0

    def steps(self) -> Iterator[Step]:
        for steps, times in self.parts:
            for _ in range(times):
                yield from steps

    def work(self) -> Iterator[Work]:
        """All operators of the compute, with their counts."""
        for steps, times in self.parts:
            for step in steps:
                if isinstance(step, Compute):
                    for work in step.work:
                        yield replace(work, count=work.count * times)

    def sends(self) -> Iterator[tuple[Send, int]]:
        """All sends, and how often each is repeated."""
        for steps, times in self.parts:
            for step in steps:
                if isinstance(step, Send):
                    yield step, times


def joined_work(work: list[Work]) -> tuple[Work, ...]:
    """Equal operators as one, in the order of their first.

    >>> joined_work([Work("other", 0, 8), Work("matmul", 2, 8), Work("other", 0, 8)])
    (Work(kind='other', flops=0, bytes=8, count=2), Work(kind='matmul', flops=2, bytes=8, count=1))
    """
    counts: dict[Work, int] = {}
    for one in work:
        key = replace(one, count=1)
        counts[key] = counts.get(key, 0) + one.count
    return tuple(replace(one, count=count) for one, count in counts.items())
