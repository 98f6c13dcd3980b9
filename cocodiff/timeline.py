"""A record of what began and ended when, on the compute lane and on every link's lane of one rank."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Mark:
    """One begin or end. `seconds` counts from the timeline's start, on this rank's host clock."""

    kind: str  # "begin" | "end"
    lane: str
    label: str
    seconds: float


@dataclass
class Timeline:
    """Begin and end of every span, in the order in which they happened on this rank.

    Spans are taken on the host. On CPU lanes that is when the work runs; on accelerators it is when it is *issued*.

    >>> timeline = Timeline()
    >>> with timeline.span("compute", "q, k"):
    ...     pass
    >>> [(mark.kind, mark.label) for mark in timeline.marks]
    [('begin', 'q, k'), ('end', 'q, k')]
    """

    marks: list[Mark] = field(default_factory=list)
    _start: float = field(default_factory=time.perf_counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def span(self, lane: str, label: str) -> Iterator[None]:
        self._add("begin", lane, label)
        try:
            yield
        finally:
            self._add("end", lane, label)

    def _add(self, kind: str, lane: str, label: str) -> None:
        with self._lock:
            self.marks.append(Mark(kind, lane, label, time.perf_counter() - self._start))
