"""The topology-staged all-to-all: one stage per level of the cluster, each inside one group of that level.

Source: CoCoDiff (arXiv 2604.14561), TAPA: first inside each GPU, then across GPUs. Here for any number of levels, and
pipelined: every stage runs on its level's lane, so the slow stage of one tensor runs beside the fast stage of the next.
The bytes over slow links are those of a flat exchange; messages are fewer and larger, and groups do not contend.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from cocodiff.exchange.flat import all_to_all
from cocodiff.exchange.layout import Stage, Traffic, digits, staged_order, staged_plan
from cocodiff.lanes import Lane, Ticket
from cocodiff.tally import Tally


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
        self._digits = digits(rank, sizes)
        self.order = staged_order(sizes)

    def start(self, send: Tensor, traffic: Traffic, label: str) -> Ticket:
        """Send a buffer packed in `self.order`; the ticket gives what arrived, in rank order, one-dimensional."""
        source: Tensor | Ticket = send
        sent = [0] * len(self._sizes)
        for stage in staged_plan(traffic, self._sizes, self._rank):
            sent[stage.level] = (sum(stage.send_splits) - stage.send_splits[self._digits[stage.level]]) * send.itemsize
            source = self._lanes[stage.level].submit(partial(self._run, stage), source, label)
        self._tally.add(label, sent)
        assert not isinstance(source, Tensor), "a staged exchange needs a level of more than one rank"
        return source

    def _run(self, stage: Stage, buffer: Tensor) -> Tensor:
        if stage.gather is not None:
            buffer = torch.cat([buffer[start : start + length] for start, length in stage.gather])
        return all_to_all(buffer, list(stage.send_splits), list(stage.recv_splits), self._groups[stage.level])
