"""What a quality sweep leaves for people: a table, a plot of quality over bytes, and a contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.quality.sweep import METHODS, ROUNDING, summary
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
    """Median PSNR over the bytes that crossed, a panel for each task and number of steps, a line for each method."""
    try:
        from matplotlib.figure import Figure
    except Exception:
        raise ConfigError("plots need matplotlib: pip install 'cocodiff[plot]'") from None
    panels: dict[str, dict[tuple[str, bool], list[tuple[float, float, float]]]] = {}
    for result in results:
        unit, row = result["unit"], summary(result)
        lines = panels.setdefault(f"{unit['task']}, {unit['steps']} steps", {})
        points = lines.setdefault((unit["method"], unit["hosts"]["ring"]), [])
        points.append((row["share"], row["median"], row["p10"]))
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.4 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    names, handles = [name for name in METHODS if name != ROUNDING], {}
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        for (method, ring), points in lines.items():
            style = "--" if ring else "-"
            if method == ROUNDING:
                line = axes.axhline(points[0][1], color="#888888", linestyle=style, linewidth=1)
                handles[f"{method}{', K and V' if ring else ''}"] = line
                continue
            shares, medians, lows = zip(*sorted(points), strict=True)
            colour, ours = f"C{names.index(method)}", method == names[0]
            (line,) = axes.plot(
                shares, medians, style, color=colour, marker="o", markersize=5 if ring else 4,
                markerfacecolor="white" if ring else colour, linewidth=2.4 if ours else 1.2,
            )  # fmt: skip
            handles[f"{method}{', K and V' if ring else ''}"] = line
            if ours:
                axes.fill_between(shares, lows, medians, color=colour, alpha=0.15)
        axes.set_xscale("log", base=2)
        axes.set_xlim(1 / 40, 0.6)
        axes.set_xticks([1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2], ["1/32", "1/16", "1/8", "1/4", "1/2"])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("share of an exact bfloat16 wire's bytes")
        axes.set_ylabel("PSNR against the exact run, dB")
        axes.grid(alpha=0.3)
    for axes in list(grid)[len(panels) :]:
        axes.remove()
    figure.suptitle("median of all pictures; shade: down to the 10th percentile", fontsize=9)
    handles = dict(sorted(handles.items(), key=lambda one: "K and V" in one[0]))
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=6, fontsize=8,
        title="solid: Q, K, V and O cross; dashed, hollow: K and V alone", title_fontsize=8,
    )  # fmt: skip
    figure.savefig(path, dpi=110)


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
