"""Reads the results that are kept in benchmarks/results, for `benchmarks.figures`.

A run of `cocodiff bench` is named by its file without the date and the suffix: "meshes/wan-14b-640-4-ranks-96mbit".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = {"flux-dev": "FLUX.1", "flux2-dev": "FLUX.2", "qwen-image": "Qwen-Image", "sd35-large": "SD3.5 large"}
NAMES |= {"sd35-medium": "SD3.5 medium", "wan-14b": "Wan 14B"}

Json = Mapping[str, Any]


@cache
def runs(folder: str = "") -> Mapping[str, Json]:
    """The runs of `cocodiff bench` in a folder of the results, by name."""
    paths = sorted((RESULTS / folder).glob("20*.json"))
    prefix = folder and f"{folder}/"
    return {prefix + path.stem[len("2026-11-21-") :]: json.loads(path.read_text()) for path in paths}


def run(name: str) -> Json:
    return runs(name.rpartition("/")[0])[name]


@cache
def quality() -> Sequence[Json]:
    """The units of benchmarks/quality: one method at one budget, 128 pictures."""
    units: Sequence[Json] = json.loads((RESULTS / "quality" / "quality.json").read_text())["units"]
    return units


def seconds(name: str, method: str) -> float:
    """Median seconds of a step."""
    value: float = run(name)["methods"][method]["seconds_per_step"]["median"]
    return value


def ratio(name: str, method: str, base: str) -> float:
    return seconds(name, base) / seconds(name, method)


def unit(task: str, steps: str, hosts: str, method: str, budget: str) -> Json | None:
    """A unit of the quality benchmark; `hosts` is "ulysses" (Q, K, V and O cross) or "ring" (K and V)."""
    share = 1.0 if method == "rounding" else float(Fraction(budget))
    for one in quality():
        key = (one["task"], one["steps"], one["hosts"]["ring"], one["method"])
        if key == (task, int(steps), hosts == "ring", method) and abs(one["budget"] - share) < 1e-9:
            return one
    return None


def place(name: str) -> str:
    """Ranks and the measured rate of the slowest link."""
    one = run(name)["cluster"]
    sizes = " x ".join(str(level["size"]) for level in reversed(one["levels"]))
    rate = min(one["goodput_gbs"].values(), default=0) * 8e3
    if not rate:
        return sizes
    shown = f"{rate / 1e3:.1f} Gbit/s" if rate >= 1000 else f"{rate:.0f} Mbit/s" if rate >= 10 else f"{rate:.1f} Mbit/s"
    return f"{sizes}, {shown}"


def shape(name: str) -> str:
    one = run(name)["shape"]
    blocks = f"{one['double']} + {one['single']}" if one["single"] else one["double"]
    return f"{NAMES[one['name']]}, {blocks} blocks, width {one['width']}"
