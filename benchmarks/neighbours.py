"""Which pipelines run right over many ranks: diffusers' own context parallelism and ours, on the same small models.

    python benchmarks/neighbours.py > benchmarks/results/neighbours.md

Random weights, float32, gloo on the CPU. *right*: relative error of the latents against one process under 1e-5;
*wrong*: a picture comes back, but not that one; *refuses*: an error, whose first line is shown below; *hangs*: no
answer in time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.distributed.ranks import run_ranks
from tests.families import PIPELINES, family_call, family_pipeline
from tests.pipelines import TASKS, flux_call, flux_pipeline, relative_error

LIMIT = 1e-5
SIZES: dict[str, dict[str, int]] = {
    "divisible": dict(height=32, width=48, text_len=12),
    "uneven": dict(height=36, width=28, text_len=7),
}
VIDEO = {"uneven": dict(height=48, width=80, text_len=7)}


def draw(name: str, size: str, wrap: Callable[[Any], Any]) -> torch.Tensor:
    if name.startswith("flux "):
        task = name.split()[1]
        return wrap(flux_pipeline(task))(**flux_call(task, **SIZES[size])).images
    sizes = SIZES | VIDEO if name.startswith("wan") else SIZES
    result = wrap(family_pipeline(name))(**family_call(name, **sizes[size]))
    return result.frames if hasattr(result, "frames") else result.images


def alone(names: list[str]) -> dict[tuple[str, str], torch.Tensor]:
    return {(name, size): draw(name, size, lambda pipe: pipe) for name in names for size in SIZES}


def meshes(size: str) -> list[tuple[int, int, int]]:
    """Ranks, ring, ulysses."""
    return [(2, 1, 2), (3, 1, 3)] if size == "uneven" else [(2, 1, 2), (4, 1, 4), (2, 2, 1), (4, 2, 2)]


def theirs(name: str, size: str, degrees: dict[str, int], expected: torch.Tensor) -> str:
    import torch.distributed as dist
    from diffusers import ContextParallelConfig

    dist.init_process_group("gloo")
    torch.accelerator.device_count = lambda: 1  # it divides by their number

    def parallel(pipe: Any) -> Any:
        for part in (pipe.transformer, getattr(pipe, "transformer_2", None)):
            if part is not None:
                part.enable_parallelism(config=ContextParallelConfig(**degrees))
        return pipe

    return verdict(lambda: draw(name, size, parallel), expected)


def ours(name: str, size: str, degrees: dict[str, Any], expected: torch.Tensor) -> str:
    import cocodiff

    return verdict(lambda: draw(name, size, partial(cocodiff.wrap, **degrees)), expected)


def verdict(run: Callable[[], torch.Tensor], expected: torch.Tensor) -> str:
    try:
        error = relative_error(run(), expected)
    except Exception as caught:
        lines = str(caught).splitlines() or [""]
        return f"refuses: {type(caught).__name__}: {lines[0][:100]}"
    return f"{'right' if error < LIMIT else 'wrong'} ({error:.0e})"


def everyone(method: Callable[..., str], ranks: int, *args: Any) -> str:
    """What the ranks agree on, or the worst of it."""
    try:
        said = run_ranks(ranks, method, *args, timeout_seconds=60)
    except AssertionError as error:
        return "hangs" if "gave no answer" in str(error) else "crashes"
    for bad in ("refuses", "wrong"):
        if found := [one for one in said if one.startswith(bad)]:
            return found[0]
    return max(said, key=lambda one: float(one.split("(")[1].rstrip(")")))


def main() -> None:
    names = [f"flux {task}" for task in TASKS] + list(PIPELINES)
    expected = run_ranks(1, alone, names)[0]
    reasons: dict[str, int] = {}
    print(f"# {__doc__.splitlines()[0]}\n\n    {__doc__.splitlines()[2].strip()}\n\n{__doc__.split(chr(10) * 2)[2]}")
    print("| pipeline | size | ranks | ring x ulysses | diffusers | cocodiff |\n|---|---|---|---|---|---|")
    for name in names:
        for size in SIZES:
            for ranks, ring, ulysses in meshes(size):
                cells, degrees = [], {"ring_degree": ring, "ulysses_degree": ulysses}
                for method in (theirs, ours):
                    said = everyone(method, ranks, name, size, degrees, expected[name, size])
                    if said.startswith("refuses"):
                        number = reasons.setdefault(said.removeprefix("refuses: "), len(reasons) + 1)
                        said = f"refuses [{number}]"
                    cells.append(said)
                print(f"| {name} | {size} | {ranks} | {ring} x {ulysses} | {cells[0]} | {cells[1]} |", flush=True)
    print()
    for reason, number in reasons.items():
        print(f"[{number}] `{reason}`\n")


if __name__ == "__main__":
    main()
