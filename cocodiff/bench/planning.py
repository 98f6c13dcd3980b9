"""Measures what the planner would assume: links, the model's own operators, and what a layer costs the host."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from cocodiff.bench.collectives import fit, time_levels
from cocodiff.bench.links import connect_all
from cocodiff.bench.methods import Method, compute_method, our_method, synchronize
from cocodiff.bench.models import build_transformer
from cocodiff.bench.run import time_steps
from cocodiff.config import Config
from cocodiff.launch.agree import gather_json
from cocodiff.launch.environment import environment
from cocodiff.launch.job import Job
from cocodiff.models.shapes import Shape
from cocodiff.parallel.mesh import Degrees
from cocodiff.plan import RunPlan
from cocodiff.planner.measured import Measurements, fitted_to_operators
from cocodiff.planner.operators import time_operators
from cocodiff.planner.plan_file import SCHEMA, plan_as_json, plan_of_json
from cocodiff.planner.rates import Rates
from cocodiff.planner.search import Found, Task, search
from cocodiff.planner.simulate import LAUNCHES_PER_SEND
from cocodiff.planner.space import meshes
from cocodiff.planner.wanted import Wanted, task
from cocodiff.topology import Cluster

SIZES = tuple(16_384 * 4**power for power in range(6))  # bytes of a message: 16 KB to 16 MB
PATIENCE_SECONDS = 0.5  # no larger message follows one that took longer
TIMES = 3
TRIED, STEPS = 3, 2  # plans that are run, and steps of each that count

OnDevice = Callable[[Method], Method]


def measured_links(job: Job, cluster: str) -> Cluster:
    """The cluster with the latency and bandwidth that each of its levels has now; parts of their own keep their share.

    Collective over all ranks, more than one.
    """
    session, connected = connect_all(job, cluster)
    levels = list(session.cluster.levels)
    for at, points in time_levels(connected, SIZES, TIMES, PATIENCE_SECONDS, job).items():
        level = levels[at]
        alpha, beta = fit(points, session.cluster.sizes[at])
        slowest = min([level.bandwidth_gbs, *(gbs for _, gbs in level.part_gbs)])
        faster = beta / 1e9 / slowest  # all parts exchange at once, so that the slowest one was timed
        own = tuple((part, gbs * faster) for part, gbs in level.part_gbs)
        levels[at] = replace(level, bandwidth_gbs=level.bandwidth_gbs * faster, latency_us=alpha * 1e6, part_gbs=own)
    session.close()
    return replace(session.cluster, levels=tuple(levels))


def measured_rates(
    job: Job, task: Task, model: nn.Module, shape: Shape, cluster: str, on_device: OnDevice = lambda method: method
) -> Rates:
    """The rates of this device for this model: its operators one by one, and what is left of a step that sends nothing.

    Args:
        task: whose rates stand in for operators that cannot be timed alone.
        model: of the shape, with weights.
        on_device: may change the method that is timed. Collective over all ranks.
    """
    guided = task.branches > 1
    for degrees in meshes(job.world_size, task.heads, guided):
        task.trace(RunPlan(degrees, exchange="flat", pieces=1))
    assert job.host_group is not None
    here = time_operators(task.known, job.device)
    everyone = gather_json(list(here.values()), job.host_group)
    medians = (statistics.median(seconds) for seconds in zip(*everyone, strict=True))
    measured = dict(zip(here, medians, strict=True))
    compute = on_device(compute_method(model, shape, job, cluster, guided))
    time_steps(compute, 1, job)
    plain = RunPlan(Degrees(1, 1, job.world_size), exchange="flat", schedule="sequential", pieces=1)
    program, calls = task.trace(plain), task.calls(plain.degrees)
    alone = statistics.median(time_steps(compute, 1, job)[0] for _ in range(TIMES)) / calls
    rates = fitted_to_operators(task.rates, measured, task.itemsize)
    work, operators = tuple(program.work()), rates.seconds(tuple(program.work()), task.itemsize)
    if job.device.type != "cpu":
        host = statistics.median(_host_seconds(compute, job) for _ in range(TIMES)) / calls
        sends = sum(times for _, times in program.sends())
        rates = replace(rates, launch_us=host / (sum(one.count for one in work) + LAUNCHES_PER_SEND * sends) * 1e6)
        alone = operators + max(alone - max(host, operators), 0.0)  # what neither of the two explains
    return replace(rates.fitted(work, task.itemsize, alone), source="measured on these ranks")


def _host_seconds(method: Method, job: Job) -> float:
    """The seconds that the host takes to start a step; its device runs behind."""
    synchronize(job)
    with torch.no_grad(), method.around():
        began = time.perf_counter()
        method.step()
        return time.perf_counter() - began


def measured_plans(
    job: Job,
    plans: Sequence[RunPlan],
    model: nn.Module,
    shape: Shape,
    cluster: str,
    guided: bool,
    steps: int = STEPS,
    on_device: OnDevice = lambda method: method,
) -> list[list[float]]:
    """Seconds of each of some steps of each plan, all plans in turn, after one step each. Collective over all ranks."""
    methods = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        for plan in plans:
            file.write_text(json.dumps({"schema": SCHEMA, "plans": [plan_as_json(plan)]}))
            methods.append(
                on_device(our_method("exact", Config(cluster=cluster, plan=file), model, shape, job, guided))
            )
    for method in methods:
        time_steps(method, 1, job)
    rounds = [[time_steps(method, 1, job)[0] for method in methods] for _ in range(steps)]
    return [list(some) for some in zip(*rounds, strict=True)]


def measure(
    job: Job, asked: Wanted, cluster: str, rates: Rates, memory_bytes: float, say: Callable[[str], None]
) -> tuple[Measurements, Found | None, list[list[float]]]:
    """Measure what the planner assumes, search with that, and run the best plans. Collective over all ranks.

    Returns:
        What was measured, the plans as the model orders them (on rank 0), and of the first what their steps took.
    """
    say("links ...")
    where = measured_links(job, cluster)
    model, rough = build_transformer(asked.shape).to(job.device), task(asked, where, rates, memory_bytes)
    say("operators ...")
    found_rates = measured_rates(job, rough, model, asked.shape, cluster)
    assert job.host_group is not None
    best = search(replace(rough, rates=found_rates), keep=TRIED) if job.is_main else None
    chosen = gather_json([] if best is None else [plan_as_json(one.plan) for one in best.candidates], job.host_group)[0]
    say(f"steps of the best {len(chosen)} ...")
    plans = [plan_of_json(one) for one in chosen]
    seconds = measured_plans(job, plans, model, asked.shape, cluster, asked.branches > 1)
    today = datetime.now(UTC).date().isoformat()
    return Measurements(environment(job), today, where, found_rates), best, seconds
