"""What a transfer of all ranks puts on each link of a cluster: who shares what, before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cocodiff.parallel.layout import level_groups, outermost
from cocodiff.parallel.mesh import Degrees
from cocodiff.parallel.placement import Placement, axis_groups, default_placement, spread_sizes
from cocodiff.planner.links import Links
from cocodiff.planner.program import Send
from cocodiff.topology import Cluster

Seconds = NDArray[np.float64]  # of each link


@dataclass(frozen=True)
class Flow:
    """What one transfer of all ranks needs.

    Attributes:
        latency_seconds: before the first byte has arrived.
        seconds: on each link, alone and at its full bandwidth; shape `(links,)`.
        sent_bytes: by one rank, the busiest.
        efficiency: the share of the bandwidth that it reaches.
    """

    latency_seconds: float
    seconds: Seconds
    sent_bytes: float
    efficiency: float = 1.0


class Fabric:
    """The links of one cluster under one mesh.

    Args:
        cluster: with concrete sizes.
        placement: of the mesh; None for the default one.
    """

    def __init__(self, cluster: Cluster, degrees: Degrees, placement: Placement | None) -> None:
        self._cluster = cluster
        sizes, world = cluster.sizes, cluster.num_ranks
        placed = placement or default_placement(sizes, degrees.counts)
        self._groups = {name: np.array(groups) for name, groups in axis_groups(degrees.counts, placed).items()}
        self._groups["alone"] = np.arange(world)[:, None]
        self._spread = spread_sizes(sizes, degrees.counts, placed)
        self._links = Links(cluster)
        self.capacity = self._links.capacity

    @property
    def num_links(self) -> int:
        return len(self.capacity)

    def flow(self, send: Send) -> Flow:
        """What a send of all ranks at once needs: each sends the ranks of its group what rank 0 sends those of its."""
        return self._flow(send.axis, send.pattern, send.bytes_to)

    def level(self, axis: str) -> int:
        """The level whose lane carries what is sent along an axis."""
        if axis.startswith("level "):
            return int(axis.removeprefix("level "))
        return 0 if axis == "alone" else outermost(self._spread[axis])

    def route(self, here: int, peer: int) -> tuple[tuple[int, ...], float]:
        """The links from one rank to another, and the seconds of latency."""
        crossed = np.zeros(self.num_links)
        _, latency = self._links.send(crossed, np.array([here]), np.array([peer]), np.ones(1))
        return tuple(np.flatnonzero(crossed).tolist()), latency

    def crossed(self, axis: str) -> int:
        """How many levels an axis crosses."""
        return sum(size > 1 for size in self._spread[axis])

    def groups(self, axis: str) -> NDArray[np.int64]:
        """All groups of an axis, `(groups, places)`."""
        if axis not in self._groups:
            along = self._groups["ulysses"]
            members = np.array(level_groups(self._spread["ulysses"], self.level(axis)))
            self._groups[axis] = along[:, members].reshape(-1, members.shape[1])
        return self._groups[axis]

    @lru_cache(maxsize=4096)  # noqa: B019 - lives as long as the fabric, which is dropped with its search
    def _flow(self, axis: str, pattern: str, bytes_to: tuple[int, ...]) -> Flow:
        groups = self.groups(axis)
        size = groups.shape[1]
        sent = np.zeros(self.num_links)
        levels: set[int] = set()
        own, latency = 0.0, 0.0
        distances = range(1, size) if pattern == "all_to_all" else range(1, min(size, 2))
        for distance in distances:
            there = np.roll(groups, -distance, axis=1)
            if pattern == "all_to_all":
                amounts = np.roll(np.array(bytes_to, dtype=float), -distance)
            else:
                amounts = np.full(size, float(bytes_to[0]))
            if not amounts.any():
                continue
            own += amounts[0]
            here, peer, weight = groups.ravel(), there.ravel(), np.tile(amounts, len(groups))
            crossed, slowest = self._links.send(sent, here, peer, weight)
            levels, latency = levels | crossed, max(latency, slowest)
        if not levels:
            return Flow(0.0, np.zeros(self.num_links), 0.0)
        efficiency = self._cluster.flat_share(levels) if pattern == "all_to_all" else 1.0
        return Flow(latency, sent / self.capacity, own, efficiency)


def telling(flows: Sequence[Flow]) -> NDArray[np.bool_]:
    """The links that can ever hold one of these transfers back: of links that are used alike one, of others the busier.

    >>> flows = [Flow(0, np.array([1.0, 1.0, 0.5]), 1), Flow(0, np.array([2.0, 2.0, 0.5]), 1)]
    >>> telling(flows).tolist()
    [True, False, False]
    """
    use = np.stack([flow.seconds for flow in flows])
    digits = np.round(use / max(use.max(), 1e-30), 9)
    _, first = np.unique(digits, axis=1, return_index=True)
    kept = np.zeros(use.shape[1], dtype=bool)
    for link in first:
        others = digits[:, [other for other in first if other != link]]
        kept[link] = not np.any(np.all(others >= digits[:, [link]], axis=0))
    return kept
