"""One all-to-all over all ranks of the group: the textbook exchange, and the baseline of the CoCoDiff paper."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from cocodiff.exchange.lanes import Lane, Ticket
from cocodiff.observe.bytes import Tally
from cocodiff.parallel.layout import Traffic, sent_flat


class FlatExchange:
    """Blocks from every rank to every rank in one `all_to_all_single`, on one lane.

    Args:
        sizes: ranks per level, innermost first: which level a message crosses.
        rank: this one's place among the sources and destinations of `Traffic`.
        group: the ranks, in that order; None for one rank alone, which has nothing to send.
        lane: the lane of the slowest link the group crosses; `group` is used by this lane alone.
        tally: counts what is sent.
    """

    name = "flat"

    def __init__(
        self, sizes: tuple[int, ...], rank: int, group: dist.ProcessGroup | None, lane: Lane, tally: Tally
    ) -> None:
        self._sizes, self._rank, self._group, self._lane, self._tally = sizes, rank, group, lane, tally
        self._started = 0
        self.order = tuple(range(math.prod(sizes)))

    def start(self, send: Tensor, traffic: Traffic, label: str, out: Tensor | None = None) -> Ticket:
        rank, ranks = self._rank, self.order
        send_splits = [traffic.block(rank, peer) for peer in ranks]
        recv_splits = [traffic.block(peer, rank) for peer in ranks]
        self._tally.add(label, [count * send.itemsize for count in sent_flat(traffic, self._sizes, rank)])
        self._started += 1
        if self._group is None:
            return self._lane.submit(lambda x: x if out is None else out.copy_(x), send, label)
        return self._lane.submit(AllToAll(send_splits, recv_splits, self._group, self._started, out), send, label)


class AllToAll:
    """`all_to_all_single` with splits in elements, into `out` or a new buffer: work for a lane.

    On gloo it is point-to-point messages, all receives posted before any send. Gloo sends data once the receiver has
    said that it is ready, on the same ordered connection. Its own all-to-all posts sends first: the word then waits
    behind the data that goes the other way, and by chance the link is used in one direction at a time. MEASURED
    (benchmarks/gloo_duplex.py): half to all of a link's bandwidth; this way, all of it. Messages carry a tag, so
    several exchanges may be under way at once.

    Args:
        tag: a number for this exchange, the same on all ranks of the group and not in use by another.
    """

    def __init__(
        self,
        send_splits: list[int],
        recv_splits: list[int],
        group: dist.ProcessGroup,
        tag: int,
        out: Tensor | None = None,
    ) -> None:
        self._send_splits, self._recv_splits, self._group, self._tag = send_splits, recv_splits, group, tag % 2**30
        self._recv = out
        self._pending: list[dist.Work] | None = None
        self._ordered = dist.get_backend(group) != "gloo"  # a collective, which must start in the lane's order

    def begin(self, send: Tensor) -> None:
        if self._ordered:
            return
        recv = self._make_recv(send)
        rank, size = self._group.rank(), self._group.size()
        incoming, outgoing = recv.split(self._recv_splits), send.split(self._send_splits)
        others = [(rank + distance) % size for distance in range(1, size)]
        # The group's own methods: dist.isend and irecv around them cost as much again, for every message.
        group, tag = self._group, self._tag
        pending = [group.recv([incoming[r]], r, tag) for r in reversed(others) if self._recv_splits[r]]
        pending += [group.send([outgoing[r]], r, tag) for r in others if self._send_splits[r]]
        incoming[rank].copy_(outgoing[rank])
        self._pending = pending

    def __call__(self, send: Tensor) -> Tensor:
        recv = self._make_recv(send)
        if self._ordered:
            if send.device.type == "xpu" and 0 in self._send_splits + self._recv_splits:
                return self._without_gaps(send, recv)
            dist.all_to_all_single(recv, send, self._recv_splits, self._send_splits, group=self._group)
            return recv
        if self._pending is None:
            self.begin(send)
        for work in self._pending or ():
            work.wait()
        return recv

    def _without_gaps(self, send: Tensor, recv: Tensor) -> Tensor:
        """The same where empty parts of uneven splits crash (oneCCL): an element stands in for each."""
        filler = send.new_zeros(1)
        padded = torch.cat([part if len(part) else filler for part in send.split(self._send_splits)])
        splits = [max(count, 1) for count in self._recv_splits]
        arrived = recv.new_empty(sum(splits))
        dist.all_to_all_single(
            arrived, padded, splits, [max(count, 1) for count in self._send_splits], group=self._group
        )
        parts = zip(arrived.split(splits), self._recv_splits, strict=True)
        return recv.copy_(torch.cat([part[:count] for part, count in parts]))

    def _make_recv(self, send: Tensor) -> Tensor:
        if self._recv is None:
            self._recv = send.new_empty(sum(self._recv_splits))
        return self._recv
