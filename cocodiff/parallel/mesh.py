"""Ranks -> a mesh of cfg x ring x ulysses, and its process groups. No other file knows group arithmetic.

    rank = (cfg_rank * ring_degree + ring_rank) * ulysses_degree + ulysses_rank

unless a placement says otherwise (`cocodiff.parallel.placement`). So ulysses is innermost: its ranks are neighbours, on
the fastest links. Ring is outside it, cfg outermost. The ranks of one cfg half together hold one sequence (`sequence`:
ring x ulysses, place ring_rank * ulysses_degree + ulysses_rank).

Each group is used by one lane alone, so that collectives of different lanes never queue behind each other; the host
group carries metadata on the CPU.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch.distributed as dist

from cocodiff.launch.job import is_alive
from cocodiff.launch.waits import Waits
from cocodiff.parallel.layout import level_groups, outer_difference, outermost
from cocodiff.parallel.placement import Counts, Placement, axis_groups, default_placement, spread_sizes
from cocodiff.topology import Cluster


@dataclass(frozen=True)
class Degrees:
    """Ranks along each axis, and why so many."""

    cfg: int
    ring: int
    ulysses: int
    reason: str = field(default="as given", compare=False)

    @property
    def counts(self) -> Counts:
        return self.cfg, self.ring, self.ulysses

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
        numbers: of each rank in a cluster of these sizes; None where they are the places on the axis.
    """

    ranks: tuple[int, ...]
    rank: int
    cluster: Cluster
    group: dist.ProcessGroup | None
    numbers: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def level(self) -> int:
        """The outermost level that the axis crosses."""
        return outermost(self.cluster.sizes)

    @cached_property
    def levels(self) -> tuple[int | None, ...]:
        """The level whose link joins this rank to each one; None to itself."""
        numbers, sizes = self.numbers or range(self.size), self.cluster.sizes
        mine = numbers[self.rank]
        return tuple(None if number == mine else outer_difference(mine, number, sizes) for number in numbers)

    @cached_property
    def members(self) -> tuple[int, ...]:
        """Place on the axis -> rank in the group, where torch.distributed has sorted them.

        From torch 2.13 on `new_group(sort_ranks=False)` leaves them in our order: once that is the oldest version that
        we support, this goes.
        """
        ranks = {rank: member for member, rank in enumerate(sorted(self.ranks))}
        return tuple(ranks[rank] for rank in self.ranks)


@dataclass(frozen=True)
class Mesh:
    """The axes of one wrapped pipeline, and what else has groups.

    Attributes:
        cluster: of all ranks, with concrete sizes.
        cfg, ring, ulysses: the axes.
        sequence: the ranks that hold one sequence, ring x ulysses.
        everyone: all ranks.
        level_groups: level in which ulysses has more than one part -> those of its ranks that share all other digits,
            in the order of that one.
        host_group: all ranks, gloo: JSON and random states.
        placement: where it was placed otherwise than by default.
    """

    degrees: Degrees
    cluster: Cluster
    cfg: Axis
    ring: Axis
    ulysses: Axis
    sequence: Axis
    everyone: Axis
    level_groups: Mapping[int, Axis]
    host_group: dist.ProcessGroup
    backend: str
    placement: Placement | None = None

    def __str__(self) -> str:
        places = f"({self.cfg.rank}, {self.ring.rank}, {self.ulysses.rank})"
        placed = "" if self.placement is None else f" placed {self.placement}"
        return f"{self.degrees}{placed}; rank {self.everyone.rank} is {places}"

    @classmethod
    def create(
        cls,
        cluster: Cluster,
        degrees: Degrees,
        backend: str,
        host_group: dist.ProcessGroup,
        placement: Placement | None = None,
    ) -> Mesh:
        """Make every group, in the same order on all ranks. Collective over the default group.

        Raises:
            ConfigError: on all ranks, where the placement is not one of these degrees on this cluster.
        """
        timeout = Waits.read(os.environ).collective  # the guard notices failures; a slow rank may be waited for

        def new_group(name: str, ranks: tuple[int, ...]) -> dist.ProcessGroup:
            return dist.new_group(list(ranks), backend=backend, timeout=timeout)

        mesh = cls.arrange(cluster, degrees, backend, host_group, placement, new_group)
        dist.barrier(group=host_group)  # who frees groups while another still connects to them breaks that one
        return mesh

    @classmethod
    def arrange(
        cls,
        cluster: Cluster,
        degrees: Degrees,
        backend: str,
        host_group: dist.ProcessGroup,
        placement: Placement | None,
        new_group: Callable[[str, tuple[int, ...]], dist.ProcessGroup],
    ) -> Mesh:
        """Arrange the ranks, with groups from `new_group`, which is asked for all of them, of other ranks, too.

        Args:
            new_group: is given the name of the axis, or "level 1", and the ranks in the order of the axis.

        Raises:
            ConfigError: the placement is not one of these degrees on this cluster.
        """
        me, world = host_group.rank(), host_group.size()
        assert cluster.num_ranks == world == math.prod(degrees.counts), (cluster, world, degrees)
        made: dict[tuple[int, ...], dist.ProcessGroup] = {}
        if placement is not None:
            placement.check(cluster.sizes, degrees.counts)
        placed = placement or default_placement(cluster.sizes, degrees.counts)
        slots = None if placed is None else placed.slots
        groups, sizes = axis_groups(degrees.counts, placed), spread_sizes(cluster.sizes, degrees.counts, placed)

        def axis(name: str) -> Axis:
            mine = None
            for ranks in groups[name]:
                if len(ranks) > 1 and ranks not in made:  # the same ranks in another order take a group of their own
                    made[ranks] = new_group(name, ranks)
                if me in ranks:
                    numbers = None if slots is None else _numbers([slots[rank] for rank in ranks])
                    mine = Axis(ranks, ranks.index(me), cluster.with_sizes(sizes[name]), made.get(ranks), numbers)
            assert mine is not None
            return mine

        axes = {name: axis(name) for name in ("everyone", "sequence", "ulysses", "ring", "cfg")}
        levels: dict[int, Axis] = {}
        for level, size in enumerate(sizes["ulysses"]):
            if size == 1:
                continue
            within = cluster.with_sizes(tuple(size if at == level else 1 for at in range(len(cluster.levels))))
            for along in groups["ulysses"]:
                for members in level_groups(sizes["ulysses"], level):
                    ranks = tuple(along[member] for member in members)
                    one = new_group(f"level {level}", ranks)  # another lane's: never shared
                    if me in ranks:
                        levels[level] = Axis(ranks, ranks.index(me), within, one)
        return cls(
            degrees, cluster, **axes, level_groups=levels, host_group=host_group, backend=backend, placement=placement
        )

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
            levels = (axis.group for axis in self.level_groups.values() if axis.group is not None)
            for group in (*mine.values(), *levels):  # in one order on all ranks: nobody waits twice
                if is_alive(group):  # the script may have freed all groups before
                    dist.destroy_process_group(group)


def _numbers(slots: list[int]) -> tuple[int, ...] | None:
    """Slots that differ in some digits -> their numbers in the sizes of these alone; None where those are 0, 1, ..."""
    numbers = {slot: number for number, slot in enumerate(sorted(slots))}
    return None if slots == sorted(slots) else tuple(numbers[slot] for slot in slots)
