"""One all-to-all over all ranks of the group: the textbook exchange, and the baseline of the CoCoDiff paper."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from cocodiff.exchange.layout import Traffic
from cocodiff.lanes import Lane, Ticket


class FlatExchange:
    """Blocks from every rank to every rank in one `all_to_all_single`, on one lane.

    Args:
        group: the ranks; its group ranks are the sources and destinations of `Traffic`.
        lane: the lane of the slowest link the group crosses; `group` is used by this lane alone.
    """

    name = "flat"

    def __init__(self, group: dist.ProcessGroup, lane: Lane) -> None:
        self._group, self._lane = group, lane
        self._rank = group.rank()
        self.order = tuple(range(group.size()))

    def start(self, send: Tensor, traffic: Traffic, label: str) -> Ticket:
        """Send a buffer packed in `self.order`; the ticket gives what arrived, in rank order, one-dimensional."""
        rank, ranks = self._rank, self.order
        send_splits = [traffic.block(rank, peer) for peer in ranks]
        recv_splits = [traffic.block(peer, rank) for peer in ranks]
        return self._lane.submit(lambda x: all_to_all(x, send_splits, recv_splits, self._group), send, label)


def all_to_all(send: Tensor, send_splits: list[int], recv_splits: list[int], group: dist.ProcessGroup) -> Tensor:
    """`all_to_all_single` with splits in elements, into a new buffer."""
    recv = send.new_empty(sum(recv_splits))
    dist.all_to_all_single(recv, send, recv_splits, send_splits, group=group)
    return recv
