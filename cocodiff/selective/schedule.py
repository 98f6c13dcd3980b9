"""What crosses slow links, as data: how exact, by which method, and so many bits at each step.

Bits go early: what is wrong in the first steps is drawn for good, while the last can live with what they hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from cocodiff.errors import ConfigError
from cocodiff.kernels.codes import payload_bytes
from cocodiff.topology import Cluster

RAW = 0  # bits of a row that travels as it is


@dataclass(frozen=True)
class Coding:
    """How the rows of one exchange travel.

    Attributes:
        bits: of an element, 1 to 8; RAW for elements as they are.
        share: of the rows that travel; 0 for none.
        base: what is subtracted first: "nothing" (then no copy is kept), "held" (what the receiver has) or "predicted".
        pick: which rows travel: "residual" (those that differ most from their base), "value" (those whose V differs
            most from that of the last step: the paper's rule), "random" or "oldest".
    """

    bits: int
    share: float = 1.0
    base: str = "predicted"
    pick: str = "residual"

    def chosen(self, rows: int) -> int:
        """How many of so many rows travel: none, all, or at least one."""
        return rows * int(self.share) if self.share in (0, 1) else min(rows, max(1, int(self.share * rows)))

    def told(self, rows: int, label: str) -> bool:
        """Whether a bit a row says which travel; not where both ends know."""
        picks = ("residual",) if label in ("q", "k") else ("residual", "value")  # the paper's mask is V's, told with V
        return self.pick in picks and 0 < self.chosen(rows) < rows

    def row_bytes(self, width: int, itemsize: int) -> int:
        return width * itemsize if self.bits == RAW else payload_bytes(width, self.bits)

    def bytes_of(self, rows: int, row_bytes: int, label: str) -> int:
        """On the wire, in rows of so many bytes (`row_bytes`)."""
        return (-(-rows // 8) if self.told(rows, label) else 0) + self.chosen(rows) * row_bytes


FULL = Coding(RAW, base="held")
# What a step may be given, most first, and what it leaves of a residual: for whole rows the distortion of a Gaussian
# source, beyond that TUNED (docs/selective.md), since what is not sent is missing at all later steps.
LADDER = (Coding(8), Coding(4), Coding(2), Coding(1), Coding(1, 0.5), Coding(1, 0.25), Coding(1, 0.0))
_LEFT = (9e-5, 1.15e-2, 0.119, 0.363, 2.0, 5.0, 15.0)
_FIRST = 10.0  # weight of the first step, which has nothing to predict from
_DECAY = 1.4  # step t weighs (1 + 28 t / steps) ** -_DECAY. TUNED, too
# Of fewer steps each weighs more, and there is less to predict from: the budget grows by this number over theirs.
SHORT_RUN = 20

METHODS = {
    "predicted": "residuals of a prediction, many bits early and few late",
    "v_major": "the paper's rule: the rows whose V changed most, more of them early",
    "changed_rows": "the rows that differ most from what the receiver holds",
    "random_rows": "rows at random",
    "oldest_rows": "the rows that were not sent for longest",
    "plain": "all rows with as few bits as it takes, no residual",
    "residual": "residuals of what the receiver holds, without prediction; bits as in `predicted`",
    "skip": "everything at every n-th step, nothing between",
}
_PICKS = {"v_major": "value", "changed_rows": "residual", "random_rows": "random", "oldest_rows": "oldest"}


@dataclass(frozen=True, kw_only=True)
class Selective:
    """Send a share of the bytes on slow links; everything inside them stays exact.

    Sender and receiver keep what the receiver holds, predict the next values from it, and only the quantised residual
    of that prediction travels.

    Args:
        budget: share of the bytes that exact sends, over a whole run; 1 is exact.
        budget_ring: the same where keys and values alone cross slow links (a ring over nodes); `budget` if None.
        level: the innermost level where it applies (all outside it, too); None for the slow ones of the cluster.
        max_error: what the relative residual error of a step, measured at the senders, should not pass. After a step
            that passed it all later ones of the run carry more bits, a rung of `LADDER` more each time.
        method: one of `METHODS`; all but the first are there to compare.
        warmup, refresh: for methods that send rows: whole steps at the beginning; every so many a whole one (0: never).
        check: compare the copies of both ends after each run, by a hash.

    >>> [coding.bits * coding.share for coding in Selective(budget=1 / 8).codings(steps=6, width=128, itemsize=2)]
    [8.0, 8.0, 8.0, 4.0, 4.0, 4.0]
    """

    budget: float = 1 / 8
    budget_ring: float | None = None
    level: str | None = None
    max_error: float | None = None
    method: str = "predicted"
    warmup: int = 1
    refresh: int = 0
    check: bool = False

    def __post_init__(self) -> None:
        for name in ("budget", "budget_ring", "max_error"):
            value = getattr(self, name)
            if value is None and name != "budget":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                hint = f" Write {name}={value}, no text." if isinstance(value, str) else ""
                raise ConfigError(f"{name}={value!r} is not a number above 0, at most 1.{hint}")
        if self.method not in METHODS:
            raise ConfigError(f"method={self.method!r} is not one of {', '.join(METHODS)}.")
        if self.max_error is not None and self.method != "predicted":
            raise ConfigError(f"max_error={self.max_error!r}: method={self.method!r} does not heed it. Leave it out.")
        for name, least in (("warmup", 1), ("refresh", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r} is not a whole number of at least {least}.")
            if self.method not in _PICKS and value != least:
                raise ConfigError(f"{name}={value!r}: method={self.method!r} has no such steps. Leave it out.")
        if self.level is not None and not isinstance(self.level, str):
            raise ConfigError(f"level={self.level!r} is not the name of a level.")
        if not isinstance(self.check, bool):
            raise ConfigError(f"check={self.check!r} is neither True nor False.")

    @classmethod
    def of(cls, transmission: str | Selective) -> Selective | None:
        """A preset by name, or itself; None for `"exact"` and for a budget of 1."""
        if isinstance(transmission, str):
            if transmission != "exact" and transmission not in PRESETS:
                names = ", ".join(map(repr, ("exact", *PRESETS)))
                raise ConfigError(f"transmission={transmission!r} is not one of {names}, nor a cocodiff.Selective.")
            return PRESETS.get(transmission)
        if not isinstance(transmission, Selective):
            raise ConfigError(f"transmission={transmission!r} is neither a name nor a cocodiff.Selective.")
        return None if transmission.budget == 1 and transmission.budget_ring in (None, 1) else transmission

    @classmethod
    def v_major(cls, budget: float = 1 / 2, warmup: int = 1, refresh: int = 10, **settings: object) -> Selective:
        """V-major selection as in the CoCoDiff paper (arXiv 2604.14561): the rows whose V changed most since the last
        step, by the L1 distance, for V, K and Q; so many that the share falls in a straight line over the steps, with
        whole steps at the beginning and every `refresh` steps. The paper says nothing of outputs: theirs are chosen by
        their own change here."""
        return cls(budget=budget, method="v_major", warmup=warmup, refresh=refresh, **settings)  # type: ignore[arg-type]

    def budget_of(self, ring: bool) -> tuple[str, float]:
        """The field that counts, and its value."""
        ring = ring and self.budget_ring is not None
        return ("budget_ring", self.budget_ring) if ring else ("budget", self.budget)  # type: ignore[return-value]

    def share(self, steps: int, ring: bool) -> float:
        """Of the bytes, over a run of so many steps: short ones send more."""
        return min(1.0, self.budget_of(ring)[1] * max(1.0, SHORT_RUN / steps))

    def codings(self, steps: int, width: int, itemsize: int, ring: bool = False) -> tuple[Coding, ...]:
        """What each step sends; its mean over the steps is at most the budget, which grows in short runs.

        Raises:
            ConfigError: the budget cannot hold what the first step needs.
        """
        whole = itemsize * 8
        bits = self.share(steps, ring) * whole
        if bits == whole:
            return (Coding(RAW, base="nothing"),) * steps
        least, why = payload_bytes(width, 1) * 8 / width, "each step takes a bit an element and a byte a row"
        if self.method in ("predicted", "residual"):
            least, why = least / steps, why.replace("each", "the first")
        elif self.method != "plain":
            least, why = whole / steps, "the first step is whole"
        if bits < least:
            name, budget = self.budget_of(ring)
            raise ConfigError(
                f"{name}={budget:.3g} is too small for method={self.method!r}, {steps} steps and rows of {width} "
                f"elements: {why}. Use at least {_rounded_up(budget * least / bits)}, or more steps."
            )
        if self.method in ("predicted", "residual"):
            spread = _spread(bits, steps, width, min(8, itemsize * 8 - 1))
            return tuple(replace(coding, base="held") for coding in spread) if self.method == "residual" else spread
        return _comparisons(self, bits, steps, width, whole)


PRESETS = {
    "high": Selective(budget=1 / 4),
    "balanced": Selective(budget=1 / 8),
    "fast": Selective(budget=1 / 16, budget_ring=1 / 32),
}


def slow_level(selective: Selective, cluster: Cluster, crossed: int) -> int | None:
    """The innermost level where it applies; None where the outermost level that is crossed lies inside it.

    Raises:
        ConfigError: there is no level of that name.
    """
    names = [level.name for level in cluster.levels]
    if selective.level is not None and selective.level not in names:
        raise ConfigError(f"level={selective.level!r}: cluster {cluster.name!r} has the levels {', '.join(names)}.")
    chosen = cluster.slow if selective.level is None else [name == selective.level for name in names]
    slow = next((level for level, yes in enumerate(chosen) if yes), len(names))
    return slow if crossed >= slow else None


def is_told(selective: Selective, cluster: Cluster, slow: int) -> bool:
    """Whether the user names the level, or the cluster calls it slow: it is taken at its word, whatever figures say."""
    return selective.level is not None or cluster.levels[slow].slow is True


@lru_cache(maxsize=256)
def _spread(bits: float, steps: int, width: int, most: int) -> tuple[Coding, ...]:
    """Reverse water-filling: again and again the step gains most, by its weight, from what another bit costs."""
    rungs = [(coding, left) for coding, left in zip(LADDER, _LEFT, strict=True) if coding.bits <= most]
    costs = [coding.bytes_of(8000, coding.row_bytes(width, 0), "v") / 1000 / width for coding, _ in rungs]
    weights = [(1 + 28 * step / steps) ** -_DECAY * (1 if step else _FIRST) for step in range(steps)]
    least = max(index for index, (coding, _) in enumerate(rungs) if coding.share == 1)
    at = [least] + [len(rungs) - 1] * (steps - 1)  # all rows must have come once
    spent = costs[least]
    while True:
        gains = [
            (weights[step] * (rungs[now][1] - rungs[rung][1]) / (costs[rung] - costs[now]), -step, -rung)
            for step, now in enumerate(at)
            for rung in range(now)
            if spent + costs[rung] - costs[now] <= bits * steps + 1e-9
        ]
        if not gains:
            return tuple(rungs[rung][0] for rung in at)
        _, step, rung = max(gains)
        spent += costs[-rung] - costs[at[-step]]
        at[-step] = -rung


def _comparisons(selective: Selective, bits: float, steps: int, width: int, whole: int) -> tuple[Coding, ...]:
    """The methods to compare with, `whole` bits an element where it is sent as it is."""
    if selective.method == "plain":
        most = max(n for n in (8, 4, 2, 1) if payload_bytes(width, n) * 8 / width <= bits)
        return (Coding(most, base="nothing"),) * steps
    full = bits / whole * steps  # so many whole steps could be sent
    if selective.method == "skip":
        sent = {round(index * steps / int(full)) for index in range(int(full))}
        return tuple(FULL if step in sent else Coding(RAW, 0.0, "held") for step in range(steps))
    pick = _PICKS[selective.method]
    warmup, refresh = selective.warmup, selective.refresh
    whole_steps = {t for t in range(steps) if t < warmup or (refresh and t % refresh == 0)}
    if len(whole_steps) > full:  # a small budget: fewer whole steps, the first always
        whole_steps = {0}
    rest = [t for t in range(steps) if t not in whole_steps]
    told = 0 if pick in ("random", "oldest") else 1 / whole / width
    mean = max((full - len(whole_steps)) / max(len(rest), 1) - told, 0.0)
    # A straight line that ends at 0 (or starts at 1, for a large mean) and has this mean over the rest.
    slope = min(mean, 1 - mean) if pick == "value" else 0.0
    places = {t: (index + 0.5) / len(rest) for index, t in enumerate(rest)}
    shares = {t: mean + slope * (1 - 2 * place) for t, place in places.items()}
    return tuple(FULL if t in whole_steps else Coding(RAW, shares[t], "held", pick) for t in range(steps))


def _rounded_up(number: float) -> str:
    """To three significant digits."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 2)
    return f"{math.ceil(number / unit) * unit:.3g}"
