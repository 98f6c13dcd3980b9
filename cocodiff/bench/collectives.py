"""Times exchanges by size, ours (flat, staged) and torch.distributed's, and fits latency and bandwidth of each level.

Bandwidths are defined as in nccl-tests. In an all-to-all each rank sends `bytes`, its own part included: the algorithm
bandwidth is bytes / seconds, and the bus bandwidth is that times (ranks - 1) / ranks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from cocodiff.bench.links import connect_all
from cocodiff.bench.methods import synchronize
from cocodiff.errors import ConfigError
from cocodiff.exchange.connected import ConnectedMesh
from cocodiff.launch.agree import gather_json
from cocodiff.launch.environment import environment
from cocodiff.launch.job import Job
from cocodiff.parallel.layout import Traffic
from cocodiff.parallel.mesh import Mesh
from cocodiff.topology import Cluster, Measured

SCHEMA = "cocodiff-collectives/1"
IN_A_ROW = 4  # exchanges between two barriers, whose own time is left out of what one takes
SIZES = tuple(4096 * 4**power for power in range(8))  # 4 KB to 64 MB


def run_collectives(
    job: Job, cluster: str, largest: int, repeat: int, patience: float, say: Callable[[str], None]
) -> tuple[dict[str, Any], Cluster]:
    """Time every exchange at every size, all exchanges in turn within one round. Collective.

    Args:
        largest: the largest message, in bytes a rank.
        repeat: timings of each exchange and size, after one that warms up.
        patience: stop after the first size at which one exchange takes longer than this many seconds.
        say: gets a line of progress.

    Returns:
        The result as JSON values (docs/bench.md has the schema), and the cluster with the measured figures.
    """
    if job.world_size == 1 or job.host_group is None:
        raise ConfigError("one rank has nothing to exchange: start the bench under a launcher, or with --ranks.")
    session, connected = connect_all(job, cluster)
    mesh, device, shape = connected.mesh, job.device, session.cluster
    names = [shape.levels[level].name for level in mesh.level_groups]
    rows: list[dict[str, Any]] = []
    for size in (size for size in SIZES if size <= largest):
        runs = {
            f"level {name}": _level(connected, level, size, device)
            for level, name in zip(mesh.level_groups, names, strict=True)
        }
        runs |= {name: _ours(connected, name, size, device) for name in ("flat", "staged")}
        runs["torch"] = _theirs(mesh, size, device)
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for index in range(repeat + 1):
            for name, run in runs.items():
                seconds = _slowest(run, job)
                if index:  # the first warms up
                    taken[name].append(seconds)
        rows += [_row(name, size, seconds, job.world_size) for name, seconds in taken.items()]
        say(f"{size} bytes a rank")
        if max(statistics.median(seconds) for seconds in taken.values()) > patience:
            break
    measured = with_measurements(mesh, rows, guessed=cluster == "auto")
    session.close()
    return {"schema": SCHEMA, "environment": environment(job), "rows": rows}, measured


def time_levels(
    connected: ConnectedMesh, sizes: Sequence[int], repeat: int, patience: float, job: Job
) -> dict[int, list[tuple[float, float]]]:
    """Median seconds of an all-to-all among the parts of each level, all groups of it at once, by bytes a rank.

    Args:
        patience: no larger size follows one that took longer. Collective.
    """
    found: dict[int, list[tuple[float, float]]] = {}
    for level in connected.mesh.level_groups:
        found[level] = []
        for size in sizes:
            run = _in_a_row(_level(connected, level, size, job.device))
            _slowest(run, job)  # warms up
            found[level].append((size, statistics.median(_slowest(run, job) for _ in range(repeat)) / IN_A_ROW))
            if found[level][-1][1] > patience:
                break
    return found


def _in_a_row(run: Callable[[], Any]) -> Callable[[], None]:
    def several() -> None:
        for _ in range(IN_A_ROW):
            run()

    return several


def _slowest(run: Callable[[], Any], job: Job) -> float:
    """Return the seconds that `run` takes on the slowest rank."""
    synchronize(job)
    began = time.perf_counter()
    run()
    if job.device.type != "cpu":
        torch.get_device_module(job.device).synchronize()
    assert job.host_group is not None
    return max(gather_json(time.perf_counter() - began, job.host_group))


def _ours(connected: ConnectedMesh, exchange: str, size: int, device: torch.device) -> Callable[[], Any]:
    ranks = connected.ulysses.size
    traffic = Traffic((1,) * ranks, (1,) * ranks, 1, size // 4 // ranks, True)
    send = torch.ones(traffic.head_dim * ranks, device=device)
    return lambda: connected.exchanges[exchange].start(send, traffic, "bench").wait()


def _theirs(mesh: Mesh, size: int, device: torch.device) -> Callable[[], Any]:
    ranks = mesh.ulysses.size
    send = torch.ones(size // 4 // ranks * ranks, device=device)
    recv = torch.empty_like(send)
    return lambda: dist.all_to_all_single(recv, send, group=mesh.ulysses.group)


def _level(connected: ConnectedMesh, level: int, size: int, device: torch.device) -> Callable[[], Any]:
    transport = connected.levels[level]
    splits = [size // 4 // transport.size] * transport.size
    send = torch.ones(sum(splits), device=device)
    return lambda: transport.all_to_all(send, splits, splits, send.dtype, "bench").wait()


def _row(name: str, size: int, seconds: Sequence[float], ranks: int) -> dict[str, Any]:
    median = statistics.median(seconds)
    algorithm = size / median / 1e9
    return {
        "exchange": name,
        "bytes": size,
        "seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
        "algbw_gbs": algorithm,
        "busbw_gbs": algorithm * (ranks - 1) / ranks,
    }


def with_measurements(mesh: Mesh, rows: Sequence[dict[str, Any]], guessed: bool) -> Cluster:
    """Return the mesh's cluster with the fitted latency and bandwidth of each level and the times of the exchanges.

    Args:
        guessed: the cluster was detected, so its levels outside the innermost are slow by assumption. With measured
            figures `slow` becomes None, which lets these decide.
    """

    def points(name: str) -> tuple[tuple[float, float], ...]:
        return tuple((row["bytes"], row["seconds"]["median"]) for row in rows if row["exchange"] == name)

    levels = list(mesh.cluster.levels)
    for level in mesh.level_groups:
        size = mesh.cluster.sizes[level]
        alpha, beta = fit(points(f"level {levels[level].name}"), size)
        slow = None if guessed and level > 0 else levels[level].slow
        levels[level] = replace(levels[level], latency_us=alpha * 1e6, bandwidth_gbs=beta / 1e9, slow=slow)
    measured = Measured(mesh.ulysses.size, points("flat"), points("staged"))
    return replace(mesh.cluster, levels=tuple(levels), measured=measured)


def fit(points: Sequence[tuple[float, float]], size: int) -> tuple[float, float]:
    """Fit alpha (seconds a message) and beta (bytes per second of a rank) of an all-to-all among `size` parts.

    They minimise the squared relative error of the model `(size - 1) * (alpha + bytes / size / beta)`.

    >>> alpha, beta = fit([(1000, 3 * (1.0 + 250 / 10)), (100000, 3 * (1.0 + 25000 / 10))], 4)
    >>> round(alpha, 6), round(beta, 6)
    (1.0, 10.0)
    """
    messages = [(total / size, seconds / (size - 1)) for total, seconds in points]
    weights = [1 / seconds**2 for _, seconds in messages]
    sw = sum(weights)
    sx = sum(w * x for w, (x, _) in zip(weights, messages, strict=True))
    sy = sum(w * y for w, (_, y) in zip(weights, messages, strict=True))
    sxx = sum(w * x * x for w, (x, _) in zip(weights, messages, strict=True))
    sxy = sum(w * x * y for w, (x, y) in zip(weights, messages, strict=True))
    determinant = sw * sxx - sx * sx
    slope = (sw * sxy - sx * sy) / determinant if determinant > 0 else 0.0
    slope = max(slope, 1e-15)
    return max((sy - slope * sx) / sw, 1e-7), 1 / slope


def collectives_table(result: dict[str, Any], cluster: Cluster) -> str:
    """Return a Markdown table with a row for each size: times and bus bandwidths, and the choice of `auto`."""
    names = list(dict.fromkeys(row["exchange"] for row in result["rows"]))
    cell = {(row["exchange"], row["bytes"]): row for row in result["rows"]}
    lines = [
        "| bytes a rank | "
        + " | ".join(f"{name}: ms (least, most), busbw GB/s" for name in names)
        + " | flat / staged | auto |",
        "|---" * (len(names) + 3) + "|",
    ]
    for size in dict.fromkeys(row["bytes"] for row in result["rows"]):
        cells = []
        for name in names:
            row = cell[name, size]
            low, middle, high = (row["seconds"][key] * 1e3 for key in ("min", "median", "max"))
            cells.append(f"{middle:.2f} ({low:.2f}, {high:.2f}), {row['busbw_gbs']:.4f}")
        ratio = cell["flat", size]["seconds"]["median"] / cell["staged", size]["seconds"]["median"]
        choice = min(("flat", "staged"), key=lambda name: cluster.seconds(name, size))
        lines.append(f"| {size} | {' | '.join(cells)} | {ratio:.2f} | {choice} |")
    return "\n".join(lines)
