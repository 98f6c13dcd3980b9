"""Which pipelines run right over many ranks: diffusers' own context parallelism and ours, on the same small models.

    python -m benchmarks.neighbours > benchmarks/results/neighbours.md

Random weights, float32, gloo on the CPU. *right*: relative error of the latents against one process under 1e-5;
*wrong*: a picture comes back, but not that one; *refuses*: an error, whose first line is shown below; *hangs*: no
answer in time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from tests.distributed.ranks import run_ranks
from tests.families import PIPELINES, family_call, family_pipeline
from tests.pipelines import TASKS, flux_call, flux_pipeline, relative_error

LIMIT = 1e-5
SIZES: dict[str, dict[str, int]] = {
    "divisible": dict(height=32, width=48, text_len=12),
    "uneven": dict(height=36, width=28, text_len=7),
}
VIDEO = {"uneven": dict(height=48, width=80, text_len=7)}


# Size -> ranks, ring degree, ulysses degree.
MESHES = {"divisible": [(2, 1, 2), (4, 1, 4), (2, 2, 1), (4, 2, 2)], "uneven": [(2, 1, 2), (3, 1, 3)]}
Meshes = Mapping[str, Sequence[tuple[int, int, int]]]


def draw(name: str, size: str, wrap: Callable[[Any], Any]) -> torch.Tensor:
    """The latents of a small pipeline, wrapped, at one of the sizes."""
    if name.startswith("flux "):
        task = name.split()[1]
        return wrap(flux_pipeline(task))(**flux_call(task, **SIZES[size])).images
    sizes = SIZES | VIDEO if name.startswith("wan") else SIZES
    result = wrap(family_pipeline(name))(**family_call(name, **sizes[size]))
    return result.frames if hasattr(result, "frames") else result.images


def on_one_rank(names: Sequence[str], sizes: Sequence[str]) -> dict[tuple[str, str], torch.Tensor]:
    """The latents that every method should give."""
    return {(name, size): draw(name, size, lambda pipe: pipe) for name in names for size in sizes}


def diffusers_parallel(name: str, size: str, degrees: dict[str, Any], expected: torch.Tensor) -> str:
    """The verdict on diffusers' own context parallelism, on one rank of several."""
    import torch.distributed as dist
    from diffusers import ContextParallelConfig

    dist.init_process_group("gloo")
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and a CPU has none

    def parallel(pipe: Any) -> Any:
        for part in (pipe.transformer, getattr(pipe, "transformer_2", None)):
            if part is not None:
                part.enable_parallelism(config=ContextParallelConfig(**degrees))
        return pipe

    return verdict(lambda: draw(name, size, parallel), expected)


def cocodiff_wrapped(name: str, size: str, degrees: dict[str, Any], expected: torch.Tensor) -> str:
    """The verdict on cocodiff, on one rank of several."""
    import cocodiff

    wrap = partial(cocodiff.wrap, **degrees)
    return verdict(lambda: draw(name, size, wrap), expected)


def verdict(run: Callable[[], torch.Tensor], expected: torch.Tensor) -> str:
    """Gives "right" or "wrong" with the relative error, or "refuses" with the first line of the exception."""
    try:
        error = relative_error(run(), expected)
    except Exception as caught:
        lines = str(caught).splitlines() or [""]
        return f"refuses: {type(caught).__name__}: {lines[0][:100]}"
    return f"{'right' if error < LIMIT else 'wrong'} ({error:.0e})"


def verdict_of_all(method: Callable[..., str], ranks: int, *args: Any) -> str:
    """Runs the method on that many ranks; the verdict of the rank that fares least well."""
    try:
        verdicts = run_ranks(ranks, method, *args, timeout_seconds=60)
    except AssertionError as error:
        return "hangs" if "gave no answer" in str(error) else "crashes"
    for bad in ("refuses", "wrong"):
        if found := [one for one in verdicts if one.startswith(bad)]:
            return found[0]
    return max(verdicts, key=lambda one: float(one.split("(")[1].rstrip(")")))


def main(names: Sequence[str] | None = None, meshes: Meshes = MESHES) -> None:
    """Print the document: a row for each pipeline, size and mesh.

    Args:
        names: pipelines of the tests, such as "flux inpaint" or "sd3"; None means all.
        meshes: for each size, ranks, ring degree and ulysses degree of its rows.
    """
    names = names or [*(f"flux {task}" for task in TASKS), *PIPELINES]
    expected = run_ranks(1, on_one_rank, names, list(meshes))[0]
    reasons: dict[str, int] = {}
    title, command, legend = str(__doc__).split("\n\n")[:3]
    print(f"# {title}\n\n{command}\n\n{legend}")
    print("| pipeline | size | ranks | ring x ulysses | diffusers | cocodiff |\n|---|---|---|---|---|---|")
    for name in names:
        for size, degrees_of_rows in meshes.items():
            for ranks, ring, ulysses in degrees_of_rows:
                cells, degrees = [], {"ring_degree": ring, "ulysses_degree": ulysses}
                for method in (diffusers_parallel, cocodiff_wrapped):
                    cell = verdict_of_all(method, ranks, name, size, degrees, expected[name, size])
                    if cell.startswith("refuses"):
                        number = reasons.setdefault(cell.removeprefix("refuses: "), len(reasons) + 1)
                        cell = f"refuses [{number}]"
                    cells.append(cell)
                print(f"| {name} | {size} | {ranks} | {ring} x {ulysses} | {cells[0]} | {cells[1]} |", flush=True)
    print()
    for reason, number in reasons.items():
        print(f"[{number}] `{reason}`\n")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
