"""Which rank of the mesh is where in the cluster: pure numbers, no communication.

A *slot* is a place in the cluster: it has the digits of its number in the cluster's sizes (`layout.digits`). A
placement spreads the three axes over the levels: each digit of a slot is cut again, ulysses innermost, then ring, then
cfg, and the place on an axis is what its parts of all digits make, innermost level first.

With sizes (2 gpus, 2 nodes), ring 2 x ulysses 2 can be placed in two ways: ulysses over the gpus of a node and ring
over the nodes, or the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from cocodiff.errors import ConfigError
from cocodiff.parallel.layout import axis_sizes, digits

Counts = tuple[int, int, int]  # of cfg, ring and ulysses


@dataclass(frozen=True)
class Placement:
    """How the axes of a mesh are spread over the levels of a cluster, and which rank has which slot.

    Attributes:
        cfg, ring, ulysses: ranks of the axis along each level, innermost level first. Along a level the three make as
            many as it has parts; over all levels one axis makes its degree.
        order: slot -> rank, a permutation of all ranks; None where each slot has the rank of its number.

    Raises:
        ConfigError: the axes have different numbers of levels, or `order` is no permutation of the ranks.
    """

    cfg: tuple[int, ...]
    ring: tuple[int, ...]
    ulysses: tuple[int, ...]
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        axes = self.cfg, self.ring, self.ulysses
        if (
            not self.cfg
            or len({len(axis) for axis in axes}) > 1
            or any(not isinstance(count, int) or count < 1 for axis in axes for count in axis)
        ):
            raise ConfigError(
                f"placement {self}: each axis takes one whole number of at least 1 for each level of the cluster, "
                "innermost first."
            )
        ranks = math.prod(self.sizes)
        if self.order is not None and sorted(self.order) != list(range(ranks)):
            raise ConfigError(
                f"placement {self}: order must name each rank from 0 to {ranks - 1} once, as [rank of slot 0, rank of "
                f"slot 1, ...], but has {len(self.order)} entries, {len(set(self.order))} of them different, the "
                f"largest {max(self.order, default=None)}."
            )

    def __str__(self) -> str:
        spread = " x ".join(
            f"{name} {'.'.join(map(str, counts))}"
            for name, counts in (("cfg", self.cfg), ("ring", self.ring), ("ulysses", self.ulysses))
        )
        return spread if self.order is None else f"{spread} in the order {' '.join(map(str, self.order))}"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the levels of the cluster that it fits."""
        return tuple(math.prod(counts) for counts in zip(self.cfg, self.ring, self.ulysses, strict=True))

    @property
    def degrees(self) -> Counts:
        """Ranks along each axis."""
        return math.prod(self.cfg), math.prod(self.ring), math.prod(self.ulysses)

    @property
    def slots(self) -> tuple[int, ...]:
        """Rank -> slot."""
        ranks = range(math.prod(self.sizes))
        return tuple(ranks) if self.order is None else tuple(sorted(ranks, key=self.order.__getitem__))

    def coordinates(self, slot: int) -> Counts:
        """The places on the cfg, ring and ulysses axes of a slot.

        >>> [Placement((1, 1), (2, 1), (1, 2)).coordinates(slot) for slot in range(4)]
        [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]
        """
        places, strides = [0, 0, 0], [1, 1, 1]
        for level, digit in enumerate(digits(slot, self.sizes)):
            for axis, counts in ((2, self.ulysses), (1, self.ring), (0, self.cfg)):
                digit, part = divmod(digit, counts[level])
                places[axis] += part * strides[axis]
                strides[axis] *= counts[level]
        return places[0], places[1], places[2]

    def slot(self, cfg: int, ring: int, ulysses: int) -> int:
        """The slot of these places on the axes.

        >>> Placement((1, 1), (2, 1), (1, 2)).slot(0, ring=1, ulysses=0)
        1
        """
        slot, stride = 0, 1
        for level in range(len(self.cfg)):
            ulysses, inner = divmod(ulysses, self.ulysses[level])
            ring, middle = divmod(ring, self.ring[level])
            cfg, outer = divmod(cfg, self.cfg[level])
            digit = (outer * self.ring[level] + middle) * self.ulysses[level] + inner
            slot += digit * stride
            stride *= self.cfg[level] * self.ring[level] * self.ulysses[level]
        return slot

    def check(self, sizes: tuple[int, ...], degrees: Counts) -> None:
        """Raise ConfigError unless this places a mesh of these degrees on a cluster of these sizes."""
        if self.sizes != sizes:
            raise ConfigError(
                f"placement {self}: it fills levels of {' x '.join(map(str, self.sizes))} parts, innermost first, but "
                f"the cluster has {' x '.join(map(str, sizes))}: along each level cfg x ring x ulysses must make its "
                "parts. Let cocodiff plan for this cluster, or leave the placement out."
            )
        if self.degrees != degrees:
            wanted, made = (
                " x ".join(f"{name} {count}" for name, count in zip(("cfg", "ring", "ulysses"), counts, strict=True))
                for counts in (degrees, self.degrees)
            )
            raise ConfigError(
                f"placement {self}: it makes {made} of a mesh that is {wanted}: over all levels the counts of an axis "
                "must multiply to its degree. Let cocodiff plan for these degrees, or leave the placement out."
            )


