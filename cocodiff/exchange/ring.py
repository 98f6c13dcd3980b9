"""Keys and values over the ring axis: each rank gets the other parts of the sequence, for the heads that it has.

Every rank sends on to the next what it got from the one before (Ring Attention, arXiv 2310.01889). MEASURED on four
emulated nodes (benchmarks/results/ring-ways.md): sending each part straight to everyone took 1.2 times as long.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from cocodiff.exchange.flat import AllToAll
from cocodiff.exchange.lanes import Lane, Ticket
from cocodiff.observe.bytes import Tally
from cocodiff.parallel.layout import outer_difference


class Ring:
    """The parts of all ranks of the ring axis, to all of them.

    Args:
        sizes: ranks per level along the axis, innermost first.
        rank: this one's place.
        group: the ranks; used by `lane` alone.
        tally: counts what is sent.
    """

    def __init__(self, sizes: tuple[int, ...], rank: int, group: dist.ProcessGroup, lane: Lane, tally: Tally) -> None:
        self._sizes, self._rank, self._group, self._lane, self._tally = sizes, rank, group, lane, tally
        self._started = 0

    def start(self, own: Ticket, rows: Sequence[int], width: int, dtype: torch.dtype, label: str) -> list[Ticket]:
        """Send this rank's part, as soon as `own` delivers it, and receive those of the ranks before it.

        Args:
            rows: of each rank's part, of `width` elements each.

        Returns:
            a ticket for each of them: of the rank before this one, of the rank before that, ...
        """
        size, tickets, source = len(rows), [], own
        behind, ahead = (self._rank - 1) % size, (self._rank + 1) % size
        level = outer_difference(self._rank, ahead, self._sizes)
        for distance in range(1, size):
            sent = rows[(self._rank - distance + 1) % size] * width
            send_splits, recv_splits, by_level = [0] * size, [0] * size, [0] * len(self._sizes)
            send_splits[ahead], recv_splits[behind] = sent, rows[(self._rank - distance) % size] * width
            by_level[level] = sent * dtype.itemsize
            self._tally.add(label, by_level)
            self._started += 1
            work = AllToAll(send_splits, recv_splits, self._group, self._started)
            source = self._lane.submit(work, source, label)
            tickets.append(source)
        return tickets
