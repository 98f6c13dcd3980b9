"""SD3.5 for the bench: a transformer of a shape, and one step's input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cocodiff.models.shapes import POOLED_WIDTH, PROMPT_WIDTH, Recipe, Shape, attention_config, sides


def config(shape: Shape) -> dict[str, Any]:
    return attention_config(shape) | dict(
        in_channels=16,
        num_layers=shape.double,
        joint_attention_dim=PROMPT_WIDTH,
        caption_projection_dim=shape.width,
        pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=max(sides(shape.image)),
        sample_size=2 * max(sides(shape.image)),
        dual_attention_layers=tuple(range(shape.dual)),
        qk_norm="rms_norm",
    )


def inputs(shape: Shape, rand: Callable[..., Tensor]) -> dict[str, Any]:
    height, width = sides(shape.image)
    return dict(
        hidden_states=rand(1, 16, 2 * height, 2 * width),
        encoder_hidden_states=rand(1, shape.text, PROMPT_WIDTH),
        pooled_projections=rand(1, POOLED_WIDTH),
        timestep=torch.tensor([500.0]),
    )


SHAPES = (
    Shape("sd35-large", "sd3", 38, 0, 38, 64, 333, 4096),
    Shape("sd35-medium", "sd3", 24, 0, 24, 64, 333, 4096, dual=13),
)
RECIPE = Recipe("SD3Transformer2DModel", config, inputs)
