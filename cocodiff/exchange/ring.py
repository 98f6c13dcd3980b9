"""Keys and values over the ring axis: each rank gets the other parts of the sequence, for the heads that it has.

Two ways, the same bytes out of every rank: passed around (each rank sends on to the next what it got from the one
before; Ring Attention, arXiv 2310.01889) or sent straight to everyone, nearest first. Parts arrive in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from cocodiff.exchange.flat import AllToAll
from cocodiff.exchange.layout import outer_difference
from cocodiff.lanes import Lane, Ticket
from cocodiff.tally import Tally


class Ring:
    """The parts of all ranks of the ring axis, to all of them.

    Args:
        sizes: ranks per level along the axis, innermost first.
        rank: this one's place.
        group: the ranks; used by `lane` alone.
        passed: around the ring, instead of straight to everyone.
        tally: counts what is sent.
    """

    def __init__(
        self, sizes: tuple[int, ...], rank: int, group: dist.ProcessGroup, lane: Lane, passed: bool, tally: Tally
    ) -> None:
        self._sizes, self._rank, self._group, self._lane, self._tally = sizes, rank, group, lane, tally
        self._passed, self._started = passed, 0

    def start(self, own: Ticket, numels: Sequence[int], itemsize: int, label: str) -> list[Ticket]:
        """Send this rank's part, as soon as `own` delivers it, and receive those of the ranks before it.

        Args:
            numels: elements of each rank's part.

        Returns:
            a ticket for each of them: of the rank before this one, of the rank before that, ...
        """
        size, tickets, source = len(numels), [], own
        for distance in range(1, size):
            before, step = (self._rank - distance) % size, 1 if self._passed else distance
            sent = (before + step) % size if self._passed else self._rank  # whose part goes out now
            send_splits, recv_splits = [0] * size, [0] * size
            to = (self._rank + step) % size
            send_splits[to] = numels[sent]
            recv_splits[(self._rank - step) % size] = numels[before]
            by_level = [0] * len(self._sizes)
            by_level[outer_difference(self._rank, to, self._sizes)] = numels[sent] * itemsize
            self._tally.add(label, by_level)
            self._started += 1
            work = AllToAll(send_splits, recv_splits, self._group, self._started)
            tickets.append(self._lane.submit(work, source, label))
            if self._passed:
                source = tickets[-1]
        return tickets
