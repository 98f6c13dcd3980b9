"""One all-to-all over all ranks of the group: the textbook exchange, and the baseline of the CoCoDiff paper."""

from __future__ import annotations

from torch import Tensor

from cocodiff.exchange.lanes import Ticket
from cocodiff.exchange.transport import Transport
from cocodiff.parallel.layout import Traffic


class FlatExchange:
    """Blocks from every rank to every rank in one all-to-all. `order` is that in which a buffer holds them."""

    name = "flat"

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.order = tuple(range(transport.size))

    def start(self, send: Tensor, traffic: Traffic, label: str, out: Tensor | None = None) -> Ticket:
        rank = self._transport.rank
        send_splits = [traffic.block(rank, peer) for peer in self.order]
        recv_splits = [traffic.block(peer, rank) for peer in self.order]
        return self._transport.all_to_all(send, send_splits, recv_splits, send.dtype, label, out=out)
