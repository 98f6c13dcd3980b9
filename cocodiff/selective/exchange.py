"""Exchanges that are exact on fast links and selective on slow ones, in the places of the exact ones.

Three lanes, each in order: rows are encoded on one, payloads travel on the link's own, rows are decoded on the third.
So a tensor is encoded while the one before it is on the link, and all that under what the model computes meanwhile.
What goes from one rank to another is one message of bytes, whose size both know.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cocodiff.exchange.flat import AllToAll
from cocodiff.exchange.lanes import Lane, Ticket
from cocodiff.exchange.staged import StagedExchange, in_order
from cocodiff.observe.bytes import Tally
from cocodiff.parallel.layout import Traffic, outer_difference, staged_order, staged_plan
from cocodiff.parallel.mesh import Axis
from cocodiff.selective.copies import Route
from cocodiff.selective.residual import Coder, Parcel

ENDS = ("send", "receive")
TAG = 2**29  # added to the numbers of our messages: exact exchanges over the same group have numbers of their own


class Channel(Protocol):
    """One layer's exchanges in one forward: how they are coded, and where their errors are kept."""

    def number(self, label: str) -> int:
        """Of the next exchange of this label: 0, 1, ... for the pieces of a layer."""

    def parcel(
        self, label: str, place: tuple, blocks: tuple[int, ...], routes: tuple[Route, ...], width: int, itemsize: int
    ) -> Parcel:
        """Some blocks on their way. `place` tells copies of one layer and label apart: the end, the number, ..."""

    def missed(self, label: str, norms: Tensor) -> None:
        """Squared norms of what a parcel misses, and of what it had to carry, `(2,)`."""


@dataclass(frozen=True)
class Link:
    """What the selective exchanges of a run share.

    Attributes:
        slow: the innermost slow level; all outside it are slow, too.
        encoding, decoding: lanes beside those of the links, which are `lanes`, by level.
        tags: numbers for messages, counting on from run to run.
    """

    slow: int
    coder: Coder
    encoding: Lane
    decoding: Lane
    lanes: Mapping[int, Lane]
    tags: Iterator[int]
    tally: Tally


@dataclass(frozen=True)
class Block:
    """What one source has for one destination, on its way from or to a peer."""

    peer: int
    route: Route
    rows: int
    width: int
    coded: bool


@dataclass(frozen=True)
class Part:
    """Consecutive blocks of a buffer: as they are, or as one parcel.

    Attributes:
        bytes: (peer, bytes on the wire) of each block.
    """

    numel: int
    bytes: tuple[tuple[int, int], ...]
    parcel: Parcel | None

    @property
    def total(self) -> int:
        return sum(count for _, count in self.bytes)


