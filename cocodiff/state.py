"""The one object a wrapped pipeline's parts share: config, mesh, lanes, exchanges and the shards of the current run."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from cocodiff.config import Config, Selective
from cocodiff.errors import ConfigError, PatchError
from cocodiff.exchange import (
    Exchange,
    FlatExchange,
    Layout,
    Ring,
    StagedExchange,
    gather_equal,
    gather_rows,
    split_sizes,
)
from cocodiff.exchange.lanes import Lane, make_lane
from cocodiff.exchange.transport import PointToPointTransport, Transport, make_transport
from cocodiff.observe.bytes import Tally
from cocodiff.observe.timeline import COMPUTE, Timeline
from cocodiff.parallel.layout import outer_difference
from cocodiff.parallel.mesh import Axis, Mesh
from cocodiff.parallel.tokens import Tokens
from cocodiff.plan import layer_costs, pieces
from cocodiff.selective.exchange import SlowLinks
from cocodiff.selective.memory import free_bytes, held_bytes
from cocodiff.selective.run import SelectiveCall, StepCoding
from cocodiff.selective.schedule import coded_from, names_level

_log = logging.getLogger(__name__)


class Engine:
    """Config, mesh, lanes and exchanges of one wrapped pipeline on this rank (more than one rank).

    Attributes:
        timeline: while one is recording, it gets every span of compute.
        users: transformers that run on it; the last closes it.
    """

    def __init__(self, config: Config, mesh: Mesh, device: torch.device) -> None:
        self.config, self.mesh, self.device = config, mesh, device
        self.timeline: Timeline | None = None
        self.users = 0
        used = {axis.level for axis in (mesh.ulysses, mesh.ring, mesh.sequence, mesh.everyone)} | set(mesh.level_groups)
        self._lanes = {level: make_lane(mesh.cluster.levels[level].name, device) for level in sorted(used)}
        self.tally = Tally()
        axis, lane = mesh.ulysses, self.lane(mesh.ulysses)
        self.flat: Exchange = FlatExchange(axis.cluster.sizes, axis.rank, axis.group, lane, self.tally)
        groups = mesh.level_groups
        self.staged: Exchange = StagedExchange(axis.cluster.sizes, axis.rank, groups, self._lanes, self.tally)
        self.ring: Ring | None = None
        if (around := mesh.ring).group is not None:
            self.ring = Ring(around.cluster.sizes, around.rank, around.group, self.lane(around), self.tally)
        self.links: SlowLinks | None = None
        self.selection: SelectiveCall | None = None  # of the call that is running, or the last one
        self.coding: StepCoding | None = None  # of the forward that is running
        self._warned: set[str] = set()
        self.selective = Selective.of(config.transmission)
        crossed = mesh.sequence.level if mesh.sequence.size > 1 else -1
        slow = None if self.selective is None else coded_from(self.selective, mesh.cluster, crossed)
        if self.selective is not None and slow is not None:
            self.links = SlowLinks(slow, make_lane("encode", device), make_lane("decode", device))
            self.coded_always = names_level(self.selective, mesh.cluster, slow)
            self.kv_only = mesh.ulysses.size == 1 or mesh.ulysses.level < slow
            self.connected: Any = SimpleNamespace(
                mesh=mesh,
                exchanges={"flat": self.flat, "staged": self.staged},
                around=self.ring,
                ulysses=self._transport(mesh.ulysses),
                ring=self._transport(mesh.ring),
            )
        self._tokens: Tokens | None = None
        self._settled: dict[int, int] = {}

    def _transport(self, axis: Axis) -> Transport:
        transport = make_transport(axis.group, axis.cluster.sizes, self.lane(axis), self.tally)
        if isinstance(transport, PointToPointTransport):
            transport._messages = 2**29  # exact exchanges over the same group have numbers of their own
        return transport

    def say(self, about: str, text: str) -> None:
        """Warn once about one thing, on rank 0."""
        if self.mesh.everyone.rank == 0 and about not in self._warned:
            _log.warning(text)
        self._warned.add(about)

    def close(self) -> None:
        """End the lanes and free the groups; nothing may be in flight. Collective."""
        beside = () if self.links is None else (self.links.encoding, self.links.decoding)
        for lane in (*self._lanes.values(), *beside):
            lane.close()
        self.mesh.close()

    @property
    def unsettled(self) -> list[int]:
        """What was submitted to each lane since the last call that ended well: nothing, unless one failed."""
        return [lane.submitted - self._settled.get(level, 0) for level, lane in self._lanes.items()]

    def settled(self) -> None:
        """A call ended well: nothing of it is under way on any rank."""
        self._settled = {level: lane.submitted for level, lane in self._lanes.items()}

    def lane(self, axis: Axis) -> Lane:
        """That of the slowest link which the axis crosses."""
        return self._lanes[axis.level]

    @property
    def rank(self) -> int:
        """This rank's place on the ulysses axis, by which exchanges and layouts count."""
        return self.mesh.ulysses.rank

    @property
    def part(self) -> int:
        """Which part of the sequence is here: this rank's place on the ring axis."""
        return self.mesh.ring.rank

    @property
    def tokens(self) -> Tokens:
        """Shards of the forward that is running."""
        if self._tokens is None:
            raise PatchError(
                "attention ran outside the wrapped transformer's forward: something replaced `transformer.forward` "
                "after cocodiff.wrap (removing hooks that were added before it does). Call cocodiff.unwrap(pipe) and "
                "cocodiff.wrap(pipe) again, last."
            )
        return self._tokens

    @contextmanager
    def sharded(self, tokens: Tokens) -> Iterator[None]:
        """While inside, the transformer's inputs are this rank's shards of `tokens`."""
        self._tokens = tokens
        try:
            yield
        finally:
            self._tokens = None

    @property
    def output_stays_inside(self) -> bool:
        """Whether keys and values cross slower links than outputs.

        Then a piece is finished as soon as it is attended, so that its next keys and values leave at once. If not,
        all pieces are attended first, since outputs travel meanwhile.
        """
        return self.ring is not None and self.mesh.ulysses.level < self.mesh.ring.level

    def layouts(self, num_heads: int, stream: str | None = None) -> list[Layout]:
        """Tokens and heads of every rank of each part, for one attention layer of the running forward.

        Args:
            stream: it attends to the tokens of that one alone.
        """
        mesh, tokens = self.mesh, self.tokens
        seq_lens, inner = tokens.joint if stream is None else tokens.streams[stream], mesh.ulysses.size
        heads = split_sizes(num_heads, inner)
        return [Layout(seq_lens[start : start + inner], heads) for start in range(0, len(seq_lens), inner)]

    def plan(self, layouts: Sequence[Layout], width: int, itemsize: int) -> tuple[Exchange, int, bool]:
        """The exchange for messages of this layer, into how many pieces its rows are cut, and whether it is selective.

        Decided from the layouts and the cluster alone, so identically on all ranks and in every run. `width` is
        heads x head_dim, of `itemsize` bytes each.
        """
        mesh, coding, place = self.mesh, self.coding, self.device.type
        seq_lens = [length for layout in layouts for length in layout.seq_lens]
        modelled = partial(
            layer_costs, mesh.cluster, mesh.degrees, self.config.exchange, place, width, itemsize, seq_lens
        )
        costs, coded = modelled(), False
        if coding is not None and (self.coded_always or costs.worth_coding):
            costs, coded = modelled(share=coding.share), True
        exchange = self.staged if costs.exchange == "staged" and mesh.ulysses.size > 1 else self.flat
        return exchange, pieces(costs, min(seq_lens), place), coded

    def begin(self, layers: Sequence[tuple[int, int]], batch: int, itemsize: int) -> None:
        """The first forward of a selective run: ConfigError on every rank unless what it will hold fits.

        Collective over the sequence.

        Args:
            layers: heads and head_dim of each attention.
        """
        selection, mesh, links = self.selection, self.mesh, self.links
        assert selection is not None and self.coding is not None and links is not None
        held = []
        for heads, head_dim in layers:
            if not self.plan(self.layouts(heads), heads * head_dim, itemsize)[2]:
                continue
            held.append((heads, head_dim))
            for width in {
                share * head_dim for share in split_sizes(heads, mesh.ulysses.size)
            }:  # all, so that all raise
                self.coding.check_width(width, itemsize)
        selection.cover(len(held), len(layers))
        if len(held) < len(layers):
            level = mesh.cluster.levels[links.level].name
            self.say(
                "uncoded layers",
                f"by the cluster's figures the exact exchanges of {len(layers) - len(held)} of {len(layers)} layers "
                "hide under their compute, so they stay exact. If the link is slower, measure it (cocodiff bench "
                f"collectives), or say Selective(level={level!r}).",
            )
        streams = {name: sum(sizes) for name, sizes in self.tokens.streams.items()}
        needed = held_bytes(
            mesh.cluster, mesh.degrees, links.level, mesh.everyone.rank, streams, held, batch, selection.branches
        )
        free = free_bytes(self.device)
        if free is not None and self.device.type == "cpu":
            free //= math.prod(mesh.cluster.sizes[: links.level])  # ranks inside share it
        short = torch.tensor(0.0 if free is None else float(needed - free), device=self.device)
        if self.worst(short) > 0:
            raise ConfigError(
                f"selective transmission would hold {needed / 1e9:.2f} GB on rank {mesh.everyone.rank}, which has "
                f"{(free or 0) / 1e9:.2f} GB left, and some rank has too little. Use more ranks, a smaller picture, "
                "or transmission='exact', which holds nothing."
            )

    def worst(self, number: Tensor) -> float:
        """The largest on all ranks of the sequence. Collective."""
        axis = self.mesh.sequence
        if axis.group is None:
            return float(number)
        self._tally_gather("guard", number.itemsize, axis)
        return float(gather_equal(number, axis.group, self.lane(axis), "guard").max())

    def gather(self, x: Tensor, stream: str) -> Tensor:
        """`(B, S_local, C)` shards of a stream -> the whole `(B, S, C)` on every rank that has some of it."""
        axis, sizes = self.mesh.sequence, self.tokens.streams[stream]
        if axis.group is None:
            return x
        self._tally_gather("gather", max(sizes) * x.shape[0] * x.shape[2] * x.itemsize, axis)
        with self.span("wait gather"):
            return gather_rows(x, sizes, axis.group, self.lane(axis))

    def differs(self, tensors: Iterable[Tensor], axis: Axis | None = None) -> Tensor:
        """Whether some rank holds other bits in these tensors: a bool on the device, for which nothing waits.

        Args:
            axis: the ranks that are asked; everyone if left out.
        """
        axis = axis or self.mesh.everyone
        kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        sums = []
        for x in tensors:
            bits = x.contiguous().flatten().view(kinds[x.itemsize])
            places = torch.arange(1, bits.numel() + 1, device=x.device)  # int64, wraps: order counts, too
            sums.append((bits * places).sum())
        if axis.group is None:
            return torch.zeros((), dtype=torch.bool, device=sums[0].device)
        self._tally_gather("compare", len(sums) * sums[0].itemsize, axis)
        everyone = gather_equal(torch.stack(sums), axis.group, self.lane(axis), "compare")
        return (everyone != everyone[0]).any()

    def anywhere(self, flag: Tensor) -> bool:
        """Whether a flag is set on some rank of all. Collective; more than one rank."""
        axis = self.mesh.everyone
        assert axis.group is not None
        self._tally_gather("compare", 1, axis)
        return bool(gather_equal(flag.to(torch.uint8), axis.group, self.lane(axis), "compare").any())

    def swap(self, x: Tensor) -> Tensor:
        """A tensor of the same shape in both cfg halves, equal within each -> `(2, *shape)`, that of either half.

        Each rank sends the other half its share of the elements; the shares are put together within the half.
        """
        sequence, cfg = self.mesh.sequence, self.mesh.cfg
        assert cfg.group is not None
        share = -(-x.numel() // sequence.size)
        flat = F.pad(x.flatten(), (0, share * sequence.size - x.numel()))
        mine = flat[sequence.rank * share : (sequence.rank + 1) * share]
        with self.span("wait branches"):
            self._tally_gather("branches", share * x.itemsize, cfg)
            shares = gather_equal(mine, cfg.group, self.lane(cfg), "branches")
            if sequence.group is not None:
                self._tally_gather("branches", 2 * share * x.itemsize, sequence)
                together = gather_equal(shares, sequence.group, self.lane(sequence), "branches")
                shares = together.transpose(0, 1).flatten(1)
        return shares[:, : x.numel()].view(2, *x.shape)

    def _tally_gather(self, label: str, shard_bytes: int, axis: Axis) -> None:
        """As of a ring (gloo's and NCCL's): all shards but one go to the next rank. Other algorithms send no less."""
        sizes = axis.cluster.sizes
        sent = [0] * len(sizes)
        sent[outer_difference(axis.rank, (axis.rank + 1) % axis.size, sizes)] = (axis.size - 1) * shard_bytes
        self.tally.add(label, sent)

    def span(self, label: str) -> AbstractContextManager[None]:
        """Names a stretch of compute in the timeline, if one is kept."""
        return nullcontext() if self.timeline is None else self.timeline.span(COMPUTE, label)

    @contextmanager
    def recording(self) -> Iterator[Timeline]:
        """While inside, a timeline of all lanes, whose time begins on all ranks at once. Collective."""
        timeline = Timeline(self.device)
        dist.barrier(group=self.mesh.host_group)
        timeline.restart()
        self._set_timeline(timeline)
        try:
            yield timeline
        finally:
            self._set_timeline(None)

    def _set_timeline(self, timeline: Timeline | None) -> None:
        self.timeline = timeline
        beside = () if self.links is None else (self.links.encoding, self.links.decoding)
        for lane in (*self._lanes.values(), *beside):
            lane.timeline = timeline
