"""docs/tested.md, made by running what it lists: `python -m tests.table` (about eight minutes on two cores)."""

from __future__ import annotations

import math
from pathlib import Path

from tests.distributed import test_families, test_mesh, test_pipeline
from tests.distributed.ranks import run_ranks
from tests.families import PIPELINES, family_pipeline
from tests.pipelines import TASKS, flux_pipeline

OUT = Path(__file__).parents[1] / "docs" / "tested.md"
RANKS = (2, 3, 4, 6, 8)
HEAD = """# What was tested

Every row is a diffusers pipeline with a small model of random weights in which every part matters, drawn whole: three
or four steps, odd sizes and prompts, a batch of two, guidance where the pipeline has it; flat and staged exchanges,
rows whole and in pieces. The figure is the worst relative error of the latents against one rank without cocodiff,
float32, on the CPU. Made by `python -m tests.table`; the suite asserts that all are under 1e-5.

"""

MESHES = """
## Meshes

The same, on every mesh of so many ranks.

"""


def classes() -> dict[str, str]:
    found = {f"flux {task}": type(flux_pipeline(task)).__name__ for task in TASKS}
    return found | {name: type(family_pipeline(name)).__name__ for name in PIPELINES}


def main() -> None:
    worst: dict[tuple[str, int], float] = {}
    for module, references in ((test_pipeline, "references"), (test_families, "_references")):
        expected = run_ranks(1, getattr(module, references))[0]
        for ranks in RANKS:
            for errors in run_ranks(ranks, module._errors, ranks, expected):
                for key, error in errors.items():
                    name = key[0] if key[0] in PIPELINES else f"flux {key[0]}"
                    worst[name, ranks] = max(error, worst.get((name, ranks), 0.0))
    lines = ["| pipeline | what | " + " | ".join(f"{ranks} ranks" for ranks in RANKS) + " |", "|---" * 7 + "|"]
    for name, pipeline in classes().items():
        cells = [f"{worst[name, ranks]:.0e}" for ranks in RANKS]
        lines.append(f"| {pipeline} | {name} | " + " | ".join(cells) + " |")
    OUT.write_text(HEAD + "\n".join(lines) + "\n" + MESHES + "\n".join(meshes()) + "\n")


def meshes() -> list[str]:
    worst: dict[tuple[tuple[int, int, int], str], float] = {}
    expected = run_ranks(1, test_mesh._references)[0]
    for ranks in test_mesh.MESHES:
        for errors in run_ranks(ranks, test_mesh._errors, ranks, expected):
            for (name, _, mesh, *_), error in errors.items():
                worst[mesh, name] = max(error, worst.get((mesh, name), 0.0))
    names = test_mesh.NAMES
    lines = ["| ranks | cfg x ring x ulysses | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for mesh in dict.fromkeys(mesh for mesh, _ in worst):
        cells = [f"{worst[mesh, name]:.0e}" for name in names]
        lines.append(f"| {math.prod(mesh)} | {' x '.join(map(str, mesh))} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
