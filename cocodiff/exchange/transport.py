"""How bytes move among the ranks of one group. Nothing above this file knows what gloo, NCCL, XCCL and MPI differ in.

A transport serves one group on one lane: whatever is asked of it runs there in order, beside the compute. It counts the
bytes that it sends, by level of the cluster, and numbers its messages, so that several may be under way at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cocodiff.exchange.lanes import Lane, Ticket, Work
from cocodiff.exchange.messages import Messages, Prepare
from cocodiff.observe.bytes import ByteCounter
from cocodiff.parallel.mesh import Axis


class Transport(ABC):
    """Moves elements among the ranks of one axis, which it names by their places on the axis.

    Args:
        lane: of the slowest link that the axis crosses; no other lane uses its group.

    Attributes:
        rank: this rank's place on the axis, which has `size` ranks.
        sizes: ranks of the axis per level of the cluster, innermost first.
    """

    def __init__(self, axis: Axis, lane: Lane, counter: ByteCounter) -> None:
        self.axis, self.lane, self._counter = axis, lane, counter
        self.rank, self.size, self.sizes = axis.rank, axis.size, axis.cluster.sizes

    def all_to_all(
        self,
        send: Tensor | Ticket,
        send_splits: Sequence[int],
        recv_splits: Sequence[int],
        dtype: torch.dtype,
        label: str,
        *,
        out: Tensor | None = None,
        prepare: Prepare | None = None,
        exact_bytes: Sequence[int] | None = None,
    ) -> Ticket:
        """Send the parts of a one-dimensional buffer, one to each rank; the ticket gives the parts of all ranks.

        Args:
            send: the buffer, or the ticket of work on another lane that produces it.
            send_splits, recv_splits: elements for, and of, each rank.
            dtype: of the buffer.
            label: names the tensor in timelines and counts.
            out: one-dimensional memory in which the parts arrive; new memory if None.
            prepare: is applied to the buffer, on the lane, before it is sent.
            exact_bytes: what an exact exchange would send to each rank, where that is more than what is sent.
        """
        sent = [count * dtype.itemsize for count in send_splits]
        self._count(label, sent, sent if exact_bytes is None else exact_bytes)
        # Sizes of exact parts are products of a number of the source and one of the destination: where none is zero and
        # one rank finds all of its parts equal, so does every rank. Of coded parts that does not hold.
        equal = exact_bytes is None and send_splits[0] > 0 and len({*send_splits, *recv_splits}) == 1
        work = self._all_to_all(list(send_splits), list(recv_splits), equal, out, prepare)
        return self.lane.submit(work, send, label)

    def pass_on(
        self,
        send: Tensor | Ticket,
        send_count: int,
        recv_count: int,
        dtype: torch.dtype,
        label: str,
        *,
        prepare: Prepare | None = None,
        exact_bytes: int | None = None,
    ) -> Ticket:
        """Send a buffer to the next rank and receive that of the rank before, around all ranks of the group.

        Args:
            send_count, recv_count: elements of the buffers, which may have none.
            send, dtype, label, prepare, exact_bytes: as in `all_to_all`.
        """
        sent, exact, ahead = [0] * self.size, [0] * self.size, (self.rank + 1) % self.size
        sent[ahead] = send_count * dtype.itemsize
        exact[ahead] = sent[ahead] if exact_bytes is None else exact_bytes
        self._count(label, sent, exact)
        return self.lane.submit(self._pass_on(send_count, recv_count, prepare), send, label)

    def all_gather(self, x: Tensor, label: str) -> Ticket:
        """Gather a tensor of the same shape on all ranks; the ticket gives `(size, *shape)`."""
        # As a ring does it (gloo's and NCCL's): all shards but one go to the next rank of the group. None sends less.
        sent, members = [0] * self.size, self.axis.members
        sent[members.index((members[self.rank] + 1) % self.size)] = (self.size - 1) * x.numel() * x.itemsize
        self._count(label, sent, sent)
        return self.lane.submit(self._all_gather, x, label)

    @abstractmethod
    def _all_to_all(
        self, send_splits: list[int], recv_splits: list[int], equal: bool, out: Tensor | None, prepare: Prepare | None
    ) -> Work:
        """The work of an all-to-all, for the lane. `equal`: all parts of all ranks are of one size."""

    def _pass_on(self, send_count: int, recv_count: int, prepare: Prepare | None) -> Work:
        """The work of `pass_on`: here an all-to-all whose other parts are empty."""
        send_splits, recv_splits = [0] * self.size, [0] * self.size
        send_splits[(self.rank + 1) % self.size] = send_count
        recv_splits[(self.rank - 1) % self.size] = recv_count
        return self._all_to_all(send_splits, recv_splits, False, None, prepare)

    @abstractmethod
    def _all_gather(self, send: Tensor) -> Tensor:
        """The work of a gather."""

    def _count(self, label: str, sent: Sequence[int], exact: Sequence[int]) -> None:
        by_level, exact_by_level = [0] * len(self.sizes), [0] * len(self.sizes)
        for level, count, whole in zip(self.axis.levels, sent, exact, strict=True):
            if level is not None:
                by_level[level] += count
                exact_by_level[level] += whole
        self._counter.add(label, by_level, exact_by_level)


class GroupTransport(Transport):
    """What the transports over a process group share.

    Attributes:
        group: the ranks as torch.distributed has sorted them.
        members: place on the axis -> rank in the group; `places`: the reverse.
        in_order: both are the same.
    """

    def __init__(self, axis: Axis, lane: Lane, counter: ByteCounter) -> None:
        super().__init__(axis, lane, counter)
        assert axis.group is not None
        self.group, self.members = axis.group, axis.members
        self.places = tuple(sorted(range(self.size), key=self.members.__getitem__))
        self.in_order = self.members == tuple(range(self.size))

    def _all_gather(self, send: Tensor) -> Tensor:
        out = send.new_empty(self.size * send.numel())
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        gather(out, send.flatten(), group=self.group)
        everyone = out.view(self.size, *send.shape)
        return everyone if self.in_order else torch.stack([everyone[member] for member in self.members])


class PointToPointTransport(GroupTransport):
    """An all-to-all of messages, all receives posted before any send: for gloo.

    Gloo sends data once the receiver has said that it is ready, on the same ordered connection. Its own all-to-all
    posts sends first: that word then waits behind the data that goes the other way, and by chance the link is used in
    one direction at a time. MEASURED (benchmarks/gloo_duplex.py): half to all of a link's bandwidth; this way, all.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._messages = 0  # the same on all ranks of the group, whose programs are the same

    def _all_to_all(
        self, send_splits: list[int], recv_splits: list[int], equal: bool, out: Tensor | None, prepare: Prepare | None
    ) -> Work:
        self._messages += 1
        return Messages(self.axis, self._messages % 2**30, send_splits, recv_splits, out, prepare)


