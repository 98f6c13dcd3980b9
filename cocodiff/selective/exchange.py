"""Exchanges that are exact on fast links and selective on slow ones, in the places of the exact ones.

Three lanes, each in order: rows are encoded on one, payloads travel on the link's own, rows are decoded on the third.
So a tensor is encoded while the one before it is on the link, and all that under what the model computes meanwhile.
What goes from one rank to another is one message of bytes, whose size both know.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cocodiff.exchange.lanes import Lane, Ticket
from cocodiff.exchange.staged import StagedExchange, in_order
from cocodiff.exchange.transport import Transport
from cocodiff.parallel.layout import Traffic, staged_order, staged_plan
from cocodiff.selective.copies import ENDS
from cocodiff.selective.crossing import Block, blocks_of
from cocodiff.selective.layer import LayerCoding
from cocodiff.selective.parcel import Parcel


@dataclass(frozen=True)
class SlowLinks:
    """Where transmission is selective, and the lanes on which rows are encoded and decoded.

    Attributes:
        level: the innermost slow level of the cluster; all outside it are slow, too.
    """

    level: int
    encoding: Lane
    decoding: Lane


@dataclass(frozen=True)
class CodedAxis:
    """An axis of the mesh that crosses slow links.

    Attributes:
        transport: moves bytes among the ranks of the axis.
        ranks: their numbers in the run, which name both ends of what travels.
    """

    transport: Transport
    ranks: tuple[int, ...]
    links: SlowLinks


@dataclass(frozen=True)
class Part:
    """Consecutive blocks of a buffer, which travel as they are or as one parcel.

    Attributes:
        counts: bytes of each block on the wire.
        exact: bytes of each block as it is.
    """

    blocks: tuple[Block, ...]
    counts: tuple[int, ...]
    exact: tuple[int, ...]
    parcel: Parcel | None

    @property
    def numel(self) -> int:
        return sum(block.rows * block.width for block in self.blocks)


class SelectiveExchange:
    """Moves blocks from every rank to every rank, exact where they cross no slow level: one layer in one forward.

    Args:
        staged: moves blocks through the levels inside the slow ones first; None where one exchange crosses all levels.
    """

    name = "selective"

    def __init__(self, axis: CodedAxis, coding: LayerCoding, staged: StagedExchange | None) -> None:
        self._axis, self._coding, self._staged = axis, coding, staged
        sizes, slow = axis.transport.sizes, axis.links.level
        self._merged = (*sizes[:slow], math.prod(sizes[slow:]))
        self.order = tuple(range(math.prod(sizes))) if staged is None else staged_order(self._merged)

    def start(self, send: Tensor, traffic: Traffic, label: str, out: Tensor | None = None) -> Ticket:
        transport, links, coding = self._axis.transport, self._axis.links, self._coding
        source: Tensor | Ticket = send
        gather = None
        if self._staged is not None:
            *inner, last = staged_plan(traffic, self._merged, transport.rank)
            source, gather = self._staged.through(inner, send, label), last.gather
        piece = str(coding.next_piece(label))
        leaving, arriving = (list(self._parts(traffic, label, end, piece, send.itemsize)) for end in ENDS)

        def encode(buffer: Tensor) -> Tensor:
            return _encoded(leaving, in_order(buffer, gather), coding)

        def decode(message: Tensor) -> Tensor:
            return _decoded(arriving, message, coding, send.dtype, out)

        message = transport.all_to_all(
            links.encoding.submit(encode, source, label),
            self._splits(leaving),
            self._splits(arriving),
            torch.uint8,
            label,
            exact_bytes=self._splits(leaving, exact=True),
        )
        return links.decoding.submit(decode, message, label)

    def _parts(self, traffic: Traffic, label: str, end: str, piece: str, itemsize: int) -> Iterator[Part]:
        """Cut a buffer into parts: neighbouring blocks of one width make one parcel."""
        transport, ranks = self._axis.transport, self._axis.ranks
        staged = self._staged is not None
        blocks = blocks_of(traffic, transport.sizes, transport.rank, self._axis.links.level, staged, end)
        for index, (key, group) in enumerate(itertools.groupby(blocks, lambda block: (block.coded, block.width))):
            (coded, width), several = key, tuple(group)
            rows = tuple(block.rows for block in several)
            exact = tuple(count * width * itemsize for count in rows)
            if not coded or not sum(rows):
                yield Part(several, exact, exact, None)
                continue
            routes = tuple((ranks[src], ranks[dst]) for src, dst in (block.route for block in several))
            parcel = self._coding.parcel(label, (end, piece, index), rows, routes, width, itemsize)
            yield Part(several, tuple(parcel.block_bytes), exact, parcel)

    def _splits(self, parts: Sequence[Part], exact: bool = False) -> list[int]:
        """Sum the bytes for, or of, each rank."""
        splits = [0] * self._axis.transport.size
        for part in parts:
            for block, count in zip(part.blocks, part.exact if exact else part.counts, strict=True):
                splits[block.peer] += count
        return splits


def _encoded(parts: Sequence[Part], buffer: Tensor, coding: LayerCoding) -> Tensor:
    """A buffer of elements -> the message, bytes."""
    pieces = buffer.split([part.numel for part in parts])
    return torch.cat(
        [
            piece.view(torch.uint8) if part.parcel is None else coding.encode(part.parcel, piece)
            for part, piece in zip(parts, pieces, strict=True)
        ]
    )


def _decoded(
    parts: Sequence[Part], message: Tensor, coding: LayerCoding, dtype: torch.dtype, out: Tensor | None
) -> Tensor:
    """A message -> the buffer of elements, in `out` or new."""
    buffer = message.new_empty(sum(part.numel for part in parts), dtype=dtype) if out is None else out
    places, payloads = buffer.split([part.numel for part in parts]), message.split([sum(part.counts) for part in parts])
    for part, place, payload in zip(parts, places, payloads, strict=True):
        if part.parcel is None:
            place.view(torch.uint8).copy_(payload)
        else:
            place.copy_(coding.decode(part.parcel, payload, dtype))
    return buffer
