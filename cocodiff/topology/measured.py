"""Measured times of exchanges by size. `exchange="auto"` uses them instead of the model if there are any."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cocodiff.errors import ConfigError


@dataclass(frozen=True)
class Measured:
    """MEASURED seconds of whole exchanges on `ranks` ranks: points (bytes a rank, seconds), sorted by size.

    Raises `ConfigError` for impossible points.

    >>> Measured(4, flat=((1000, 1.0), (4000, 4.0)), staged=((1000, 2.0),)).seconds("flat", 2000)
    2.0
    """

    ranks: int
    flat: tuple[tuple[float, float], ...]
    staged: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.ranks, int) or isinstance(self.ranks, bool) or self.ranks < 2:
            raise ConfigError(f"measured: ranks must be a whole number of at least 2, not {self.ranks!r}")
        for name in ("flat", "staged"):
            object.__setattr__(self, name, _points(getattr(self, name), name))

    def seconds(self, exchange: str, bytes_per_rank: float) -> float:
        """Return the seconds of an exchange of this size, `"flat"` or `"staged"`.

        Between two points they follow a power law. Below the first point they are its seconds, beyond the last one they
        grow in proportion to the bytes.
        """
        points: tuple[tuple[float, float], ...] = getattr(self, exchange)
        if bytes_per_rank <= points[0][0]:
            return points[0][1]
        for (low, fast), (high, slow) in zip(points, points[1:], strict=False):
            if bytes_per_rank <= high:
                share = math.log(bytes_per_rank / low) / math.log(high / low)
                return round(fast * (slow / fast) ** share, 12)
        return points[-1][1] * bytes_per_rank / points[-1][0]


def _points(points: Sequence[Sequence[float]], name: str) -> tuple[tuple[float, float], ...]:
    try:
        pairs = tuple((float(size), float(seconds)) for size, seconds in points)
    except (TypeError, ValueError):
        raise ConfigError(f"measured: {name} must be a list of [bytes, seconds], not {points!r}") from None
    sizes = [size for size, _ in pairs]
    good = all(0 < size < math.inf and 0 < seconds < math.inf for size, seconds in pairs)
    if not pairs or not good or sorted(set(sizes)) != sizes:
        raise ConfigError(f"measured: {name} must hold positive, finite numbers, sizes growing, not {points!r}")
    return pairs
