"""How much memory a bench needs, estimated before anything is built, and how much this machine has."""

from __future__ import annotations

from pathlib import Path

import torch

from cocodiff.errors import ConfigError
from cocodiff.launch.job import Job
from cocodiff.models.shapes import Shape
from cocodiff.planner.wanted import meta_transformer

BUILT_BYTES = 4  # of a weight while it is built: random numbers are drawn in float32
ALIVE = 24  # tensors of a block's width that are alive at once, estimated: of the MLP and projections 16, 8 more
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def weight_count(shape: Shape) -> int:
    """Return the number of parameters of the transformer, without memory for them."""
    return sum(parameter.numel() for parameter in meta_transformer(shape).parameters())


def needed_bytes(weights: int, shape: Shape, ranks: int) -> int:
    """Estimate the memory of one host: weights on each of its ranks, and the tokens of one forward.

    Each rank builds the whole transformer; the methods share its weights. One forward is that of `single`, on rank 0,
    or of all ranks with a share of the tokens each.
    """
    forward = (shape.text + shape.image) * shape.width * ALIVE * getattr(torch, shape.dtype).itemsize
    return ranks * weights * BUILT_BYTES + forward


def free_bytes() -> int | None:
    """Return the memory that this process may still have: of the machine, or of its control group if that is less.

    None where the system does not say.
    """
    found = []
    try:
        line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
        most, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if most != "max":
            found.append(int(most) - int(used))
    except (OSError, ValueError, StopIteration):
        pass
    return min(found, default=None)


def check_memory(shape: Shape, job: Job, methods: int) -> None:
    """Raise ConfigError with the numbers if the estimate exceeds what is free, on this host or on its accelerator."""
    weights, ranks = weight_count(shape), job.hosts.count(job.hosts[job.rank])
    where = f"{ranks} rank{'s' if ranks > 1 else ''} on this host"
    refuse_over(needed_bytes(weights, shape, ranks), free_bytes(), where, weights)
    if job.device.type != "cpu":
        device = torch.get_device_module(job.device)
        if hasattr(device, "mem_get_info"):  # each method has its own copy there
            size = methods * getattr(torch, shape.dtype).itemsize
            needed = size * weights + needed_bytes(0, shape, 0)
            refuse_over(needed, device.mem_get_info(job.device)[0], f"{methods} method(s) on {job.device}", weights)


def refuse_over(needed: int, free: int | None, what: str, weights: int) -> None:
    """Raise ConfigError if more is needed than is free."""
    if free is not None and needed > free:
        raise ConfigError(
            f"{what} need about {needed / 1e9:.1f} GB ({weights / 1e9:.2f}e9 weights on each, estimated), and "
            f"{free / 1e9:.1f} GB are free: choose a smaller --scale, or fewer --layers, --tokens or --width."
        )