class CollectiveTransport(GroupTransport):
    """One collective of the backend at a time, in the lane's order: NCCL, MPI."""

    def _all_to_all(
        self, send_splits: list[int], recv_splits: list[int], equal: bool, out: Tensor | None, prepare: Prepare | None
    ) -> Work:
        def work(send: Tensor) -> Tensor:
            send = send if prepare is None else prepare(send)
            recv = send.new_empty(sum(recv_splits)) if out is None else out
            if self.in_order:
                self._single(recv, send, recv_splits, send_splits, equal)
                return recv
            arriving, leaving = ([splits[place] for place in self.places] for splits in (recv_splits, send_splits))
            arrived = torch.empty_like(recv)
            self._single(arrived, _reordered(send, send_splits, self.places), arriving, leaving, equal)
            return recv.copy_(_reordered(arrived, arriving, self.members))

        return work

    def _single(self, recv: Tensor, send: Tensor, recv_splits: list[int], send_splits: list[int], equal: bool) -> None:
        """One collective, whose parts are in the order of the group."""
        if equal:  # no splits: an operation of its own in oneCCL, whose other one has been wrong (oneCCL#190)
            dist.all_to_all_single(recv, send, group=self.group)
        else:
            self._uneven(recv, send, recv_splits, send_splits)

    def _uneven(self, recv: Tensor, send: Tensor, recv_splits: list[int], send_splits: list[int]) -> None:
        dist.all_to_all_single(recv, send, recv_splits, send_splits, group=self.group)

    def _pass_on(self, send_count: int, recv_count: int, prepare: Prepare | None) -> Work:
        ahead, behind = (self.members[(self.rank + step) % self.size] for step in (1, -1))

        def work(send: Tensor) -> Tensor:
            send = send if prepare is None else prepare(send)
            # An empty part goes as one element: all ranks take part in every batch, the group's first included.
            recv, sent = send.new_empty(max(recv_count, 1)), send if send_count else send.new_zeros(1)
            both = [
                dist.P2POp(dist.isend, sent, group=self.group, group_peer=ahead),
                dist.P2POp(dist.irecv, recv, group=self.group, group_peer=behind),
            ]
            for one in dist.batch_isend_irecv(both):
                one.wait()
            return recv[:recv_count]

        return work


