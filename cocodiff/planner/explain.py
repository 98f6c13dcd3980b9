"""Plans in words: a table, why each lost to the first, where ranks are, and how far to trust it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cocodiff.parallel.layout import digits
from cocodiff.parallel.mesh import Degrees
from cocodiff.plan import RunPlan
from cocodiff.planner.plan_file import SCHEMA, plan_as_json
from cocodiff.planner.rates import Rates
from cocodiff.planner.search import Candidate, Found
from cocodiff.planner.wanted import Wanted
from cocodiff.topology import Cluster

SHOWN_PLACES = 4  # units of the outermost level whose ranks are listed


def parts(candidate: Candidate, cluster: Cluster) -> dict[str, float]:
    """Seconds of a step by what they are spent on; they add up to the step."""
    timing, times = candidate.timing, candidate.forwards
    waiting = {f"waiting on {cluster.levels[level].name}": times * seconds for level, seconds in timing.waiting.items()}
    spent = {"compute": timing.compute, "compute slowed by sending": timing.shared, "waiting for the host": timing.host}
    return {name: times * seconds for name, seconds in spent.items() if seconds > 0} | waiting


def why_not(best: Candidate, other: Candidate, cluster: Cluster) -> str:
    """What the other plan loses by, in one sentence."""
    first, second = parts(best, cluster), parts(other, cluster)
    more = {name: second.get(name, 0.0) - first.get(name, 0.0) for name in {**first, **second}}
    name, seconds = max(more.items(), key=lambda one: one[1])
    groups = best.plan.dp_degree, other.plan.dp_degree
    slower = other.seconds * groups[0] / (best.seconds * groups[1]) - 1
    if groups[0] != groups[1]:
        each = f"each step takes {other.seconds / best.seconds:.2f} times as long"
        return f"{slower + 1:.2f} times as long for as many steps: {groups[1]} groups, not {groups[0]}; {each}."
    if slower < 0.001:
        return "as fast in this model: take either."
    return f"{slower:.1%} slower: {_seconds(seconds)} more of {name}."


def describe(found: Found, asked: Wanted, cluster: Cluster, rates: Rates) -> Iterator[str]:
    """The lines that `cocodiff plan` prints."""
    shape = asked.shape
    size = f"{asked.height} x {asked.width}" + (f", {asked.frames} frames" if asked.frames else "")
    levels = " x ".join(f"{level.name} {level.size}" for level in cluster.levels)
    branches = "two branches of guidance" if asked.branches > 1 else "no guidance in two branches"
    yield f"{shape.name}, {size} ({shape.image} tokens), {shape.dtype}, {branches}; {cluster.name}: {levels}"
    yield f"MODELLED, nothing was run: {found.played} of {found.bounded} plans were simulated, the others bounded."
    yield ""
    yield f"{'':2}{'plan':34}{'exchange':>10}{'pieces':>8}{'a step':>10}{'compute':>9}{'waiting':>9}{'memory':>10}"
    for number, one in enumerate(found.candidates, 1):
        compute = one.forwards * one.timing.compute / one.seconds
        yield (
            f"{number:<2}{_named(one.plan):34}{one.plan.exchange:>10}{one.plan.pieces:>8}"
            f"{_seconds(one.seconds):>10}{compute:>9.0%}{1 - compute:>9.0%}{one.memory_bytes / 1e9:>7.1f} GB"
        )
    best = found.candidates[0]
    yield ""
    spent = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in parts(best, cluster).items() if seconds > 5e-6)
    yield f"1 spends: {spent}."
    for number, one in enumerate(found.candidates[1:], 2):
        yield f"Not {number}: {why_not(best, one, cluster)}"
    yield ""
    yield from placement(best, cluster)
    yield ""
    assumed = f"{rates.name}'s rates are {rates.source}; links are as the cluster {cluster.name!r} states them"
    yield f"Confidence: {assumed}. Memory leaves out text encoders and VAE. See docs/planner.md."
    if best.plan.dp_degree > 1:
        yield f"To use it: start {best.plan.dp_degree} runs of {cluster.num_ranks // best.plan.dp_degree} ranks each."
    else:
        yield 'To use it: add --out plan.json, and cocodiff.wrap(pipe, plan="plan.json").'


def placement(candidate: Candidate, cluster: Cluster) -> Iterator[str]:
    """Which part of the work each rank of the first units of the outermost level has."""
    degrees = candidate.plan.degrees
    if cluster.num_ranks == 1:
        return
    placed, group = candidate.plan.placement, cluster.num_ranks // candidate.plan.dp_degree
    place = placed.coordinates if placed is not None else lambda rank: _in_order(degrees, rank)
    if placed is not None:
        yield f"Placement, ranks of each axis along {', '.join(level.name for level in cluster.levels)}: {placed}"
    unit = cluster.num_ranks // cluster.sizes[-1]
    of = "" if candidate.plan.dp_degree == 1 else f" in their group of {group}"
    yield f"Ranks as (cfg, ring, ulysses){of}, by {cluster.levels[-1].name}:"
    for number in range(min(cluster.sizes[-1], SHOWN_PLACES)):
        words = []
        for rank in range(number * unit, (number + 1) * unit):
            words.append("({},{},{})".format(*place(rank % group)))
            if len(cluster.sizes) > 2 and digits(rank + 1, cluster.sizes)[0] == 0 and rank + 1 < (number + 1) * unit:
                words.append("|")
        yield f"  {cluster.levels[-1].name} {number}: {' '.join(words)}"
    if cluster.sizes[-1] > SHOWN_PLACES:
        yield f"  and so on, to {cluster.levels[-1].name} {cluster.sizes[-1] - 1}"


def _named(plan: RunPlan) -> str:
    """The degrees of a plan, with the groups where there are several."""
    return str(plan.degrees) if plan.dp_degree == 1 else f"dp {plan.dp_degree} x {plan.degrees}"


def _in_order(degrees: Degrees, rank: int) -> tuple[int, int, int]:
    part, ulysses = divmod(rank, degrees.ulysses)
    return *divmod(part, degrees.ring), ulysses


def as_json(found: Found, asked: Wanted, cluster: Cluster, rates: Rates) -> dict[str, Any]:
    """The same as JSON values; docs/planner.md has the schema."""
    plans = [
        {
            **plan_as_json(one.plan),
            "seconds_per_step": one.seconds,
            "seconds_by_part": parts(one, cluster),
            "lower_bound_seconds": one.bound,
            "memory_bytes": {"weights": one.program.weight_bytes, "activations": one.program.kept_bytes},
        }
        for one in found.candidates
    ]
    return {
        "schema": SCHEMA,
        "modelled": True,
        "shape": asked.shape.as_json(),
        "height": asked.height,
        "width": asked.width,
        "frames": asked.frames,
        "branches": asked.branches,
        "cluster": {"name": cluster.name, "levels": {level.name: level.size for level in cluster.levels}},
        "rates": {"name": rates.name, "source": rates.source},
        "plans_bounded": found.bounded,
        "plans_simulated": found.played,
        "plans": plans,
    }


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
