"""`cocodiff bench`: several methods in turn on one model shape. `bench collectives`: exchanges without a model."""

from __future__ import annotations

import os
import shlex
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from cocodiff.cli.asked import Asked
from cocodiff.cli.files import check_file, check_folder
from cocodiff.cli.start import CLUSTER_HELP, DEVICE_HELP, MOST_RANKS, RANKS_HELP, say, start_ranks
from cocodiff.cli.together import on_all_ranks, quiet_others, this_rank
from cocodiff.errors import ConfigError
from cocodiff.topology import load_cluster
from cocodiff.topology.detect import check_name

bench_app = typer.Typer(help="Measure several methods in turn within one run: seconds, bytes and limits.")


@bench_app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    shape: Annotated[
        str,
        typer.Option(
            help="Model whose layers, heads and proportions are used: flux-dev, flux2-dev, qwen-image, sd35-large, "
            "sd35-medium, wan-14b or wan-1.3b. Weights are random."
        ),
    ] = "flux-dev",
    scale: Annotated[
        str,
        typer.Option(help="Share of the model's tokens x width and of its number of blocks, above 0 and at most 1."),
    ] = "1/16",
    methods: Annotated[
        str,
        typer.Option(
            help="Methods to compare, separated by commas: single, diffusers, ulysses, exact, high, balanced, fast or "
            "v_major."
        ),
    ] = "single,diffusers,ulysses,exact",
    cfg_degree: Annotated[
        str | None,
        typer.Option(
            help="Number of groups of ranks that share the branches of guidance, 1 or 2. `exact` and the selective "
            "methods run once with each number of a list such as 1,2."
        ),
    ] = None,
    ring_degree: Annotated[
        str | None,
        typer.Option(help="Number of parts of the sequence whose keys and values travel. A list as for --cfg-degree."),
    ] = None,
    ulysses_degree: Annotated[
        str | None,
        typer.Option(help="Number of ranks that share the heads of a part. A list as for --cfg-degree."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Number of denoising steps in each timing.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, max=10_000, help="Number of timings of each method.")] = 5,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, max=2**24, help="Number of image tokens. If left out, that of the scaled shape."),
    ] = None,
    text: Annotated[
        int | None,
        typer.Option(min=1, max=2**20, help="Number of text tokens. If left out, that of the scaled shape."),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=8, max=2**16, help="Width of the model, heads x head_dim. If left out, the scaled shape's."),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(min=1, max=2**12, help="Number of attention heads. If left out, that of the shape."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Number of blocks. FLUX takes double and single ones, such as 2,4. If left out, those of the scaled "
            "shape."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Type of the weights: float32 (the default), bfloat16 (bf16) or float16 (fp16)."),
    ] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    cluster: Annotated[str, typer.Option(envvar="EMULATED_CLUSTER", show_envvar=False, help=CLUSTER_HELP)] = "auto",
    ranks: Annotated[int | None, typer.Option(min=1, max=MOST_RANKS, help=RANKS_HELP)] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the result as JSON into this file; - prints it instead.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the result into this PNG file.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Record one more step of each of our methods into a subfolder of this folder."),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write JSON, Markdown and a plot into this folder.")] = None,
) -> None:
    """Run several methods in turn on one model shape and say how long they took and how much they sent."""
    if context.invoked_subcommand is not None:
        return
    quiet_others()
    files = {"--json": json, "--plot": plot}
    meshes = (cfg_degree, ring_degree, ulysses_degree)
    asked = Asked(shape, scale, methods, tokens, text, width, heads, layers, dtype, meshes)
    check = partial(_check, files, save, cluster)
    if ranks is not None or this_rank()[1] == 1:
        asked.check()
        check()
    if ranks is not None:
        asked.check_ranks(ranks)
        raise SystemExit(start_ranks(ranks))
    from cocodiff.bench import results
    from cocodiff.bench.memory import check_memory
    from cocodiff.bench.run import run_bench
    from cocodiff.launch.job import start_job

    job = start_job(device)
    with on_all_ranks(job, "checking the options"):
        if job.is_main and job.world_size > 1:
            asked.check()
            check()
        asked.check_ranks(job.world_size)
        if trace is not None:
            check_folder(trace, "--trace")
        load_cluster(cluster, job.hosts, job.device.type)
        chosen = asked.model()
        check_memory(chosen, job, len(asked.names))
    say_main = say if job.is_main else (lambda text: None)
    say_main(f"building {chosen.name} of width {chosen.width} for {', '.join(asked.names)} ...")
    with job.watched("cocodiff bench"):
        result = run_bench(chosen, asked.names, job, cluster, steps, repeat, say_main, trace, asked.degrees)
    if not job.is_main:
        return
    command = os.environ.get("EMULATED_COMMAND") or shlex.join(["cocodiff", *sys.argv[1:]])
    if str(json) == "-":
        print(results.as_json(result))
    else:
        print(results.headline(result), *results.doubts(result), results.table(result), sep="\n\n")
    if json is not None and str(json) != "-":
        results.write(json, results.as_json(result))
    if plot is not None:
        results.plot(result, plot)
    if save is not None:
        print("saved", *results.save(result, save, command))
    if all("error" in row for row in result["methods"].values()):
        raise ConfigError("no method ran: the table says why.")


