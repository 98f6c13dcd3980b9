"""Pictures of selective transmission against those of the exact run, on the trained tiny pipelines: a resumable sweep.

A *unit* is one method at one budget on all prompts; each leaves a JSON file, and units whose file is there are not run
again. Held-out captions are the report set; what was tuned was tuned on training captions (docs/selective.md).
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.methods import COMPARED, comparison
from benchmarks.quality.metrics import psnr, relative_error, ssim
from benchmarks.quality.simulate import Comparison, Hosts, Played, Rounding, Simulation
from cocodiff.config import Selective
from cocodiff.errors import ConfigError
from cocodiff.models.small import tiny_pipeline
from cocodiff.selective.schedule import codings
from cocodiff.tiny import pictures
from cocodiff.tiny.check import check_picture
from cocodiff.tiny.models import TEXT_TOKENS

SCHEMA = "cocodiff-quality/1"
BATCH = 16
LENGTHS = {"text": TEXT_TOKENS, "image": (pictures.SIZE // 4) ** 2}
ROUNDING = "rounding"  # everything that crosses is made bfloat16
METHODS = (  # in the order of tables
    ROUNDING, "predicted", "v_major", "changed_rows", "random_rows", "oldest_rows", "plain", "residual", "skip",
)  # fmt: skip
TASKS = ("text2image", "inpaint")


@dataclass(frozen=True)
class Unit:
    """One row of the sweep. `budget` of `rounding` is 1."""

    task: str
    steps: int
    hosts: Hosts
    method: str
    budget: float

    @property
    def name(self) -> str:
        return f"{self.task}-{self.steps}-{str(self.hosts).replace(' ', '')}-{self.method}-{1 / self.budget:g}"


@dataclass(frozen=True)
class Prompts:
    """Which captions, each with how many seeds."""

    captions: int = pictures.HELD_OUT
    seeds: int = 2

    def batches(self) -> Iterator[list[tuple[int, int]]]:
        """(caption's index, seed), some at a time."""
        pairs = [(index, seed) for seed in range(self.seeds) for index in range(self.captions)]
        for start in range(0, len(pairs), BATCH):
            yield pairs[start : start + BATCH]


def units(
    tasks: Sequence[str], steps: Sequence[int], hosts: Sequence[Hosts], methods: Sequence[str], budgets: Sequence[float]
) -> list[Unit]:
    """All of them that have a schedule."""
    if unknown := [method for method in methods if method not in METHODS]:
        raise ConfigError(f"--methods {','.join(unknown)}: there are {', '.join(METHODS)}.")
    found = []
    for task in tasks:
        for count in steps:
            for where in hosts:
                for method in methods:
                    for budget in (1.0,) if method == ROUNDING else budgets:
                        unit = Unit(task, count, where, method, budget)
                        if _possible(unit):
                            found.append(unit)
    return found


def _possible(unit: Unit) -> bool:
    width = 192 // unit.hosts.ranks // (1 if unit.hosts.ring else unit.hosts.hosts)
    try:
        if unit.method in COMPARED:
            comparison(unit.method, unit.budget, unit.steps, width, 2, unit.hosts.ring)
        elif unit.method != ROUNDING:
            codings(_selective(unit), unit.steps, width, 2, unit.hosts.ring)
    except ConfigError:
        return False
    return True


def _selective(unit: Unit) -> Selective:
    if unit.method == "v_major":
        return Selective.v_major(unit.budget)  # with the paper's periodic refresh, where the budget holds it
    return Selective(budget=unit.budget, method=unit.method)


def _played(unit: Unit) -> Played:
    if unit.method == ROUNDING:
        return Rounding(unit.hosts, LENGTHS)
    if unit.method in COMPARED:
        return Comparison(unit.method, unit.budget, unit.hosts, LENGTHS, unit.steps)
    return Simulation(_selective(unit), unit.hosts, LENGTHS, unit.steps)


def run_unit(unit: Unit, prompts: Prompts, folder: Path) -> None:
    """Draw the unit and write its result, unless it was written before."""
    path = folder / "units" / f"{unit.name}.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found["prompts"] != asdict(prompts):
            raise ConfigError(
                f"{path} is of {found['prompts']}, not of {asdict(prompts)}: give them as --captions and --seeds, or "
                "another folder as --out."
            )
        return
    columns: dict[str, list[float]] = {name: [] for name in ("psnr", "ssim", "latent_error", "right", "exact_right")}
    sent = whole = 0
    for batch in prompts.batches():
        exact = _exact(unit.task, unit.steps, batch, folder)
        simulation = _played(unit)
        drawn, latents = draw(unit.task, unit.steps, batch, simulation)
        sent, whole = sent + simulation.sent, whole + simulation.exact
        columns["psnr"] += [round(value, 3) for value in psnr(drawn, exact["pixels"]).tolist()]
        columns["ssim"] += [round(value, 7) for value in ssim(drawn, exact["pixels"]).tolist()]
        columns["latent_error"] += [float(f"{value:.3e}") for value in relative_error(latents, exact["latents"])]
        columns["right"] += _right(drawn, batch)
        columns["exact_right"] += _right(exact["pixels"], batch)
    result = {
        "schema": SCHEMA,
        "unit": asdict(unit),
        "prompts": asdict(prompts),
        "share": sent / whole,
        "sent_bytes": sent,
        "per_prompt": columns,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result) + "\n")
    row = summary(result)
    print(
        f"{unit.name}: {row['share']:.4f} of the bytes, {row['median']:.1f} dB, 10th percentile {row['p10']:.1f}",
        file=sys.stderr,
        flush=True,
    )


