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


def pairs(row: Row) -> set[Pair]:
    """Every two choices of a row."""
    return _pairs(row, [*itertools.combinations(row, 2)])


def _pairs(row: Row, names: Sequence[tuple[str, str]]) -> set[Pair]:
    return {(one, row[one], other, row[other]) for one, other in names}


def covering(
    dimensions: Mapping[str, Sequence[Any]],
    allowed: Callable[[Row], bool] = lambda row: True,
    derived: Mapping[str, Callable[[Row], Any]] | None = None,
    apart: Collection[frozenset[str]] = (),
    cost: Callable[[Row], float] = lambda row: 1,
) -> list[Row]:
    """Rows that together hold every pair that an allowed row holds: greedy, always the row with the most new pairs.

    The same arguments give the same rows; of equal rows the first in the order of the product is taken.
    Where rows have a cost, the row with the most new pairs for its cost is taken.

    Args:
        dimensions: values by name.
        allowed: which rows may be.
        derived: further dimensions, computed from a row; pairs with them are covered like others.
        apart: pairs of dimensions whose values need not all meet.
        cost: of a row, above 0.
    """
    rows = product(dimensions, allowed)
    derived = derived or {}
    names = [two for two in itertools.combinations([*dimensions, *derived], 2) if frozenset(two) not in apart]
    held = [_pairs(row | {name: of(row) for name, of in derived.items()}, names) for row in rows]
    missing = set().union(*held)
    # What a row adds only ever shrinks, so a row whose count is still right when it comes up adds the most.
    costs = [cost(row) for row in rows]
    queue = [(-len(found) / costs[index], index) for index, found in enumerate(held)]
    heapq.heapify(queue)
    chosen = []
    while missing:
        gain, index = heapq.heappop(queue)
        held[index] &= missing
        if (now := -len(held[index]) / costs[index]) == gain:
            chosen.append(rows[index])
            missing -= held[index]
        else:
            heapq.heappush(queue, (now, index))
    return chosen
