"""The links of a cluster, and what a transfer puts on each: who shares what, before anything is timed.

Every part of a level sends and receives through a link of its own, which its ranks share: the GPU through its fabric
ports, the node through its NICs. A message crosses the link of the outermost level in which its two ends differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cocodiff.parallel.layout import level_groups, outermost
from cocodiff.parallel.mesh import Degrees
from cocodiff.parallel.placement import Placement, axis_groups, default_placement, spread_sizes
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
        peers_in_turn: a rank's messages of one exchange leave one after the other, each with its latency (gloo), not
            together (NCCL, XCCL).
    """

    def __init__(self, cluster: Cluster, degrees: Degrees, placement: Placement | None, peers_in_turn: bool) -> None:
        self._cluster, self._in_turn = cluster, peers_in_turn
        sizes, world = cluster.sizes, cluster.num_ranks
        placed = placement or default_placement(sizes, degrees.counts)
        self._groups = {name: np.array(groups) for name, groups in axis_groups(degrees.counts, placed).items()}
        self._groups["alone"] = np.arange(world)[:, None]
        self._spread = spread_sizes(sizes, degrees.counts, placed)
        inner = [math.prod(sizes[:level]) for level in range(len(sizes))]
        self._unit = np.stack([np.arange(world) // one for one in inner])  # (levels, ranks): whose link
        parts = [world // one for one in inner]
        self._first = np.concatenate([[0], np.cumsum([2 * count for count in parts])])  # out, then in, of each level
        capacity = []
        for level, count, ranks in zip(cluster.levels, parts, inner, strict=True):
            of_part = np.full(count, level.bandwidth_gbs)
            for part, gbs in level.part_gbs:
                of_part[part] = gbs
            capacity += [of_part * 1e9 * ranks] * 2  # out and in
        self._capacity = np.concatenate(capacity)

    @property
    def num_links(self) -> int:
        return len(self._capacity)

    def flow(self, send: Send) -> Flow:
        """What a send of all ranks at once needs: each sends the ranks of its group what rank 0 sends those of its."""
        return self._flow(send.axis, send.pattern, send.bytes_to)

    def level(self, axis: str) -> int:
        """The level whose lane carries what is sent along an axis."""
        if axis.startswith("level "):
            return int(axis.removeprefix("level "))
        return 0 if axis == "alone" else outermost(self._spread[axis])

    def _crossings(self, level: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        """Each level, and which messages cross its links, from the outermost level of each message."""
        for one, described in enumerate(self._cluster.levels):
            mine = (level >= one) if described.on_the_way else (level == one)
            if mine.any():
                yield one, mine

    def crossed(self, axis: str) -> int:
        """How many levels an axis crosses."""
        return sum(size > 1 for size in self._spread[axis])

    def _of(self, axis: str) -> NDArray[np.int64]:
        """All groups of an axis, `(groups, places)`."""
        if axis not in self._groups:
            along = self._groups["ulysses"]
            members = np.array(level_groups(self._spread["ulysses"], self.level(axis)))
            self._groups[axis] = along[:, members].reshape(-1, members.shape[1])
        return self._groups[axis]

    @lru_cache(maxsize=4096)  # noqa: B019 - lives as long as the fabric, which is dropped with its search
    def _flow(self, axis: str, pattern: str, bytes_to: tuple[int, ...]) -> Flow:
        groups = self._of(axis)
        size = groups.shape[1]
        sent = np.zeros(self.num_links)
        levels, messages, own = set(), 0, 0.0
        distances = range(1, size) if pattern == "all_to_all" else range(1, min(size, 2))
        for distance in distances:
            there = np.roll(groups, -distance, axis=1)
            if pattern == "all_to_all":
                amounts = np.roll(np.array(bytes_to, dtype=float), -distance)
            else:
                amounts = np.full(size, float(bytes_to[0]))
            if not amounts.any():
                continue
            messages += 1
            own += amounts[0]
            here, peer, weight = groups.ravel(), there.ravel(), np.tile(amounts, len(groups))
            level = _outer_level(self._unit, here, peer)
            levels |= set(level.tolist())
            for one, mine in self._crossings(level):
                count = (self._first[one + 1] - self._first[one]) // 2
                np.add.at(sent, self._first[one] + self._unit[one][here[mine]], weight[mine])
                np.add.at(sent, self._first[one] + count + self._unit[one][peer[mine]], weight[mine])
        if not levels:
            return Flow(0.0, np.zeros(self.num_links), 0.0)
        latency = max(self._cluster.levels[level].latency_us for level in levels) * 1e-6
        if self._in_turn:
            latency *= messages
        several = pattern == "all_to_all" and len(levels) > 1
        efficiency = self._cluster.flat_efficiency if several else 1.0
        return Flow(latency, sent / self._capacity, own, efficiency)


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


def _outer_level(unit: NDArray[np.int64], here: NDArray[np.int64], peer: NDArray[np.int64]) -> NDArray[np.int64]:
    """The outermost level in which two ranks differ."""
    differ = unit[:, here] != unit[:, peer]
    return differ.shape[0] - 1 - np.argmax(differ[::-1], axis=0)
