"""What torch's functions do on the meta device: their work, and the tensors that they make.

A function that was called before with such arguments is not run again: blocks are much alike, and on the meta device
most operators are slow Python. Views and what is written in place are run, without hearing of their operators.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cocodiff.planner.program import Work


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
class Called:
    """What a function did.

    Attributes:
        work: of its operators, in order.
        made: the new tensors that it returned; None where it returned something else, and is to be run again.
        more_bytes: the most memory that it took at once.
    """

    work: tuple[Work, ...]
    made: tuple[Operand, ...] | None
    more_bytes: int


@dataclass(frozen=True)
class Known:
    """Functions and operators that were called, by their arguments.

    Attributes:
        operators: an operator with its arguments and keyword arguments, as `Operand`s and values -> its work, and what
            it makes.
    """

    operators: dict[Any, tuple[Work | None, list[Operand]]] = field(default_factory=dict)
    called: dict[Any, Called] = field(default_factory=dict)


class _Alive(weakref.ref):
    """Of a storage, to hear when it goes."""

    count: int


class Memory:
    """Bytes of tensors, for as long as they are there.

    Attributes:
        alive_bytes: now.
        peak_bytes: the most at once.
    """

    def __init__(self) -> None:
        self.alive_bytes = self.peak_bytes = 0
        self._storages: set[_Alive] = set()

    def made(self, tensor: Tensor) -> None:
        """Count a new tensor."""
        storage = tensor.untyped_storage()
        alive = _Alive(storage, self._freed)
        alive.count = storage.nbytes()
        self._storages.add(alive)
        self.alive_bytes += alive.count
        self.took(0)

    def took(self, count: int) -> None:
        """So many bytes more were there for a while."""
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes + count)

    def _freed(self, alive: _Alive) -> None:
        self._storages.discard(alive)
        self.alive_bytes -= alive.count

    @contextmanager
    def more(self) -> Iterator[Callable[[], int]]:
        """While inside, count anew; the function that this gives says how many bytes came at the most."""
        before, peak = self.alive_bytes, self.peak_bytes
        self.peak_bytes = before
        try:
            yield lambda: self.peak_bytes - before
        finally:
            self.peak_bytes = max(self.peak_bytes, peak)


# Functions that make and compute nothing, whatever their arguments.
_PLAIN = {
    *(Tensor.numel, Tensor.size, Tensor.stride, Tensor.dim, Tensor.is_contiguous, Tensor.element_size),
    *(Tensor.view, Tensor.transpose, Tensor.unsqueeze, Tensor.split, Tensor.chunk, Tensor.unflatten, Tensor.unbind),
}
_GETTER = type(Tensor.shape.__get__)  # type: ignore[attr-defined] # `x.shape` calls a function, too


class Functions(TorchFunctionMode):
    """While inside, hears of every function of torch that is called.

    Attention is one operator, as fused kernels have it, not the parts that it has on the meta device.

    Args:
        operator: gets the work of each operator.
    """

    def __init__(self, known: Known, operator: Callable[[Work], None], memory: Memory) -> None:
        super().__init__()
        self._known, self._operator, self._memory = known, operator, memory

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if type(func) is _GETTER or func in _PLAIN:
            return func(*args, **kwargs)
        key = func, _brief(args), _brief(tuple(kwargs.items()))
        called = self._known.called.get(key)
        if called is None:
            return self._first(key, func, args, kwargs)
        for work in called.work:
            self._operator(work)
        if called.made is None:
            return func(*args, **kwargs)
        self._memory.took(called.more_bytes)
        made = tuple(one.empty() for one in called.made)
        for tensor in made:
            self._memory.made(tensor)
        return made if len(made) > 1 else made[0]

    def _first(self, key: Any, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run a function and hear of its operators; keep what it did, where that answers the next call."""
        heard = _Operators(self._known.operators, self._memory)
        with self._memory.more() as more:
            if func is F.scaled_dot_product_attention:
                out = heard.attention(func, args, kwargs)
            else:
                with heard:
                    out = func(*args, **kwargs)
            made = _made(_tensors((*args, *kwargs.values())), out)
            if made is not None or not more():
                self._known.called[key] = Called(tuple(heard.work), made, more())
        for work in heard.work:
            self._operator(work)
        return out


