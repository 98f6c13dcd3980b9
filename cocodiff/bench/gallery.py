"""What a quality sweep leaves for people: a table, a plot of quality over bytes, and a contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cocodiff.bench.quality import ROUNDING, summary
from cocodiff.errors import ConfigError

TILE, TOP, LEFT = 128, 34, 6  # px
DIFFERENCE = 8


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A row for each unit, grouped as they stand."""
    lines = [
        "| pictures | steps | hosts | method | bytes | PSNR median | 10th percentile | mean | worst | SSIM | latent "
        "error | captions right (exact) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        unit, row = result["unit"], summary(result)
        hosts = unit["hosts"]
        where = f"{hosts['hosts']} x {hosts['ranks']}, {'K and V' if hosts['ring'] else 'Q, K, V, O'}"
        method = unit["method"] if unit["method"] == ROUNDING else f"{unit['method']} 1/{1 / unit['budget']:g}"
        lines.append(
            f"| {unit['task']} | {unit['steps']} | {where} | {method} | {row['share']:.4f} | {row['median']:.1f} "
            f"| {row['p10']:.1f} | {row['mean']:.1f} | {row['worst']:.1f} | {row['ssim']:.4f} "
            f"| {row['latent_error']:.1e} | {row['right']} ({row['exact_right']}) of {row['count']} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Median PSNR over the bytes that crossed, a line for each method, a panel for each way to cross."""
    try:
        from matplotlib.figure import Figure
    except Exception:
        raise ConfigError("plots need matplotlib: pip install 'cocodiff[plot]'") from None
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    floors: dict[str, float] = {}
    for result in results:
        unit, row = result["unit"], summary(result)
        crossing = "K and V cross" if unit["hosts"]["ring"] else "Q, K, V and O cross"
        title = f"{unit['task']}, {unit['steps']} steps, {crossing}"
        if unit["method"] == ROUNDING:
            floors[title] = row["median"]
        else:
            line = panels.setdefault(title, {}).setdefault(unit["method"], [])
            line.append((row["share"], row["median"], row["p10"]))
    if not panels:
        raise ConfigError("there is no unit to plot.")
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.2 * rows), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items(), strict=False):
        for method, points in lines.items():
            shares, medians, lows = zip(*sorted(points), strict=True)
            ours = method == "predicted"
            axes.plot(shares, medians, marker="o", markersize=4, linewidth=2.4 if ours else 1.2, label=method)
            if ours:
                axes.fill_between(shares, lows, medians, alpha=0.15)
        if title in floors:
            axes.axhline(floors[title], color="#888888", linestyle=":", label="bfloat16 rounding")
        axes.set_xscale("log", base=2)
        axes.set_xticks([1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2], ["1/32", "1/16", "1/8", "1/4", "1/2"])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("share of an exact bfloat16 wire's bytes")
        axes.set_ylabel("PSNR against the exact run, dB: median (shade: to 10th percentile)", fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def contact_sheet(exact: Tensor, columns: Mapping[str, Tensor], captions: Sequence[str], path: Path) -> None:
    """The exact picture, then for each method its picture and how it differs, eight times as strong.

    Args:
        exact: pixels `(B, H, W, 3)` in [0, 1].
        columns: heading -> pixels of the same.
    """
    width = LEFT + (1 + 2 * len(columns)) * (TILE + LEFT)
    sheet = Image.new("RGB", (width, TOP + len(exact) * (TILE + 20)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)

    def paste(pixels: Tensor, column: int, row: int) -> None:
        rounded = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        tile = Image.fromarray(rounded).resize((TILE, TILE), Image.Resampling.NEAREST)
        sheet.paste(tile, (LEFT + column * (TILE + LEFT), TOP + row * (TILE + 20)))

    headings = ["exact", *(text for name in columns for text in (name, f"difference x {DIFFERENCE}"))]
    for column, text in enumerate(headings):
        pen.text((LEFT + column * (TILE + LEFT), 8), text, fill=(0, 0, 0), font=font)
    for row, caption in enumerate(captions):
        paste(exact[row], 0, row)
        for index, pictures in enumerate(columns.values()):
            paste(pictures[row], 1 + 2 * index, row)
            paste((pictures[row] - exact[row]).abs() * DIFFERENCE, 2 + 2 * index, row)
        pen.text((LEFT, TOP + row * (TILE + 20) + TILE + 3), caption, fill=(60, 60, 60), font=font)
    sheet.save(path, optimize=True)
