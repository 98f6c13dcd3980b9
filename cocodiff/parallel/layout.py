"""Who holds which tokens and heads, and the plan of a staged exchange: pure numbers, no communication.

Terms: a *block* is what one rank (source) has for one rank (destination). Its size is an outer product,
`source[src] * destination[dst] * unit` elements: towards head shards the sources count tokens and the destinations
heads, on the way back the reverse. So every rank can compute every size, and no sizes are ever sent.

A rank's *digits* are its coordinates in the cluster, innermost level first: with sizes (2, 6, 4), rank 17 is tile 1
of GPU 2 of node 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate


def split_sizes(total: int, parts: int, *, larger_last: bool = False) -> tuple[int, ...]:
    """Cut `total` into `parts` sizes that differ by at most one.

    >>> split_sizes(7, 3), split_sizes(7, 3, larger_last=True)
    ((3, 2, 2), (2, 2, 3))
    """
    base, extra = divmod(total, parts)
    sizes = (base + 1,) * extra + (base,) * (parts - extra)
    return sizes[::-1] if larger_last else sizes


@dataclass(frozen=True)
class Layout:
    """Tokens (`seq_lens`) and heads (`num_heads`) of each rank, on either side of an exchange."""

    seq_lens: tuple[int, ...]
    num_heads: tuple[int, ...]

    def pieces(self, rank: int, count: int) -> list[tuple[slice, Layout]]:
        """Cut every rank's tokens into `count` pieces: this rank's rows of a piece, and the piece's layout.

        >>> [rows for rows, _ in Layout((4, 5), (1, 1)).pieces(rank=1, count=2)]
        [slice(0, 3, None), slice(3, 5, None)]
        """
        cuts = [split_sizes(length, count) for length in self.seq_lens]
        pieces, start = [], 0
        for lengths in zip(*cuts, strict=True):
            pieces.append((slice(start, start + lengths[rank]), Layout(lengths, self.num_heads)))
            start += lengths[rank]
        return pieces

    def order(self, count: int) -> list[tuple[int, slice]]:
        """How all tokens lie after an exchange in so many pieces: whose rows, and which of theirs.

        >>> Layout((1, 3), (1, 1)).order(2)
        [(0, slice(0, 1, None)), (1, slice(0, 2, None)), (0, slice(1, 1, None)), (1, slice(2, 3, None))]
        """
        cuts = [list(accumulate(split_sizes(length, count), initial=0)) for length in self.seq_lens]
        return [(rank, slice(*cut[piece : piece + 2])) for piece in range(count) for rank, cut in enumerate(cuts)]


@dataclass(frozen=True)
class Traffic:
    """Sizes of all blocks of one exchange. A block is rows (its tokens x batch) of a width (its heads x head_dim)."""

    source: tuple[int, ...]
    destination: tuple[int, ...]
    batch: int
    head_dim: int
    to_heads: bool  # sources count tokens and destinations heads; else the reverse

    def block(self, src: int, dst: int) -> int:
        """Its elements."""
        return self.source[src] * self.destination[dst] * self.batch * self.head_dim

    def shape(self, src: int, dst: int) -> tuple[int, int]:
        """Its rows and their width."""
        tokens, heads = self.source[src], self.destination[dst]
        if not self.to_heads:
            tokens, heads = heads, tokens
        return tokens * self.batch, heads * self.head_dim


def to_heads_traffic(layout: Layout, batch: int, head_dim: int) -> Traffic:
    return Traffic(layout.seq_lens, layout.num_heads, batch, head_dim, True)


def to_sequence_traffic(layout: Layout, batch: int, head_dim: int) -> Traffic:
    return Traffic(layout.num_heads, layout.seq_lens, batch, head_dim, False)


def digits(rank: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Coordinates of a rank, innermost level first.

    >>> digits(17, (2, 6, 4))
    (1, 2, 1)
    """
    out = []
    for size in sizes:
        rank, digit = divmod(rank, size)
        out.append(digit)
    return tuple(out)


