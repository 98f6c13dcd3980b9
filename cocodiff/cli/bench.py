"""`cocodiff bench`: several methods in turn on one model shape. `bench collectives`: exchanges without a model."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from cocodiff.cli.start import CLUSTER_HELP, DEVICE_HELP, RANKS_HELP, start_ranks
from cocodiff.config import DEGREES
from cocodiff.errors import ConfigError

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
    steps: Annotated[int, typer.Option(min=1, help="Number of denoising steps in each timing.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Number of timings of each method.")] = 5,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Number of image tokens. If left out, that of the scaled shape.")
    ] = None,
    text: Annotated[
        int | None, typer.Option(min=1, help="Number of text tokens. If left out, that of the scaled shape.")
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=8, help="Width of the model, heads x head_dim. If left out, that of the scaled shape."),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Number of attention heads. If left out, that of the shape.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Number of blocks. FLUX takes double and single ones, such as 2,4. If left out, those of the scaled "
            "shape."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the weights: float32 (the default), bfloat16 or float16.")
    ] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    cluster: Annotated[str, typer.Option(envvar="EMULATED_CLUSTER", help=CLUSTER_HELP)] = "auto",
    ranks: Annotated[int | None, typer.Option(min=1, help=RANKS_HELP)] = None,
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
    if ranks is not None:
        raise SystemExit(start_ranks(ranks))
    from cocodiff.bench import results
    from cocodiff.bench.run import run_bench
    from cocodiff.bench.shapes import named_shape
    from cocodiff.launch.job import start_job

    chosen = named_shape(shape).scaled(_fraction(scale))
    changes: dict[str, Any] = {"image": tokens, "text": text, "heads": heads, "dtype": dtype}
    if layers is not None:
        changes["double"], changes["single"] = _layers(layers)
    chosen = replace(chosen, **{name: value for name, value in changes.items() if value is not None})
    if width is not None or heads is not None:
        wanted = width or named_shape(shape).scaled(_fraction(scale)).width
        if wanted % (8 * chosen.heads):
            raise ConfigError(f"width {wanted} does not make {chosen.heads} heads of a multiple of 8 channels.")
        chosen = replace(chosen, head_dim=wanted // chosen.heads)
    results.check_folder(save)
    job = start_job(device)
    say = (lambda text: print(text, file=sys.stderr)) if job.is_main else (lambda text: None)
    with job.watched("cocodiff bench"):
        meshes = _meshes(cfg_degree, ring_degree, ulysses_degree)
        result = run_bench(chosen, methods.split(","), job, cluster, steps, repeat, say, trace, meshes)
    if not job.is_main:
        return
    command = os.environ.get("EMULATED_COMMAND") or shlex.join(["cocodiff", *sys.argv[1:]])
    if str(json) == "-":
        print(results.as_json(result))
        return
    print(results.headline(result), results.table(result), sep="\n\n")
    if json is not None:
        results.write(json, results.as_json(result))
    if plot is not None:
        results.plot(result, plot)
    if save is not None:
        print("saved", *results.save(result, save, command))


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
    cluster: Annotated[str, typer.Option(envvar="EMULATED_CLUSTER", help=CLUSTER_HELP)] = "auto",
    ranks: Annotated[int | None, typer.Option(min=1, help=RANKS_HELP)] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write all timings as JSON into this file.")] = None,
) -> None:
    """Time every exchange over message sizes and write a cluster file with the measured latencies and bandwidths."""
    if ranks is not None:
        raise SystemExit(start_ranks(ranks))
    from cocodiff.bench import results
    from cocodiff.bench.collectives import collectives_table, run_collectives
    from cocodiff.launch.job import start_job

    results.check_folder(out.resolve().parent)
    job = start_job(device)
    say = (lambda text: print(text, file=sys.stderr)) if job.is_main else (lambda text: None)
    with job.watched("cocodiff bench collectives"):
        result, measured = run_collectives(job, cluster, largest, repeat, patience, say)
    if not job.is_main:
        return
    results.write(out, measured.to_json() + "\n")
    if json is not None:
        results.write(json, results.as_json(result))
    print(collectives_table(result, measured))
    for level in measured.levels:
        print(f"level {level.name}: alpha {level.latency_us:.1f} us, beta {level.bandwidth_gbs:.4f} GB/s a rank")
    print(f"written: {out}; use it with cocodiff.wrap(pipe, cluster={str(out)!r})")


def _fraction(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"--scale {text} is no number: write 1/16 or 0.0625.") from None


def _meshes(*options: str | None) -> list[dict[str, int]]:
    """Return all combinations of the degrees that were given; options are those of DEGREES, in that order."""
    choices = []
    for name, text in zip(DEGREES, options, strict=True):
        parts = [] if text is None else text.split(",")
        if not all(part.isdecimal() and int(part) for part in parts):
            raise ConfigError(f"--{name.replace('_', '-')} {text}: write whole numbers, with commas.")
        choices.append([{name: int(part)} for part in parts] or [{}])
    return [cfg | ring | ulysses for cfg, ring, ulysses in itertools.product(*choices)]


def _layers(text: str) -> tuple[int, int]:
    """Return the numbers of double and single blocks."""
    parts = text.split(",") if "," in text else [text, "0"]
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or not sum(map(int, parts)):
        raise ConfigError(f"--layers {text}: write the numbers of double and single blocks: 2,4; or one number.")
    return int(parts[0]), int(parts[1])
