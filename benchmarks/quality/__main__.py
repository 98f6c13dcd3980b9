"""Pictures of selective transmission against exact ones: how like they are, method by method and budget by budget.

python -m benchmarks.quality --out FOLDER --methods rounding,predicted,v_major --budgets 1/4,1/8,1/16 --steps 28
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.quality import gallery
from benchmarks.quality.simulate import Hosts, Simulation
from benchmarks.quality.sweep import TASKS, Prompts, collected, draw, run_unit, summary, units
from cocodiff.bench.results import as_json, write
from cocodiff.cli.files import check_folder
from cocodiff.config import PRESETS, Selective
from cocodiff.errors import CocodiffError, ConfigError
from cocodiff.tiny import pictures


def main(
    out: Annotated[Path, typer.Option(help="A folder; units whose results are there are not run again.")],
    tasks: Annotated[str, typer.Option(help="text2image and inpaint, with commas.")] = "text2image,inpaint",
    steps: Annotated[str, typer.Option(help="Steps of a run; several with commas.")] = "28,50",
    hosts: Annotated[str, typer.Option(help="Hosts x ranks of each host; several with commas.")] = "2x2",
    crossing: Annotated[
        str, typer.Option(help="What crosses: ulysses (Q, K, V and O), ring (K and V), or both with a comma.")
    ] = "ulysses,ring",
    methods: Annotated[
        str, typer.Option(help="rounding, predicted, v_major, ...; several with commas.")
    ] = "rounding,predicted",
    budgets: Annotated[
        str, typer.Option(help="Shares of the bytes of an exact bfloat16 wire, with commas.")
    ] = "1/2,1/4,1/8,1/16,1/32",
    captions: Annotated[int, typer.Option(min=1, max=64, help="How many of the held-out captions.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures of each caption.")] = 2,
    part: Annotated[str, typer.Option(help="1/2 and 2/2: two processes share the units.")] = "1/1",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of this process.")] = None,
    sheet: Annotated[bool, typer.Option(help="Also draw the contact sheet.")] = False,
) -> None:
    """Draw every method at every budget in one process that plays all ranks; then a table and a plot of all in OUT."""
    names = tasks.split(",")
    if unknown := [name for name in names if name not in TASKS]:
        raise ConfigError(f"--tasks {','.join(unknown)}: there are {', '.join(TASKS)}.")
    if threads is not None:
        torch.set_num_threads(threads)
    check_folder(out, "--out")
    sizes = [_numbers("--hosts", one, "x") for one in hosts.split(",")]
    where = [Hosts(count, ranks, way == "ring") for count, ranks in sizes for way in _ways(crossing)]
    shares = [_share(text) for text in budgets.split(",")]
    chosen = units(names, _numbers("--steps", steps, ","), where, methods.split(","), shares)
    if not chosen:
        raise ConfigError(f"--methods {methods} --budgets {budgets}: none of these budgets holds any of these methods.")
    index, of = _numbers("--part", part, "/")
    if index > of:
        raise ConfigError(f"--part {part}: write 1/{of} to {of}/{of}.")
    prompts = Prompts(captions, seeds)
    for unit in chosen[index - 1 :: of]:
        run_unit(unit, prompts, out)
    if of > 1:
        return
    results = collected(out)
    write(out / "quality.json", as_json({"units": [one["unit"] | summary(one) for one in results]}))
    write(out / "quality.md", gallery.table(results))
    print(gallery.table(results))
    gallery.plot(results, out / "quality.png")
    if sheet:
        batch = [(number, 0) for number in range(min(4, captions))]
        exact, _ = draw("text2image", 28, batch)
        columns = {}
        for name, selective in {**PRESETS, "v_major 1/8": Selective.v_major(1 / 8)}.items():
            simulation = Simulation(selective, Hosts(), {"text": 16, "image": 256}, 28)
            columns[name], _ = draw("text2image", 28, batch, simulation)
        texts = [pictures.held_out_scenes()[number].caption for number, _ in batch]
        gallery.contact_sheet(exact, columns, texts, out / "sheet.png")


def _numbers(option: str, text: str, mark: str) -> list[int]:
    parts = text.split(mark)
    if not all(one.isdecimal() and int(one) for one in parts) or (mark != "," and len(parts) != 2):
        raise ConfigError(f"{option} {text}: write whole numbers with {mark!r} between them.")
    return [int(one) for one in parts]


def _ways(text: str) -> list[str]:
    ways = text.split(",")
    if set(ways) - {"ulysses", "ring"}:
        raise ConfigError(f"--crossing {text}: ulysses, ring, or both with a comma.")
    return ways


def _share(text: str) -> float:
    try:
        share = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        share = 0.0
    if not 0 < share < 1:
        raise ConfigError(f"--budgets {text}: write shares between 0 and 1, as 1/8 or 0.125.")
    return share


if __name__ == "__main__":
    try:
        typer.run(main)
    except CocodiffError as error:
        print(f"benchmarks.quality: {error}", file=sys.stderr)
        raise SystemExit(2) from None
