"""How well the planner's model predicts what was measured: the committed results of every mesh, one by one.

    python -m benchmarks.planned

Of each run the model is given two things that were measured in that same run: the time of the compute alone, to which
the CPU's assumed rates are scaled by one factor, and the goodput of each link. Everything else is modelled: operators,
messages and their order are read from the code, latencies and the cores' share of sending are fixed below for all runs.
The runs were measured before the planner was written; the two constants were chosen by looking at four of them
(CALIBRATION), the others are the test.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cocodiff.models import family_named
from cocodiff.models.shapes import Shape
from cocodiff.parallel.layout import split_sizes
from cocodiff.parallel.mesh import Degrees
from cocodiff.plan import RunPlan, plan_layer
from cocodiff.planner.costs import MeshCosts
from cocodiff.planner.rates import DEVICES
from cocodiff.planner.search import Task
from cocodiff.planner.wanted import Wanted, task
from cocodiff.topology import Cluster, Level

RESULTS = Path(__file__).parent / "results" / "meshes"
CALIBRATION = ("105mbit", "4092mbit", "8-ranks-107mbit", "wan-14b")
LATENCY_US = 1000.0  # of a message between ranks that share two cores: they wait for their turn
CORE_SECONDS_PER_BYTE = 4e-9


@dataclass(frozen=True)
class Row:
    """One method of one run: seconds a step, predicted and measured (median, least, most)."""

    run: str
    method: str
    predicted: float
    measured: float
    least: float
    most: float


def predict(path: Path) -> Iterator[Row]:
    """Every row of one result of `cocodiff bench` that names its mesh."""
    found = json.loads(path.read_text())
    if found["cluster"] is None or not found["cluster"].get("goodput_gbs") or "branches" not in found:
        return
    shape = Shape(**{key: value for key, value in found["shape"].items() if key != "width"})
    described, guided = found["cluster"], found["branches"] == 2
    links = _cluster(described["levels"], described["goodput_gbs"], LATENCY_US)
    stated = _cluster(described["levels"], {}, None)
    asked = Wanted(shape, 0, 0, None, 2 if guided else 1)
    cpu = replace(DEVICES["cpu"], core_seconds_per_byte=CORE_SECONDS_PER_BYTE)
    plain = RunPlan(Degrees(1, 1, links.num_ranks), exchange="flat", schedule="sequential", pieces=1)
    work = tuple(task(asked, links, cpu, None).trace(plain).work())
    calls = 2 if guided and not family_named(shape.family).batched else 1
    wanted = task(asked, links, cpu.fitted(work, 4, found["compute_seconds"] / calls), None)
    for name, method in found["methods"].items():
        seconds = method.get("seconds_per_step")
        if method.get("mesh") is None or seconds is None or name.split()[0] not in ("ulysses", "exact"):
            continue
        words = method["mesh"].split()
        degrees = Degrees(int(words[1]), int(words[4]), int(words[7]))
        plan = plain if name == "ulysses" else _as_run_then(shape, degrees, stated)
        yield Row(path.stem, name, seconds_of(wanted, plan), seconds["median"], seconds["min"], seconds["max"])


def seconds_of(wanted: Task, plan: RunPlan) -> float:
    """What the model says of one plan."""
    program = wanted.trace(plan)
    costs = MeshCosts(wanted.cluster, wanted.rates, wanted.itemsize, plan.degrees, plan.placement)
    return wanted.calls(plan.degrees) * costs.play(program).total


def concordance(rows: list[Row]) -> tuple[int, int]:
    """Of pairs in one run whose spreads do not meet: how many are in the right order, and how many there are."""
    right = total = 0
    for index, one in enumerate(rows):
        for other in rows[:index]:
            if one.run == other.run and (one.least > other.most or other.least > one.most):
                total += 1
                right += (one.predicted > other.predicted) == (one.measured > other.measured)
    return right, total


def _cluster(levels: list[dict[str, Any]], goodput: dict[str, float], latency_us: float | None) -> Cluster:
    """The cluster of a result; `goodput` is of the link that all ranks inside a level share."""
    made, inner = [], 1
    for level in levels:
        gbs = goodput[level["name"]] / inner if level["name"] in goodput else level["bandwidth_gbs"]
        latency = level["latency_us"] if latency_us is None else latency_us
        made.append(Level(level["name"], level["size"], gbs, latency, level["slow"]))
        inner *= level["size"]
    return Cluster("measured", tuple(made))


def _as_run_then(shape: Shape, degrees: Degrees, cluster: Cluster) -> RunPlan:
    """The exchange and pieces that the rule chose for that mesh."""
    tokens = shape.image + (0 if shape.family == "wan" else shape.text)
    lengths = split_sizes(tokens, degrees.ring * degrees.ulysses)
    itemsize = getattr(torch, shape.dtype).itemsize
    layer = plan_layer(RunPlan(degrees), cluster, "cpu", lengths, shape.width, itemsize, None)
    return RunPlan(degrees, exchange=layer.exchange, pieces=layer.pieces)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows: list[Row] = []
    print("| run | method | predicted | measured | ratio |\n|---|---|---|---|---|")
    for path in sorted(RESULTS.glob("*.json")):
        for row in predict(path):
            rows.append(row)
            spread = f"{row.measured:.2f} ({row.least:.2f} to {row.most:.2f})"
            print(
                f"| {row.run} | {row.method} | {row.predicted:.2f} s | {spread} | {row.predicted / row.measured:.2f} |"
            )
    for name, chosen in (("calibration", True), ("test", False)):
        some = [row for row in rows if any(word in row.run for word in CALIBRATION) == chosen]
        errors = [abs(row.predicted / row.measured - 1) for row in some]
        right, total = concordance(some)
        print(
            f"\n{name}: {len(some)} rows, mean error {sum(errors) / len(errors):.1%}, most {max(errors):.1%}; "
            f"{right} of {total} pairs whose spreads do not meet are in the right order"
        )


if __name__ == "__main__":
    main()
