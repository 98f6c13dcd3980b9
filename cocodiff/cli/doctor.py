"""`cocodiff doctor`: versions, devices, backends, launcher, cluster, and the reasons for what was chosen."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from json import dumps
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.distributed as dist
import typer

if TYPE_CHECKING:
    from cocodiff.models.shapes import Shape
    from cocodiff.topology import Cluster

PACKAGES = ("cocodiff", "torch", "diffusers", "transformers", "accelerate", "safetensors", "mpi4py", "mpich")


def doctor(json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Say what is installed, what was detected and why. Under a launcher, rank 0 speaks for all ranks."""
    findings, is_main = diagnose()
    if is_main:
        print(render(findings, as_json=json))


def diagnose() -> tuple[dict[str, Any], bool]:
    """Return the findings as JSON values, and whether this rank should print them. Collective under a launcher."""
    from cocodiff.bench.shapes import SHAPES
    from cocodiff.launch.job import start_job
    from cocodiff.models import FAMILIES
    from cocodiff.topology import load_cluster

    job = start_job(None)
    cluster, reason = load_cluster("auto", job.hosts, job.device.type)
    findings = {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "device": {"type": job.device.type, "count": _device_count(job.device), "name": _device_name(job.device)},
        "threads": torch.get_num_threads(),
        "backends": [name for name in ("gloo", "nccl", "xccl", "mpi") if _has_backend(name)],
        "launcher": {
            "name": job.launcher,
            "ranks": job.world_size,
            "hosts": {host: job.hosts.count(host) for host in dict.fromkeys(job.hosts)},
            "backend": job.backend,
            "backend_reason": job.backend_reason,
        },
        "cluster": {
            "reason": reason,
            "levels": [
                {
                    "name": level.name,
                    "size": level.size,
                    "bandwidth_gbs": level.bandwidth_gbs,
                    "latency_us": level.latency_us,
                    "slow": slow,
                }
                for level, slow in zip(cluster.levels, cluster.slow, strict=True)
            ],
            "figures": "assumed, not measured",
        },
        "mesh": {shape.name: _mesh(cluster, shape, job.device) for shape in SHAPES.values()}
        if job.world_size > 1
        else "one rank shares nothing; under your launcher this says how each model would run",
        "pipelines": [name for family in FAMILIES for name in family.pipelines],
        "warnings": _warnings(job.world_size, job.device),
    }
    return findings, job.is_main


def render(findings: dict[str, Any], *, as_json: bool) -> str:
    """Return the findings as JSON or as an indented list."""
    if as_json:
        return dumps(findings, indent=2)
    lines: list[str] = []

    def add(value: Any, depth: int) -> None:
        for name, item in value.items():
            if isinstance(item, dict):
                lines.append(f"{'  ' * depth}{name}")
                add(item, depth + 1)
            elif isinstance(item, list) and item and isinstance(item[0], dict):
                lines.append(f"{'  ' * depth}{name}")
                lines.extend("  " * (depth + 1) + ", ".join(f"{k} {v}" for k, v in part.items()) for part in item)
            else:
                text = ", ".join(map(str, item)) if isinstance(item, list) else item
                lines.append(
                    f"{'  ' * depth}{name:<{max(1, 24 - 2 * depth)}} {text if text not in ('', None) else '-'}"
                )

    add(findings, 0)
    return "\n".join(lines)


def _mesh(cluster: Cluster, shape: Shape, device: torch.device) -> str:
    """Return the degrees that the rule chooses for a model's shape on this cluster, and why."""
    from cocodiff.models import family_named
    from cocodiff.planner import choose_degrees

    family = family_named(shape.family)
    degrees = choose_degrees(cluster, shape.heads, long=family.long and device.type != "xpu")
    return f"{degrees}, for {shape.heads} heads: {degrees.reason}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _has_backend(name: str) -> bool:
    return dist.is_available() and bool(getattr(dist, f"is_{name}_available", lambda: False)())


def _device_count(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.get_device_module(device).device_count()


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return platform.processor() or platform.machine()
    return torch.get_device_module(device).get_device_name(device)


def _warnings(world_size: int, device: torch.device) -> list[str]:
    found = []
    if device.type == "cpu" and world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        found.append("several CPU ranks without OMP_NUM_THREADS: they will compete for cores")
    if _version("mpi4py") is None:
        found.append("mpi4py is missing: under mpiexec set MASTER_ADDR and MASTER_PORT, or pip install 'cocodiff[mpi]'")
    return found
