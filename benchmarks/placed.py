"""Every mesh and every placement of it, predicted by the planner's model and measured, in turn within one run.

    scripts/emulated_cluster --racks 2 --nodes 4 --ranks-per-node 1 --link 400mbit --rack-link 60mbit \
        -- python -m benchmarks.placed --shape sd35-medium --scale 1/16 --guided

What the model is given of the run: the compute time and each link's goodput, as in `benchmarks.planned`. Rank 0 prints
a Markdown table. An exchange is flat and nothing is cut into pieces, so that plans differ in mesh and placement alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from benchmarks.planned import CORE_SECONDS_PER_BYTE, LATENCY_US, Row, concordance, scaled, seconds_of
from cocodiff.bench.links import connect_all, goodput, inner_ranks
from cocodiff.bench.methods import compute_method, our_method
from cocodiff.bench.models import build_transformer
from cocodiff.bench.run import time_steps
from cocodiff.bench.shapes import named_shape
from cocodiff.config import Config
from cocodiff.launch.job import Job, start_job
from cocodiff.parallel.mesh import Degrees
from cocodiff.plan import RunPlan
from cocodiff.planner.plan_file import SCHEMA, plan_as_json
from cocodiff.planner.rates import DEVICES
from cocodiff.planner.space import meshes, spreadings
from cocodiff.planner.wanted import Wanted, task
from cocodiff.topology import Cluster


def measured_cluster(job: Job, cluster: str) -> Cluster:
    """The cluster with the goodput that its links have now. Collective."""
    session, connected = connect_all(job, cluster)
    sizes, levels = session.cluster.sizes, list(session.cluster.levels)
    for at in connected.levels:
        gbs = goodput(connected, at, job.device) / 1e9 / inner_ranks(sizes, at)
        slower = gbs / levels[at].bandwidth_gbs
        own = tuple((part, stated * slower) for part, stated in levels[at].part_gbs)
        levels[at] = replace(levels[at], bandwidth_gbs=gbs, latency_us=LATENCY_US, part_gbs=own)
    session.close()
    return replace(session.cluster, levels=tuple(levels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="flux-dev")
    parser.add_argument("--scale", type=Fraction, default=Fraction(1, 16))
    parser.add_argument("--guided", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    job, cluster = start_job("cpu"), os.environ["EMULATED_CLUSTER"]
    shape = named_shape(args.shape).scaled(args.scale)
    model, links = build_transformer(shape), measured_cluster(job, cluster)
    compute = compute_method(model, shape, job, cluster, args.guided)
    time_steps(compute, 1, job)
    alone = statistics.median(time_steps(compute, 1, job)[0] for _ in range(3))
    asked = Wanted(shape, 0, 0, None, 2 if args.guided else 1)
    cpu = replace(DEVICES["cpu"], core_seconds_per_byte=CORE_SECONDS_PER_BYTE)
    whole = RunPlan(Degrees(1, 1, job.world_size), exchange="flat", schedule="sequential", pieces=1)
    rough = task(asked, links, cpu, None)
    assumed = cpu.seconds(tuple(rough.trace(whole).work()), rough.itemsize) * rough.calls(whole.degrees)
    wanted = task(asked, links, scaled(cpu, assumed / alone), None)
    plans = [
        RunPlan(degrees, exchange="flat", pieces=1, placement=placement)
        for degrees in meshes(job.world_size, shape.heads, args.guided)
        for placement in spreadings(links.sizes, degrees)
    ]
    with tempfile.TemporaryDirectory() as folder:
        methods = []
        for plan in plans:
            file = Path(folder) / "plan.json"
            file.write_text(json.dumps({"schema": SCHEMA, "plans": [plan_as_json(plan)]}))
            methods.append(our_method("exact", Config(cluster=cluster, plan=file), model, shape, job, args.guided))
        for method in methods:
            time_steps(method, 1, job)
        seconds: list[list[float]] = [[] for _ in methods]
        for number in range(args.rounds):
            for index in range(len(methods)):
                at = (index + number) % len(methods)
                seconds[at].append(time_steps(methods[at], 1, job)[0])
    if job.is_main:
        rates = ", ".join(f"{one.name} {one.bandwidth_gbs * 1e3:.1f} MB/s a rank" for one in links.levels)
        print(f"\nThe model is given: compute {alone:.2f} s; {rates}.")
        report(plans, [seconds_of(wanted, plan) for plan in plans], seconds)


def report(plans: list[RunPlan], predicted: list[float], seconds: list[list[float]]) -> None:
    print("\n| mesh | placement | predicted | measured | ratio |\n|---|---|---|---|---|")
    rows = []
    for plan, one, some in zip(plans, predicted, seconds, strict=True):
        row = Row("", str(plan.degrees), one, statistics.median(some), min(some), max(some))
        rows.append(row)
        spread = f"{row.measured:.2f} s ({row.least:.2f} to {row.most:.2f})"
        print(f"| {plan.degrees} | {plan.placement or '-'} | {one:.2f} s | {spread} | {one / row.measured:.2f} |")
    best, chosen = min(row.measured for row in rows), min(rows, key=lambda row: row.predicted)
    right, total = concordance(rows)
    print(f"\n{right} of {total} pairs whose spreads do not meet are in the right order; ", end="")
    print(f"the plan that the model takes is {chosen.measured / best - 1:.1%} slower than the best that was measured.")
    for mesh in dict.fromkeys(row.method for row in rows):
        of = [row for row in rows if row.method == mesh]
        if len(of) > 1:
            worst = max(row.measured for row in of) / min(row.measured for row in of)
            print(f"{mesh}: the worst placement takes {worst:.2f} times as long as the best.")


if __name__ == "__main__":
    main()
