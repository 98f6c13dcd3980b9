"""Records when spans of work began and ended on one rank: on its compute and on each of its lanes."""

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
    """The begin or the end of a span, in seconds from the start of the timeline."""

    kind: str  # "begin" or "end"
    lane: str
    label: str
    seconds: float


@dataclass(frozen=True)
class Span:
    """A named stretch of time on one lane, in seconds from the start of the timeline."""

    lane: str
    label: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class Timeline:
    """Keeps the begin and the end of every span in the order in which this rank issued them.

    On the CPU times are those of the host. On an accelerator each is an event on the current stream, so it says when
    the device reached this point, not when the host asked for it.

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
        """Drop all marks and let time begin now."""
        self._taken, self._start = [], self._now()

    @contextmanager
    def span(self, lane: str, label: str) -> Iterator[None]:
        """While inside, a span of this label is under way on the lane."""
        self._add("begin", lane, label)
        try:
            yield
        finally:
            self._add("end", lane, label)

    @property
    def marks(self) -> list[Mark]:
        """All marks so far. Waits for the accelerator if there is one."""
        if self._api is not None:
            self._api.synchronize()
        return [Mark(kind, lane, label, self._seconds(when)) for kind, lane, label, when in self._taken]

    def spans(self) -> list[Span]:
        """Return all spans that have ended, in the order of their ends. Spans of one lane may be nested."""
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
