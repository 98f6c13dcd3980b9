"""The topology-staged all-to-all: one stage per level of the cluster, each inside one group of that level.

Source: CoCoDiff (arXiv 2604.14561), TAPA: first inside each GPU, then across GPUs. Here for any number of levels, and
pipelined: every stage runs on its level's lane, so the slow stage of one tensor runs beside the fast stage of the next.
The bytes over slow links are those of a flat exchange; messages are fewer and larger, and groups do not contend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cocodiff.exchange.flat import AllToAll
from cocodiff.exchange.lanes import Lane, Ticket
from cocodiff.observe.bytes import Tally
from cocodiff.parallel.layout import Stage, Traffic, digits, staged_order, staged_plan


class StagedExchange:
    """Blocks from every rank to every rank, level by level.

    Args:
        sizes: ranks per level, innermost first; their product is the number of ranks.
        rank: this rank among them.
        groups: level -> the group of ranks that share all other digits, ordered by the digit of that level.
        lanes: level -> its lane. Levels of size one need neither.
        tally: counts what is sent.
    """

    name = "staged"

    def __init__(
        self,
        sizes: tuple[int, ...],
        rank: int,
        groups: Mapping[int, dist.ProcessGroup],
        lanes: Mapping[int, Lane],
        tally: Tally,
    ) -> None:
        self._sizes, self._rank, self._groups, self._lanes, self._tally = sizes, rank, groups, lanes, tally
        self._digits, self._started = digits(rank, sizes), 0
        self.order = staged_order(sizes)

    def start(self, send: Tensor, traffic: Traffic, label: str, out: Tensor | None = None) -> Ticket:
        ticket = self.through(staged_plan(traffic, self._sizes, self._rank), send, label, out)
        assert not isinstance(ticket, Tensor), "a staged exchange needs a level of more than one rank"
        return ticket

    def through(self, stages: Sequence[Stage], send: Tensor, label: str, out: Tensor | None = None) -> Tensor | Ticket:
        """Some stages of an exchange, one after the other; what was sent itself if there are none."""
        source: Tensor | Ticket = send
        sent = [0] * len(self._sizes)
        self._started += 1
        for stage in stages:
            level = stage.level
            sent[level] = (sum(stage.send_splits) - stage.send_splits[self._digits[level]]) * send.itemsize
            work = _Staged(stage, self._groups[level], self._started, out if stage is stages[-1] else None)
            source = self._lanes[level].submit(work, source, label)
        self._tally.add(label, sent)
        return source


class _Staged(AllToAll):
    """One stage: what arrived from the stage before, put in order, then exchanged."""

    def __init__(self, stage: Stage, group: dist.ProcessGroup, tag: int, out: Tensor | None) -> None:
        super().__init__(list(stage.send_splits), list(stage.recv_splits), group, tag, out)
        self._gather = stage.gather
        self._ordered_buffer: Tensor | None = None

    def begin(self, send: Tensor) -> None:
        super().begin(self._in_order(send))

    def __call__(self, send: Tensor) -> Tensor:
        return super().__call__(self._in_order(send))

    def _in_order(self, buffer: Tensor) -> Tensor:
        if self._ordered_buffer is None:
            self._ordered_buffer = in_order(buffer, self._gather)
        return self._ordered_buffer


def in_order(buffer: Tensor, gather: Sequence[tuple[int, int]] | None) -> Tensor:
    """The slices (start, length) of a buffer one behind the other; itself for None."""
    return buffer if gather is None else torch.cat([buffer[start : start + length] for start, length in gather])
