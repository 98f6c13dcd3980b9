"""A device for each rank, played on one machine: operators take the time that they took alone, asleep.

Ranks that share two cores hide what a mesh costs: one that waits for a link leaves its core to the others, which then
compute faster than any device would. Here every operator is timed once, alone on the machine, and is from then on a
sleep of that length whose result is memory without values. All else is real: the code, lanes, messages and links.
"""

from __future__ import annotations

import fcntl
import hashlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TIMES = 3  # an operator is timed; the least counts
LEAST_SLEEP = 3e-4  # shorter debts are kept for the next operator
MOST_BEHIND = 2e-3  # by so much a device may be behind its clock and catch up; more means that it waited for something


class PlayedDevice(TorchDispatchMode):
    """While it is entered, this thread's operators are played.

    Args:
        folder: shared by all ranks; what an operator takes is written there once, so that it is the same for all.
        slower: multiplies all times.
    """

    def __init__(self, folder: Path, slower: float = 1.0) -> None:
        super().__init__()
        self._folder, self._slower = folder, slower
        self._known: dict[Any, tuple[float, list[tuple[Any, Any, Any]], bool]] = {}
        self._until = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if any(one.alias_info is not None for one in func._schema.returns):  # a view, or written in place
            return func(*args, **kwargs)
        key = str(func), _described(args), _described(tuple(kwargs.items()))
        if key not in self._known:
            out = func(*args, **kwargs)
            several = isinstance(out, tuple)
            made = list(out) if several else [out]
            if not all(isinstance(one, Tensor) and one.is_floating_point() and one.is_cpu for one in made):
                return out  # whole numbers are checked by what runs; the planner's traces are on the meta device
            seconds = self._alone(repr(key), lambda: func(*args, **kwargs))
            self._known[key] = seconds, [(one.shape, one.stride(), one.dtype) for one in made], several
        seconds, made, several = self._known[key]
        results = tuple(torch.empty_strided(size, stride, dtype=dtype) for size, stride, dtype in made)
        self._sleep(seconds * self._slower)
        return results if several else results[0]

    def _sleep(self, seconds: float) -> None:
        now = time.perf_counter()
        self._until = (self._until if now - self._until < MOST_BEHIND else now) + seconds
        if self._until - now > LEAST_SLEEP:
            time.sleep(self._until - now)

    def _alone(self, key: str, run: Any) -> float:
        """The seconds of an operator while no other rank times one."""
        name = self._folder / hashlib.sha256(key.encode()).hexdigest()
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not name.exists():
                taken = []
                for _ in range(TIMES):
                    began = time.perf_counter()
                    run()
                    taken.append(time.perf_counter() - began)
                name.write_text(str(min(taken)))
            return float(name.read_text())


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), str(value.dtype), str(value.device)
    if isinstance(value, (list, tuple)):
        return tuple(_described(one) for one in value)
    return type(value).__name__, value
