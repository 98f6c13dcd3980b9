"""One bench: several methods in turn on one shape, what they took, what they sent, and how near the limit that is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cocodiff.bench.links import busiest_links, connect_all, goodput, inner_ranks, interface_bytes
from cocodiff.bench.methods import DESCRIPTIONS, OURS, Method, check_methods, compute_method, make_method, synchronize
from cocodiff.bench.models import build_transformer
from cocodiff.launch.agree import gather_json
from cocodiff.launch.environment import environment
from cocodiff.launch.job import Job
from cocodiff.models.shapes import Shape
from cocodiff.observe.trace import write_trace
from cocodiff.topology import Cluster

SCHEMA = "cocodiff-bench/1"
COMPUTE = "compute"
CODING_LANES = ("encode", "decode")


@dataclass
class Record:
    """What one method showed on this rank."""

    method: Method | None = None
    error: str | None = None
    seconds: list[float] = field(default_factory=list)
    sent: list[list[int]] | None = None  # of each step of a run: by level, on this rank
    crossed: int | None = None  # by this host's interfaces, in one step
    coding: float | None = None  # seconds a step that this rank encoded and decoded
    output: Tensor | None = None


def run_bench(
    shape: Shape,
    names: Sequence[str],
    job: Job,
    cluster: str,
    steps: int,
    repeat: int,
    say: Callable[[str], None],
    trace: Path | None = None,
    meshes: Sequence[Mapping[str, int]] = ({},),
) -> dict[str, Any]:
    """Every method once to warm up, then `repeat` rounds of all in turn, `steps` steps each. Collective.

    Args:
        trace: a folder; one more step of each method of ours is recorded there, in a folder of its name.
        meshes: degrees of `exact` and of what is selective, which run with each of them. Where one has cfg_degree=2, a
            step of every method computes two branches.

    Returns:
        the result as JSON values; docs/bench.md has the schema. Rank 0's is the one to show.
    """
    check_methods(names)
    model = build_transformer(shape)
    guided = any(mesh.get("cfg_degree", 1) > 1 for mesh in meshes)
    makers: dict[str, Callable[[], Method]] = {}
    for name in names:
        for mesh in meshes if name in OURS else ({},):
            words = [name, *(f"{axis.removesuffix('_degree')}{degree}" for axis, degree in mesh.items())]
            makers[" ".join(words)] = partial(make_method, name, model, shape, job, cluster, mesh, guided)
    if job.world_size > 1:
        makers[COMPUTE] = partial(compute_method, model, shape, job, cluster, guided)
    records = {name: _warmed_up(maker, job) for name, maker in makers.items()}
    running = {name: record for name, record in records.items() if record.error is None}
    say(f"warmed up: {', '.join(running)}")
    order = list(running)
    for round_index in range(repeat if order else 0):
        for name in order[round_index % len(order) :] + order[: round_index % len(order)]:
            record = running[name]
            assert record.method is not None
            record.seconds.append(time_steps(record.method, steps, job)[0])
        say(f"round {round_index + 1} of {repeat}")
    where, rates = None, {}
    if job.world_size > 1:
        session, connected = connect_all(job, cluster)
        where, rates = session.cluster, {level: goodput(connected, level, job.device) for level in connected.levels}
        session.close()
    if trace is not None:
        for name, record in running.items():
            if record.method is not None and record.method.forward is not None and name != COMPUTE:
                with record.method.forward.session.recording() as timeline:
                    time_steps(record.method, 1, job)
                write_trace(timeline, trace / name, job.rank)
    return _result(shape, records, job, where, rates, steps, 2 if guided else 1)


def _warmed_up(make: Callable[[], Method], job: Job) -> Record:
    """Make the method and run it twice: once to warm up, once to count. An error on any rank is every rank's."""
    record = Record()
    try:
        record.method = make()
        with torch.no_grad():
            if record.method.run is None:
                time_steps(record.method, 1, job)
            _count(record, record.method, job)
    except Exception as error:
        record.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    errors = _everyone(record.error, job)
    record.error = next((error for error in errors if error is not None), None)
    return record


def _count(record: Record, method: Method, job: Job) -> None:
    """One run: what it sent at each step, and how long it coded."""
    session, steps = None if method.forward is None else method.forward.session, method.run or 1
    recording: Any = nullcontext() if session is None or method.run is None else session.recording()
    counts: list[list[int]] = []

    def counted() -> None:
        if session is not None:
            counts.append(session.bytes.by_level(len(session.cluster.levels)))
            session.bytes.clear()

    if session is not None:
        session.bytes.clear()
    synchronize(job)
    before = interface_bytes()
    with recording as timeline:
        _, record.output = time_steps(method, 1, job, counted)
    after = interface_bytes()
    record.crossed = None if before is None or after is None else (after - before) // steps
    record.sent = counts or None
    if timeline is not None:
        record.coding = sum(span.seconds for span in timeline.spans() if span.lane in CODING_LANES) / steps


