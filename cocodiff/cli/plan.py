"""`cocodiff plan`: which mesh and which exchange to take for a model on a cluster, and why."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cocodiff.cli.asked import fraction
from cocodiff.cli.files import check_file
from cocodiff.cli.plan_measure import measure_plans
from cocodiff.cli.start import MOST_RANKS, RANKS_HELP, dtype_named, start_ranks
from cocodiff.cli.together import quiet_others
from cocodiff.errors import ConfigError

if TYPE_CHECKING:
    from cocodiff.topology import Cluster


def plan(
    model: Annotated[str, typer.Option(help="A released model's id on the hub, or shape:NAME.")],
    cluster: Annotated[
        str | None,
        typer.Option(
            envvar="EMULATED_CLUSTER",
            show_envvar=False,
            help="aurora:8 (nodes), dgx-h100:2, polaris:4, single-node:4, v5e:2x4, or FILE.json[:N].",
        ),
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; by default the model's.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; by default the model's.")] = None,
    frames: Annotated[int | None, typer.Option(help="Of a clip; 81 by default.")] = None,
    cfg: Annotated[bool, typer.Option("--cfg", help="Guidance in two branches.")] = False,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    device: Annotated[str | None, typer.Option(help="What a rank computes on, where the cluster does not say.")] = None,
    memory: Annotated[str | None, typer.Option(help="Of a rank's device, as 64GB; by default the device's.")] = None,
    objective: Annotated[str, typer.Option(help="latency (of one picture) or throughput (of many).")] = "latency",
    top: Annotated[int, typer.Option(help="How many plans to show.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Write the best plan here, for wrap(pipe, plan=FILE).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plans as JSON.")] = False,
    scale: Annotated[str, typer.Option(help="Share of the model and its tokens, as of cocodiff bench.")] = "1",
    measure: Annotated[
        Path | None,
        typer.Option(help="Run on the ranks at hand: measure links, operators and the best plans, and write it here."),
    ] = None,
    measured: Annotated[Path | None, typer.Option(help="A file of --measure, instead of what is assumed.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, max=MOST_RANKS, help=f"With --measure. {RANKS_HELP}")] = None,
) -> None:
    """Say which plan is fastest in a model of the machine, without weights, GPUs or ranks; or measure it on ranks."""
    full = dtype_named(dtype)
    if top < 1:
        raise ConfigError(f"--top {top}: at least 1.")
    if objective not in ("latency", "throughput"):
        raise ConfigError(f"--objective {objective} is neither latency nor throughput.")
    if out is not None:
        check_file(out, "--out")
    if measure is not None:
        check_file(measure, "--measure")
    share = fraction(scale)
    if ranks is not None:
        if measure is None:
            raise ConfigError("--ranks starts ranks to measure on: give --measure FILE with it.")
        raise SystemExit(start_ranks(ranks))
    quiet_others()
    from cocodiff.planner.explain import as_json, describe
    from cocodiff.planner.measured import read_measurements
    from cocodiff.planner.rates import rates_of
    from cocodiff.planner.search import search
    from cocodiff.planner.throughput import search_throughput
    from cocodiff.planner.wanted import task, wanted

    asked = wanted(model, height, width, frames, cfg, full)
    asked = replace(asked, shape=asked.shape.scaled(share)) if share != 1 else asked
    if measure is not None:
        return measure_plans(asked, cluster or "auto", device, partial(_bytes, memory), measure, out)
    if measured is not None:
        figures = read_measurements(measured)
        where, rates = figures.cluster, figures.rates
    elif cluster is None:
        raise ConfigError("--cluster says which machine to plan for, as aurora:8; or give --measured FILE.")
    else:
        where, name = _cluster(cluster)
        rates = rates_of(device, name)
    of = partial(task, asked, rates=rates, memory_bytes=_bytes(memory, rates.memory_gb))
    found = search(of(where), keep=top) if objective == "latency" else search_throughput(of, where, keep=top)
    if out is not None:
        written = as_json(found, asked, where, rates)
        out.write_text(dumps(written | {"plans": written["plans"][:1]}, indent=2) + "\n")
    if json:
        print(dumps(as_json(found, asked, where, rates), indent=2))
    else:
        print("\n".join(describe(found, asked, where, rates)))


def _cluster(text: str) -> tuple[Cluster, str]:
    """A cluster with concrete sizes, from its name or file and the size of its outermost level, or of each, as 2x4."""
    from cocodiff.topology import PRESETS
    from cocodiff.topology.detect import read_cluster

    name, _, counts = text.rpartition(":")
    if not name or (counts and not all(count.isdecimal() for count in counts.split("x"))):
        name, counts = text, ""
    found: Cluster = PRESETS[name] if name in PRESETS else read_cluster(name)
    levels, sizes = found.levels, [int(count) for count in counts.split("x") if count]
    if len(sizes) not in (0, 1, len(levels)):
        every = ", ".join(level.name for level in levels)
        raise ConfigError(f"--cluster {text}: give one size, of {levels[-1].name!r}, or one each of {every}.")
    resized = list(levels[: len(levels) - len(sizes)])
    for level, size in zip(levels[len(levels) - len(sizes) :], sizes, strict=True):
        if size < 1:
            raise ConfigError(f"--cluster {text}: at least one {level.name}.")
        if level.size is not None and size > level.size:
            raise ConfigError(f"--cluster {text}: {name} has {level.size} of {level.name!r}, not {size}.")
        resized.append(level.of_size(size))
    if resized[-1].size is None:
        raise ConfigError(f"--cluster {text}: say how many of {levels[-1].name!r}, as {name}:2.")
    made = replace(found, levels=tuple(resized))
    return made.resolve(made.num_ranks), os.path.basename(name).removesuffix(".json")


def _bytes(text: str | None, default_gb: float) -> float:
    if text is None:
        return default_gb * 1e9
    number = text.strip().upper().removesuffix("B").removesuffix("G")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise ConfigError(f"--memory {text} is no memory in GB, as 64GB.")
    return value * 1e9
