"""One all-to-all over all ranks of the group: the textbook exchange, and the baseline of the CoCoDiff paper."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from cocodiff.exchange.layout import Traffic, sent_flat
from cocodiff.lanes import Lane, Ticket
from cocodiff.tally import Tally


class FlatExchange:
    """Blocks from every rank to every rank in one `all_to_all_single`, on one lane.

    Args:
        sizes: ranks per level, innermost first: which level a message crosses.
        group: the ranks; its group ranks are the sources and destinations of `Traffic`.
        lane: the lane of the slowest link the group crosses; `group` is used by this lane alone.
        tally: counts what is sent.
    """

    name = "flat"

    def __init__(self, sizes: tuple[int, ...], group: dist.ProcessGroup, lane: Lane, tally: Tally) -> None:
        self._sizes, self._group, self._lane, self._tally = sizes, group, lane, tally
        self._rank = group.rank()
        self.order = tuple(range(group.size()))

    def start(self, send: Tensor, traffic: Traffic, label: str) -> Ticket:
        """Send a buffer packed in `self.order`; the ticket gives what arrived, in rank order, one-dimensional."""
        rank, ranks = self._rank, self.order
        send_splits = [traffic.block(rank, peer) for peer in ranks]
        recv_splits = [traffic.block(peer, rank) for peer in ranks]
        self._tally.add(label, [count * send.itemsize for count in sent_flat(traffic, self._sizes, rank)])
        return self._lane.submit(lambda x: all_to_all(x, send_splits, recv_splits, self._group), send, label)


def all_to_all(send: Tensor, send_splits: list[int], recv_splits: list[int], group: dist.ProcessGroup) -> Tensor:
    """`all_to_all_single` with splits in elements, into a new buffer."""
    recv = send.new_empty(sum(recv_splits))
    if dist.get_backend(group) == "gloo":
        _receives_first(recv, send, recv_splits, send_splits, group)
    else:
        dist.all_to_all_single(recv, send, recv_splits, send_splits, group=group)
    return recv


def _receives_first(
    recv: Tensor, send: Tensor, recv_splits: list[int], send_splits: list[int], group: dist.ProcessGroup
) -> None:
    """The same by point-to-point messages, all receives posted before any send.

    Gloo sends data once the receiver has said that it is ready, on the same ordered connection. Its own all-to-all posts
    sends first: the word then waits behind the data that goes the other way, and by chance the link is used in one
    direction at a time. MEASURED (benchmarks/gloo_duplex.py): half to all of a link's bandwidth; this way all of it.
    """
    rank, size = group.rank(), group.size()
    incoming, outgoing = recv.split(recv_splits), send.split(send_splits)
    incoming[rank].copy_(outgoing[rank])
    pending = []
    for distance in range(1, size):
        source = (rank - distance) % size
        if recv_splits[source]:
            pending.append(dist.irecv(incoming[source], group_src=source, group=group))
    for distance in range(1, size):
        destination = (rank + distance) % size
        if send_splits[destination]:
            pending.append(dist.isend(outgoing[destination], group_dst=destination, group=group))
    for one in pending:
        assert one is not None
        one.wait()
