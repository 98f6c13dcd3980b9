"""FLUX.2 for the bench: a transformer of a shape, and one step's input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cocodiff.models.shapes import CHANNELS, PROMPT_WIDTH, Recipe, Shape, attention_config, positions


def config(shape: Shape) -> dict[str, Any]:
    quarter = shape.head_dim // 8 * 2
    return attention_config(shape) | dict(
        in_channels=CHANNELS,
        num_layers=shape.double,
        num_single_layers=shape.single,
        joint_attention_dim=PROMPT_WIDTH,
        axes_dims_rope=(shape.head_dim - 3 * quarter, quarter, quarter, quarter),
    )


def inputs(shape: Shape, rand: Callable[..., Tensor]) -> dict[str, Any]:
    return dict(
        hidden_states=rand(1, shape.image, CHANNELS),
        encoder_hidden_states=rand(1, shape.text, PROMPT_WIDTH),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([4.0]),
        img_ids=positions(shape, 4)[None],
        txt_ids=torch.zeros(1, shape.text, 4),
    )


SHAPES = (Shape("flux2-dev", "flux2", 8, 48, 48, 128, 512, 4096),)
RECIPE = Recipe("Flux2Transformer2DModel", config, inputs)