def collected(folder: Path) -> list[dict[str, Any]]:
    """All units that are in a folder, by pictures, steps, hosts, method and budget."""

    def order(result: dict[str, Any]) -> tuple:
        unit = result["unit"]
        place = METHODS.index(unit["method"]), -unit["budget"]
        return unit["task"] != TASKS[0], unit["steps"], unit["hosts"]["ring"], *place

    return sorted((json.loads(path.read_text()) for path in (folder / "units").glob("*.json")), key=order)


def summary(result: Mapping[str, Any]) -> dict[str, float]:
    """Median, 10th percentile, mean and worst of PSNR, and the rest's medians and counts."""
    columns = result["per_prompt"]
    values = sorted(columns["psnr"])
    return {
        "share": result["share"],
        "median": statistics.median(values),
        "p10": values[round(0.1 * (len(values) - 1))],
        "mean": statistics.fmean(values),
        "worst": values[0],
        "ssim": statistics.median(columns["ssim"]),
        "latent_error": statistics.median(columns["latent_error"]),
        "right": sum(columns["right"]),
        "exact_right": sum(columns["exact_right"]),
        "count": len(values),
    }


def draw(
    task: str, steps: int, batch: Sequence[tuple[int, int]], simulation: Played | None = None
) -> tuple[Tensor, Tensor]:
    """Pixels `(B, 64, 64, 3)` in [0, 1], unrounded, and latents, of one batch in float32."""
    pipe = tiny_pipeline("flux", task)
    pipe.set_progress_bar_config(disable=True)
    scenes = [pictures.held_out_scenes()[index] for index, _ in batch]
    call: dict[str, Any] = {}
    if task == "inpaint":
        cases = [pictures.inpaint_case(index) for index, _ in batch]
        call = dict(image=[case.image for case in cases], mask_image=[case.mask for case in cases], strength=1.0)
    latents: list[Tensor] = []

    def keep(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents[:] = [tensors["latents"]]
        return {}

    generators = [torch.Generator().manual_seed(seed * pictures.HELD_OUT + index) for index, seed in batch]
    with nullcontext() if simulation is None else simulation.around(pipe.transformer):
        images = pipe(
            [scene.caption for scene in scenes],
            num_inference_steps=steps,
            generator=generators,
            output_type="np",
            callback_on_step_end=keep,
            **call,
        ).images
    return torch.from_numpy(images), latents[0]


def _exact(task: str, steps: int, batch: Sequence[tuple[int, int]], folder: Path) -> dict[str, Tensor]:
    """The exact run's pixels and latents, kept for the other units."""
    from safetensors.torch import load_file, save_file

    index, seed = batch[0]
    path = folder / "exact" / f"{task}-{steps}-{seed}-{index}-{len(batch)}.safetensors"
    if not path.exists():
        pixels, latents = draw(task, steps, batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")  # another process may be waiting for it
        save_file({"pixels": pixels.contiguous(), "latents": latents.contiguous()}, partial)
        partial.rename(path)
    return load_file(path)


def _right(pixels: Tensor, batch: Sequence[tuple[int, int]]) -> list[bool]:
    scenes = [pictures.held_out_scenes()[index] for index, _ in batch]
    rounded = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return [bool(check_picture(one, scene)) for one, scene in zip(rounded, scenes, strict=True)]
