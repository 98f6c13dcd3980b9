"""Keys and values over a ring that crosses slow links: coded at the first of them, and passed on as they are coded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from cocodiff.exchange.flat import AllToAll
from cocodiff.exchange.lanes import Ticket
from cocodiff.parallel.layout import outer_difference
from cocodiff.parallel.mesh import Axis
from cocodiff.selective.exchange import Channel, Link
from cocodiff.selective.residual import Parcel


class SelectiveRing:
    """`Ring` of one layer in one forward.

    All who receive a part hold the same copy of it, so its sender keeps one.

    Args:
        axis: of the parts, more than one.
    """

    def __init__(self, link: Link, channel: Channel, axis: Axis) -> None:
        assert axis.group is not None
        self._link, self._channel, self._lane = link, channel, link.lanes[axis.level]
        self._sizes, self._rank, self._ranks, self._group = axis.cluster.sizes, axis.rank, axis.ranks, axis.group

    def start(self, own: Ticket, rows: Sequence[int], width: int, dtype: torch.dtype, label: str) -> list[Ticket]:
        """As of `Ring`."""
        link, size, number = self._link, len(rows), self._channel.number(f"{label} ring")
        behind, ahead = (self._rank - 1) % size, (self._rank + 1) % size
        level = outer_difference(self._rank, ahead, self._sizes)

        def parcel(end: str, part: int) -> Parcel:
            place = (end, f"ring {number}", part)
            route = self._ranks[part], self._ranks[part]
            return self._channel.parcel(label, place, (rows[part],), (route,), width, dtype.itemsize)

        tickets: list[Ticket] = []
        source, received = own, 0
        for distance in range(1, size):
            leaving, arriving = (self._rank - distance + 1) % size, (self._rank - distance) % size
            exact = rows[leaving] * width * dtype.itemsize
            if self._coded(leaving, self._rank):
                sent = received  # passed on as it came
            elif self._coded(leaving, ahead):
                ours = parcel("send", leaving)
                sent = _bytes(ours, dtype)
                source = link.encoding.submit(partial(self._encoded, ours, dtype), source, label)
            else:
                sent = exact
                source = link.encoding.submit(lambda x: x.view(torch.uint8), source, label)
            theirs = parcel("receive", arriving) if self._coded(arriving, self._rank) else None
            received = rows[arriving] * width * dtype.itemsize if theirs is None else _bytes(theirs, dtype)
            send_splits, recv_splits = [0] * size, [0] * size
            send_splits[ahead], recv_splits[behind] = sent, received
            levels = range(len(self._sizes))
            link.tally.add(label, [sent * (i == level) for i in levels], [exact * (i == level) for i in levels])
            source = self._lane.submit(AllToAll(send_splits, recv_splits, self._group, next(link.tags)), source, label)
            tickets.append(link.decoding.submit(partial(self._decoded, theirs, dtype), source, label))
        return tickets

    def _coded(self, part: int, place: int) -> bool:
        return crossed(part, place, self._sizes, self._link.slow)

    def _encoded(self, parcel: Parcel, dtype: torch.dtype, elements: Tensor) -> Tensor:
        payload, norms = self._link.coder.encode(parcel, elements.view(dtype).view(-1, parcel.width))
        self._channel.missed(parcel.label, norms)
        return payload

    def _decoded(self, parcel: Parcel | None, dtype: torch.dtype, payload: Tensor) -> Tensor:
        if parcel is None:
            return payload.view(dtype)
        return self._link.coder.decode(parcel, payload, dtype).flatten()


def crossed(part: int, place: int, sizes: tuple[int, ...], slow: int) -> bool:
    """Whether a part of the ring has crossed a slow link on its way around to a place."""
    size = math.prod(sizes)
    path = [(part + hop) % size for hop in range((place - part) % size + 1)]
    return any(outer_difference(*hop, sizes) >= slow for hop in itertools.pairwise(path))


def _bytes(parcel: Parcel, dtype: torch.dtype) -> int:
    return sum(parcel.block_bytes(parcel.coding.row_bytes(parcel.width, dtype.itemsize)))
