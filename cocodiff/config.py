"""What a user may choose, checked as it is made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches

from cocodiff.errors import ConfigError
from cocodiff.topology import Cluster
from cocodiff.topology.detect import check_name

CHOICES = {"exchange": ("auto", "flat", "staged"), "schedule": ("v_first", "sequential")}
DEGREES = ("cfg_degree", "ring_degree", "ulysses_degree")
METHODS = {
    "predicted": "residuals of a prediction, many bits early and few late",
    "residual": "residuals of what the receiver holds, without prediction; bits as in `predicted`",
    "v_major": "the rule of the CoCoDiff paper: the rows whose V changed most, more of them early",
}


@dataclass(frozen=True, kw_only=True)
class Selective:
    """Send a share of the bytes on slow links; everything inside them stays exact.

    Sender and receiver keep what the receiver holds, predict the next values from it, and only the quantised residual
    of that prediction travels.

    Args:
        budget: share of the bytes that exact sends, over a whole run; 1 is exact.
        budget_ring: the same where only keys and values cross slow links (a ring over nodes); `budget` if None.
        level: the innermost level where it applies (all outside it, too); None for the slow ones of the cluster.
        max_error: what the relative residual error of a step, measured at the senders, should not pass. After a step
            that passed it all later ones of the run carry more bits, a rung of `LADDER` more each time.
        method: one of `METHODS`; all but the first are there to compare.
        warmup: of `v_major`: whole steps at the beginning.
        refresh: of `v_major`: every so many steps a whole one (0: never).
        check: compare the copies of both ends after each run, by a hash.
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
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ConfigError(f"method={self.method!r} is not one of {', '.join(METHODS)}.")
        if self.max_error is not None and self.method != "predicted":
            raise ConfigError(f"max_error={self.max_error!r}: method={self.method!r} does not heed it. Leave it out.")
        for name, least in (("warmup", 1), ("refresh", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r} is not a whole number of at least {least}.")
            if self.method != "v_major" and value != least:
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


PRESETS = {
    "high": Selective(budget=1 / 4),
    "balanced": Selective(budget=1 / 8),
    "fast": Selective(budget=1 / 16, budget_ring=1 / 32),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one wrapped pipeline; every field has a good default and is the same on all ranks.

    Args:
        exchange: `"flat"` (one all-to-all), `"staged"` (one per level of the cluster) or `"auto"`: whichever the
            cluster's figures predict to be faster for the size of each message.
        schedule: `"v_first"` (every exchange starts as soon as its tensor exists and hides under the work that
            follows) or `"sequential"` (the textbook order; same result, for comparison and debugging).
        cluster: `"auto"` (which ranks share a node, from the launcher), a preset's name, a path to JSON, or a
            `cocodiff.Cluster`.
        cfg_degree: 2 puts the conditional and the unconditional branch on two halves of the ranks. None means 1.
        ring_degree: parts of the sequence whose keys and values travel, while queries and outputs stay.
        ulysses_degree: ranks that share a part, each with some of the heads. What is left out follows the rule of
            `cocodiff.planner.choose_degrees`; the three multiply to the number of ranks.
        transmission: what crosses slow links: `"exact"`, or `"high"`, `"balanced"`, `"fast"` (1/4, 1/8 and 1/16 of the
            bytes; 1/32 where only keys and values cross), or a `cocodiff.Selective`. Fast links stay exact.
        pieces: into how many pieces a layer's rows are cut so that exchange and compute overlap; None lets the cost
            model decide.
        plan: `"auto"`: the planner chooses degrees, placement, exchange and pieces at the first call of a shape, by
            assumed figures; a file of `cocodiff plan --measure`: by measured ones. A file of `cocodiff plan --out` has
            the plan.

    Examples:
        >>> Config(exchange="staged").schedule
        'v_first'
    """

    exchange: str = "auto"
    schedule: str = "v_first"
    cluster: str | os.PathLike[str] | Cluster = "auto"
    cfg_degree: int | None = None
    ring_degree: int | None = None
    ulysses_degree: int | None = None
    transmission: str | Selective = "exact"
    pieces: int | None = None
    plan: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")
        if not isinstance(self.cluster, str | os.PathLike | Cluster):
            raise ConfigError(f"cluster={self.cluster!r} is neither a name, a path nor a cocodiff.Cluster.")
        check_name(self.cluster)
        for name in (*DEGREES, "pieces"):
            count = getattr(self, name)
            if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
                raise ConfigError(f"{name}={count!r} is not a positive whole number.")
        if self.plan is not None:
            self._check_plan()
        selective = Selective.of(self.transmission)
        if selective is not None and selective.method == "v_major" and self.schedule == "sequential":
            raise ConfigError('v_major chooses rows by V, which schedule="sequential" sends last: use "v_first".')

    def _check_plan(self) -> None:
        """A plan file decides what these settings would; it is read where ranks have joined."""
        if not isinstance(self.plan, str | os.PathLike):
            raise ConfigError(f'plan={self.plan!r} is neither "auto" nor the path of a file of cocodiff plan.')
        fixed = {name: getattr(self, name) for name in (*DEGREES, "pieces") if getattr(self, name) is not None}
        fixed |= {} if self.exchange == "auto" else {"exchange": self.exchange}
        fixed |= {} if self.transmission == "exact" else {"transmission": self.transmission}
        if fixed:
            said = ", ".join(f"{name}={value!r}" for name, value in fixed.items())
            raise ConfigError(f"plan={os.fspath(self.plan)!r} decides for itself, and is exact: leave out {said}.")

    @classmethod
    def of(cls, config: Config | None, settings: dict[str, object]) -> Config:
        """The config given, or one made of keywords; never both."""
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(names))
        if unknown:
            raise ConfigError(_unknown(unknown, [*names, "device"]))
        if config is None:
            return cls(**settings)  # type: ignore[arg-type]
        if settings:
            raise ConfigError(f"config= and {', '.join(sorted(settings))}= were both given; put them into the Config.")
        if not isinstance(config, Config):
            raise ConfigError(f"config={config!r} is not a cocodiff.Config.")
        return config


def _unknown(unknown: Sequence[str], names: Sequence[str]) -> str:
    near = {name: get_close_matches(name, names, 1) for name in unknown}
    said = [name + (f" (did you mean {found[0]}?)" if found else "") for name, found in near.items()]
    return f"unknown settings: {', '.join(said)}. There are {', '.join(names)}; device is an argument of wrap."
