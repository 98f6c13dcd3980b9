"""A record of what began and ended when, on the compute lane and on every link's lane of one rank."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

COMPUTE = "compute"


@dataclass(frozen=True)
class Mark:
    """One begin or end. `seconds` counts from the timeline's start."""

    kind: str  # "begin" | "end"
    lane: str
    label: str
    seconds: float


@dataclass(frozen=True)
class Span:
    """A stretch of one lane, in seconds from the timeline's start."""

    lane: str
    label: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class Timeline:
    """Begin and end of every span, in the order in which they happened (or were issued) on this rank.

    On the CPU times are the host's. On an accelerator each is an event on the stream that is current, so they say when
    the device came there, not when the host asked for it.

    >>> timeline = Timeline()
    >>> with timeline.span("compute", "q"):
    ...     pass
    >>> [(mark.kind, mark.label) for mark in timeline.marks]
    [('begin', 'q'), ('end', 'q')]
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        place = torch.device(device)
        self._api: Any = None if place.type == "cpu" else torch.get_device_module(place)
        self._lock = threading.Lock()
        self._taken: list[tuple[str, str, str, Any]] = []
        self._start = self._now()

    def restart(self) -> None:
        """Forget everything; time begins now."""
        self._taken, self._start = [], self._now()

    @contextmanager
    def span(self, lane: str, label: str) -> Iterator[None]:
        self._add("begin", lane, label)
        try:
            yield
        finally:
            self._add("end", lane, label)

    @property
    def marks(self) -> list[Mark]:
        """All marks so far. Waits for the accelerator, if there is one."""
        if self._api is not None:
            self._api.synchronize()
        return [Mark(kind, lane, label, self._seconds(when)) for kind, lane, label, when in self._taken]

    def spans(self) -> list[Span]:
        """All spans that have ended, by their end; those of one lane may lie within each other."""
        open_spans: dict[str, list[Mark]] = {}
        spans = []
        for mark in self.marks:
            stack = open_spans.setdefault(mark.lane, [])
            if mark.kind == "begin":
                stack.append(mark)
            else:
                spans.append(Span(mark.lane, mark.label, stack.pop().seconds, mark.seconds))
        return spans

    def _add(self, kind: str, lane: str, label: str) -> None:
        now = self._now()
        with self._lock:
            self._taken.append((kind, lane, label, now))

    def _now(self) -> Any:
        if self._api is None:
            return time.perf_counter()
        event = self._api.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, when: Any) -> float:
        return when - self._start if self._api is None else self._start.elapsed_time(when) / 1e3
