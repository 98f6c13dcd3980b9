"""Ranks -> a mesh of cfg x ring x ulysses, and its process groups. No other file knows group arithmetic.

    rank = (cfg_rank * ring_degree + ring_rank) * ulysses_degree + ulysses_rank

Ulysses is innermost: its ranks are neighbours, on the fastest links. Ring is outside it, cfg outermost. The ranks of
one cfg half together hold one sequence (`sequence`: ring x ulysses).

Each group is used by one lane alone, so that collectives of different lanes never queue behind each other; the host
group carries metadata on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch.distributed as dist

from cocodiff.errors import ConfigError
from cocodiff.parallel.layout import axis_sizes, digits, level_groups
from cocodiff.topology import Cluster


@dataclass(frozen=True)
class Degrees:
    """Ranks along each axis, and why so many."""

    cfg: int
    ring: int
    ulysses: int
    reason: str = "as given"

    def __str__(self) -> str:
        return f"cfg {self.cfg} x ring {self.ring} x ulysses {self.ulysses}"


def choose_degrees(
    cluster: Cluster,
    heads: int,
    cfg: int | None = None,
    ring: int | None = None,
    ulysses: int | None = None,
    *,
    long: bool = False,
    selective: bool = False,
) -> Degrees:
    """The degrees that were given, and for those left out (None) one rule.

    cfg is 1. Of all ring x ulysses that the heads allow, the one that sends the fewest bytes through the outermost
    level that the ranks of a sequence cross; of equals (two nodes) ring for long sequences, ulysses for others.

    Args:
        cluster: with concrete sizes.
        heads: the fewest that an attention of the model has; ulysses cannot be larger.
        long: the family attends to so many tokens that keys and values hide under attention to those that are here.
        selective: transmission is. Keys and values alone are then better, for the same bytes, by so much (MEASURED,
            docs/selective.md) that they may be half as many again: rings over two and three nodes.

    Raises:
        ConfigError: with the numbers, where no mesh has these degrees.

    >>> from cocodiff.topology import Level
    >>> aurora = Cluster("a", (Level("tile", 2, 100, 1), Level("gpu", 6, 20, 1), Level("node", 8, 2, 1)))
    >>> str(choose_degrees(aurora, heads=24))
    'cfg 1 x ring 4 x ulysses 24'
    """
    ranks = cluster.num_ranks
    given = {"cfg_degree": cfg, "ring_degree": ring, "ulysses_degree": ulysses}
    said = " x ".join(f"{name} {degree}" for name, degree in given.items() if degree is not None)
    cfg = cfg or 1
    if cfg > 2:
        raise ConfigError(f"cfg_degree={cfg}: guidance has two branches, so 1 or 2.")
    possible = []
    for inner in range(1, ranks // cfg + 1):
        outer = ranks // cfg // inner
        if cfg * outer * inner == ranks and ring in (None, outer) and ulysses in (None, inner):
            possible.append((outer, inner))
    if not possible:
        raise ConfigError(
            f"{said} on {ranks} ranks: the degrees must multiply to the number of ranks. "
            "Leave one out, or start as many ranks as they make."
        )
    legal = [(outer, inner) for outer, inner in possible if inner <= heads]
    if not legal:
        raise ConfigError(
            f"{heads} attention heads cannot be shared among {min(inner for _, inner in possible)} ranks of the "
            f"ulysses axis: every rank needs one. Use ulysses_degree={heads} or less, with a ring_degree beyond."
        )
    level = outermost(axis_sizes(cluster.sizes, 1, ranks // cfg))
    prefer_ring = (long or selective) and level > 0
    weight = 2 / 3 if selective else 1.0

    def cost(pair: tuple[int, int]) -> tuple[float, int]:
        outer, inner = pair
        return outward_bytes(cluster, level, outer, inner, weight), -outer if prefer_ring else outer

    best = min(legal, key=cost)
    if len(legal) == 1:
        reason = "as given" if said else "the only ones"
    else:
        reason = f"the fewest bytes through the level {cluster.levels[level].name!r}"
    return Degrees(cfg, *best, reason)


def outward_bytes(cluster: Cluster, level: int, ring: int, ulysses: int, ring_weight: float = 1.0) -> float:
    """What a layer sends through a level, the outermost it crosses, as a multiple of one rank's shard of one tensor.

    Four tensors cross the ulysses axis, each to `ulysses` ranks in equal parts; K and V of every other part are passed
    on, whole, to the next rank of the ring axis. The mean of all ranks.

    Args:
        ring_weight: of a byte along the ring axis.
    """
    sizes, ranks, total = cluster.sizes, ring * ulysses, 0.0
    for rank in range(ranks):
        node = digits(rank, sizes)[level]
        first = rank - rank % ulysses
        away_ulysses = sum(digits(first + other, sizes)[level] != node for other in range(ulysses))
        away_ring = (ring - 1) * (digits((rank + ulysses) % ranks, sizes)[level] != node)
        total += 4 * away_ulysses / ulysses + 2 * away_ring * ring_weight
    return round(total / ranks, 6)


def outermost(sizes: tuple[int, ...]) -> int:
    """The outermost level that has more than one part; 0 if none has."""
    return max((level for level, size in enumerate(sizes) if size > 1), default=0)


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

        def group(ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
            if len(ranks) > 1 and ranks not in made:
                made[ranks] = dist.new_group(list(ranks), backend=backend)
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
                    one = dist.new_group(list(ranks), backend=backend)  # never shared: it is another lane's
                    if me in ranks:
                        levels[level] = one
        dist.barrier(group=host_group)  # who frees groups while another still connects to them breaks that one
        return cls(degrees, cluster, **axes, level_groups=levels, host_group=host_group, backend=backend)

    def close(self) -> None:
        """Free this mesh's own groups (not the host group). Collective."""
        if self.backend == "gloo":  # others free theirs at exit: destroying subgroups is known to crash some
            axes = (self.everyone, self.sequence, self.ulysses, self.ring, self.cfg)
            mine = {axis.ranks: axis.group for axis in axes if axis.group is not None}
            for group in (*mine.values(), *self.level_groups.values()):
                dist.destroy_process_group(group)


def _along(world: int, stride: int, size: int) -> Iterator[tuple[int, ...]]:
    """Every group of an axis, by its lowest rank."""
    for start in range(world):
        if start // stride % size == 0:
            yield tuple(range(start, start + stride * size, stride))