class SelectiveExchange:
    """Blocks from every rank to every rank, exact where they cross no slow level: for one layer in one forward.

    Args:
        axis: of all these ranks, more than one.
        staged: takes the levels inside the slow ones, a stage each; None for all at once.
    """

    name = "selective"

    def __init__(self, link: Link, channel: Channel, axis: Axis, staged: StagedExchange | None) -> None:
        assert axis.group is not None
        self._link, self._channel, self._staged = link, channel, staged
        self._sizes, self._rank, self._ranks, self._group = axis.cluster.sizes, axis.rank, axis.ranks, axis.group
        self._lane, sizes = link.lanes[axis.level], self._sizes
        self._merged = (*sizes[: link.slow], math.prod(sizes[link.slow :]))
        self.order = tuple(range(math.prod(sizes))) if staged is None else staged_order(self._merged)

    def start(self, send: Tensor, traffic: Traffic, label: str, out: Tensor | None = None) -> Ticket:
        link, number, itemsize = self._link, self._channel.number(label), send.itemsize
        source: Tensor | Ticket = send
        gather = None
        if self._staged is not None:
            *inner, last = staged_plan(traffic, self._merged, self._rank)
            source, gather = self._staged.through(inner, send, label), last.gather
        staged = self._staged is not None
        blocks = {end: blocks_of(traffic, self._sizes, self._rank, link.slow, staged, end) for end in ENDS}
        parts = {end: list(self._parts(some, label, (end, number), itemsize)) for end, some in blocks.items()}
        splits = {end: _splits(some, len(self.order)) for end, some in parts.items()}
        self._count(blocks["send"], splits["send"], label, itemsize)

        def encode(buffer: Tensor) -> Tensor:
            return _encoded(parts["send"], in_order(buffer, gather), link.coder, self._channel, label)

        def decode(payload: Tensor) -> Tensor:
            return _decoded(parts["receive"], payload, link.coder, send.dtype, out)

        travel = AllToAll(splits["send"], splits["receive"], self._group, next(link.tags))
        payload = self._lane.submit(travel, link.encoding.submit(encode, source, label), label)
        return link.decoding.submit(decode, payload, label)

    def _parts(self, blocks: Sequence[Block], label: str, place: tuple, itemsize: int) -> Iterator[Part]:
        """Neighbouring blocks of one width make one parcel."""
        for index, (key, group) in enumerate(itertools.groupby(blocks, lambda block: (block.coded, block.width))):
            coded, width = key
            several = list(group)
            rows = tuple(block.rows for block in several)
            parcel = None
            if coded and sum(rows):
                routes = tuple((self._ranks[src], self._ranks[dst]) for src, dst in (block.route for block in several))
                parcel = self._channel.parcel(label, (*place, index), rows, routes, width, itemsize)
            if parcel is None:
                counts = [block.rows * width * itemsize for block in several]
            else:
                counts = parcel.block_bytes(parcel.coding.row_bytes(width, itemsize))
            peers = (block.peer for block in several)
            yield Part(sum(rows) * width, tuple(zip(peers, counts, strict=True)), parcel)

    def _count(self, blocks: Sequence[Block], splits: Sequence[int], label: str, itemsize: int) -> None:
        sent, exact = [0] * len(self._sizes), [0] * len(self._sizes)
        for peer, count in enumerate(splits):
            if peer != self._rank:
                sent[outer_difference(self._rank, peer, self._sizes)] += count
        for block in blocks:
            if block.peer != self._rank:
                level = outer_difference(self._rank, block.peer, self._sizes)
                exact[level] += block.rows * block.width * itemsize
        self._link.tally.add(label, sent, exact)


def blocks_of(traffic: Traffic, sizes: tuple[int, ...], rank: int, slow: int, staged: bool, end: str) -> list[Block]:
    """What leaves a rank ("send") or arrives ("receive") in the exchange that crosses slow levels, in order."""
    everyone, inner = math.prod(sizes), math.prod(sizes[:slow])

    def block(peer: int, src: int, dst: int) -> Block:
        crosses = peer != rank and outer_difference(rank, peer, sizes) >= slow
        return Block(peer, (src, dst), *traffic.shape(src, dst), crosses)

    def beside(peer: int) -> range:
        return range(peer - peer % inner, peer - peer % inner + inner)

    if not staged:
        return [block(peer, rank, peer) if end == "send" else block(peer, peer, rank) for peer in range(everyone)]
    # Stages inside have brought together what all ranks in here have for the same place elsewhere.
    peers = range(rank % inner, everyone, inner)
    if end == "send":
        return [block(peer, src, peer) for peer in peers for src in beside(rank)]
    return [block(peer, src, rank) for peer in peers for src in beside(peer)]


def _splits(parts: Sequence[Part], ranks: int) -> list[int]:
    """Bytes for, or of, each rank."""
    splits = [0] * ranks
    for part in parts:
        for peer, count in part.bytes:
            splits[peer] += count
    return splits


def _encoded(parts: Sequence[Part], buffer: Tensor, coder: Coder, channel: Channel, label: str) -> Tensor:
    """A buffer of elements -> the message, bytes."""
    message = []
    for part, elements in zip(parts, buffer.split([part.numel for part in parts]), strict=True):
        if part.parcel is None:
            message.append(elements.view(torch.uint8))
        else:
            payload, norms = coder.encode(part.parcel, elements.view(-1, part.parcel.width))
            channel.missed(label, norms)
            message.append(payload)
    return torch.cat(message)


def _decoded(parts: Sequence[Part], message: Tensor, coder: Coder, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """A message -> the buffer of elements, in `out` or new."""
    buffer = message.new_empty(sum(part.numel for part in parts), dtype=dtype) if out is None else out
    places = buffer.split([part.numel for part in parts])
    for part, place, payload in zip(parts, places, message.split([part.total for part in parts]), strict=True):
        if part.parcel is None:
            place.view(torch.uint8).copy_(payload)
        else:
            place.copy_(coder.decode(part.parcel, payload, buffer.dtype).flatten())
    return buffer
