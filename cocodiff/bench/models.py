"""Transformers of every family and one step's input for them, made from a shape: the same on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cocodiff.models import family_named
from cocodiff.models.shapes import Recipe, Shape


def _recipe(shape: Shape) -> Recipe:
    return family_named(shape.family).part("shapes").RECIPE


def build_transformer(shape: Shape) -> nn.Module:
    """A transformer of this shape; the same weights on every rank. The caller's random state stays as it was."""
    import diffusers

    recipe = _recipe(shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(diffusers, recipe.transformer)(**recipe.config(shape))
    return nn.Module.to(model, getattr(torch, shape.dtype)).eval()  # diffusers' own `to` warns, naming no module


def build_inputs(shape: Shape, device: torch.device, branch: int = 0) -> dict[str, Any]:
    """One step's input, of the first branch of guidance or the second; the same on every rank."""
    generator, dtype = torch.Generator().manual_seed(1 + branch), getattr(torch, shape.dtype)

    def rand(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    inputs = _recipe(shape).inputs(shape, rand)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