def level_groups(sizes: Sequence[int], level: int) -> list[tuple[int, ...]]:
    """Ranks that differ in the digit of `level` alone, one tuple per group, ordered by that digit.

    >>> level_groups((2, 2), 0), level_groups((2, 2), 1)
    ([(0, 1), (2, 3)], [(0, 2), (1, 3)])
    """
    stride = 1
    for size in sizes[:level]:
        stride *= size
    world = stride
    for size in sizes[level:]:
        world *= size
    starts = [rank for rank in range(world) if rank // stride % sizes[level] == 0]
    return [tuple(start + digit * stride for digit in range(sizes[level])) for start in starts]


def outer_difference(rank: int, other: int, sizes: Sequence[int]) -> int:
    """The level whose link a message between two different ranks crosses: the outermost digit that differs.

    >>> outer_difference(0, 1, (2, 2)), outer_difference(0, 3, (2, 2))
    (0, 1)
    """
    pairs = zip(digits(rank, sizes), digits(other, sizes), strict=True)
    return max(level for level, (mine, theirs) in enumerate(pairs) if mine != theirs)


def axis_sizes(sizes: tuple[int, ...], stride: int, size: int) -> tuple[int, ...]:
    """The sizes, level by level, of an axis of a mesh: `size` ranks, each `stride` ranks after the one before.

    Where an axis does not fit the levels (some of its groups begin or end inside a part) all of it counts at the
    outermost level that one of them crosses.

    >>> axis_sizes((2, 6, 4), 1, 12), axis_sizes((2, 6, 4), 12, 4), axis_sizes((3, 2), 1, 2)
    ((2, 6, 1), (1, 1, 4), (1, 2))
    """
    end, inner, found = stride * size, 1, []
    bounds = {stride, end}
    for parts in sizes:
        outer = inner * parts
        found.append(max(1, min(end, outer) // max(stride, inner)))
        bounds.add(outer)
        inner = outer
    ordered = sorted(bounds)
    if size == 1 or all(larger % smaller == 0 for smaller, larger in zip(ordered, ordered[1:], strict=False)):
        return tuple(found)
    starts = [rank for rank in range(inner) if rank // stride % size == 0]
    crossed = max(outer_difference(start, start + (size - 1) * stride, sizes) for start in starts)
    return tuple(size if level == crossed else 1 for level in range(len(sizes)))


def outermost(sizes: tuple[int, ...]) -> int:
    """The outermost level that has more than one part; 0 if none has."""
    return max((level for level, size in enumerate(sizes) if size > 1), default=0)


@dataclass(frozen=True)
class Stage:
    """One all-to-all inside one group of one level.

    `gather` lists the slices (start, length) of the buffer at hand that make up the send buffer, in order; None where
    the buffer is the send buffer already. Splits are in elements, one per member of the group.
    """

    level: int
    gather: tuple[tuple[int, int], ...] | None
    send_splits: tuple[int, ...]
    recv_splits: tuple[int, ...]


def staged_order(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Destinations in the order in which the first stage wants their blocks: by innermost active digit, then rank.

    >>> staged_order((2, 2))
    (0, 2, 1, 3)
    """
    world = 1
    for size in sizes:
        world *= size
    active = [level for level, size in enumerate(sizes) if size > 1]
    if not active:
        return tuple(range(world))
    return tuple(sorted(range(world), key=lambda rank: (digits(rank, sizes)[active[0]], rank)))


@lru_cache(maxsize=4096)
def staged_plan(traffic: Traffic, sizes: tuple[int, ...], rank: int) -> tuple[Stage, ...]:
    """The paper's topology-staged all-to-all (CoCoDiff, arXiv 2604.14561) for any number of levels.

    Stage by stage from the inside, every block moves to the member of the group whose digit is its destination's.
    Before stage i a rank holds the blocks of all sources that share its digits i and beyond, for all destinations that
    share its digits before i. Buffers are ordered by source, then destination, so after the last stage the blocks for
    this rank lie in source order. Levels of size one take no stage.
    """
    world, active = len(traffic.source), [level for level, size in enumerate(sizes) if size > 1]
    coordinates = [digits(other, sizes) for other in range(world)]

    def held(member: int, stage: int) -> list[int]:
        fixed = active[stage:]
        return [s for s in range(world) if all(coordinates[s][i] == coordinates[member][i] for i in fixed)]

    def wanted(member: int, stage: int) -> list[int]:
        fixed = active[:stage]
        return [d for d in range(world) if all(coordinates[d][i] == coordinates[member][i] for i in fixed)]

    stages: list[Stage] = []
    for index, level in enumerate(active):
        members = next(group for group in level_groups(sizes, level) if rank in group)
        sources, destinations = held(rank, index), wanted(rank, index)
        offsets, start = {}, 0
        for src in sources:
            for dst in destinations:
                offsets[src, dst] = start
                start += traffic.block(src, dst)
        gather, send_splits = [], []
        for digit in range(sizes[level]):
            mine = [(s, d) for s in sources for d in destinations if coordinates[d][level] == digit]
            gather += [(offsets[pair], traffic.block(*pair)) for pair in mine]
            send_splits.append(sum(traffic.block(*pair) for pair in mine))
        remaining = wanted(rank, index + 1)
        recv_splits = [sum(traffic.block(s, d) for s in held(m, index) for d in remaining) for m in members]
        # The first stage's order is made while packing (`staged_order`), so its buffer needs no second copy.
        moves = _merge(gather) if index else ()
        stages.append(Stage(level, moves if len(moves) > 1 else None, tuple(send_splits), tuple(recv_splits)))
    return tuple(stages)


def _merge(slices: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join neighbouring slices; empty ones go."""
    merged: list[tuple[int, int]] = []
    for start, length in slices:
        if length and merged and merged[-1][0] + merged[-1][1] == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        elif length:
            merged.append((start, length))
    return tuple(merged)
