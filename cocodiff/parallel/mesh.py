"""Ranks -> a mesh of cfg x ring x ulysses, and its process groups. No other file knows group arithmetic.

    rank = (cfg_rank * ring_degree + ring_rank) * ulysses_degree + ulysses_rank

Ulysses is innermost: its ranks are neighbours, on the fastest links. Ring is outside it, cfg outermost. The ranks of
one cfg half together hold one sequence (`sequence`: ring x ulysses).

Each group is used by one lane alone, so that collectives of different lanes never queue behind each other; the host
group carries metadata on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch.distributed as dist

from cocodiff.launch.job import is_alive
from cocodiff.launch.waits import Waits
from cocodiff.parallel.layout import axis_sizes, level_groups, outermost
from cocodiff.topology import Cluster


@dataclass(frozen=True)
class Degrees:
    """Ranks along each axis, and why so many."""

    cfg: int
    ring: int
    ulysses: int
    reason: str = field(default="as given", compare=False)

    def __str__(self) -> str:
        return f"cfg {self.cfg} x ring {self.ring} x ulysses {self.ulysses}"


@dataclass(frozen=True)
class Axis:
    """The ranks that this rank meets along one axis.

    Attributes:
        ranks: of the run, in the order of the axis.
        rank: this one's place among them.
        cluster: the levels, with the sizes that the axis has in them.
        group: of these ranks; None for one rank alone.
    """

    ranks: tuple[int, ...]
    rank: int
    cluster: Cluster
    group: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def level(self) -> int:
        """The outermost level that the axis crosses."""
        return outermost(self.cluster.sizes)


@dataclass(frozen=True)
class Mesh:
    """The axes of one wrapped pipeline, and what else has groups.

    Attributes:
        cluster: of all ranks, with concrete sizes.
        cfg, ring, ulysses: the axes.
        sequence: the ranks that hold one sequence, ring x ulysses.
        everyone: all ranks.
        level_groups: level in which ulysses has more than one part -> the group that shares all other digits.
        host_group: all ranks, gloo: JSON and random states.
    """

    degrees: Degrees
    cluster: Cluster
    cfg: Axis
    ring: Axis
    ulysses: Axis
    sequence: Axis
    everyone: Axis
    level_groups: Mapping[int, dist.ProcessGroup]
    host_group: dist.ProcessGroup
    backend: str

    def __str__(self) -> str:
        places = f"({self.cfg.rank}, {self.ring.rank}, {self.ulysses.rank})"
        return f"{self.degrees}; rank {self.everyone.rank} is {places}"

    @classmethod
    def create(cls, cluster: Cluster, degrees: Degrees, backend: str, host_group: dist.ProcessGroup) -> Mesh:
        """Make every group, in the same order on all ranks. Collective over the default group."""
        me, world = host_group.rank(), host_group.size()
        assert cluster.num_ranks == world == degrees.cfg * degrees.ring * degrees.ulysses, (cluster, world, degrees)
        made: dict[tuple[int, ...], dist.ProcessGroup] = {}
        timeout = Waits.read(os.environ).collective  # the guard notices failures; a slow rank may be waited for

        def group(ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
            if len(ranks) > 1 and ranks not in made:
                made[ranks] = dist.new_group(list(ranks), backend=backend, timeout=timeout)
            return made.get(ranks)

        def axis(stride: int, size: int) -> Axis:
            mine = None
            for ranks in _along(world, stride, size):
                one = group(ranks)
                if me in ranks:
                    mine = Axis(
                        ranks, ranks.index(me), cluster.with_sizes(axis_sizes(cluster.sizes, stride, size)), one
                    )
            assert mine is not None
            return mine

        sequence = degrees.ring * degrees.ulysses
        axes = dict(
            everyone=axis(1, world),
            sequence=axis(1, sequence),
            ulysses=axis(1, degrees.ulysses),
            ring=axis(degrees.ulysses, degrees.ring),
            cfg=axis(sequence, degrees.cfg),
        )
        levels: dict[int, dist.ProcessGroup] = {}
        sizes = axes["ulysses"].cluster.sizes
        for level, size in enumerate(sizes):
            if size == 1:
                continue
            for first in range(0, world, degrees.ulysses):
                for members in level_groups(sizes, level):
                    ranks = tuple(first + member for member in members)
                    one = dist.new_group(list(ranks), backend=backend, timeout=timeout)  # another lane's: never shared
                    if me in ranks:
                        levels[level] = one
        dist.barrier(group=host_group)  # who frees groups while another still connects to them breaks that one
        return cls(degrees, cluster, **axes, level_groups=levels, host_group=host_group, backend=backend)

    def close(self, together: bool = False) -> None:
        """Free this mesh's own groups (not the host group).

        Gloo's are freed by each rank for itself. NCCL's wait for their other ranks: those that close alone leave them
        until the process ends. So do all with XCCL, whose communicators no call frees (torch-xpu-ops#5071).

        Args:
            together: all ranks close this mesh now, and no work that some of them lack is under way.
        """
        if self.backend == "gloo" or (self.backend == "nccl" and together):
            axes = (self.everyone, self.sequence, self.ulysses, self.ring, self.cfg)
            mine = {axis.ranks: axis.group for axis in axes if axis.group is not None}
            for group in (*mine.values(), *self.level_groups.values()):  # in one order on all ranks: nobody waits twice
                if is_alive(group):  # the script may have freed all groups before
                    dist.destroy_process_group(group)


def _along(world: int, stride: int, size: int) -> Iterator[tuple[int, ...]]:
    """Every group of an axis, by its lowest rank."""
    for start in range(world):
        if start // stride % size == 0:
            yield tuple(range(start, start + stride * size, stride))
