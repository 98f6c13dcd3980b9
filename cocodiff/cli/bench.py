"""`cocodiff bench`: methods in turn on one shape."""

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

from cocodiff.cli.start import start_ranks
from cocodiff.config import DEGREES
from cocodiff.errors import ConfigError

bench_app = typer.Typer(help="Seconds, bytes and limits of several methods, in turn within one run.")


@bench_app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    shape: Annotated[
        str,
        typer.Option(help="Proportions of a released model: flux-dev, flux2-dev, qwen-image, sd35-large, wan-14b .."),
    ] = "flux-dev",
    scale: Annotated[str, typer.Option(help="Of tokens x width, and of the number of blocks.")] = "1/16",
    methods: Annotated[str, typer.Option(help="With commas.")] = "single,diffusers,ulysses,exact",
    cfg_degree: Annotated[str | None, typer.Option(help="Of `exact`; 1,2 runs it with each.")] = None,
    ring_degree: Annotated[str | None, typer.Option(help="Of `exact`; 1,2 runs it with each.")] = None,
    ulysses_degree: Annotated[str | None, typer.Option(help="Of `exact`; with commas, each.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps in each timing.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Timings of each method.")] = 5,
    tokens: Annotated[int | None, typer.Option(min=1, help="Image tokens, instead of the shape's.")] = None,
    text: Annotated[int | None, typer.Option(min=1, help="Text tokens.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Of the model: heads x head_dim.")] = None,
    heads: Annotated[int | None, typer.Option(min=1)] = None,
    layers: Annotated[str | None, typer.Option(help="Blocks; with FLUX double and single ones: 2,4")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (default), bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, xpu; the local accelerator if left out.")] = None,
    cluster: Annotated[
        str, typer.Option(envvar="EMULATED_CLUSTER", help="auto, a preset's name or a JSON file.")
    ] = "auto",
    ranks: Annotated[int | None, typer.Option(min=1, help="Start so many local ranks.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result there; - prints it.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the result there.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Record one more step of each method of ours there.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write JSON, Markdown and PNG into this folder.")] = None,
) -> None:
    """Run methods in turn on one model shape and say what they took and sent."""
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
    largest: Annotated[int, typer.Option(min=4096, help="Bytes a rank at which to stop.")] = 64 * 2**20,
    repeat: Annotated[int, typer.Option(min=1, help="Timings of each exchange and size.")] = 5,
    patience: Annotated[float, typer.Option(help="Seconds of one exchange after which no larger one is tried.")] = 3.0,
    out: Annotated[Path, typer.Option(help="The cluster with what was measured, for wrap(cluster=...).")] = Path(
        "cluster.json"
    ),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, xpu; the local accelerator if left out.")] = None,
    cluster: Annotated[
        str, typer.Option(envvar="EMULATED_CLUSTER", help="Its levels: auto, a preset, a file.")
    ] = "auto",
    ranks: Annotated[int | None, typer.Option(min=1, help="Start so many local ranks.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write all timings there.")] = None,
) -> None:
    """Time every exchange over message sizes; write latencies and bandwidths as a cluster."""
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
    """All combinations of the degrees that were named."""
    choices = []
    for name, text in zip(DEGREES, options, strict=True):
        parts = [] if text is None else text.split(",")
        if not all(part.isdecimal() and int(part) for part in parts):
            raise ConfigError(f"--{name.replace('_', '-')} {text}: write whole numbers, with commas.")
        choices.append([{name: int(part)} for part in parts] or [{}])
    return [cfg | ring | ulysses for cfg, ring, ulysses in itertools.product(*choices)]


def _layers(text: str) -> tuple[int, int]:
    parts = text.split(",") if "," in text else [text, "0"]
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or not sum(map(int, parts)):
        raise ConfigError(f"--layers {text}: write the numbers of double and single blocks: 2,4; or one number.")
    return int(parts[0]), int(parts[1])
