"""How many bits each step of a run sends over slow links.

Bits go early: what is wrong in the first steps is drawn for good, while the last can live with what they hold.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, replace
from functools import lru_cache

from cocodiff.config import Selective
from cocodiff.errors import ConfigError
from cocodiff.kernels.codes import payload_bytes
from cocodiff.topology import Cluster

RAW = 0  # bits of a row that travels as it is


@dataclass(frozen=True)
class Coding:
    """How the rows of one exchange travel.

    Attributes:
        bits: of an element, 1 to 8, of its residual; RAW for whole rows of elements as they are (`v_major`).
        share: of the rows that travel; 0 for none.
        predicted: whether residuals are those of the receiver's prediction, or of the values that it holds.
    """

    bits: int
    share: float = 1.0
    predicted: bool = True

    def chosen(self, rows: int) -> int:
        """How many of so many rows travel: none, all, or at least one."""
        return rows * int(self.share) if self.share in (0, 1) else min(rows, max(1, int(self.share * rows)))

    def has_mask(self, rows: int, label: str) -> bool:
        """Whether a payload begins with a bit a row that says which rows travel.

        The receiver needs none where all or no rows travel, nor for Q and K of `v_major`, whose rows are those of V.
        """
        follows_v = self.bits == RAW and label in ("q", "k")
        return not follows_v and 0 < self.chosen(rows) < rows

    def row_bytes(self, width: int, itemsize: int) -> int:
        return width * itemsize if self.bits == RAW else payload_bytes(width, self.bits)

    def block_bytes(self, rows: int, row_bytes: int, label: str) -> int:
        """Bytes on the wire for a block of rows, each of which takes `row_bytes`."""
        return (-(-rows // 8) if self.has_mask(rows, label) else 0) + self.chosen(rows) * row_bytes


# What a step may be given, most first, and what it leaves of a residual: for whole rows the distortion of a Gaussian
# source, beyond that TUNED (docs/selective.md), since what is not sent is missing at all later steps.
LADDER = (Coding(8), Coding(4), Coding(2), Coding(1), Coding(1, 0.5), Coding(1, 0.25), Coding(1, 0.0))
_LEFT = (9e-5, 1.15e-2, 0.119, 0.363, 2.0, 5.0, 15.0)
_FIRST = 10.0  # weight of the first step, which has nothing to predict from
_DECAY = 1.4  # step t weighs (1 + 28 t / steps) ** -_DECAY. TUNED, too
# Of fewer steps each weighs more, and there is less to predict from: the budget grows by this number over theirs.
SHORT_RUN = 20


def budget_of(selective: Selective, kv_only: bool) -> tuple[str, float]:
    """Return the name and the value of the budget that applies.

    Args:
        kv_only: only keys and values cross slow links.
    """
    if kv_only and selective.budget_ring is not None:
        return "budget_ring", selective.budget_ring
    return "budget", selective.budget


def share(selective: Selective, steps: int, kv_only: bool = False) -> float:
    """Return the share of an exact run's bytes that a run of so many steps sends: short ones send more, 1 is exact."""
    return min(1.0, budget_of(selective, kv_only)[1] * max(1.0, SHORT_RUN / max(steps, 1)))


def codings(selective: Selective, steps: int, width: int, itemsize: int, kv_only: bool = False) -> tuple[Coding, ...]:
    """Plan what each step sends, in a run whose `share` is below 1; the mean over the steps is at most that share.

    Args:
        width: elements of a row, of `itemsize` bytes each.

    Raises:
        ConfigError: the budget cannot hold what the first step needs, or there are no steps or elements.

    >>> [one.bits * one.share for one in codings(Selective(budget=1 / 8), steps=6, width=128, itemsize=2)]
    [8.0, 8.0, 8.0, 4.0, 4.0, 4.0]
    """
    if steps < 1 or width < 1:
        raise ConfigError(f"steps={steps} and rows of {width} elements: both must be at least 1.")
    whole = itemsize * 8
    bits = share(selective, steps, kv_only) * whole
    if selective.method == "v_major":
        least, why = whole / steps, "the first step is whole"
    else:
        least = payload_bytes(width, 1) * 8 / width / steps
        why = "the first step takes a bit an element and a byte a row"
    if bits < least:
        name, budget = budget_of(selective, kv_only)
        raise ConfigError(
            f"{name}={budget:.3g} is too small for method={selective.method!r}, {steps} steps and rows of {width} "
            f"elements: {why}. Use at least {_rounded_up(budget * least / bits)}, or more steps."
        )
    if selective.method == "v_major":
        return _falling_shares(selective, bits / whole * steps, steps, 1 / whole / width)
    spread = _spread(bits, steps, width, min(8, whole - 1))
    return tuple(replace(one, predicted=False) for one in spread) if selective.method == "residual" else spread


