"""Counts the bytes that this rank sends to other ranks, by level of the cluster and by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class ByteCounter:
    """Counts payload where exchanges start, from their sizes. What a rank keeps for itself is not counted.

    Attributes:
        sent: (level, label) -> bytes.
        exact: (level, label) -> bytes that an exact run would have sent.

    >>> counter = ByteCounter()
    >>> counter.add("v", (8, 16), exact=(8, 64))
    >>> counter.by_level(2), counter.exact[1, "v"]
    ([8, 16], 64)
    """

    sent: Counter[tuple[int, str]] = field(default_factory=Counter)
    exact: Counter[tuple[int, str]] = field(default_factory=Counter)

    def add(self, label: str, bytes_by_level: Sequence[int], exact: Sequence[int] | None = None) -> None:
        for level, count in enumerate(bytes_by_level):
            self.sent[level, label] += count
            self.exact[level, label] += count if exact is None else exact[level]

    def snapshot(self) -> tuple[Counter, Counter]:
        """Return copies of `sent` and `exact`."""
        return Counter(self.sent), Counter(self.exact)

    def clear(self) -> None:
        self.sent.clear()
        self.exact.clear()

    def by_level(self, levels: int) -> list[int]:
        return [sum(count for (one, _), count in self.sent.items() if one == level) for level in range(levels)]
