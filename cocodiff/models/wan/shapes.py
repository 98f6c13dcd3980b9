"""Wan for the bench: a transformer of a shape, and one step's input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cocodiff.models.shapes import PROMPT_WIDTH, Recipe, Shape, attention_config, sides


def config(shape: Shape) -> dict[str, Any]:
    return attention_config(shape) | dict(
        num_layers=shape.double,
        text_dim=PROMPT_WIDTH,
        ffn_dim=round(shape.width * 2.7 / 8) * 8,  # 13824 of 5120
        rope_max_seq_len=max(1024, shape.image),
    )


def inputs(shape: Shape, rand: Callable[..., Tensor]) -> dict[str, Any]:
    frames = next(count for count in (21, 20, 16, 8, 4, 2, 1) if shape.image % count == 0)
    height, width = sides(shape.image // frames)
    return dict(
        hidden_states=rand(1, 16, frames, 2 * height, 2 * width),
        encoder_hidden_states=rand(1, shape.text, PROMPT_WIDTH),
        timestep=torch.tensor([500.0]),
    )


SHAPES = (
    Shape("wan-14b", "wan", 40, 0, 40, 128, 512, 32760),
    Shape("wan-1.3b", "wan", 30, 0, 12, 128, 512, 32760),
)
RECIPE = Recipe("WanTransformer3DModel", config, inputs)