@dataclass(frozen=True)
class StepSchedule:
    """What one step of a run sends.

    Attributes:
        steps: of the run.
        kv_only: only keys and values cross slow links.
        step: of the schedule, from 0.
        rungs: of `LADDER`, by which steps carry more bits than planned.
    """

    selective: Selective
    steps: int
    kv_only: bool
    step: int
    rungs: int

    @property
    def share(self) -> float:
        """Share of the bytes of an exact exchange, on average over the run."""
        return share(self.selective, self.steps, self.kv_only)

    def coding(self, width: int, itemsize: int, first: bool) -> Coding:
        """Return how rows of a width travel; `first` where the receiver holds nothing, so that all rows must come.

        Raises:
            ConfigError: the budget cannot hold what the first step needs.
        """
        planned = codings(self.selective, self.steps, width, itemsize, self.kv_only)
        if first or self.step >= len(planned):  # more steps than the scheduler said
            return planned[0]
        coding = planned[self.step]
        return LADDER[max(LADDER.index(coding) - self.rungs, 0)] if self.rungs and coding in LADDER else coding


def coded_from(selective: Selective, cluster: Cluster, crossed: int) -> int | None:
    """Find the innermost level where transmission is selective; None where no such level is crossed.

    Args:
        crossed: the outermost level that the ranks cross.

    Raises:
        ConfigError: there is no level of that name.
    """
    names = [level.name for level in cluster.levels]
    if selective.level is not None and selective.level not in names:
        raise ConfigError(f"level={selective.level!r}: cluster {cluster.name!r} has the levels {', '.join(names)}.")
    chosen = cluster.slow if selective.level is None else [name == selective.level for name in names]
    slow = next((level for level, yes in enumerate(chosen) if yes), len(names))
    return slow if crossed >= slow else None


def names_level(selective: Selective, cluster: Cluster, level: int) -> bool:
    """Whether the user names the level, or the cluster's author says that it is slow.

    Such a level is always coded; one that is slow by its figures only where those say that coding gains.
    """
    return selective.level is not None or cluster.levels[level].slow is True


@lru_cache(maxsize=256)
def _spread(bits: float, steps: int, width: int, most: int) -> tuple[Coding, ...]:
    """Reverse water-filling: again and again the step gains most, by its weight, from what another bit costs."""
    rungs = [(coding, left) for coding, left in zip(LADDER, _LEFT, strict=True) if coding.bits <= most]
    costs = [coding.block_bytes(8000, coding.row_bytes(width, 0), "v") / 1000 / width for coding, _ in rungs]
    weights = [(1 + 28 * step / steps) ** -_DECAY * (1 if step else _FIRST) for step in range(steps)]
    least = max(index for index, (coding, _) in enumerate(rungs) if coding.share == 1)
    at = [least] + [len(rungs) - 1] * (steps - 1)  # all rows must have come once
    spent = costs[least]

    def gains(step: int) -> list[tuple[float, int, int, int]]:
        """The rungs that the step could rise to, each with its gain by cost, negative since a heap has least first."""
        now, weight = at[step], weights[step]
        return [
            (-weight * (rungs[now][1] - rungs[rung][1]) / max(costs[rung] - costs[now], 1e-9), step, rung, now)
            for rung in range(now)
        ]

    heap = [gain for step in range(steps) for gain in gains(step)]
    heapq.heapify(heap)
    while heap:
        _, step, rung, now = heapq.heappop(heap)
        more = costs[rung] - costs[now]
        if at[step] == now and spent + more <= bits * steps + 1e-9:  # what is too dear now will be later, too
            at[step] = rung
            spent += more
            for gain in gains(step):
                heapq.heappush(heap, gain)
    return tuple(rungs[rung][0] for rung in at)


def _falling_shares(selective: Selective, sendable: float, steps: int, mask: float) -> tuple[Coding, ...]:
    """The paper's schedule: whole steps, and between them shares of rows in a straight line that ends at 0.

    Args:
        sendable: as many whole steps as the budget holds.
        mask: size of the bit that says whether a row travels, as a share of the row's.
    """
    whole_steps = {
        t for t in range(steps) if t < selective.warmup or (selective.refresh and t % selective.refresh == 0)
    }
    if len(whole_steps) > sendable:  # a small budget: fewer whole steps, the first always
        whole_steps = {0}
    rest = [t for t in range(steps) if t not in whole_steps]
    mean = max((sendable - len(whole_steps)) / max(len(rest), 1) - mask, 0.0)
    slope = min(mean, 1 - mean)  # of a line that ends at 0, or begins at 1 for a large mean, and has this mean
    places = {t: (index + 0.5) / len(rest) for index, t in enumerate(rest)}
    shares = {t: mean + slope * (1 - 2 * place) for t, place in places.items()}
    return tuple(Coding(RAW, shares.get(t, 1.0)) for t in range(steps))


def _rounded_up(number: float) -> str:
    """Round up to three significant digits."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 2)
    return f"{math.ceil(number / unit) * unit:.3g}"
