"""Lanes, transports and groups that send nothing and write down what one rank would do, on the meta device.

The real code runs over them: attention, blocks, lanes' order and exchanges are those of a real run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cocodiff.exchange.transport import Prepare, Transport
from cocodiff.observe.timeline import Timeline
from cocodiff.planner.functions import Functions, Known, Memory
from cocodiff.planner.program import Compute, Send, Step, Wait, Work, joined_work


@dataclass(frozen=True)
class RecordedGroup:
    """Stands for a process group; `axis` says of what."""

    axis: str
    place: int
    ranks: tuple[int, ...]

    def rank(self) -> int:
        return self.place

    def size(self) -> int:
        return len(self.ranks)


class Recorder:
    """Writes down operators, sends and waits; also stands for a timeline, whose spans it hears of.

    Args:
        known: functions that were called before, kept from one recorder to the next.
    """

    def __init__(self, known: Known) -> None:
        self._known, self.memory, self.sends = known, Memory(), 0
        self._steps: list[Step] = []
        self._work: list[Work] = []  # of the stretch of compute that runs
        self._lane_work: list[Work] | None = None  # of the lane's work that runs
        self._sent: tuple[str, str, tuple[int, ...]] | None = None
        self._labels: list[str] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While inside, write down the operators that run."""
        with Functions(self._known, self.operator, self.memory):
            yield

    def operator(self, work: Work) -> None:
        (self._work if self._lane_work is None else self._lane_work).append(work)

    @contextmanager
    def span(self, lane: str, label: str) -> Iterator[None]:
        """As a timeline's."""
        self._labels.append(label)
        try:
            yield
        finally:
            self._labels.pop()

    def submit(self, work: Callable[[Tensor], Tensor], source: Any, label: str) -> RecordedTicket:
        after = None
        if isinstance(source, RecordedTicket):
            after = self.sends - source.number
            source = source.result
        self._flush()
        self._lane_work, self._sent = [], None
        result = work(source)
        lane_work, self._lane_work = joined_work(self._lane_work), None
        assert self._sent is not None, "a lane's work is an exchange"
        axis, pattern, bytes_to = self._sent
        self._steps.append(Send(axis, pattern, bytes_to, after, lane_work, label))
        self.sends += 1
        return RecordedTicket(self, self.sends - 1, result)

    def transfer(self, axis: str, pattern: str, bytes_to: tuple[int, ...]) -> None:
        """Note what the lane's work that runs sends."""
        self._sent = axis, pattern, bytes_to

    def wait(self, number: int) -> None:
        self._flush()
        self._steps.append(Wait(self.sends - number))

    def part(self) -> tuple[Step, ...]:
        """Take what was written down since the last time."""
        self._flush()
        steps, self._steps = tuple(self._steps), []
        return steps

    def _flush(self) -> None:
        if self._work:
            self._steps.append(Compute(self._labels[-1] if self._labels else "", joined_work(self._work)))
            self._work = []


class RecordedTicket:
    def __init__(self, recorder: Recorder, number: int, result: Tensor) -> None:
        self._recorder, self.number, self.result = recorder, number, result

    def wait(self) -> Tensor:
        self._recorder.wait(self.number)
        return self.result


class RecordingLane:
    """A `Lane` whose work runs at once, on the meta device."""

    timeline: Timeline | None = None

    def __init__(self, recorder: Recorder, level: int) -> None:
        self.name, self.device, self.submitted = f"level {level}", torch.device("meta"), 0
        self._recorder = recorder

    def submit(self, work: Callable[[Tensor], Tensor], source: Any, label: str) -> RecordedTicket:
        self.submitted += 1
        return self._recorder.submit(work, source, label)

    def catch_up(self) -> None:
        pass

    def close(self) -> None:
        pass


class RecordingTransport(Transport):
    """Notes the bytes for each rank of its group; what arrives is memory without values."""

    def __init__(self, recorder: Recorder, axis: str, *args: Any) -> None:
        super().__init__(*args)
        self._recorder, self._axis = recorder, axis

    def _all_to_all(
        self, send_splits: list[int], recv_splits: list[int], equal: bool, out: Tensor | None, prepare: Prepare | None
    ) -> Callable[[Tensor], Tensor]:
        def work(send: Tensor) -> Tensor:
            send = send if prepare is None else prepare(send)
            sent = tuple(count * send.itemsize for count in send_splits)
            self._recorder.transfer(self._axis, "all_to_all", sent)
            return torch.empty(sum(recv_splits), dtype=send.dtype, device="meta") if out is None else out

        return work

    def _pass_on(self, send_count: int, recv_count: int, prepare: Prepare | None) -> Callable[[Tensor], Tensor]:
        def work(send: Tensor) -> Tensor:
            send = send if prepare is None else prepare(send)
            self._recorder.transfer(self._axis, "pass_on", (send_count * send.itemsize,))
            return torch.empty(recv_count, dtype=send.dtype, device="meta")

        return work

    def _all_gather(self, send: Tensor) -> Tensor:
        self._recorder.transfer(self._axis, "pass_on", ((self.size - 1) * send.numel() * send.itemsize,))
        return torch.empty((self.size, *send.shape), dtype=send.dtype, device="meta")