def placements(sizes: tuple[int, ...], degrees: Counts) -> Iterator[Placement]:
    """Every way to spread the axes over the levels, each once; `default_placement` first, where there is one.

    >>> [str(one) for one in placements((2, 2), (1, 2, 2))]
    ['cfg 1.1 x ring 1.2 x ulysses 2.1', 'cfg 1.1 x ring 2.1 x ulysses 1.2']
    """

    def spread(level: int, left: Counts) -> Iterator[tuple[Counts, ...]]:
        if level == len(sizes):
            if left == (1, 1, 1):
                yield ()
            return
        for ulysses in _divisors(math.gcd(left[2], sizes[level])):
            for ring in _divisors(math.gcd(left[1], sizes[level] // ulysses)):
                cfg = sizes[level] // ulysses // ring
                if left[0] % cfg == 0:
                    here = cfg, ring, ulysses
                    for outside in spread(level + 1, (left[0] // cfg, left[1] // ring, left[2] // ulysses)):
                        yield here, *outside

    for levels in spread(0, degrees):
        cfg, ring, ulysses = zip(*levels, strict=True)
        yield Placement(cfg, ring, ulysses)


def default_placement(sizes: tuple[int, ...], degrees: Counts) -> Placement | None:
    """The placement without one: rank = (cfg_rank * ring_degree + ring_rank) * ulysses_degree + ulysses_rank.

    None where an axis does not fit the levels, because some of its groups begin or end inside a part of one.

    >>> str(default_placement((2, 6, 4), (1, 4, 12))), default_placement((2, 3), (1, 2, 3))
    ('cfg 1.1.1 x ring 1.1.4 x ulysses 2.6.1', None)
    """
    cfg, ring, ulysses = (axis_sizes(sizes, *axis) for axis in _strides(degrees))
    made = tuple(math.prod(counts) for counts in zip(cfg, ring, ulysses, strict=True))
    return Placement(cfg, ring, ulysses) if made == sizes else None


def spread_sizes(sizes: tuple[int, ...], degrees: Counts, placement: Placement | None) -> dict[str, tuple[int, ...]]:
    """The sizes that each axis has in the levels of the cluster, by its name (`sequence`: ring x ulysses).

    >>> spread_sizes((2, 2), (1, 2, 2), None)["ring"], spread_sizes((3, 2), (1, 3, 2), None)["ulysses"]
    ((1, 2), (1, 2))
    """
    if placement is None:
        cfg, ring, ulysses = (axis_sizes(sizes, *axis) for axis in _strides(degrees))
        sequence = axis_sizes(sizes, 1, degrees[1] * degrees[2])
    else:
        cfg, ring, ulysses = placement.cfg, placement.ring, placement.ulysses
        sequence = tuple(outer * inner for outer, inner in zip(ring, ulysses, strict=True))
    return {"everyone": sizes, "sequence": sequence, "ulysses": ulysses, "ring": ring, "cfg": cfg}


def coordinates(rank: int, degrees: Counts, placement: Placement | None) -> Counts:
    """The places of a rank of the run on the cfg, ring and ulysses axes."""
    if placement is not None:
        return placement.coordinates(rank if placement.order is None else placement.order.index(rank))
    outer, ulysses = divmod(rank, degrees[2])
    return *divmod(outer, degrees[1]), ulysses


def axis_groups(degrees: Counts, placement: Placement | None) -> dict[str, list[tuple[int, ...]]]:
    """All groups of ranks of each axis, by its name; a group in the order of its axis, the groups by lowest rank.

    >>> axis_groups((1, 2, 2), Placement((1, 1), (2, 1), (1, 2)))["ulysses"]
    [(0, 2), (1, 3)]
    """

    def rank(cfg: int, ring: int, ulysses: int) -> int:
        if placement is None:
            return (cfg * degrees[1] + ring) * degrees[2] + ulysses
        slot = placement.slot(cfg, ring, ulysses)
        return slot if placement.order is None else placement.order[slot]

    cfgs, rings, inners = (range(degree) for degree in degrees)
    groups = {
        "everyone": [tuple(range(math.prod(degrees)))],
        "sequence": [tuple(rank(c, r, u) for r in rings for u in inners) for c in cfgs],
        "ulysses": [tuple(rank(c, r, u) for u in inners) for c in cfgs for r in rings],
        "ring": [tuple(rank(c, r, u) for r in rings) for c in cfgs for u in inners],
        "cfg": [tuple(rank(c, r, u) for c in cfgs) for r in rings for u in inners],
    }
    return {name: sorted(several, key=min) for name, several in groups.items()}


def _strides(degrees: Counts) -> tuple[tuple[int, int], ...]:
    """Without a placement: ranks from one to the next along the cfg, ring and ulysses axes, and how many there are."""
    cfg, ring, ulysses = degrees
    return (ring * ulysses, cfg), (ulysses, ring), (1, ulysses)


def _divisors(number: int) -> list[int]:
    """From the largest to 1."""
    return [divisor for divisor in range(number, 0, -1) if number % divisor == 0]
