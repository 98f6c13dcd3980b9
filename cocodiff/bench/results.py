"""Writes the result of a bench: a Markdown table, JSON and a plot."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cocodiff.errors import ConfigError

WIDE_SPREAD = 1.5  # the longest timing of a method over its shortest


def headline(result: Mapping[str, Any]) -> str:
    """Return one line that says what ran where."""
    shape, cluster, where = result["shape"], result["cluster"], result["environment"]
    parts = [
        f"{shape['name']}: {shape['double']} double and {shape['single']} single blocks of width {shape['width']}, "
        f"{shape['heads']} heads, {shape['text']} + {shape['image']} tokens, {shape['dtype']}"
    ]
    if cluster is not None:
        rates = cluster["goodput_gbs"]
        levels = [
            f"{level['name']} x {level['size']}"
            + (f" ({rates[level['name']] * 8e3:.0f} Mbit/s measured)" if rates else "")
            for level in cluster["levels"]
            if level["size"] > 1
        ]
        parts.append(", ".join(levels))
    parts.append(f"{where['machine']}, {where['device']}, {where['backend']}, torch {where['versions']['torch']}")
    return "; ".join(parts)


def doubts(result: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each sign that the machine was busy and the ratios mean little; usually none."""
    rows = {name: row["seconds_per_step"] for name, row in result["methods"].items() if "error" not in row}
    found = [
        f"{name} took {taken['min']:.3f} to {taken['max']:.3f} s: timings of one method differ by more than "
        f"{WIDE_SPREAD - 1:.0%}, so that ratios mean little. Was the machine busy?"
        for name, taken in rows.items()
        if taken["max"] > WIDE_SPREAD * taken["min"]
    ]
    compute = result["compute_seconds"]
    faster = [name for name, taken in rows.items() if name != "single" and compute and compute > taken["median"]]
    if faster:
        found.append(
            f"compute alone took {compute:.3f} s, longer than {', '.join(faster)}: their share of communication is "
            "within the noise and left out."
        )
    return found


def table(result: Mapping[str, Any]) -> str:
    """Return the methods as a Markdown table. Ratios are those of medians within this run."""
    methods = result["methods"]
    base = methods.get("ulysses", {}).get("seconds_per_step", {}).get("median")
    lines = [
        "| method | seconds a step (least, most) | against ulysses | communication share | MB on the slowest link "
        "(interface) | limit, ratio to it | relative difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in methods.items():
        if "error" in row:
            lines.append(f"| {name} | does not run: {row['error']} | | | | | |")
            continue
        taken = row["seconds_per_step"]
        cells = [
            name,
            f"{taken['median']:.3f} ({taken['min']:.3f}, {taken['max']:.3f})",
            "" if base is None else f"{base / taken['median']:.2f}x",
            _or_blank(row["communication_share"], lambda share: f"{share:.0%}"),
            _bytes(row),
            "" if row["limit_seconds"] is None else f"{row['limit_seconds']:.3f} s, {row['ratio_to_limit']:.2f}",
            _or_blank(row["relative_error"], lambda error: f"{error:.0e}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _or_blank(value: Any, words: Any) -> str:
    return "" if value is None else words(value)


def _bytes(row: Mapping[str, Any]) -> str:
    counted, crossed = row["counted_bytes"], row["interface_bytes"]
    shown = [_or_blank(counted, lambda n: f"{n / 1e6:.2f}"), _or_blank(crossed, lambda n: f"({n / 1e6:.2f})")]
    return " ".join(part for part in shown if part)


def as_json(result: Mapping[str, Any]) -> str:
    """Return the result as indented JSON with a newline at the end."""
    return json.dumps(result, indent=2) + "\n"


def write(path: Path, text: str) -> None:
    """Write a file. ConfigError if that is impossible."""
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}).") from None


def save(result: Mapping[str, Any], folder: Path, command: str) -> list[Path]:
    """Write JSON, Markdown and PNG, and return their paths.

    The name is made of the date, the shape, its width, the ranks, and the measured rate of the slowest link.
    """
    shape, ranks = result["shape"], result["environment"]["ranks"]
    stem = f"{datetime.date.today().isoformat()}-{shape['name']}-{shape['width']}-{ranks}-ranks"
    if result["cluster"] is not None and result["cluster"]["goodput_gbs"]:
        stem += f"-{min(result['cluster']['goodput_gbs'].values()) * 8e3:.0f}mbit"
    number, base = 1, stem
    while (folder / f"{base}.json").exists():
        number, base = number + 1, f"{stem}-{number + 1}"
    paths = [folder / f"{base}.{ending}" for ending in ("json", "md", "png")]
    write(paths[0], as_json(result))
    words = [f"# {headline(result)}", f"    {command}", *doubts(result), table(result), f"![the same]({paths[2].name})"]
    write(paths[1], "\n\n".join(words) + "\n")
    plot(result, paths[2])
    return paths


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw seconds a step as bars with their spread, the compute as a dotted line and the limit as a mark."""
    try:
        from matplotlib.figure import Figure
    except Exception:
        raise ConfigError("plots need matplotlib: pip install 'cocodiff[plot]'") from None
    rows = {name: row for name, row in result["methods"].items() if "error" not in row and name != "single"}
    rows = rows or {name: row for name, row in result["methods"].items() if "error" not in row}
    figure = Figure(figsize=(8, 1.1 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows.values()):
        taken = row["seconds_per_step"]
        spread = [[taken["median"] - taken["min"]], [taken["max"] - taken["median"]]]
        axes.barh(place, taken["median"], xerr=spread, color="#8aa9c4", height=0.6, ecolor="#444444", capsize=3)
        if row["limit_seconds"] is not None:
            axes.plot([row["limit_seconds"]] * 2, [place - 0.38, place + 0.38], color="#b03030", linewidth=2)
    if result["compute_seconds"] is not None:
        axes.axvline(result["compute_seconds"], color="#444444", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("seconds a step: median, least, most; dotted: compute alone; red: the limit of compute and bytes")
    lines = headline(result).split("; ")
    axes.set_title(f"{lines[0]}\n{'; '.join(lines[1:])}", fontsize=8, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}).") from None
