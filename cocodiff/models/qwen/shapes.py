"""Qwen-Image for the bench: a transformer of a shape, and one step's input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cocodiff.models.shapes import CHANNELS, PROMPT_WIDTH, Recipe, Shape, attention_config, rope_axes, sides


def config(shape: Shape) -> dict[str, Any]:
    return attention_config(shape) | dict(
        in_channels=CHANNELS,
        num_layers=shape.double,
        joint_attention_dim=PROMPT_WIDTH,
        axes_dims_rope=rope_axes(shape.head_dim),
    )


def inputs(shape: Shape, rand: Callable[..., Tensor]) -> dict[str, Any]:
    return dict(
        hidden_states=rand(1, shape.image, CHANNELS),
        encoder_hidden_states=rand(1, shape.text, PROMPT_WIDTH),
        timestep=torch.tensor([0.5]),
        img_shapes=[[(1, *sides(shape.image))]],
    )


SHAPES = (Shape("qwen-image", "qwen", 60, 0, 24, 128, 256, 4096),)
RECIPE = Recipe("QwenImageTransformer2DModel", config, inputs)
