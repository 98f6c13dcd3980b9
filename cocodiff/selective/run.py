"""Selective transmission over one call of a pipeline: which step of which branch a forward is, and what it sends.

Whatever is decided here is decided identically on all ranks of a sequence: from the settings, the scheduler's times,
diffusers' names of branches, the values of tensors and the number of forwards, or (the guard) from one small reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cocodiff.config import Selective
from cocodiff.exchange import Exchange, Ring, StagedExchange
from cocodiff.exchange.connected import ConnectedMesh
from cocodiff.selective.branches import Remembered
from cocodiff.selective.copies import Copies
from cocodiff.selective.exchange import CodedAxis, SelectiveExchange, SlowLinks
from cocodiff.selective.layer import LayerCoding, Missed
from cocodiff.selective.parcel import Codec
from cocodiff.selective.residual import ResidualCodec
from cocodiff.selective.ring import SelectiveRing
from cocodiff.selective.schedule import LADDER, SHORT_RUN, StepSchedule, budget_of, share
from cocodiff.selective.v_major import VMajorCodec

MUCH = 0.5  # of what a step stood for; MEASURED: `fast` misses 0.44 at the end of 28 steps, and 0.3 to 0.6 gave 26 dB


def make_codec(selective: Selective, copies: Copies) -> Codec:
    """The codec of a method."""
    return VMajorCodec(copies) if selective.method == "v_major" else ResidualCodec(copies)


@dataclass(frozen=True)
class StepCoding:
    """What one forward sends over slow links.

    Attributes:
        branch, step: of guidance, and its forwards so far, both from 0; `time` of the step by the scheduler.
        first: this is the first forward of the call.
        layers: numbers of the layers that have been coded in this call, by their keys.
    """

    branch: int
    step: int
    time: float
    first: bool
    schedule: StepSchedule
    links: SlowLinks
    codec: Codec
    missed: Missed
    layers: dict[Hashable, int]

    @property
    def share(self) -> float:
        """Share of the bytes of an exact exchange, on average over the call."""
        return self.schedule.share

    def check_width(self, width: int, itemsize: int) -> None:
        """Raise ConfigError where the budget cannot hold the first step of rows of a width."""
        self.schedule.coding(width, itemsize, first=True)

    def layer(self, key: Hashable) -> LayerCoding:
        """What the exchanges of one layer need; `key` is in every forward the same."""
        number = self.layers.setdefault(key, len(self.layers))
        return LayerCoding(self.branch, number, self.step, self.time, self.schedule, self.codec, self.missed)

    def exchanges(
        self, key: Hashable, connected: ConnectedMesh, exchange: str
    ) -> tuple[Exchange, Ring | SelectiveRing | None]:
        """The exchange and the ring of one layer in this forward, selective where they cross slow links.

        Args:
            exchange: what an exact run would take, "flat" or "staged".
        """
        mesh, coding = connected.mesh, self.layer(key)
        exact, around = connected.exchanges[exchange], connected.around
        chosen: Exchange = exact
        if not self.schedule.kv_only:
            axis = CodedAxis(connected.ulysses, mesh.ulysses.ranks, self.links)
            chosen = SelectiveExchange(axis, coding, exact if isinstance(exact, StagedExchange) else None)
        if around is None or mesh.ring.level < self.links.level:
            return chosen, around
        return chosen, SelectiveRing(CodedAxis(connected.ring, mesh.ring.ranks, self.links), coding)


@dataclass
class Branch:
    """A branch of guidance, as far as the call has come.

    Attributes:
        name: what diffusers calls it; None where it does not say.
        conditioning: recognises the branch, or its change.
        shape: whatever decides the sizes of its messages.
        forwards: how many it has had, and `since`, how many before its schedule began.
    """

    name: str | None
    conditioning: Remembered
    shape: Hashable
    forwards: int = 0
    since: int = 0


class SelectiveCall:
    """Selective transmission over one call of a pipeline: made when it begins, dropped when it has been reported.

    Args:
        kv_only: only keys and values cross slow links.
        times: of the scheduler, one for each forward that a branch makes; known in the first forward.
        branches: of guidance that are forwards of their own.
        say: takes a topic and a text, and warns once about each topic.

    Attributes:
        missed: squared norms of what was missed and of what had to be carried.
        coded: layers that are selective, and all.
        guarded: (step, largest error of any rank, rungs from there on) of each forward, with `max_error`.
    """

    def __init__(
        self,
        settings: Selective,
        kv_only: bool,
        times: Callable[[], Sequence[float]],
        branches: int,
        device: torch.device,
        say: Callable[[str, str], None],
        links: SlowLinks,
    ) -> None:
        self.settings, self.branches = settings, branches
        self._kv_only, self._scheduled, self._device, self._say, self._links = kv_only, times, device, say, links
        self.missed = Missed(list)
        self.coded = (0, 0)
        self.guarded: list[tuple[int, float, int]] = []
        self._times: list[float] = []  # from the first forward on
        self._seen: list[Branch] = []
        self._latents: Remembered | None = None  # of the last forward that was of a new branch
        self._layers: dict[Hashable, int] = {}
        self._rungs = 0
        self._most_bytes = 0
        self.copies = Copies()
        self._codec = make_codec(settings, self.copies)

    @property
    def planned(self) -> float:
        """Share of the bytes of an exact run that this call may send; 1 before its first forward."""
        return share(self.settings, len(self._times), self._kv_only) if self._times else 1.0

    @property
    def held_bytes(self) -> int:
        """Memory of the copies, at its largest."""
        return max(self._most_bytes, self.copies.held_bytes)

    def step(
        self, conditioning: Tensor, latents: Tensor, shape: Hashable, branch_name: str | None = None
    ) -> StepCoding | None:
        """Begin a forward and return what it sends over slow links; None where it is exact.

        Conditions that are new (a callback that changes the prompt) begin a branch's schedule of bits anew. What the
        branch holds is then of no use, nor is it for another `shape`, and all ranks forget it at once.

        Args:
            conditioning: the prompt's embeddings, by whose values a branch without a name is recognised.
            latents: branches whose conditions are equal are distinguished by these: each sees them once.
            shape: whatever decides the sizes of messages.
            branch_name: what diffusers calls the branch of guidance. Names beyond the expected number of branches are
                of forwards now and then, which are exact.
        """
        first = not self._times
        if first:
            self._begin()
        if self.planned == 1:
            return None
        number, changed = self._find(conditioning, latents, branch_name)
        if number is None and len(self._seen) == self.branches:
            return None
        if number is None:
            number = len(self._seen)
            self._seen.append(Branch(branch_name, Remembered(conditioning), shape))
            self._latents = Remembered(latents) if number + 1 < self.branches and branch_name is None else None
        branch = self._seen[number]
        if changed:
            branch.conditioning, branch.since = Remembered(conditioning), branch.forwards
        if changed or branch.shape != shape:
            self._most_bytes = self.held_bytes
            self.copies.forget(number)
            branch.shape = shape
        step = branch.forwards
        branch.forwards += 1
        schedule = StepSchedule(self.settings, len(self._times), self._kv_only, step - branch.since, self._rungs)
        time = self._times[min(step, len(self._times) - 1)]
        return StepCoding(
            number, step, time, first, schedule, self._links, self._codec, self.missed, self._layers
        )  # fmt: skip

    def _begin(self) -> None:
        times = self._scheduled()
        spacing = abs(times[-1] - times[0]) / max(len(times) - 1, 1) or 1.0
        self._times = [(times[0] - time) / spacing for time in times]
        planned, budget = self.planned, budget_of(self.settings, self._kv_only)[1]
        if planned > budget:
            what = "is exact" if planned == 1 else f"may send {planned:.3g} of the bytes instead of {budget:.3g}"
            text = f"runs of fewer than {SHORT_RUN} steps have little to predict from: one of {len(times)} {what}."
            self._say(text, text)

    def _find(self, conditioning: Tensor, latents: Tensor, name: str | None) -> tuple[int | None, bool]:
        """Find the number of a forward's branch, None for a new one, and whether its conditions have changed."""
        if name is not None:
            number = next((number for number, branch in enumerate(self._seen) if branch.name == name), None)
            return number, number is not None and not self._seen[number].conditioning.recognises(conditioning)

        def turn(number: int) -> int:
            return self._seen[number].forwards

        same = [number for number, branch in enumerate(self._seen) if branch.conditioning.recognises(conditioning)]
        if len(self._seen) < self.branches:
            if not same or (self._latents is not None and self._latents.recognises(latents)):
                return None, False
        if same:
            return min(same, key=turn), False
        return min(range(self.branches), key=turn), True

    def forwarded(self, coding: StepCoding, max_over_sequence: Callable[[Tensor], float]) -> None:
        """End a forward: raise later steps where its error passed `max_error`; free copies after the last one.

        Args:
            max_over_sequence: the largest of a number on all ranks of the sequence. Collective.
        """
        if self.settings.max_error is not None:
            self._guard(coding.step, self.settings.max_error, max_over_sequence)
        done = len(self._seen) == self.branches and min(one.forwards for one in self._seen) == len(self._times)
        if done and not self.settings.check:  # decoding the picture may need the memory
            self.free()

    def _guard(self, step: int, bound: float, max_over_sequence: Callable[[Tensor], float]) -> None:
        """Let all steps after one whose error, the largest of any rank, passes the bound carry more bits.

        What was raised stays: with a rung less the error is 2 to 11 times as large, and passes it again.
        """
        norms = [x for (at, _, _), several in self.missed.items() if at == step for x in several]
        missed, carried = torch.stack(norms or [torch.zeros(2, dtype=torch.float32, device=self._device)]).sum(0)
        error = max_over_sequence((missed / carried.clamp_min(1e-30)).sqrt())
        if error > bound:
            self._rungs = min(self._rungs + 1, len(LADDER) - 1)
        self.guarded.append((step, error, self._rungs))

    def cover(self, coded: int, layers: int) -> None:
        """Note how many layers are selective in this call, and how many there are."""
        self.coded = coded, layers

    def judge(self, errors: Sequence[float]) -> None:
        """Warn where a step missed so much that the picture may be another one; `errors` are relative, by step."""
        if errors and (error := max(errors)) > MUCH:
            self._say(
                "missed",
                f"at step {errors.index(error)} what was sent missed {error:.0%} of what it stood for: the picture may "
                "differ visibly from the exact one (noise added by the scheduler at each step, a sudden change?). Use "
                "a preset with more bytes, max_error, or transmission='exact'. Said once; see report().",
            )

    def free(self) -> None:
        """Drop all copies. Work of a forward that failed may still be under way: it has the old ones."""
        self._most_bytes = self.held_bytes
        self.copies = Copies()
        self._codec = make_codec(self.settings, self.copies)
