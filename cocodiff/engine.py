"""The one object a wrapped pipeline's parts share: config, mesh, lanes, exchanges and the shards of the current run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from cocodiff.config import Config
from cocodiff.errors import ConfigError, PatchError
from cocodiff.exchange import Exchange, FlatExchange, Layout, StagedExchange, gather_equal, gather_rows, split_sizes
from cocodiff.exchange.layout import outer_difference
from cocodiff.lanes import make_lane
from cocodiff.mesh import Mesh
from cocodiff.tally import Tally
from cocodiff.timeline import COMPUTE, Timeline
from cocodiff.tokens import Tokens

MAX_PIECES = 4
ROWS_PER_PIECE = 128  # where there are fewer than two such pieces, two smaller ones
LATENCIES_PER_PIECE = 20  # the exchange of a piece takes at least this many times its latency, and so many seconds;
# MEASURED on a CPU whose ranks share cores: pieces of 4 ms took 1.2 times as long as none, those of 9 ms gained.
LEAST_PIECE_SECONDS = {"cpu": 5e-3}
# Cutting makes matrix products smaller: MEASURED 6 to 9 % of the compute on a CPU, more than it hides unless a layer's
# exchanges take at least this share of its compute, which is MODELLED from what a rank is assumed to do in a second.
WORTH_CUTTING = 0.5
ASSUMED_TFLOPS = {"cpu": 0.03, "cuda": 300.0, "xpu": 100.0}


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
        levels = mesh.cluster.levels
        active = list(mesh.level_groups)
        self._lanes = {level: make_lane(levels[level].name, device) for level in active}
        self.outer_lane = self._lanes[active[-1]]
        self.tally, sizes = Tally(), mesh.cluster.sizes
        self.flat: Exchange = FlatExchange(sizes, mesh.flat_group, self.outer_lane, self.tally)
        self.staged: Exchange = StagedExchange(sizes, mesh.rank, mesh.level_groups, self._lanes, self.tally)
        self._tokens: Tokens | None = None

    def close(self) -> None:
        """End the lanes and free the groups; nothing may be in flight. Collective."""
        for lane in self._lanes.values():
            lane.close()
        self.mesh.close()

    @property
    def submitted(self) -> list[int]:
        """What was ever submitted to each lane; equal on all ranks between calls, unless one failed within a call."""
        return [lane.submitted for lane in self._lanes.values()]

    @property
    def rank(self) -> int:
        return self.mesh.rank

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

    def layout(self, num_heads: int) -> Layout:
        """Tokens and heads of every rank for one attention layer of the running forward."""
        return Layout(self.tokens.joint, split_sizes(num_heads, self.mesh.world_size))

    def check_heads(self, num_heads: int) -> None:
        """ConfigError unless every rank gets at least one of so many heads."""
        ranks = self.mesh.world_size
        if num_heads < ranks:
            raise ConfigError(
                f"{num_heads} attention heads cannot be shared among {ranks} ranks: every rank needs one. "
                f"Start at most {num_heads} ranks."
            )

    def plan(self, layout: Layout, width: int, itemsize: int) -> tuple[Exchange, int]:
        """The exchange for messages of this layer, and into how many pieces its rows are cut.

        Decided from the layout and the cluster alone, so identically on all ranks and in every run. `width` is
        heads x head_dim, of `itemsize` bytes each.
        """
        cluster, seq_len = self.mesh.cluster, sum(layout.seq_lens)
        rows = seq_len / self.mesh.world_size
        seconds = {name: cluster.seconds(name, rows * width * itemsize) for name in ("flat", "staged")}
        choice = self.config.exchange
        if choice == "auto":
            choice = "staged" if seconds["staged"] < seconds["flat"] else "flat"
        exchange, latency = self.staged if choice == "staged" else self.flat, cluster.seconds(choice, 0)
        flops = rows * width * (24 * width + 4 * seq_len)  # projections and an MLP four times as wide; attention
        compute_seconds = flops / (ASSUMED_TFLOPS.get(self.device.type, 100.0) * 1e12)
        if 4 * seconds[choice] < WORTH_CUTTING * compute_seconds:
            return exchange, 1
        least_seconds = max(LATENCIES_PER_PIECE * latency, LEAST_PIECE_SECONDS.get(self.device.type, 1e-4))
        pieces = int(seconds[choice] / least_seconds)
        fewest = min(layout.seq_lens)
        return exchange, max(1, min(pieces, MAX_PIECES, max(2, fewest // ROWS_PER_PIECE), fewest))

    def gather(self, x: Tensor, stream: str) -> Tensor:
        """`(B, S_local, C)` shards of a stream -> the whole `(B, S, C)` on every rank."""
        longest = max(self.tokens.streams[stream]) * x.shape[0] * x.shape[2] * x.itemsize
        self._tally_gather("gather", longest)
        with self.span("wait gather"):
            return gather_rows(x, self.tokens.streams[stream], self.mesh.flat_group, self.outer_lane)

    def differs(self, tensors: Iterable[Tensor]) -> Tensor:
        """Whether some rank holds other bits in these tensors: a bool on the device, for which nothing waits."""
        kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        sums = []
        for x in tensors:
            bits = x.contiguous().flatten().view(kinds[x.itemsize])
            places = torch.arange(1, bits.numel() + 1, device=x.device)  # int64, wraps: order counts, too
            sums.append((bits * places).sum())
        self._tally_gather("compare", len(sums) * sums[0].itemsize)
        everyone = gather_equal(torch.stack(sums), self.mesh.flat_group, self.outer_lane, "compare")
        return (everyone != everyone[0]).any()

    def _tally_gather(self, label: str, shard_bytes: int) -> None:
        """As of a ring (gloo's and NCCL's): all shards but one go to the next rank. Other algorithms send no less."""
        rank, ranks = self.rank, self.mesh.world_size
        sent = [0] * len(self.mesh.cluster.sizes)
        sent[outer_difference(rank, (rank + 1) % ranks, self.mesh.cluster.sizes)] = (ranks - 1) * shard_bytes
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
        for lane in self._lanes.values():
            lane.timeline = timeline
