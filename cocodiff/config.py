"""What a user may choose, checked as it is made."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

from cocodiff.errors import ConfigError
from cocodiff.selective.schedule import Selective
from cocodiff.topology import Cluster

CHOICES = {"exchange": ("auto", "flat", "staged"), "schedule": ("v_first", "sequential")}
DEGREES = ("cfg_degree", "ring_degree", "ulysses_degree")


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
        pieces: into how many pieces a layer's rows are cut, so that exchange and compute overlap. None lets the cost
            model decide.
        transmission: what crosses slow links: `"exact"`, or `"high"`, `"balanced"`, `"fast"` (1/4, 1/8 and 1/16 of the
            bytes; 1/32 where keys and values alone cross), or a `cocodiff.Selective`. Fast links stay exact.

    >>> Config(exchange="staged").schedule
    'v_first'
    """

    exchange: str = "auto"
    schedule: str = "v_first"
    cluster: str | os.PathLike[str] | Cluster = "auto"
    cfg_degree: int | None = None
    ring_degree: int | None = None
    ulysses_degree: int | None = None
    pieces: int | None = None
    transmission: str | Selective = "exact"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")
        if not isinstance(self.cluster, str | os.PathLike | Cluster):
            raise ConfigError(f"cluster={self.cluster!r} is neither a name, a path nor a cocodiff.Cluster.")
        for name in (*DEGREES, "pieces"):
            degree = getattr(self, name)
            if degree is not None and (not isinstance(degree, int) or isinstance(degree, bool) or degree < 1):
                raise ConfigError(f"{name}={degree!r} is not a positive whole number.")
        selective = Selective.of(self.transmission)
        if selective is not None and selective.method == "v_major" and self.schedule == "sequential":
            raise ConfigError('v_major chooses rows by V, which schedule="sequential" sends last: use "v_first".')

    @classmethod
    def of(cls, config: Config | None, settings: dict[str, object]) -> Config:
        """The config given, or one made of keywords; never both."""
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(names))
        if unknown:
            raise ConfigError(f"unknown settings {', '.join(unknown)}; there are {', '.join(names)}.")
        if config is None:
            return cls(**settings)  # type: ignore[arg-type]
        if settings:
            raise ConfigError(f"config= and {', '.join(sorted(settings))}= were both given; put them into the Config.")
        if not isinstance(config, Config):
            raise ConfigError(f"config={config!r} is not a cocodiff.Config.")
        return config
