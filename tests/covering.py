"""Pairwise covering sets: a few rows in which every two choices that may meet do meet.

Most faults need one choice, or two together, to show. A full product of all choices costs hundreds of runs; a set of
rows that holds every pair costs about as many as the two longest dimensions multiplied.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Pair = tuple[str, Any, str, Any]


def product(dimensions: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """All rows that take one value of each dimension and are allowed, in order."""
    rows = (dict(zip(dimensions, values, strict=True)) for values in itertools.product(*dimensions.values()))
    return [row for row in rows if allowed(row)]


def pairs(row: Row, apart: Collection[frozenset[str]] = ()) -> set[Pair]:
    """Every two choices of a row, except those of two dimensions that are named in `apart`."""
    names = [two for two in itertools.combinations(row, 2) if frozenset(two) not in apart]
    return {(one, row[one], other, row[other]) for one, other in names}


def covering(
    dimensions: Mapping[str, Sequence[Any]],
    allowed: Callable[[Row], bool] = lambda row: True,
    derived: Mapping[str, Callable[[Row], Any]] | None = None,
    apart: Collection[frozenset[str]] = (),
) -> list[Row]:
    """Rows that together hold every pair that an allowed row holds: greedy, always the row with the most new pairs.

    The same arguments give the same rows; of equal rows the first in the order of the product is taken.

    Args:
        dimensions: values by name.
        allowed: which rows may be.
        derived: further dimensions, computed from a row; pairs with them are covered like others.
        apart: pairs of dimensions whose values need not all meet.
    """
    rows = product(dimensions, allowed)
    held = [pairs(row | {name: of(row) for name, of in (derived or {}).items()}, apart) for row in rows]
    missing = set().union(*held)
    # What a row adds only ever shrinks, so a row whose count is still right when it comes up adds the most.
    queue = [(-len(found), index) for index, found in enumerate(held)]
    heapq.heapify(queue)
    chosen = []
    while missing:
        count, index = heapq.heappop(queue)
        held[index] &= missing
        if len(held[index]) == -count:
            chosen.append(rows[index])
            missing -= held[index]
        else:
            heapq.heappush(queue, (-len(held[index]), index))
    return chosen
