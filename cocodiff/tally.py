"""How many bytes this rank has sent to other ranks, by level of the cluster and by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counted where exchanges start, from their sizes: payload alone, what a rank keeps for itself excluded.

    >>> tally = Tally()
    >>> tally.add("v", (8, 16))
    >>> tally.by_level(2), tally.by_label()
    ([8, 16], {'v': 24})
    """

    sent: Counter[tuple[int, str]] = field(default_factory=Counter)  # (level, label) -> bytes

    def add(self, label: str, bytes_by_level: Sequence[int]) -> None:
        for level, count in enumerate(bytes_by_level):
            self.sent[level, label] += count

    def by_level(self, levels: int) -> list[int]:
        return [sum(count for (one, _), count in self.sent.items() if one == level) for level in range(levels)]

    def by_label(self) -> dict[str, int]:
        totals: Counter[str] = Counter()
        for (_, label), count in self.sent.items():
            totals[label] += count
        return dict(totals)