class XcclTransport(CollectiveTransport):
    """As NCCL, where empty parts of uneven splits crash (oneCCL): an element stands in for each."""

    def _uneven(self, recv: Tensor, send: Tensor, recv_splits: list[int], send_splits: list[int]) -> None:
        if 0 not in send_splits + recv_splits:
            return super()._uneven(recv, send, recv_splits, send_splits)
        filler = send.new_zeros(1)
        padded = torch.cat([part if len(part) else filler for part in send.split(send_splits)])
        splits = [max(count, 1) for count in recv_splits]
        arrived = recv.new_empty(sum(splits))
        super()._uneven(arrived, padded, splits, [max(count, 1) for count in send_splits])
        parts = zip(arrived.split(splits), recv_splits, strict=True)
        recv.copy_(torch.cat([part[:count] for part, count in parts]))


class LocalTransport(Transport):
    """Sends nothing: what arrives is what was sent, cut or repeated to the size that should arrive.

    For one rank that is right. For several it costs what packing costs, which is how a bench times compute alone.
    """

    def _all_to_all(
        self, send_splits: list[int], recv_splits: list[int], equal: bool, out: Tensor | None, prepare: Prepare | None
    ) -> Work:
        def work(x: Tensor) -> Tensor:
            x = x if prepare is None else prepare(x)
            arrived = x if self.size == 1 else _stretched(x, sum(recv_splits))
            return arrived if out is None else out.copy_(arrived)

        return work

    def _all_gather(self, send: Tensor) -> Tensor:
        return torch.stack([send] * self.size)


def _reordered(buffer: Tensor, splits: list[int], order: Sequence[int]) -> Tensor:
    """A copy of a buffer whose parts come in another order."""
    parts = buffer.split(splits)
    return torch.cat([parts[index] for index in order])


def _stretched(x: Tensor, numel: int) -> Tensor:
    """A copy of a one-dimensional tensor, cut or repeated to `numel` elements."""
    if numel <= x.numel():
        return x[:numel].clone()
    return torch.cat([x] * (numel // x.numel()) + [x[: numel % x.numel()]])


def make_transport(axis: Axis, lane: Lane, counter: ByteCounter) -> Transport:
    """The transport for the backend of an axis' group; for one rank one that sends nothing."""
    if axis.group is None:
        return LocalTransport(axis, lane, counter)
    if dist.get_backend(axis.group) == "gloo":
        return PointToPointTransport(axis, lane, counter)
    kind = XcclTransport if lane.device.type == "xpu" else CollectiveTransport
    return kind(axis, lane, counter)
