"""An all-to-all of messages over a process group, as work for a lane: gloo's way, see `PointToPointTransport`."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from cocodiff.parallel.mesh import Axis

Prepare = Callable[[Tensor], Tensor]


class Messages:
    """Work for a lane: `begin` posts the messages as soon as the buffer exists, the call waits for them.

    Args:
        tag: tells them from others that are under way in the group.
        send_splits, recv_splits: elements for, and of, each rank of the axis.
        out: memory in which they arrive; new memory if None.
        prepare: is applied to the buffer before it is sent.
    """

    def __init__(
        self,
        axis: Axis,
        tag: int,
        send_splits: list[int],
        recv_splits: list[int],
        out: Tensor | None,
        prepare: Prepare | None,
    ) -> None:
        self._axis, self._tag, self._send_splits, self._recv_splits = axis, tag, send_splits, recv_splits
        self._out, self._prepare = out, prepare
        self._begun: tuple[Tensor, Tensor, list[dist.Work]] | None = None  # what is sent must live until it is

    def begin(self, send: Tensor) -> None:
        group, members, rank, size = self._axis.group, self._axis.members, self._axis.rank, self._axis.size
        assert group is not None
        send = send if self._prepare is None else self._prepare(send)
        recv = send.new_empty(sum(self._recv_splits)) if self._out is None else self._out
        incoming, outgoing = recv.split(self._recv_splits), send.split(self._send_splits)
        others = [(rank + distance) % size for distance in range(1, size)]
        # The group's own methods: dist.isend and irecv around them cost as much again, for every message.
        pending = [group.recv([incoming[r]], members[r], self._tag) for r in reversed(others) if self._recv_splits[r]]
        pending += [group.send([outgoing[r]], members[r], self._tag) for r in others if self._send_splits[r]]
        incoming[rank].copy_(outgoing[rank])
        self._begun = recv, send, pending

    def __call__(self, send: Tensor) -> Tensor:
        if self._begun is None:
            self.begin(send)
        assert self._begun is not None
        recv, _, pending = self._begun
        for work in pending:
            work.wait()
        return recv
