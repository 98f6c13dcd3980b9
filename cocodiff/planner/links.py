"""The links of a cluster, and which of them messages cross.

Every part of a switched level sends and receives through a link of its own, which its ranks share: the GPU through its
fabric ports, the node through its NICs. A message crosses the link of the outermost level in which its two ends differ.

Levels of wiring "line" or "ring" that follow each other are the dimensions of one mesh or torus. Each of its nodes has
a link to the next and one to the one before along every dimension. A message goes from node to node, innermost
dimension first, the shorter way around a ring, and half of it each way where both are as long.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cocodiff.topology import Cluster

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Links:
    """The links of one cluster with concrete sizes, numbered level by level.

    Attributes:
        capacity: bytes a second of each link, `(links,)`. Of each level first those out of the parts, or up to the
            next node, then those into the parts, or down to the node before.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._levels, self._sizes, world = cluster.levels, cluster.sizes, cluster.num_ranks
        self._inner = [math.prod(self._sizes[:level]) for level in range(len(self._sizes))]
        self._digit = np.stack(
            [np.arange(world) // inner % size for inner, size in zip(self._inner, self._sizes, strict=True)]
        )
        # The first level of the torus that a level is a dimension of; of a switched level itself.
        self._base: list[int] = []
        for at, level in enumerate(self._levels):
            goes_on = at > 0 and level.wired and self._levels[at - 1].wired
            self._base.append(self._base[-1] if goes_on else at)
        self._node = [self._inner[base] for base in self._base]  # ranks that share a link of the level
        self._count = [world // ranks for ranks in self._node]
        self._first = np.concatenate([[0], np.cumsum([2 * count for count in self._count])])
        capacity = []
        for level, count, ranks in zip(self._levels, self._count, self._node, strict=True):
            of_part = np.full(count, level.bandwidth_gbs)
            for part, gbs in level.part_gbs:
                of_part[part] = gbs
            capacity += [of_part * 1e9 * (1 if level.wired else ranks)] * 2
        self.capacity: Floats = np.concatenate(capacity)

    def send(self, sent: Floats, here: Ints, peer: Ints, weight: Floats) -> tuple[set[int], float]:
        """Add the bytes of messages between ranks that differ to `sent`, `(links,)`.

        Returns:
            The outermost levels that messages cross, and the latency in seconds of the slowest message.
        """
        differ = self._digit[:, here] != self._digit[:, peer]
        outer = len(differ) - 1 - np.argmax(differ[::-1], axis=0)
        latency = np.zeros(len(here))
        for at, level in enumerate(self._levels):
            if level.wired:
                mine = differ[at] & (np.take(self._base, outer) == self._base[at])
            else:
                mine = (outer >= at) if level.on_the_way else (outer == at)
            if not mine.any():
                continue
            if level.wired:
                hops = self._along(sent, at, here[mine], peer[mine], weight[mine])
                latency[mine] += level.latency_us * 1e-6 * hops
            else:
                np.add.at(sent, self._first[at] + here[mine] // self._node[at], weight[mine])
                np.add.at(sent, self._first[at] + self._count[at] + peer[mine] // self._node[at], weight[mine])
                latency[outer == at] = level.latency_us * 1e-6
        return set(outer.tolist()), float(latency.max())

    def _along(self, sent: Floats, at: int, here: Ints, peer: Ints, weight: Floats) -> Ints:
        """Add what messages send along one dimension; their hops."""
        size, stride, start = self._sizes[at], self._inner[at] // self._node[at], self._digit[at, here]
        node = here // self._node[at]
        for done in range(self._base[at], at):  # dimensions along which they have come to their peers
            node += (self._digit[done, peer] - self._digit[done, here]) * (self._inner[done] // self._node[at])
        ahead = self._digit[at, peer] - start
        if self._levels[at].wiring == "ring":
            ahead %= size
            hops = np.minimum(ahead, size - ahead)
            up = np.where(2 * ahead == size, 0.5, 2.0 * ahead < size)
        else:
            hops, up = abs(ahead), np.where(ahead > 0, 1.0, 0.0)
        for step in range(int(hops.max())):
            on = hops > step
            for sign, first, share in ((1, 0, up), (-1, self._count[at], 1 - up)):
                moved = (start + sign * step) % size - start
                np.add.at(sent, self._first[at] + first + (node + moved * stride)[on], (weight * share)[on])
        return hops
