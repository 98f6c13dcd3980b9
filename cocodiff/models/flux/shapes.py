"""FLUX.1 for the bench: a transformer of a shape, and one step's input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cocodiff.models.shapes import (
    CHANNELS,
    POOLED_WIDTH,
    PROMPT_WIDTH,
    Recipe,
    Shape,
    attention_config,
    positions,
    rope_axes,
)


def config(shape: Shape) -> dict[str, Any]:
    return attention_config(shape) | dict(
        in_channels=CHANNELS,
        num_layers=shape.double,
        num_single_layers=shape.single,
        joint_attention_dim=PROMPT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        axes_dims_rope=rope_axes(shape.head_dim),
    )


def inputs(shape: Shape, rand: Callable[..., Tensor]) -> dict[str, Any]:
    return dict(
        hidden_states=rand(1, shape.image, CHANNELS),
        encoder_hidden_states=rand(1, shape.text, PROMPT_WIDTH),
        pooled_projections=rand(1, POOLED_WIDTH),
        timestep=torch.tensor([0.5]),
        img_ids=positions(shape, 3),
        txt_ids=torch.zeros(shape.text, 3),
    )


SHAPES = (Shape("flux-dev", "flux", 19, 38, 24, 128, 512, 4096),)
RECIPE = Recipe("FluxTransformer2DModel", config, inputs)
