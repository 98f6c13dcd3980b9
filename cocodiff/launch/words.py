"""Words for messages that name ranks or repeat what came from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable


def rank_words(ranks: Iterable[int], shown: int = 8) -> str:
    """Return "rank 3", or "ranks 0, 2 and 7 more".

    >>> rank_words([1, 3])
    'ranks 1, 3'
    """
    numbers = list(ranks)
    text = ", ".join(map(str, numbers[:shown]))
    more = f" and {len(numbers) - shown} more" if len(numbers) > shown else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {text}{more}"


def printable(text: str, limit: int = 400) -> str:
    """Return one short line without control characters: what another process wrote may go to a terminal.

    >>> printable("two\\nlines \\x1b[31m")
    'two lines ?[31m'
    """
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:limit]