@bench_app.command()
def collectives(
    largest: Annotated[int, typer.Option(min=4096, help="Largest message to time, in bytes a rank.")] = 64 * 2**20,
    repeat: Annotated[int, typer.Option(min=1, help="Number of timings of each exchange and size.")] = 5,
    patience: Annotated[
        float, typer.Option(help="Stop at the size at which one exchange takes longer than this many seconds.")
    ] = 3.0,
    out: Annotated[
        Path, typer.Option(help="Write the measured cluster into this JSON file, for cocodiff.wrap(cluster=...).")
    ] = Path("cluster.json"),
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    cluster: Annotated[str, typer.Option(envvar="EMULATED_CLUSTER", show_envvar=False, help=CLUSTER_HELP)] = "auto",
    ranks: Annotated[int | None, typer.Option(min=1, max=MOST_RANKS, help=RANKS_HELP)] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write all timings as JSON into this file.")] = None,
) -> None:
    """Time every exchange over message sizes and write a cluster file with the measured latencies and bandwidths."""
    quiet_others()
    if not patience > 0:
        raise ConfigError(f"--patience {patience} is not above 0.")
    check = partial(_check, {"--out": out, "--json": json}, None, cluster)
    if ranks is not None or this_rank()[1] == 1:
        check()
    if ranks is not None:
        raise SystemExit(start_ranks(ranks))
    from cocodiff.bench import results
    from cocodiff.bench.collectives import collectives_table, run_collectives
    from cocodiff.launch.job import start_job

    job = start_job(device)
    with on_all_ranks(job, "checking the options"):
        if job.is_main and job.world_size > 1:
            check()
        load_cluster(cluster, job.hosts, job.device.type)
    say_main = say if job.is_main else (lambda text: None)
    with job.watched("cocodiff bench collectives"):
        result, measured = run_collectives(job, cluster, largest, repeat, patience, say_main)
    if not job.is_main:
        return
    results.write(out, measured.to_json() + "\n")
    if json is not None:
        results.write(json, results.as_json(result))
    print(collectives_table(result, measured))
    for level in measured.levels:
        print(f"level {level.name}: alpha {level.latency_us:.1f} us, beta {level.bandwidth_gbs:.4f} GB/s a rank")
    print(f"written: {out}; use it with cocodiff.wrap(pipe, cluster={str(out)!r})")


def _check(files: dict[str, Path | None], save: Path | None, cluster: str) -> None:
    """Raise ConfigError for an unknown cluster, and if a result could not be written in the end. Looks at this host."""
    check_name(cluster)
    plot = files.get("--plot")
    if plot is not None and plot.suffix.lower() != ".png":
        raise ConfigError(f"--plot {plot}: plots are PNG files: write plot.png.")
    if (plot is not None or save is not None) and find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'cocodiff[plot]'")
    for option, path in files.items():
        if path is not None and str(path) != "-":
            check_folder(path.parent, option)
            check_file(path, option)
    if save is not None:
        check_folder(save, "--save")
