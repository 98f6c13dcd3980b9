"""Keys and values over the ring axis: each rank gets the other parts of the sequence, for the heads that it has.

Every rank sends on to the next what it got from the one before (Ring Attention, arXiv 2310.01889). MEASURED on four
emulated nodes (benchmarks/results/ring-ways.md): sending each part straight to everyone took 1.2 times as long.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cocodiff.exchange.lanes import Ticket
from cocodiff.exchange.transport import Transport


class Ring:
    """Brings the parts of all ranks of the ring axis to all of them."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def start(self, own: Ticket, rows: Sequence[int], width: int, dtype: torch.dtype, label: str) -> list[Ticket]:
        """Send this rank's part, as soon as `own` delivers it, and receive those of the ranks before it.

        Args:
            rows: of each rank's part, of `width` elements each.

        Returns:
            A ticket for each of them: of the rank before this one, of the rank before that, ...
        """
        rank, size, source = self._transport.rank, len(rows), own
        tickets: list[Ticket] = []
        for distance in range(1, size):
            leaving, arriving = (rank - distance + 1) % size, (rank - distance) % size
            source = self._transport.pass_on(source, rows[leaving] * width, rows[arriving] * width, dtype, label)
            tickets.append(source)
        return tickets