def time_steps(
    method: Method, steps: int, job: Job, after: Callable[[], None] = lambda: None
) -> tuple[float, Tensor | None]:
    """Seconds a step of the slowest rank, and the last output of this one. A method that has runs runs a whole one.

    `after` is called after each step.
    """
    output, steps = None, method.run or steps
    synchronize(job)
    began = time.perf_counter()
    if method.everyone or job.is_main:
        with torch.no_grad(), method.around():
            for _ in range(steps):
                output = method.step()
                after()
            if job.device.type != "cpu":
                torch.get_device_module(job.device).synchronize()
    taken = time.perf_counter() - began
    return max(_everyone(taken, job)) / steps, output


def _everyone(value: Any, job: Job) -> list[Any]:
    return [value] if job.host_group is None else gather_json(value, job.host_group)


def _result(
    shape: Shape,
    records: dict[str, Record],
    job: Job,
    cluster: Cluster | None,
    rates: dict[int, float],
    steps: int,
    branches: int,
) -> dict[str, Any]:
    compute = statistics.median(records[COMPUTE].seconds) if COMPUTE in records and not records[COMPUTE].error else None
    reference = next((record.output for record in records.values() if record.output is not None), None)
    sizes, level_names = (cluster.sizes, [level.name for level in cluster.levels]) if cluster else ((), [])
    methods: dict[str, dict[str, Any]] = {}
    for name, record in records.items():
        mine = record.sent, record.crossed, record.coding, job.hosts[job.rank]
        sent, crossed, coding, hosts = (_everyone(x, job) for x in mine)
        if name == COMPUTE:
            continue
        if record.error is not None:
            methods[name] = {"description": DESCRIPTIONS[name.split()[0]], "error": record.error}
            continue
        median = statistics.median(record.seconds)
        plan = None if record.method is None or record.method.forward is None else record.method.forward.plan()
        if plan is not None and plan.placement is not None and plan.placement.order is not None:
            sent = [sent[rank] for rank in plan.placement.order]  # by slot, as links are shared
        each = [] if None in sent else [busiest_links(list(counts), sizes) for counts in zip(*sent, strict=True)]
        links = [sum(level) // len(each) for level in zip(*each, strict=True)] if each else None
        limit = _limit(compute, each, rates)
        methods[name] = {
            "description": DESCRIPTIONS[name.split()[0]],
            "mesh": None if plan is None else str(plan.degrees),
            "seconds_per_step": {
                "median": median,
                "min": min(record.seconds),
                "max": max(record.seconds),
                "all": record.seconds,
            },
            "communication_share": None if name == "single" else _beyond(compute, median),
            "bytes": None if links is None else dict(zip(level_names, links, strict=True)),
            "counted_bytes": None if links is None else _host_bytes(links, hosts, sizes),
            "interface_bytes": None if None in crossed else max(dict(zip(hosts, crossed, strict=True)).values()),
            "limit_seconds": limit,
            "coding_seconds": None if None in coding else max(coding),
            "ratio_to_limit": None if limit is None else median / limit,
            "relative_error": _relative_error(record.output, reference),
        }
    return {
        "schema": SCHEMA,
        "environment": environment(job),
        "cluster": None if cluster is None else asdict(cluster) | {"goodput_gbs": _named(rates, cluster)},
        "shape": shape.as_json(),
        "steps": steps,
        "branches": branches,
        "compute_seconds": compute,
        "methods": methods,
    }


def _beyond(compute: float | None, median: float) -> float | None:
    """The share of a step that is not compute. None where compute alone took longer: the timings do not fit then."""
    return None if compute is None or compute > median else 1 - compute / median


def _limit(compute: float | None, steps: Sequence[Sequence[int]], rates: Mapping[int, float]) -> float | None:
    """At each step the larger of the compute time and of what the busiest links need for its bytes; their mean."""
    if compute is None or not steps:
        return None
    needed = [max([compute, *(links[level] / rate for level, rate in rates.items())]) for links in steps]
    return sum(needed) / len(needed)


def _host_bytes(links: list[int], hosts: list[str], sizes: tuple[int, ...]) -> int | None:
    """Our own count of what the busiest host sent to others, for comparison with its interfaces."""
    together = hosts.count(hosts[0])
    level = next((level for level in range(len(sizes)) if inner_ranks(sizes, level) == together), None)
    return None if level is None else links[level]


def _relative_error(output: Tensor | None, reference: Tensor | None) -> float | None:
    if output is None or reference is None:
        return None
    return ((output - reference).float().norm() / reference.float().norm()).item()


def _named(rates: dict[int, float], cluster: Cluster) -> dict[str, float]:
    return {cluster.levels[level].name: rate / 1e9 for level, rate in rates.items()}
