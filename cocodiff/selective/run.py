"""Selective transmission of one engine: which step of which run this is, what each layer sends, and what was missed.

Whatever is decided here is decided identically on all ranks of a sequence: from the settings, the scheduler's times and
the number of calls, or (the guard) from one small reduction.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cocodiff.exchange import Exchange, Ring, StagedExchange
from cocodiff.exchange.lanes import Lane, make_lane
from cocodiff.observe.bytes import Tally
from cocodiff.parallel.mesh import Mesh
from cocodiff.selective.branches import Remembered
from cocodiff.selective.copies import Copies, Route
from cocodiff.selective.exchange import TAG, Link, SelectiveExchange
from cocodiff.selective.residual import Coder, Parcel
from cocodiff.selective.ring import SelectiveRing
from cocodiff.selective.schedule import LADDER, SHORT_RUN, Coding, Selective, is_told

_log = logging.getLogger(__name__)

MUCH = 0.5  # of what a step stood for; MEASURED: `fast` misses 0.44 at the end of 28 steps, and 0.3 to 0.6 gave 26 dB


class Selection:
    """Which exchanges are selective, and how, from run to run.

    Args:
        slow: the innermost level where it applies.
        lanes: of the links, by level.

    Attributes:
        told: `is_told`.
        branches: of guidance that are calls of their own, in the run that is running.
        rungs: by which the guard has raised what each step carries.
        coded: layers that are selective in this run, and all; `planned`: share of the bytes that they may send.
    """

    def __init__(
        self, selective: Selective, mesh: Mesh, slow: int, lanes: Mapping[int, Lane], tally: Tally, device: torch.device
    ) -> None:
        self.selective, self.mesh, self.slow = selective, mesh, slow
        self.copies = Copies()
        encoding, decoding = make_lane("encode", device), make_lane("decode", device)
        self._link = Link(slow, Coder(self.copies), encoding, decoding, lanes, itertools.count(TAG), tally)
        self._device = device
        self.told = is_told(selective, mesh.cluster, slow)
        self.alone = mesh.ulysses.level < slow or mesh.ulysses.size == 1  # keys and values alone cross
        self._said: set[str] = set()
        self._times: list[float] | None = None  # while a run is running
        self._expected: Callable[[], Sequence[float]] | None = None
        self.branches = 1
        self._paused = False
        self._conditions: list[Remembered] = []  # of each branch, and what decides the sizes of its messages
        self._shapes: list[Hashable] = []
        self._latents: Remembered | None = None  # of the last call that was of a new branch
        self._calls: Counter[int] = Counter()
        self._since: Counter[int] = Counter()  # the call with which a branch's schedule begins
        self._branch = 0
        self._layers: dict[Hashable, int] = {}
        self.missed: defaultdict[tuple[int, int, str], list[Tensor]] = defaultdict(list)  # (step, layer, label)
        self._held = 0
        self.rungs = 0
        self.coded, self.planned = (0, 0), 1.0
        self.guarded: list[tuple[int, float, int]] = []  # (step, worst error, rungs from there on)

    @property
    def running(self) -> bool:
        return self._times is not None and not self._paused

    @property
    def share(self) -> float:
        """Of the bytes of an exact exchange, on average over the run that is running; 1 outside one."""
        return self.selective.share(len(self._times), self.alone) if self._times and self.running else 1.0

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
        share = self.planned = self.share
        if share > (budget := self.selective.budget_of(self.alone)[1]):
            what = "is exact" if share == 1 else f"may send {share:.3g} of the bytes instead of {budget:.3g}"
            self._say(f"runs of fewer than {SHORT_RUN} steps have little to predict from: one of {len(times)} {what}.")
        self.free()
        self._conditions, self._shapes, self._latents, self.rungs, self._held = [], [], None, 0, 0
        for one in (self._calls, self._since, self.missed, self.guarded):
            one.clear()

    def judge(self, steps: Sequence[float]) -> None:
        """After a run: a warning where so much was missed, step by step, that the picture may be another one."""
        if steps and (error := max(steps)) > MUCH:
            self._say(
                f"at step {steps.index(error)} what was sent missed {error:.0%} of what it stood for: the picture may "
                "differ visibly from the exact one (noise added by the scheduler at each step, a sudden change?). Use "
                "a preset with more bytes, max_error, or transmission='exact'. Said once; see report().",
                about="missed",
            )

    def _say(self, text: str, about: str | None = None) -> None:
        """Once about one thing, on rank 0."""
        about = about or text
        if self.mesh.everyone.rank == 0 and about not in self._said:
            _log.warning(text)
        self._said.add(about)

    def cover(self, coded: int, layers: int) -> None:
        """So many layers of all are selective in the run that begins; the others stay exact for what they cost."""
        self.coded = coded, layers
        if coded < layers:
            level = self.mesh.cluster.levels[self.slow].name
            self._say(
                f"by the cluster's figures the exact exchanges of {layers - coded} of {layers} layers hide under their "
                f"compute, so they stay exact. If the link is slower than that, measure it (cocodiff bench "
                f"collectives), or say Selective(level={level!r})."
            )

    def end(self) -> None:
        """Nothing is selective until the next run."""
        self._times = self._expected = None
        if not self.selective.check:  # which compares them first
            self.free()

    def free(self) -> None:
        """Copies of the run are of no more use. Work of a call that failed may still be under way: it has the old."""
        self._held = self.held_bytes
        self.copies = Copies()
        self._link = replace(self._link, coder=Coder(self.copies))

    @property
    def held_bytes(self) -> int:
        """Memory of the copies of this run, or of the last."""
        return max(self._held, self.copies.held_bytes)

    @property
    def lanes(self) -> tuple[Lane, Lane]:
        """Those beside the links' own."""
        return self._link.encoding, self._link.decoding

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()

    def forward(self, conditioning: Tensor, latents: Tensor, shape: Hashable) -> bool:
        """A forward begins: find out of which branch, by what it is conditioned on. Whether it is the first of a run.

        Values decide, which are the same on all ranks. Conditions that are new (a callback that changes the prompt)
        are of the branch whose turn it is, and begin its schedule of bits anew. What this branch holds is then of no
        use, nor is it for another `shape`: whatever decides the sizes of messages. All ranks forget it at once.

        Args:
            latents: branches whose conditions are equal are told apart by these: each sees them once.
        """
        self._paused, first = False, self._expected is not None
        if self._expected is not None:
            self._begin(self._expected())
            self._expected = None
        if not self.running:
            return False
        turn = self._calls.__getitem__
        same = [number for number, one in enumerate(self._conditions) if one.recognises(conditioning)]
        room = len(self._conditions) < self.branches
        if room and (not same or (self._latents is not None and self._latents.recognises(latents))):
            known = len(self._conditions)
            self._conditions.append(Remembered(conditioning))
            self._shapes.append(shape)
            self._latents = Remembered(latents) if known + 1 < self.branches else None
        elif same:
            known = min(same, key=turn)
            if self._shapes[known] != shape:
                self._forget(known)
        else:
            known = min(range(self.branches), key=turn)
            self._conditions[known], self._since[known] = Remembered(conditioning), self._calls[known]
            self._forget(known)
        self._shapes[known], self._branch = shape, known
        self._calls[known] += 1
        return first

    def _forget(self, branch: int) -> None:
        self._held = self.held_bytes
        self.copies.forget(branch)

    def pause(self) -> None:
        """The next forward is of no branch: everything is exact."""
        self._paused = True

    def bind(
        self, exchange: Exchange, ring: Ring | None, key: Hashable
    ) -> tuple[Exchange, Ring | SelectiveRing | None]:
        """The exchange and the ring of one layer in the forward that runs, selective where they cross slow links."""
        assert self._times is not None
        layer = self._layers.setdefault(key, len(self._layers))
        step = self._calls[self._branch] - 1
        time, since = self._times[min(step, len(self._times) - 1)], self._since[self._branch]
        channel = _Channel(self, self._branch, layer, step, since, time)
        if not self.alone:
            staged = exchange if isinstance(exchange, StagedExchange) else None
            exchange = SelectiveExchange(self._link, channel, self.mesh.ulysses, staged)
        if ring is None or self.mesh.ring.level < self.slow:
            return exchange, ring
        return exchange, SelectiveRing(self._link, channel, self.mesh.ring)

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

    def forwarded(self, worst: Callable[[Tensor], float]) -> None:
        """After a forward: what follows from the error that was measured; after the last one copies are freed.

        Args:
            worst: the largest of a number on all ranks of the sequence. Collective.
        """
        if self._times is None or self._paused:
            return
        if self.selective.max_error is not None:
            self._guard(self.selective.max_error, worst)
        if len(self._conditions) == self.branches and min(self._calls.values()) == len(self._times):
            if not self.selective.check:  # decoding the picture may need the memory
                self.free()

    def _guard(self, bound: float, worst: Callable[[Tensor], float]) -> None:
        """After a step whose error, the worst rank's, passes the bound, all later ones carry more.

        What was raised stays: with a rung less the error is 2 to 11 times as large, and passes it again.
        """
        step = self._calls[self._branch] - 1
        norms = [x for key, several in self.missed.items() if key[0] == step for x in several]
        missed, carried = (
            torch.stack(norms).sum(0) if norms else torch.zeros(2, dtype=torch.float32, device=self._device)
        )
        error = worst((missed / carried.clamp_min(1e-30)).sqrt())
        if error > bound:
            self.rungs = min(self.rungs + 1, len(LADDER) - 1)
        self.guarded.append((step, error, self.rungs))


class _Channel:
    """`cocodiff.selective.exchange.Channel` of one layer in one forward."""

    def __init__(self, selection: Selection, branch: int, layer: int, step: int, since: int, time: float) -> None:
        self._selection, self._key, self._step, self._since, self._time = selection, (branch, layer), step, since, time
        self._numbers: Counter[str] = Counter()

    def number(self, label: str) -> int:
        self._numbers[label] += 1
        return self._numbers[label] - 1

    def parcel(
        self, label: str, place: tuple, blocks: tuple[int, ...], routes: tuple[Route, ...], width: int, itemsize: int
    ) -> Parcel:
        key = (*self._key, label, *place)
        first = self._selection.copies.get(key) is None
        coding = self._selection.coding(self._step - self._since, width, itemsize, first)
        return Parcel(key, (*self._key, *place), label, blocks, routes, width, coding, self._step, self._time)

    def missed(self, label: str, norms: Tensor) -> None:
        self._selection.missed[self._step, self._key[1], label].append(norms)
