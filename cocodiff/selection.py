"""Selective transmission of one engine: which step of which run this is, what each layer sends, and what was missed.

Whatever is decided here is decided identically on all ranks of a sequence: from the settings, the scheduler's times and
the number of calls, or (the guard) from one small reduction.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cocodiff.errors import ConfigError
from cocodiff.exchange import Exchange, Ring, SelectiveExchange, SelectiveRing, StagedExchange
from cocodiff.exchange.coder import Coder, Parcel
from cocodiff.exchange.selective import TAG, Link
from cocodiff.lanes import Lane, make_lane
from cocodiff.mesh import Mesh
from cocodiff.similarity import Copies, Route
from cocodiff.tally import Tally
from cocodiff.topology import Cluster
from cocodiff.transmission import LADDER, SHORT_RUN, Coding, Selective

_log = logging.getLogger(__name__)


# A rank's share of a link, in GB/s, above which coding costs more than it saves: a third to a quarter of what a rank
# encodes and decodes. MEASURED on a CPU core that two ranks share (float32: 20 ns an element), ASSUMED elsewhere.
WORTH_CODING_GBS = {"cpu": 0.05, "cuda": 15.0, "xpu": 5.0}


def slow_level(selective: Selective, cluster: Cluster, crossed: int, device_type: str) -> int | None:
    """The innermost level where it applies; None where the outermost level that is crossed lies inside it.

    Of the levels that are slow only by their figures, one must be slow enough for coding to gain; what a cluster calls
    slow, and what a user names, is taken at its word.

    Raises:
        ConfigError: there is no level of that name.
    """
    names = [level.name for level in cluster.levels]
    if selective.level is not None and selective.level not in names:
        raise ConfigError(f"level={selective.level!r}: cluster {cluster.name!r} has the levels {', '.join(names)}.")
    most = WORTH_CODING_GBS.get(device_type, WORTH_CODING_GBS["cuda"]) / cluster.flat_efficiency
    chosen = [
        level.name == selective.level
        if selective.level is not None
        else slow and (level.slow is True or level.bandwidth_gbs <= most)
        for level, slow in zip(cluster.levels, cluster.slow, strict=True)
    ]
    slow = next((level for level, yes in enumerate(chosen) if yes), len(names))
    return slow if crossed >= slow else None


class Selection:
    """Which exchanges are selective, and how, from run to run.

    Args:
        slow: the innermost level where it applies.
        lanes: of the links, by level.

    Attributes:
        branches: of guidance that are calls of their own, in the run that is running.
        rungs: by which the guard has raised what each step carries.
    """

    def __init__(
        self, selective: Selective, mesh: Mesh, slow: int, lanes: Mapping[int, Lane], tally: Tally, device: torch.device
    ) -> None:
        self.selective, self.mesh, self.slow = selective, mesh, slow
        self.copies = Copies()
        self._link = Link(slow, Coder(self.copies), make_lane("encode", device), make_lane("decode", device), tally)
        self._lanes, self._tags, self._device = lanes, itertools.count(TAG), device
        self.alone = mesh.ulysses.level < slow or mesh.ulysses.size == 1  # keys and values alone cross
        self._said: set[int] = set()
        self._times: list[float] | None = None  # while a run is running
        self._expected: Callable[[], Sequence[float]] | None = None
        self.branches = 1
        self._conditions: list[Any] = []
        self._calls: Counter[int] = Counter()
        self._branch = 0
        self._layers: dict[Hashable, int] = {}
        self.missed: defaultdict[tuple[int, int, str], list[Tensor]] = defaultdict(list)  # (step, layer, label)
        self.rungs = 0
        self.guarded: list[tuple[int, float, int]] = []  # (step, worst error, rungs from there on)

    @property
    def running(self) -> bool:
        return self._times is not None

    def share(self, itemsize: int) -> float:
        """Of the bytes of an exact exchange, on average over the run that is running; 1 outside one."""
        return self.selective.in_bits(itemsize, self.alone) / (8 * itemsize) if self.running else 1.0

    def expect(self, times: Callable[[], Sequence[float]], branches: int) -> None:
        """A run begins with the next forward.

        Args:
            times: of the scheduler, one for each call that a branch makes; known in the first forward.
            branches: calls of the transformer for each of them.
        """
        self._expected, self.branches = times, branches

    def _begin(self, times: Sequence[float]) -> None:
        """Nothing is held, and nothing has been counted."""
        spacing = abs(times[-1] - times[0]) / max(len(times) - 1, 1) or 1.0
        self._times = [(times[0] - time) / spacing for time in times]
        if len(times) < SHORT_RUN and len(times) not in self._said:
            self._said.add(len(times))
            if self.mesh.everyone.rank == 0:
                _log.warning(
                    "a run of %d steps: fewer than %d have little to predict from, so it may send %.1f times as much.",
                    len(times), SHORT_RUN, SHORT_RUN / len(times),
                )  # fmt: skip
        self._conditions, self.rungs = [], 0
        for one in (self.copies, self._calls, self.missed, self.guarded):
            one.clear()

    def end(self) -> None:
        """Nothing is selective until the next run. Copies are kept for whoever looks at them."""
        self._times = self._expected = None

    @property
    def lanes(self) -> tuple[Lane, Lane]:
        """Those beside the links' own."""
        return self._link.encoding, self._link.decoding

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()

    def forward(self, conditioning: Any) -> bool:
        """A forward begins: find out of which branch, by what it is conditioned on. Whether it is the first of a run.

        Pipelines hand over the same object at every step. One that is new (a callback that changes the prompt) is of
        the branch whose turn it is.
        """
        first = self._expected is not None
        if self._expected is not None:
            self._begin(self._expected())
            self._expected = None
        if not self.running:
            return False
        known = next((number for number, one in enumerate(self._conditions) if one is conditioning), None)
        if known is None and len(self._conditions) < self.branches:
            known = len(self._conditions)
            self._conditions.append(conditioning)
        elif known is None:
            known = min(range(self.branches), key=lambda number: self._calls[number])
            self._conditions[known] = conditioning
        self._branch = known
        self._calls[known] += 1
        return first

    def bind(
        self, exchange: Exchange, ring: Ring | None, key: Hashable
    ) -> tuple[Exchange, Ring | SelectiveRing | None]:
        """The exchange and the ring of one layer in the forward that runs, selective where they cross slow links."""
        if self._times is None:
            return exchange, ring
        layer = self._layers.setdefault(key, len(self._layers))
        step = self._calls[self._branch] - 1
        channel = _Channel(self, self._branch, layer, step, self._times[min(step, len(self._times) - 1)])
        mesh, link = self.mesh, self._link
        if not self.alone:
            axis = mesh.ulysses
            assert axis.group is not None
            staged = exchange if isinstance(exchange, StagedExchange) else None
            sizes, lane = axis.cluster.sizes, self._lanes[axis.level]
            exchange = SelectiveExchange(
                link, channel, sizes, axis.rank, axis.ranks, axis.group, lane, staged, self._tags
            )
        if ring is None or mesh.ring.level < self.slow:
            return exchange, ring
        axis = mesh.ring
        assert axis.group is not None
        sizes, lane = axis.cluster.sizes, self._lanes[axis.level]
        return exchange, SelectiveRing(link, channel, sizes, axis.rank, axis.ranks, axis.group, lane, self._tags)

    def coding(self, step: int, width: int, itemsize: int, first: bool) -> Coding:
        """Of rows of a width at a step; `first` where nothing is held, so that all rows must come."""
        assert self._times is not None
        codings = self.selective.codings(len(self._times), width, itemsize, self.alone)
        if first or step >= len(codings):  # more steps than the scheduler said
            return codings[0]
        coding = codings[step]
        if self.rungs and coding in LADDER:
            return LADDER[max(LADDER.index(coding) - self.rungs, 0)]
        return coding

    def guard(self, worst: Callable[[Tensor], float]) -> None:
        """After a forward: raise what the next exchanges carry while the worst rank's error leaves the bound.

        Args:
            worst: the largest of a number on all ranks of the sequence. Collective.
        """
        bound, step = self.selective.max_error, self._calls[self._branch] - 1
        if bound is None or not self.running:
            return
        norms = [x for key, several in self.missed.items() if key[0] == step for x in several]
        missed, carried = torch.stack(norms).sum(0) if norms else torch.zeros(2, device=self._device)
        error = worst((missed / carried.clamp_min(1e-30)).sqrt())
        if error > bound:
            self.rungs = min(self.rungs + 1, len(LADDER) - 1)
        elif error < bound / 4:
            self.rungs = max(self.rungs - 1, 0)
        self.guarded.append((step, error, self.rungs))


class _Channel:
    """`cocodiff.exchange.selective.Channel` of one layer in one forward."""

    def __init__(self, selection: Selection, branch: int, layer: int, step: int, time: float) -> None:
        self._selection, self._key, self._step, self._time = selection, (branch, layer), step, time
        self._numbers: Counter[str] = Counter()

    def number(self, label: str) -> int:
        self._numbers[label] += 1
        return self._numbers[label] - 1

    def parcel(
        self, label: str, place: tuple, blocks: tuple[int, ...], routes: tuple[Route, ...], width: int, itemsize: int
    ) -> Parcel:
        key = (*self._key, label, *place)
        first = self._selection.copies.get(key, sum(blocks), width) is None
        coding = self._selection.coding(self._step, width, itemsize, first)
        return Parcel(key, (*self._key, *place), label, blocks, routes, width, coding, self._step, self._time)

    def missed(self, label: str, norms: Tensor) -> None:
        self._selection.missed[self._step, self._key[1], label].append(norms)
