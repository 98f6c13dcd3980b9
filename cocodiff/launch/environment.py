"""The machine and the versions that a result belongs to."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cocodiff.launch.job import Job


def environment(job: Job) -> dict[str, Any]:
    """The machine and the versions, for a reader of the result."""
    names = ("cocodiff", "torch", "diffusers")
    return {
        "device": job.device.type,
        "machine": _processor(),
        "ranks": job.world_size,
        "hosts": len(set(job.hosts)),
        "backend": job.backend,
        "threads_per_rank": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.machine()
