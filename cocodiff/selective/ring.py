"""Keys and values over a ring that crosses slow links: coded at the first of them, and passed on as they are coded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from cocodiff.exchange.lanes import Ticket
from cocodiff.selective.crossing import crossed
from cocodiff.selective.exchange import CodedAxis
from cocodiff.selective.layer import LayerCoding
from cocodiff.selective.parcel import Parcel


class SelectiveRing:
    """Does what `Ring` does, for one layer in one forward.

    All ranks that receive a part hold the same copy of it, so its sender keeps one.
    """

    def __init__(self, axis: CodedAxis, coding: LayerCoding) -> None:
        self._axis, self._coding = axis, coding

    def start(self, own: Ticket, rows: Sequence[int], width: int, dtype: torch.dtype, label: str) -> list[Ticket]:
        """Send and receive the parts as `Ring.start` does."""
        transport, links, coding, size = self._axis.transport, self._axis.links, self._coding, len(rows)
        ahead = (transport.rank + 1) % size
        piece = f"ring {coding.next_piece(f'{label} ring')}"

        def parcel(end: str, part: int) -> Parcel:
            route = self._axis.ranks[part], self._axis.ranks[part]
            return coding.parcel(label, (end, piece, part), (rows[part],), (route,), width, dtype.itemsize)

        def encode(parcel: Parcel, elements: Tensor) -> Tensor:
            return coding.encode(parcel, elements.view(dtype))

        def decode(parcel: Parcel | None, payload: Tensor) -> Tensor:
            return payload.view(dtype) if parcel is None else coding.decode(parcel, payload, dtype)

        tickets: list[Ticket] = []
        source, received = own, 0
        for distance in range(1, size):
            leaving, arriving = (transport.rank - distance + 1) % size, (transport.rank - distance) % size
            exact_bytes = sent = rows[leaving] * width * dtype.itemsize
            if self._coded(leaving, transport.rank):
                sent = received  # passed on as it came
            elif self._coded(leaving, ahead):
                ours = parcel("send", leaving)
                sent = sum(ours.block_bytes)
                source = links.encoding.submit(partial(encode, ours), source, label)
            theirs = parcel("receive", arriving) if self._coded(arriving, transport.rank) else None
            received = rows[arriving] * width * dtype.itemsize if theirs is None else sum(theirs.block_bytes)
            source = transport.pass_on(
                source,
                sent,
                received,
                torch.uint8,
                label,
                prepare=lambda x: x.view(torch.uint8),  # the first is of elements
                exact_bytes=exact_bytes,
            )
            tickets.append(links.decoding.submit(partial(decode, theirs), source, label))
        return tickets

    def _coded(self, part: int, place: int) -> bool:
        return crossed(part, place, self._axis.transport.sizes, self._axis.links.level)
