"""`cocodiff plan --measure`: the same, but measured on the ranks at hand, and the best plans are run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

from cocodiff.cli.start import say
from cocodiff.cli.together import on_all_ranks

if TYPE_CHECKING:
    from cocodiff.planner.measured import Measurements
    from cocodiff.planner.search import Found
    from cocodiff.planner.wanted import Wanted


def measure_plans(
    asked: Wanted, cluster: str, device: str | None, memory: Callable[[float], float], file: Path, out: Path | None
) -> None:
    """Measure on the launcher's ranks, write what was measured into a file, and the best plan into another."""
    from cocodiff.bench.memory import check_memory
    from cocodiff.bench.planning import measure
    from cocodiff.errors import ConfigError
    from cocodiff.launch.job import start_job
    from cocodiff.planner.plan_file import SCHEMA, plan_as_json
    from cocodiff.planner.rates import rates_here

    job = start_job(device)
    with on_all_ranks(job, "checking the options"):
        if job.world_size == 1:
            raise ConfigError("one rank has nothing to plan: start --measure under a launcher, or with --ranks.")
        check_memory(asked.shape, job, 1)
    rates = rates_here(job.device)
    with job.watched("cocodiff plan --measure"):
        found, plans, seconds = measure(
            job, asked, cluster, rates, memory(rates.memory_gb), say if job.is_main else (lambda text: None)
        )
    if not job.is_main or plans is None:
        return
    file.write_text(dumps(found.as_json(), indent=1) + "\n")
    medians = [statistics.median(some) for some in seconds]
    fastest = plans.candidates[medians.index(min(medians))].plan
    if out is not None:
        out.write_text(dumps({"schema": SCHEMA, "modelled": False, "plans": [plan_as_json(fastest)]}, indent=2) + "\n")
    print("\n".join(_lines(found, plans, seconds)))
    print(f'written: {file}; use it with cocodiff.wrap(pipe, plan="{file}"), or cocodiff plan --measured {file}')


def _lines(found: Measurements, plans: Found, seconds: list[list[float]]) -> Iterator[str]:
    where = found.environment
    yield f"MEASURED on {where['ranks']} ranks of {where['hosts']} hosts: {where['machine']}, {where['device']}"
    for level in found.cluster.levels:
        yield f"level {level.name}: {level.latency_us:.0f} us, {level.bandwidth_gbs:.4g} GB/s a rank"
    rates = found.rates
    yield f"{len(rates.measured)} operators; {rates.operator_us + rates.launch_us:.0f} us more for each"
    yield ""
    yield f"{'plan':36}{'exchange':>10}{'pieces':>8}{'in the model':>14}{'measured':>12}{'from':>10}{'to':>9}"
    medians = [statistics.median(some) for some in seconds]
    for at in sorted(range(len(medians)), key=medians.__getitem__):
        one, some = plans.candidates[at], seconds[at]
        yield (
            f"{str(one.plan.degrees):36}{one.plan.exchange:>10}{one.plan.pieces:>8}{one.seconds:>12.3f} s"
            f"{medians[at]:>10.3f} s{min(some):>8.3f} s{max(some):>7.3f} s"
        )
        if one.plan.placement is not None:
            yield f"  placed {one.plan.placement}"
