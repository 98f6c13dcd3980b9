"""The two directions of Ulysses (arXiv 2309.14509), in terms of any exchange.

Legend: B batch, S sequence, H heads, D head_dim; `_local` sizes belong to this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from cocodiff.exchange.lanes import Ticket
from cocodiff.kernels import pack_heads, pack_rows, unpack_heads, unpack_rows
from cocodiff.parallel.layout import Layout, Traffic, to_heads_traffic, to_sequence_traffic


class Exchange(Protocol):
    """Moves blocks between ranks; `flat` and `staged` deliver the same elements along different paths."""

    name: str
    order: tuple[int, ...]

    def start(self, send: Tensor, traffic: Traffic, label: str, out: Tensor | None = None) -> Ticket:
        """Send a buffer packed in `order`; the ticket gives what arrived, in rank order, one-dimensional.

        `out`, if given, is where it arrives.
        """


class Pending:
    """An exchange in flight: `wait`, once, gives the tensor on this side, in the layout that its user wants."""

    def __init__(self, ticket: Ticket, unpack: Callable[[Tensor], Tensor]) -> None:
        self._ticket: Ticket | None = ticket
        self.unpack = unpack

    @property
    def ticket(self) -> Ticket:
        """Of the elements as they arrive, one-dimensional."""
        assert self._ticket is not None, "an exchange is waited for once"
        return self._ticket

    def wait(self) -> Tensor:
        received = self.unpack(self.ticket.wait())
        self._ticket = None  # from here on what was sent may be freed
        return received


def to_heads(
    exchange: Exchange, x: Tensor, layout: Layout, rank: int, label: str, out: Tensor | None = None
) -> Pending:
    """Start `(B, S_local, H, D)` -> `(B, S, H_local, D)`: all tokens, in rank order, of this rank's heads.

    `out`, if given, is one-dimensional memory in which the result lies as `(S, B, H_local, D)`.
    """
    batch, seq_len_local, _, head_dim = x.shape
    assert seq_len_local == layout.seq_lens[rank], (x.shape, layout, rank)
    send = pack_heads(x, layout.num_heads, exchange.order)
    ticket = exchange.start(send, to_heads_traffic(layout, batch, head_dim), label, out)
    return Pending(ticket, lambda buffer: unpack_heads(buffer, batch, layout.num_heads[rank], head_dim))


def to_sequence(exchange: Exchange, x: Tensor, layout: Layout, rank: int, label: str) -> Pending:
    """Start `(B, S, H_local, D)` -> `(B, S_local, H * D)`: all heads of this rank's tokens, joined."""
    batch, seq_len, num_heads_local, head_dim = x.shape
    assert (seq_len, num_heads_local) == (sum(layout.seq_lens), layout.num_heads[rank]), (x.shape, layout, rank)
    send = pack_rows(x, layout.seq_lens, exchange.order)
    ticket = exchange.start(send, to_sequence_traffic(layout, batch, head_dim), label)
    return Pending(ticket, lambda buffer: unpack_rows(buffer, batch, layout.num_heads, head_dim))
