"""Lanes, transports and groups that send nothing and write down what one rank would do, on the meta device.

The real code runs over them: attention, blocks, lanes' order and exchanges are those of a real run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cocodiff.exchange.transport import Prepare, Transport
from cocodiff.observe.timeline import Timeline
from cocodiff.planner.program import Compute, Send, Step, Wait, Work, joined_work

# An operator with its arguments and keyword arguments, as `Operand`s and values -> its work, and what it makes.
Known = dict[Any, tuple[Work | None, list["Operand"]]]


@dataclass(frozen=True)
class Operand:
    """What is known of a tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Operand:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


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
        known: operators that were seen before, kept from one recorder to the next.
    """

    def __init__(self, known: Known) -> None:
        self.known, self.sends = known, 0
        self._steps: list[Step] = []
        self._work: list[Work] = []  # of the stretch of compute that runs
        self._lane_work: list[Work] | None = None  # of the lane's work that runs
        self._sent: tuple[str, str, tuple[int, ...]] | None = None
        self._labels: list[str] = []
        self._alive_bytes = self.peak_bytes = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While inside, write down the operators that run."""
        with _Attention(self), _Operators(self):
            yield

    def operator(self, work: Work) -> None:
        (self._work if self._lane_work is None else self._lane_work).append(work)

    def made(self, tensor: Tensor) -> None:
        """Count a new tensor's memory for as long as it is there."""
        storage = tensor.untyped_storage()
        self._alive_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._alive_bytes)
        weakref.finalize(storage, self._freed, storage.nbytes()).atexit = False

    def _freed(self, count: int) -> None:
        self._alive_bytes -= count

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


class _Attention(TorchFunctionMode):
    """Attention is one operator, as fused kernels have it, not the parts that it has on the meta device."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = _arguments(*args, **(kwargs or {}))
        (batch, heads, rows, head_dim), keys = query.shape, key.shape[2]
        flops = 4.0 * batch * heads * rows * keys * head_dim
        elements = 2 * query.numel() + key.numel() + value.numel()
        work = Work("attention", flops, float(elements * query.itemsize))
        out = query.new_empty(batch, heads, rows, value.shape[-1])
        self._recorder.known[func, _described(args), _described(tuple((kwargs or {}).items()))] = (
            work,
            [Operand.of(out)],
        )
        self._recorder.operator(work)
        return out


def _arguments(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query, key, value


class _Operators(TorchDispatchMode):
    """Hears of every operator. One that was seen before with such inputs is not run again: blocks are much alike, and
    most operators of the meta device are slow Python.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if any(one.alias_info is not None for one in func._schema.returns):  # a view, or written in place
            out = func(*args, **kwargs)
            if any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.returns):
                self._note(_work_of(func, args, kwargs, out))
            return out
        key = func, _described(args), _described(tuple(kwargs.items()))
        if key in self._recorder.known:
            work, made = self._recorder.known[key]
            out = tuple(one.empty() for one in made)
            out = out if len(out) > 1 else out[0]
        else:
            out = func(*args, **kwargs)
            work, tensors = _work_of(func, args, kwargs, out), _tensors((out,))
            single = isinstance(out, Tensor) or (isinstance(out, tuple) and len(out) == len(tensors) > 1)
            if single and all(x.device.type == "meta" for x in tensors):
                self._recorder.known[key] = work, [Operand.of(x) for x in tensors]
        self._note(work)
        for tensor in _tensors((out,)):
            self._recorder.made(tensor)
        return out

    def _note(self, work: Work | None) -> None:
        if work is not None:
            self._recorder.operator(work)


def _described(value: Any) -> Any:
    """What decides the shape of an operator's result, hashable."""
    if isinstance(value, Tensor):
        return Operand.of(value)
    if isinstance(value, (list, tuple)):
        return tuple(_described(one) for one in value)
    return type(value), value  # 1 and 1.0 and True are equal


_NO_WORK = (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten._unsafe_view)


def _work_of(func: Any, args: tuple, kwargs: dict, out: Any) -> Work | None:
    """The operator's FLOPs and bytes; None where it does nothing."""
    inputs = _tensors(args) + _tensors(tuple(kwargs.values()))
    outputs = _tensors((out,))
    moved = sum(x.numel() * x.itemsize for x in inputs + outputs)
    if not outputs or func.overloadpacket in _NO_WORK:
        return None
    count = flop_registry.get(func.overloadpacket)
    if count is None:
        return Work("other", 0.0, float(moved))
    return Work("matmul", float(count(*args, **kwargs, out_val=out)), float(moved))


def _tensors(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found
