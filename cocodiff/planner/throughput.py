"""Plans for the most pictures in a time: groups of ranks that each draw their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cocodiff.errors import ConfigError
from cocodiff.planner.search import Candidate, Found, Task, search
from cocodiff.topology import Cluster


def search_throughput(task: Callable[[Cluster], Task], cluster: Cluster, keep: int = 5) -> Found:
    """The plans that take the most steps a second, all groups together.

    Groups hold neighbouring ranks, and do not share links with each other in the model.

    Args:
        task: for the ranks of one group.
        cluster: of all ranks, with concrete sizes.

    Raises:
        ConfigError: no group of any size has a legal plan.
    """
    ranks, found, bounded, played = cluster.num_ranks, list[Candidate](), 0, 0
    refusal: ConfigError | None = None
    for groups in range(1, ranks + 1):
        if ranks % groups:
            continue
        try:
            here = search(task(cluster.resolve(ranks // groups)), keep)
        except ConfigError as error:  # these ranks fill no levels, or have no plan
            refusal = refusal or error
            continue
        bounded, played = bounded + here.bounded, played + here.played
        found += [replace(one, plan=replace(one.plan, dp_degree=groups)) for one in here.candidates]
    if not found:
        assert refusal is not None
        raise refusal
    found.sort(key=lambda one: one.seconds / one.plan.dp_degree)
    return Found(tuple(found[:keep]), bounded, played)
