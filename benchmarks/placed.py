"""Every mesh and every placement of it, predicted by the planner's model and measured, in turn within one run.

    scripts/emulated_cluster --racks 2 --nodes 4 --ranks-per-node 1 --link 400mbit --rack-link 60mbit \
        -- python -m benchmarks.placed --shape sd35-medium --scale 1/16 --guided

What the model is given is measured in the same run, as `cocodiff plan --measure` does: links, operators one by one, and
what is left of a step that sends nothing. Rank 0 prints a Markdown table. Exchanges are flat and nothing is cut into
pieces, so that plans differ in mesh and placement alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.planned import Row, concordance, seconds_of
from benchmarks.played import PlayedDevice
from cocodiff.bench.methods import Method
from cocodiff.bench.models import build_transformer
from cocodiff.bench.planning import measured_links, measured_plans, measured_rates
from cocodiff.bench.shapes import named_shape
from cocodiff.kernels.partial import attend_partial
from cocodiff.launch.environment import environment
from cocodiff.launch.job import start_job
from cocodiff.plan import RunPlan
from cocodiff.planner.measured import Measurements
from cocodiff.planner.plan_file import plan_as_json
from cocodiff.planner.rates import DEVICES
from cocodiff.planner.space import meshes, spreadings
from cocodiff.planner.wanted import Wanted, task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="flux-dev")
    parser.add_argument("--scale", type=Fraction, default=Fraction(1, 16))
    parser.add_argument("--guided", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--played", type=float, help="operators are played, so many times slower: benchmarks/played.py")
    parser.add_argument("--out", type=Path, help="a JSON file for benchmarks/concordance.py")
    args = parser.parse_args()
    job, cluster = start_job("cpu"), os.environ["EMULATED_CLUSTER"]
    shape = named_shape(args.shape).scaled(args.scale)
    model, links = build_transformer(shape), measured_links(job, cluster)
    some, cpu = torch.randn(1, 4, 2, shape.head_dim), DEVICES["cpu"]
    attend_partial(some, some, some)  # checks its kernel once, with values
    device: AbstractContextManager[object] = nullcontext()
    if args.played is not None:
        device, cpu = PlayedDevice(Path(cluster).parent, args.played), replace(cpu, core_seconds_per_byte=0.0)

    def on_device(method: Method) -> Method:
        step = method.step

        def run() -> Tensor:
            with device:
                return step()

        method.step = run
        return method

    wanted = task(Wanted(shape, 0, 0, None, 2 if args.guided else 1), links, cpu, None)
    with device:
        rates = measured_rates(job, wanted, model, shape, cluster, on_device)
    wanted = replace(wanted, rates=rates)
    plans = [
        RunPlan(degrees, exchange="flat", pieces=1, placement=placement)
        for degrees in meshes(job.world_size, shape.heads, args.guided)
        for placement in spreadings(links.sizes, degrees)
    ]
    predicted = [seconds_of(wanted, plan) for plan in plans] if job.is_main else []
    seconds = measured_plans(job, plans, model, shape, cluster, args.guided, args.rounds, on_device)
    if not job.is_main:
        return
    given = ", ".join(
        f"{one.name} {one.bandwidth_gbs * 1e3:.1f} MB/s a rank, {one.latency_us / 1e3:.2f} ms" for one in links.levels
    )
    print(f"\nThe model is given: {given}; {len(rates.measured)} operators, and {rates.operator_us:.0f} us for each.")
    rows = [
        Row("", f"{plan.degrees}, {plan.placement or '-'}", one, statistics.median(some), min(some), max(some))
        for plan, one, some in zip(plans, predicted, seconds, strict=True)
    ]
    report(rows)
    if args.out is not None:
        figures = Measurements(environment(job), datetime.now(UTC).date().isoformat(), links, rates)
        found = {
            "command": os.environ["EMULATED_COMMAND"],
            "shape": shape.as_json(),
            "branches": 2 if args.guided else 1,
            "measured": figures.as_json(),
            "plans": [plan_as_json(plan) for plan in plans],
            "rows": [asdict(row) for row in rows],
        }
        args.out.write_text(json.dumps(found) + "\n")


def report(rows: list[Row]) -> None:
    print("\n| mesh, placement | predicted | measured | ratio |\n|---|---|---|---|")
    for row in rows:
        spread = f"{row.measured:.2f} s ({row.least:.2f} to {row.most:.2f})"
        print(f"| {row.method} | {row.predicted:.2f} s | {spread} | {row.predicted / row.measured:.2f} |")
    best, chosen = min(row.measured for row in rows), min(rows, key=lambda row: row.predicted)
    right, total = concordance(rows)
    print(f"\n{right} of {total} pairs whose spreads do not meet are in the right order; ", end="")
    print(f"the plan that the model takes is {chosen.measured / best - 1:.1%} slower than the best that was measured.")
    for mesh in dict.fromkeys(row.method.split(",")[0] for row in rows):
        of = [row.measured for row in rows if row.method.split(",")[0] == mesh]
        if len(of) > 1:
            print(f"{mesh}: the worst placement takes {max(of) / min(of):.2f} times as long as the best.")


if __name__ == "__main__":
    main()
