"""The topology-staged all-to-all: one stage per level of the cluster, each inside one group of that level.

Source: CoCoDiff (arXiv 2604.14561), TAPA: first inside each GPU, then across GPUs. Here for any number of levels, and
pipelined: every stage runs on its level's lane, so the slow stage of one tensor runs beside the fast stage of the next.
The bytes over slow links are those of a flat exchange; messages are fewer and larger, and groups do not contend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from cocodiff.exchange.lanes import Ticket
from cocodiff.exchange.transport import Transport
from cocodiff.parallel.layout import Stage, Traffic, staged_order, staged_plan


class StagedExchange:
    """Blocks from every rank to every rank, level by level.

    Args:
        sizes: ranks per level, innermost first; their product is the number of ranks.
        rank: this rank among them.
        transports: level -> that of the ranks that share all other digits, ordered by the digit of that level. A level
            of size one needs none.
    """

    name = "staged"

    def __init__(self, sizes: tuple[int, ...], rank: int, transports: Mapping[int, Transport]) -> None:
        self._sizes, self._rank, self._transports = sizes, rank, transports
        self.order = staged_order(sizes)

    def start(self, send: Tensor, traffic: Traffic, label: str, out: Tensor | None = None) -> Ticket:
        ticket = self.through(staged_plan(traffic, self._sizes, self._rank), send, label, out)
        assert not isinstance(ticket, Tensor), "a staged exchange needs a level of more than one rank"
        return ticket

    def through(self, stages: Sequence[Stage], send: Tensor, label: str, out: Tensor | None = None) -> Tensor | Ticket:
        """Run some stages of an exchange, one after the other; without any the buffer itself comes back."""
        source: Tensor | Ticket = send
        for stage in stages:
            source = self._transports[stage.level].all_to_all(
                source, stage.send_splits, stage.recv_splits, send.dtype, label,
                out=out if stage is stages[-1] else None,
                prepare=None if stage.gather is None else partial(in_order, gather=stage.gather),
            )  # fmt: skip
        return source


def in_order(buffer: Tensor, gather: Sequence[tuple[int, int]] | None) -> Tensor:
    """The slices (start, length) of a buffer one behind the other; the buffer itself for None."""
    return buffer if gather is None else torch.cat([buffer[start : start + length] for start, length in gather])
