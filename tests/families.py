"""Small pipelines of every family but FLUX.1 (`tests.pipelines`), with random weights, and calls for them."""

from __future__ import annotations

from typing import Any

import torch

from cocodiff.models import FAMILIES
from cocodiff.models.flux.family import FLUX
from cocodiff.models.random_parts import TEXT_WIDTH, Inputs
from cocodiff.models.small import Small

__all__ = ["PIPELINES", "TEXT_WIDTH", "family_call", "family_pipeline"]

PIPELINES: dict[str, Small] = {
    name: small
    for small in (family.part("small").SMALL for family in FAMILIES if family is not FLUX)
    for name in small.pipelines
}


def family_pipeline(name: str) -> Any:
    """The pipeline of this name; the same weights on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = PIPELINES[name].pipelines[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def family_call(name: str, *, height: int, width: int, text_len: int, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Arguments for one call, with guidance where the pipeline has it; a latent comes back."""
    return PIPELINES[name].call(name, Inputs(height, width, text_len, batch, seed))
