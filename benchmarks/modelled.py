"""What tables of modelled plans are made of: seconds of plans, the best of many, ranks of them. For `papers.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from benchmarks.planned import seconds_of
from cocodiff.parallel.mesh import Degrees
from cocodiff.parallel.placement import Placement, default_placement
from cocodiff.plan import RunPlan
from cocodiff.planner.fabric import Fabric
from cocodiff.planner.rates import Rates
from cocodiff.planner.search import Task
from cocodiff.planner.space import meshes, spreadings, ways
from cocodiff.planner.wanted import task, wanted
from cocodiff.topology import Cluster

MOST_RING = 12  # longer rings were never near the best, and their traces take long
GUIDED = {
    "flux-dev": False,
    "flux2-dev": False,
    "qwen-image": True,
    "sd35-large": True,
    "wan-1.3b": True,
    "wan-14b": True,
}

Placed = dict[tuple[Degrees, Placement | None], float]


def asked(
    model: str, height: int, width: int, frames: int | None, cluster: Cluster, rates: Rates,
    blocks: int | None = None,
) -> Task:  # fmt: skip
    """What is to be planned for, memory left out; `blocks` of each kind instead of the model's own number."""
    of = wanted(f"shape:{model}", height, width, frames, GUIDED[model], "bfloat16")
    if blocks is not None:
        shape = replace(of.shape, double=min(blocks, of.shape.double), single=min(blocks, of.shape.single))
        of = replace(of, shape=shape)
    return task(of, cluster, rates, None)


def plain(of: Task, degrees: Degrees, exchange: str = "flat", schedule: str = "sequential") -> float:
    return seconds_of(of, RunPlan(degrees, exchange=exchange, schedule=schedule, pieces=1))


def everywhere(of: Task, schedule: str = "v_first") -> Placed:
    """Seconds of every mesh and placement, exchanged flat and whole."""
    found: Placed = {}
    for degrees in meshes(of.cluster.num_ranks, of.heads, of.branches > 1):
        if degrees.ring <= max(MOST_RING, of.cluster.num_ranks // of.heads):
            for placement in spreadings(of.cluster.sizes, degrees):
                plan = RunPlan(degrees, exchange="flat", schedule=schedule, pieces=1, placement=placement)
                found[degrees, placement] = seconds_of(of, plan)
    return found


def refined(of: Task, placed: Placed, most: int = 3) -> dict[RunPlan, float]:
    """The best of them, with every exchange and number of pieces."""
    found = {}
    for degrees, placement in sorted(placed, key=lambda key: placed[key])[:most]:
        fabric = Fabric(of.cluster, degrees, placement)
        for plan in ways(degrees, placement, fabric.crossed("ulysses")):
            found[plan] = seconds_of(of, plan)
    return found


def all_ulysses(of: Task) -> Degrees:
    """One axis of all ranks, or of as many as the heads allow and whole parts of the cluster hold, in rings."""
    ranks, sizes = of.cluster.num_ranks, of.cluster.sizes
    fitting = [size for size in range(1, min(ranks, of.heads) + 1) if ranks % size == 0]
    ulysses = max(size for size in fitting if default_placement(sizes, (1, ranks // size, size)) is not None)
    return Degrees(1, ranks // ulysses, ulysses)


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """The correlation of ranks; equal values, up to nine digits, share their mean rank.

    >>> round(spearman([1, 2, 3], [10, 20, 20]), 3), spearman([1, 2, 3], [3, 2, 1])
    (0.866, -1.0)
    """

    def ranks(values: Sequence[float]) -> np.ndarray:
        rounded = np.array([float(f"{value:.9g}") for value in values])
        _, index, counts = np.unique(rounded, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[index]

    return float(np.round(np.corrcoef(ranks(one), ranks(other))[0, 1], 12))


def placement_effect(placed: Placed) -> float:
    """Of one mesh, the worst placement over the best; of the mesh with most to lose."""
    by_mesh: dict[Degrees, list[float]] = {}
    for (degrees, _), seconds in placed.items():
        by_mesh.setdefault(degrees, []).append(seconds)
    return max(max(some) / min(some) for some in by_mesh.values())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"
