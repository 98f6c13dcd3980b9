"""Which blocks of an exchange cross slow links: pure numbers, no communication."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from cocodiff.parallel.layout import Traffic, outer_difference
from cocodiff.selective.copies import Route


@dataclass(frozen=True)
class Block:
    """What one source has for one destination, on its way from or to a peer.

    Attributes:
        route: source and destination, by their places on the axis.
        coded: whether it crosses a slow level.
    """

    peer: int
    route: Route
    rows: int
    width: int
    coded: bool


def blocks_of(traffic: Traffic, sizes: tuple[int, ...], rank: int, slow: int, staged: bool, end: str) -> list[Block]:
    """What leaves a rank ("send") or arrives ("receive") in the exchange that crosses slow levels, in order.

    Args:
        sizes: ranks per level along the axis, innermost first.
        slow: the innermost slow level.
        staged: stages inside the slow levels come before.
    """
    everyone, inner = math.prod(sizes), math.prod(sizes[:slow])

    def block(peer: int, src: int, dst: int) -> Block:
        crosses = peer != rank and outer_difference(rank, peer, sizes) >= slow
        return Block(peer, (src, dst), *traffic.shape(src, dst), crosses)

    def inside(peer: int) -> range:
        return range(peer - peer % inner, peer - peer % inner + inner)

    if not staged:
        return [block(peer, rank, peer) if end == "send" else block(peer, peer, rank) for peer in range(everyone)]
    # Stages inside have brought together what all ranks in here have for the same place elsewhere.
    peers = range(rank % inner, everyone, inner)
    if end == "send":
        return [block(peer, src, peer) for peer in peers for src in inside(rank)]
    return [block(peer, src, rank) for peer in peers for src in inside(peer)]


def crossed(part: int, place: int, sizes: tuple[int, ...], slow: int) -> bool:
    """Whether a part of the ring has crossed a slow link on its way around to a place."""
    size = math.prod(sizes)
    path = [(part + hop) % size for hop in range((place - part) % size + 1)]
    return any(outer_difference(*hop, sizes) >= slow for hop in itertools.pairwise(path))
