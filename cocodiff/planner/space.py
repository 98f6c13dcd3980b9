"""Every plan that may be, before any is judged."""

from __future__ import annotations

from collections.abc import Iterator

from cocodiff.parallel.mesh import Degrees
from cocodiff.parallel.placement import Placement, default_placement, placements
from cocodiff.plan import MAX_PIECES, RunPlan

PIECES = tuple(2**power for power in range(MAX_PIECES.bit_length()))


def meshes(num_ranks: int, heads: int, guided: bool) -> Iterator[Degrees]:
    """Every cfg x ring x ulysses of so many ranks: ulysses at most the heads, cfg 2 where there is guidance.

    >>> [str(one) for one in meshes(4, heads=2, guided=False)]
    ['cfg 1 x ring 2 x ulysses 2', 'cfg 1 x ring 4 x ulysses 1']
    """
    for cfg in (1, 2) if guided else (1,):
        sequence, left = divmod(num_ranks, cfg)
        for ring in range(1, sequence + 1):
            if not left and sequence % ring == 0 and sequence // ring <= heads:
                yield Degrees(cfg, ring, sequence // ring, "planned")


def spreadings(sizes: tuple[int, ...], degrees: Degrees) -> list[Placement | None]:
    """Every placement of a mesh in the launcher's order; first the default one, which is None.

    >>> [str(one) for one in spreadings((2, 2), Degrees(1, 2, 2))]
    ['None', 'cfg 1.1 x ring 2.1 x ulysses 1.2']
    """
    default = default_placement(sizes, degrees.counts)
    return [None, *(one for one in placements(sizes, degrees.counts) if one != default)]


def ways(degrees: Degrees, placement: Placement | None, levels: int) -> Iterator[RunPlan]:
    """Every exchange and number of pieces of a placed mesh.

    Args:
        levels: how many the ulysses axis crosses; a staged exchange needs two.
    """
    communicates = degrees.ring * degrees.ulysses > 1
    for exchange in ("flat", "staged") if levels > 1 else ("flat",):
        for pieces in PIECES if communicates else (1,):
            yield RunPlan(degrees, exchange=exchange, pieces=pieces, placement=placement)
