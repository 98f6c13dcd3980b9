"""`cocodiff bench copies`: what selective transmission holds, computed from shapes alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from cocodiff.cli.asked import whole_numbers
from cocodiff.errors import ConfigError

MOST_RANKS = 4096


def copies(
    shapes: Annotated[str, typer.Option(help="The shapes, separated by commas.")] = "flux-dev,flux2-dev,qwen-image",
    pixels: Annotated[int, typer.Option(min=16, max=2**16, help="Height and width of the picture, in pixels.")] = 2304,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, separated by commas.")] = "24,96",
    cluster: Annotated[str, typer.Option(help="The cluster: a preset's name, or a JSON file.")] = "aurora",
    batch: Annotated[int, typer.Option(min=1, max=2**16, help="Pictures in one call.")] = 1,
    branches: Annotated[int, typer.Option(min=1, max=2, help="2 where guidance is a forward of its own.")] = 1,
) -> None:
    """The held copies of each shape: GB on the rank that holds most. Nothing is run."""
    from cocodiff.bench.shapes import named_shape
    from cocodiff.planner import choose_degrees
    from cocodiff.selective.memory import held_bytes
    from cocodiff.topology import load_cluster

    named = [named_shape(name.strip()) for name in shapes.split(",")]
    counts = whole_numbers("--ranks", ranks, MOST_RANKS)
    clusters = {count: load_cluster(cluster, ["host"] * count, "cpu")[0] for count in counts}
    if not all(any(where.slow) for where in clusters.values()):
        raise ConfigError(f"--cluster {cluster}: none of its levels is slow.")
    print("| model | ranks | mesh | held copies, GB a rank | weights in bfloat16, GB |\n|---|---|---|---|---|")
    for one in named:
        shape = replace(one, image=(pixels // 16) ** 2)
        streams = {"text": shape.text, "image": shape.image}
        for count, where in clusters.items():
            slow = where.slow.index(True)
            for ring in (None, 1):
                try:
                    degrees = choose_degrees(where, shape.heads, ring=ring, selective=True)
                except ConfigError:  # more ranks than heads
                    continue
                layers = [(shape.heads, shape.head_dim)] * shape.layers
                most = max(
                    held_bytes(where, degrees, slow, rank, streams, layers, batch, branches) for rank in range(count)
                )
                print(f"| {one.name}, {pixels} px | {count} | {degrees} | {most / 1e9:.2f} | {_weights(one.name)} |")


def _weights(name: str) -> str:
    """Of the released transformers, in billions of parameters x 2 bytes."""
    return {"flux-dev": "24", "flux2-dev": "64", "qwen-image": "41", "sd35-large": "16"}.get(name, "")
