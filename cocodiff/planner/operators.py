"""Times a model's own operators on the device at hand, as traces saw them. MEASURED."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cocodiff.planner.functions import Known, Operand
from cocodiff.planner.program import Work

TIMES = 3  # each is run after one run that warms up; the least counts
AT_ONCE_SECONDS = 2e-3  # on an accelerator, so much is launched before the clock is read


def time_operators(known: Known, device: torch.device) -> Mapping[Work, float]:
    """Seconds of each operator that does work, alone on the device.

    Args:
        known: of the traces (`Task.known`).

    Operators with equal FLOPs and bytes count as one; the slowest stands for them.
    """
    found: dict[Work, float] = {}
    with torch.no_grad():
        for (function, args, kwargs), (work, _) in known.operators.items():
            if work is None:
                continue
            given = _made(args, device)
            named = {_value(name, device): _value(one, device) for name, one in kwargs}
            seconds = _time(lambda: function(*given, **named), device)  # noqa: B023 - runs before the next turn
            found[work] = max(found.get(work, 0.0), seconds)
    return found


def _time(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        run()
        return min(_clocked(run) for _ in range(TIMES))
    synchronize = torch.get_device_module(device).synchronize
    run()
    synchronize()
    once = _clocked(lambda: (run(), synchronize()))
    several = max(1, math.ceil(AT_ONCE_SECONDS / max(once, 1e-6)))

    def together() -> None:
        for _ in range(several):
            run()
        synchronize()

    return min(_clocked(together) for _ in range(TIMES)) / several


def _clocked(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _made(values: Any, device: torch.device) -> list[Any]:
    """Arguments again from what was noted of them: tensors of random values, whole numbers 0."""
    return [_value(one, device) for one in values]


def _value(one: Any, device: torch.device) -> Any:
    if isinstance(one, Operand):
        return _tensor(one, device)
    if len(one) == 2 and isinstance(one[0], type):
        kind, value = one
        return device if kind is torch.device else value
    return _made(one, device)


def _tensor(one: Operand, device: torch.device) -> Tensor:
    reach = 1 + sum((size - 1) * stride for size, stride in zip(one.shape, one.stride, strict=True))
    store = torch.zeros(max(reach, 1) if math.prod(one.shape) else 0, dtype=one.dtype, device=device)
    if one.dtype.is_floating_point:
        store.normal_()
    return store.as_strided(one.shape, one.stride)