class _Operators(TorchDispatchMode):
    """Hears of the operators of one function. One that was seen before with such inputs is not run again."""

    def __init__(self, known: dict[Any, tuple[Work | None, list[Operand]]], memory: Memory) -> None:
        super().__init__()
        self._known, self._memory = known, memory
        self.work: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        # A view, or written in place; this one does not say that it is a view.
        if any(one.alias_info is not None for one in func._schema.returns) or func.overloadpacket is _VIEW:
            out = func(*args, **kwargs)
            if any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.returns):
                self._note(_work_of(func, args, kwargs, out))
            return out
        key = func, _described(args), _described(tuple(kwargs.items()))
        if key in self._known:
            work, made = self._known[key]
            out = tuple(one.empty() for one in made)
            out = out if len(out) > 1 else out[0]
        else:
            out = func(*args, **kwargs)
            work, tensors = _work_of(func, args, kwargs, out), _tensors((out,))
            single = isinstance(out, Tensor) or (isinstance(out, tuple) and len(out) == len(tensors) > 1)
            if single and all(x.device.type == "meta" for x in tensors):
                self._known[key] = work, [Operand.of(x) for x in tensors]
        self._note(work)
        for tensor in _tensors((out,)):
            self._memory.made(tensor)
        return out

    def attention(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        query, key, value = _arguments(*args, **kwargs)
        (batch, heads, rows, head_dim), keys = query.shape, key.shape[2]
        flops = 4.0 * batch * heads * rows * keys * head_dim
        elements = 2 * query.numel() + key.numel() + value.numel()
        work = Work("attention", flops, float(elements * query.itemsize))
        out = query.new_empty(batch, heads, rows, value.shape[-1])
        self._known[func, _described(args), _described(tuple(kwargs.items()))] = work, [Operand.of(out)]
        self._note(work)
        self._memory.made(out)
        return out

    def _note(self, work: Work | None) -> None:
        if work is not None:
            self.work.append(work)


def _arguments(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query, key, value


def _made(given: list[Tensor], out: Any) -> tuple[Operand, ...] | None:
    """The tensors that a function returned, if each is new, whole and without values."""
    tensors = (out,) if isinstance(out, Tensor) else out
    if type(tensors) is not tuple or not tensors or not all(isinstance(x, Tensor) and x.is_meta for x in tensors):
        return None
    if isinstance(out, tuple) and len(out) == 1:
        return None
    others = [x.untyped_storage() for x in given]
    for x in tensors:
        storage = x.untyped_storage()
        if any(storage is other for other in others) or x.storage_offset():
            return None
        if storage.nbytes() != Operand.of(x).empty().untyped_storage().nbytes():
            return None
        others.append(storage)
    return tuple(Operand.of(x) for x in tensors)


def _brief(value: Any) -> Any:
    """What decides what a function does, hashable and quickly made."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, (list, tuple)):
        return tuple([_brief(one) for one in value])
    if isinstance(value, slice):
        return slice, value.start, value.stop, value.step
    return type(value), value  # 1 and 1.0 and True are equal


def _described(value: Any) -> Any:
    """What decides the shape of an operator's result, hashable."""
    if isinstance(value, Tensor):
        return Operand.of(value)
    if isinstance(value, (list, tuple)):
        return tuple(_described(one) for one in value)
    return type(value), value  # 1 and 1.0 and True are equal


_VIEW = torch.ops.aten._unsafe_view
_NO_WORK = (torch.ops.aten.empty, torch.ops.aten.new_empty)


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
