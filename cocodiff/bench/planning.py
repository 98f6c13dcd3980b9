"""Measures what the planner would assume: links, the model's own operators, and what a layer costs the host."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from cocodiff.bench.collectives import fit, time_levels
from cocodiff.bench.links import connect_all
from cocodiff.bench.methods import Method, compute_method
from cocodiff.bench.run import time_steps
from cocodiff.launch.agree import gather_json
from cocodiff.launch.job import Job
from cocodiff.models.shapes import Shape
from cocodiff.parallel.mesh import Degrees
from cocodiff.plan import RunPlan
from cocodiff.planner.operators import time_operators
from cocodiff.planner.rates import Rates
from cocodiff.planner.search import Task
from cocodiff.planner.space import meshes
from cocodiff.topology import Cluster

SIZES = tuple(16_384 * 4**power for power in range(6))  # bytes of a message: 16 KB to 16 MB
PATIENCE_SECONDS = 0.5  # no larger message follows one that took longer
TIMES = 3

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
    measured = {
        work: statistics.median(seconds) for work, seconds in zip(here, zip(*everyone, strict=True), strict=True)
    }
    compute = on_device(compute_method(model, shape, job, cluster, guided))
    time_steps(compute, 1, job)
    alone = statistics.median(time_steps(compute, 1, job)[0] for _ in range(TIMES))
    plain = RunPlan(Degrees(1, 1, job.world_size), exchange="flat", schedule="sequential", pieces=1)
    work = tuple(task.trace(plain).work())
    rates = replace(task.rates, measured=measured, source="measured on these ranks")
    return rates.fitted(work, task.itemsize, alone / task.calls(plain.degrees))
