"""What `cocodiff plan` is asked for: a model by name, a size in pixels, a cluster by name. From words to a `Task`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cocodiff.errors import ConfigError
from cocodiff.models import FAMILIES, family_named
from cocodiff.models.shapes import Recipe, Shape
from cocodiff.planner.rates import Rates
from cocodiff.planner.search import Task
from cocodiff.planner.task import task_of
from cocodiff.topology import Cluster

# Released models, by the shapes that have their layers, heads and widths.
HUB = {
    "black-forest-labs/FLUX.1-dev": "flux-dev",
    "black-forest-labs/FLUX.1-schnell": "flux-dev",
    "black-forest-labs/FLUX.2-dev": "flux2-dev",
    "stabilityai/stable-diffusion-3.5-large": "sd35-large",
    "stabilityai/stable-diffusion-3.5-medium": "sd35-medium",
    "Qwen/Qwen-Image": "qwen-image",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan-14b",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan-1.3b",
}
PIXELS_A_TOKEN = 16  # along each side: the VAE's 8, and patches of 2; the same in all these families
FRAMES_A_TOKEN = 4  # of Wan's VAE; the first frame stands alone


@dataclass(frozen=True)
class Wanted:
    """A model's shape, and what is drawn with it.

    Attributes:
        frames: of a clip; None for a picture.
        branches: 2 with guidance in two branches.
    """

    shape: Shape
    height: int
    width: int
    frames: int | None
    branches: int


def shape_named(name: str) -> Shape:
    """The shape of `shape:NAME`, or of a released model by its id on the hub. ConfigError lists them."""
    shapes = {shape.name: shape for family in FAMILIES for shape in family.part("shapes").SHAPES}
    key = name.removeprefix("shape:") if name.startswith("shape:") else HUB.get(name)
    if key not in shapes:
        known = ", ".join([*HUB, *(f"shape:{one}" for one in shapes)])
        raise ConfigError(f"--model {name}: its sizes are not known. Known are {known}.")
    return shapes[key]


def wanted(model: str, height: int | None, width: int | None, frames: int | None, guided: bool, dtype: str) -> Wanted:
    """Raises ConfigError for a size that the model cannot have."""
    shape = shape_named(model)
    clip = shape.family == "wan"
    default = (480, 832) if clip else (1024, 1024)
    height = default[0] if height is None else height
    width = default[1] if width is None else width
    for name, size in (("height", height), ("width", width)):
        if size < PIXELS_A_TOKEN or size % PIXELS_A_TOKEN:
            raise ConfigError(f"--{name} {size}: {shape.name} takes multiples of {PIXELS_A_TOKEN}.")
    if frames is not None and not clip:
        raise ConfigError(f"--frames {frames}: {shape.name} draws pictures; leave it out.")
    tokens = (height // PIXELS_A_TOKEN) * (width // PIXELS_A_TOKEN)
    if clip:
        frames = 81 if frames is None else frames
        if frames < 1 or frames % FRAMES_A_TOKEN != 1:
            raise ConfigError(f"--frames {frames}: a multiple of {FRAMES_A_TOKEN}, and 1 more, as 81.")
        tokens *= 1 + frames // FRAMES_A_TOKEN
    return Wanted(replace(shape, image=tokens, dtype=dtype), height, width, frames, 2 if guided else 1)


def task(asked: Wanted, cluster: Cluster, rates: Rates, memory_bytes: float | None) -> Task:
    """What the search needs; the transformer is built on the meta device, without memory for its weights."""
    shape, family = asked.shape, family_named(asked.shape.family)
    recipe: Recipe = family.part("shapes").RECIPE
    dtype = getattr(torch, shape.dtype)
    one = recipe.inputs(shape, lambda *sizes: torch.empty(sizes, dtype=dtype, device="meta"))
    batched = asked.branches > 1 and bool(family.batched)
    twice = {name: _twice(value) if name in family.batched else value for name, value in one.items()}
    return task_of(
        meta_transformer(shape), family, shape.heads, (one, twice if batched else one), asked.branches, cluster, rates,
        memory_bytes,
    )  # fmt: skip


def meta_transformer(shape: Shape) -> nn.Module:
    """A transformer of this shape, without memory for its weights. ConfigError if diffusers cannot make one."""
    import diffusers

    recipe: Recipe = family_named(shape.family).part("shapes").RECIPE
    try:
        with torch.device("meta"):
            built = getattr(diffusers, recipe.transformer)(**recipe.config(shape))
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        size = f"{shape.heads} heads x {shape.head_dim}, {shape.double} + {shape.single} blocks"
        raise ConfigError(f"{recipe.transformer} cannot be made with {size}: {error}.") from None
    return nn.Module.to(built, getattr(torch, shape.dtype)).eval()  # diffusers' own `to` warns, naming no module


def _twice(value: Any) -> Any:
    """Both branches of guidance in one batch."""
    return torch.cat([value, value]) if isinstance(value, Tensor) else value
