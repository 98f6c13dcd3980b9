"""docs/tested.md, made by running what it lists: `python -m tests.table` (about fifteen minutes on two cores)."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.distributed.draws import ALL, MESHES, RANKS, Draw, References, build, errors, full_meshes, full_pipelines
from tests.distributed.ranks import run_ranks

OUT = Path(__file__).parents[1] / "docs" / "tested.md"
MESH_NAMES = ("flux text2image", "sd35 text2image", "qwen text2image", "wan t2v")
HEAD = """# What was tested

Every row is a diffusers pipeline with a small model of random weights in which every part matters, drawn whole: three
or four steps, odd sizes and prompts, a batch of two, guidance where the pipeline has it; flat and staged exchanges,
rows whole and in pieces. The figure is the largest relative error of the latents against one rank without cocodiff,
float32, on the CPU. Made by `python -m tests.table`; the suite draws a pairwise covering set of these and asserts that
all are under 1e-5.

"""

MESH_HEAD = """
## Meshes

The same, on every mesh of so many ranks.

"""


def largest_errors(draws: list[Draw], references: References) -> dict[Draw, float]:
    """The largest error that any rank has, by draw. All draws have the same number of ranks."""
    references.prepare((one.pipeline, one.call) for one in draws)
    everyone = run_ranks(draws[0].ranks, errors, draws, references, timeout_seconds=1800)
    return {one: max(found[one] for found in everyone) for one in draws}


def cell(found: dict[Draw, float], **wanted: object) -> str:
    values = [error for one, error in found.items() if all(getattr(one, name) == wanted[name] for name in wanted)]
    return f"{max(values):.0e}"


def row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def pipelines(references: References) -> list[str]:
    found = {}
    for ranks in RANKS:
        found |= largest_errors(full_pipelines(ranks), references)
    lines = [row(["pipeline", "what", *(f"{ranks} ranks" for ranks in RANKS)]), "|---" * (2 + len(RANKS)) + "|"]
    for name in ALL:
        cells = [cell(found, pipeline=name, ranks=ranks) for ranks in RANKS]
        lines.append(row([type(build(name)).__name__, name, *cells]))
    return lines


def meshes(references: References) -> list[str]:
    lines = [row(["ranks", "cfg x ring x ulysses", *MESH_NAMES]), "|---" * (2 + len(MESH_NAMES)) + "|"]
    for ranks in RANKS:
        found = largest_errors(full_meshes(ranks, MESH_NAMES), references)
        for mesh in MESHES[ranks]:
            cells = [cell(found, pipeline=name, mesh=mesh) for name in MESH_NAMES]
            lines.append(row([ranks, " x ".join(map(str, mesh)), *cells]))
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="the file to write instead of docs/tested.md")
    out = parser.parse_args(arguments).out
    if not out.parent.is_dir():
        parser.error(f"--out {out}: there is no folder {out.parent}")
    with tempfile.TemporaryDirectory() as folder:
        references = References(Path(folder), full=True)
        lines = [*pipelines(references), MESH_HEAD.rstrip("\n"), "", *meshes(references)]
    out.write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
