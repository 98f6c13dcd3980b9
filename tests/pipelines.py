"""Small FLUX.1 pipelines with random weights in which every part matters."""

from __future__ import annotations

from typing import Any

import torch

from cocodiff.models.flux import small
from cocodiff.models.random_parts import POOLED_WIDTH, TEXT_WIDTH, Inputs

__all__ = ["POOLED_WIDTH", "TASKS", "TEXT_WIDTH"]

TASKS = tuple(small.CLASSES)


def flux_pipeline(task: str = "text2image", *, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int) -> Any:
    """One of the five FLUX pipelines, without text encoders (prompts are embeddings).

    Args:
        sizes: `heads`, `double` and `single` of `small.random_pipeline`.
    """
    torch.manual_seed(seed)
    pipe = small.random_pipeline(task, **sizes)
    if dtype != torch.float32:
        pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_call(
    task: str, *, height: int = 36, width: int = 28, text_len: int = 7, batch: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Arguments for one call: odd sizes and an odd prompt unless said otherwise; a latent comes back."""
    return small.call(task, Inputs(height, width, text_len, batch, seed))


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def controlnet_pipeline() -> Any:
    """FluxControlNetPipeline over the pipeline of `flux_pipeline()`."""
    import diffusers

    parts = flux_pipeline().components
    torch.manual_seed(7)
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    pipe = diffusers.FluxControlNetPipeline(
        **{name: parts[name] for name in names}, controlnet=small.random_controlnet()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
