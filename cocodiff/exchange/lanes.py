"""WHEN work runs: ordered side lanes, one per link level. The only file that names streams or threads.

A lane runs what is submitted to it strictly in order, beside the compute that goes on meanwhile. The rules that keep
it correct, for every kind of lane: the lane waits for the producer of its input, the consumer waits for the lane
(`Ticket.wait`), and a ticket keeps the tensors in use alive: whoever holds it drops it after waiting, not before.

Lanes of CPU tensors are worker threads, those of accelerators are streams. Ranks submit in the same program order,
so the collectives on a lane meet in the same order everywhere; each lane has process groups of its own.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from cocodiff.observe.timeline import Timeline


class Ticket(Protocol):
    """A result that a lane will deliver."""

    def wait(self) -> Tensor:
        """The result, safe to use by the caller from here on. Errors of the lane's work are raised here."""


Work = Callable[[Tensor], Tensor]  # may have `begin(source)`, which starts it and does not block


class Lane(Protocol):
    """An ordered queue of work beside the compute. `timeline`, if set, records it.

    `submitted` counts what was ever submitted: ranks whose counts differ are out of step for good.
    """

    name: str
    device: torch.device
    submitted: int
    timeline: Timeline | None

    def submit(self, work: Work, source: Tensor | Ticket, label: str) -> Ticket:
        """Run `work(source)` after all that was submitted here before, and after `source` has been produced.

        `source` is a tensor of the caller's own, or the ticket of another lane: that is how the stages of a staged
        exchange follow each other without the caller's help. `label` names the work in a timeline. Where the lane is a
        thread and the work has a `begin`, that is called as soon as there is a source, ahead of what is still running.
        """

    def catch_up(self) -> None:
        """Let nothing that the caller computes from here on run before what was submitted here has ended.

        After an exception: whatever the lane's work still reads or writes may be freed then. Does not block the host.
        """

    def close(self) -> None:
        """No more work will come."""


class ThreadLane:
    """A lane of CPU tensors: one daemon thread, so that communication and compute share the cores for real.

    >>> lane = ThreadLane("doubling")
    >>> lane.submit(lambda x: 2 * x, torch.ones(1), "twice").wait().item()
    2.0
    """

    def __init__(self, name: str) -> None:
        self.name, self.device = name, torch.device("cpu")
        self.timeline: Timeline | None = None
        self.submitted = 0
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=f"cocodiff lane {name}", daemon=True).start()

    def submit(self, work: Work, source: Tensor | Ticket, label: str) -> ThreadTicket:
        promise: Future[Tensor] = Future()
        inference = torch.is_inference_mode_enabled()  # modes are per thread: ours must match the caller's
        begin: Callable[[Tensor], None] | None = getattr(work, "begin", None)

        def early(tensor: Tensor) -> None:
            assert begin is not None
            with torch.inference_mode(inference), torch.set_grad_enabled(False):
                begin(tensor)

        if begin is not None and isinstance(source, Tensor):
            early(source)
        elif begin is not None:
            assert isinstance(source, ThreadTicket)
            source = source.then(early)

        def task() -> None:
            try:
                tensor = source if isinstance(source, Tensor) else source.wait()
                with torch.inference_mode(inference), torch.set_grad_enabled(False):
                    with _span(self, label):
                        result = work(tensor)
                promise.set_result(result)
            except BaseException as error:  # delivered to whoever waits, never lost in a thread
                promise.set_exception(error)

        self.submitted += 1
        self._tasks.put(task)
        return ThreadTicket(promise)

    def catch_up(self) -> None:
        pass  # the work itself holds what it reads and writes

    def close(self) -> None:
        self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            task = None  # or the last tensors sent would live until the next come


class ThreadTicket:
    def __init__(self, promise: Future[Tensor]) -> None:
        self._promise = promise

    def wait(self) -> Tensor:
        return self._promise.result()

    def then(self, what: Callable[[Tensor], None]) -> ThreadTicket:
        """Call with the result as soon as it is there, in the lane's thread. The ticket is of the result after that."""
        after: Future[Tensor] = Future()

        def call(promise: Future[Tensor]) -> None:
            try:
                what(promise.result())
                after.set_result(promise.result())
            except BaseException as error:
                after.set_exception(error)

        self._promise.add_done_callback(call)
        return ThreadTicket(after)


class StreamLane:
    """A lane of accelerator tensors: one side stream, ordered by events; the host never blocks.

    Memory: the result is allocated on the side stream. The allocator may hand it out again to this lane once the
    consumer has dropped it, perhaps while the consumer's kernels still read it. That is safe here because every
    `submit` makes the lane wait for all compute issued so far *before* its work allocates anything.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.timeline: Timeline | None = None
        self.submitted = 0
        self._api = torch.get_device_module(device)
        self._stream = self._api.Stream(device=device, priority=-1)  # ahead of compute: it is short, and others wait

    def submit(self, work: Work, source: Tensor | Ticket, label: str) -> StreamTicket:
        self.submitted += 1
        self._stream.wait_stream(self._api.current_stream(self.device))
        with self._api.stream(self._stream):
            tensor = source if isinstance(source, Tensor) else source.wait()
            with _span(self, label):
                result = work(tensor)
            done = self._stream.record_event()
        return StreamTicket(self._api, self.device, done, result, keep=(tensor, source))

    def catch_up(self) -> None:
        self._api.current_stream(self.device).wait_stream(self._stream)

    def close(self) -> None:
        pass  # a stream needs no end


class StreamTicket:
    """Keeps what the lane reads alive for as long as the ticket itself: drop it only after the *compute* waited.

    A wait of the next lane is no licence to free: compute has not waited yet, and could be given the memory.
    """

    def __init__(self, api: Any, device: torch.device, done: Any, result: Tensor, keep: tuple) -> None:
        self._api, self._device, self._done, self._result, self._keep = api, device, done, result, keep

    def wait(self) -> Tensor:
        # Called under the consumer's stream: the compute stream, or the next lane's.
        self._api.current_stream(self._device).wait_event(self._done)
        return self._result


def _span(lane: Lane, label: str) -> AbstractContextManager[None]:
    return nullcontext() if lane.timeline is None else lane.timeline.span(lane.name, label)


def share_one_lane(device: torch.device) -> bool:
    """Whether all links must share one lane, so that their collectives start in one order on every rank's device.

    NCCL needs one order of all collectives, of whatever communicators and streams. From 2.26 on it keeps that of the
    host if NCCL_LAUNCH_ORDER_IMPLICIT=1 was set before its first communicator; else two streams could start theirs in
    another order on another rank, and both would wait for ever.
    """
    if device.type != "cuda":
        return False
    return torch.cuda.nccl.version()[:2] < (2, 26) or os.environ.get("NCCL_LAUNCH_ORDER_IMPLICIT") != "1"


def make_lane(name: str, device: torch.device) -> Lane:
    """A lane for tensors of `device`: a stream on accelerators, a thread on the CPU."""
    return ThreadLane(name) if device.type == "cpu" else StreamLane(name, device)
