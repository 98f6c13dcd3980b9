"""Measures links: the bytes that the system's interfaces count, and the payload rate that a link carries."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from cocodiff.config import Config
from cocodiff.exchange.connected import ConnectedMesh
from cocodiff.launch.agree import gather_json
from cocodiff.launch.job import Job
from cocodiff.parallel.mesh import Degrees
from cocodiff.plan import RunPlan
from cocodiff.state import Session
from cocodiff.topology import load_cluster

GOODPUT_BYTES = 1_000_000, 16_000_000  # least and most through one link; between them, what it carries in:
GOODPUT_SECONDS = 5.0


def interface_bytes(counters: str = "/proc/self/net/dev") -> int | None:
    """Return the bytes that this host's interfaces, except the loopback, ever sent; None if the system has no counters.

    If the host is a node or a network namespace, these are the bytes that crossed its links, with some of the headers.
    """
    try:
        lines = Path(counters).read_text().splitlines()[2:]
    except OSError:
        return None
    fields = [line.replace(":", " ").split() for line in lines]
    return sum(int(field[9]) for field in fields if field[0] != "lo")


def inner_ranks(sizes: tuple[int, ...], level: int) -> int:
    """Return the number of ranks in one part of a level; they share the part's link."""
    return math.prod(sizes[:level])


def busiest_links(sent: list[list[int]], sizes: tuple[int, ...]) -> list[int]:
    """Return the bytes out through the busiest link of each level, from `sent[rank][level]`.

    Messages of outer levels cross inner links, too.

    >>> busiest_links([[1, 10], [1, 10], [1, 10], [1, 10]], (2, 2))
    [11, 20]
    """
    busiest = []
    for level in range(len(sizes)):
        together = inner_ranks(sizes, level)
        parts = [sent[start : start + together] for start in range(0, len(sent), together)]
        busiest.append(max(sum(sum(rank[level:]) for rank in part) for part in parts))
    return busiest


def connect_all(job: Job, cluster: str) -> tuple[Session, ConnectedMesh]:
    """Return a session over all ranks with one ulysses axis for all of them; the caller closes it. Collective."""
    shape, _ = load_cluster(cluster, job.hosts, job.device.type)
    plan = RunPlan(Degrees(1, 1, job.world_size))
    session = Session(replace(job, shared=True), Config(cluster=cluster), shape, lambda model: plan)
    return session, session.connect(plan)


def goodput(connected: ConnectedMesh, level: int, device: torch.device) -> float:
    """Return the MEASURED bytes per second out of one part of a level, while each part sends to all others evenly.

    Two sizes are sent, one twice the other, and the rate is that of the difference, so that it contains neither the
    burst of a token bucket nor latency. Median of three. Collective.
    """
    transport, sizes, host_group = connected.levels[level], connected.mesh.cluster.sizes, connected.mesh.host_group
    peers, together = sizes[level] - 1, inner_ranks(sizes, level)
    least, most = GOODPUT_BYTES
    rate = connected.mesh.cluster.levels[level].bandwidth_gbs * 1e9 * together
    total = int(min(max(rate * GOODPUT_SECONDS, least), most))
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(3):
        for halves in seconds:
            numel = total * halves // 2 // (4 * peers * together)
            splits = [0 if peer == transport.rank else numel for peer in range(sizes[level])]
            send = torch.ones(sum(splits), device=device)
            dist.barrier(group=host_group)
            began = time.perf_counter()
            transport.all_to_all(send, splits, splits, send.dtype, "goodput").wait()
            if device.type != "cpu":
                torch.get_device_module(device).synchronize()
            seconds[halves].append(max(gather_json(time.perf_counter() - began, host_group)))
    difference = statistics.median(seconds[2]) - statistics.median(seconds[1])
    return total / 2 / max(difference, 1e-9)
