"""Transformers of every family and one step's input for them, made from a shape: the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cocodiff.bench.shapes import Shape

CHANNELS, PROMPT_WIDTH, POOLED_WIDTH = 64, 256, 64


@dataclass(frozen=True)
class Recipe:
    """How one family's transformer is made: `config` and `inputs` of a shape; `inputs` draws from a generator."""

    transformer: str
    config: Callable[[Shape], dict[str, Any]]
    inputs: Callable[[Shape, Callable[..., Tensor]], dict[str, Any]]


def build_transformer(shape: Shape) -> nn.Module:
    """A transformer of this shape; the same weights on every rank. The caller's random state stays as it was."""
    import diffusers

    recipe = RECIPES[shape.family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(diffusers, recipe.transformer)(**recipe.config(shape))
    return model.to(getattr(torch, shape.dtype)).eval()


def build_inputs(shape: Shape, device: torch.device, branch: int = 0) -> dict[str, Any]:
    """One step's input, of the first branch of guidance or the second; the same on every rank."""
    generator, dtype = torch.Generator().manual_seed(1 + branch), getattr(torch, shape.dtype)

    def rand(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    inputs = RECIPES[shape.family].inputs(shape, rand)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def sides(tokens: int) -> tuple[int, int]:
    """Height and width, in tokens, of a picture of just so many: as square as can be.

    >>> sides(1024), sides(1440)
    ((32, 32), (36, 40))
    """
    height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return height, tokens // height


def _attention(shape: Shape) -> dict[str, int]:
    return {"attention_head_dim": shape.head_dim, "num_attention_heads": shape.heads}


def _axes(head_dim: int, first: int, others: int, of: int) -> tuple[int, int, int]:
    """Channels of a head for time, height and width, each even."""
    side = 2 * (head_dim // 2 * others // of)
    return head_dim - 2 * side, side, side


def _places(shape: Shape, axes: int) -> Tensor:
    height, width = sides(shape.image)
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    ids = torch.zeros(shape.image, axes)
    ids[:, 1:3] = grid
    return ids


def _flux_config(shape: Shape) -> dict[str, Any]:
    return _attention(shape) | dict(
        in_channels=CHANNELS,
        num_layers=shape.double,
        num_single_layers=shape.single,
        joint_attention_dim=PROMPT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        axes_dims_rope=_axes(shape.head_dim, 2, 7, 16),
    )


def _flux_inputs(shape: Shape, rand: Callable[..., Tensor]) -> dict[str, Any]:
    return dict(
        hidden_states=rand(1, shape.image, CHANNELS),
        encoder_hidden_states=rand(1, shape.text, PROMPT_WIDTH),
        pooled_projections=rand(1, POOLED_WIDTH),
        timestep=torch.tensor([0.5]),
        img_ids=_places(shape, 3),
        txt_ids=torch.zeros(shape.text, 3),
    )


def _flux2_config(shape: Shape) -> dict[str, Any]:
    quarter = shape.head_dim // 8 * 2
    return _attention(shape) | dict(
        in_channels=CHANNELS,
        num_layers=shape.double,
        num_single_layers=shape.single,
        joint_attention_dim=PROMPT_WIDTH,
        axes_dims_rope=(shape.head_dim - 3 * quarter, quarter, quarter, quarter),
    )


def _flux2_inputs(shape: Shape, rand: Callable[..., Tensor]) -> dict[str, Any]:
    return dict(
        hidden_states=rand(1, shape.image, CHANNELS),
        encoder_hidden_states=rand(1, shape.text, PROMPT_WIDTH),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([4.0]),
        img_ids=_places(shape, 4)[None],
        txt_ids=torch.zeros(1, shape.text, 4),
    )


def _sd3_config(shape: Shape) -> dict[str, Any]:
    return _attention(shape) | dict(
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


def _sd3_inputs(shape: Shape, rand: Callable[..., Tensor]) -> dict[str, Any]:
    height, width = sides(shape.image)
    return dict(
        hidden_states=rand(1, 16, 2 * height, 2 * width),
        encoder_hidden_states=rand(1, shape.text, PROMPT_WIDTH),
        pooled_projections=rand(1, POOLED_WIDTH),
        timestep=torch.tensor([500.0]),
    )


def _qwen_config(shape: Shape) -> dict[str, Any]:
    return _attention(shape) | dict(
        in_channels=CHANNELS,
        num_layers=shape.double,
        joint_attention_dim=PROMPT_WIDTH,
        axes_dims_rope=_axes(shape.head_dim, 2, 7, 16),
    )


def _qwen_inputs(shape: Shape, rand: Callable[..., Tensor]) -> dict[str, Any]:
    return dict(
        hidden_states=rand(1, shape.image, CHANNELS),
        encoder_hidden_states=rand(1, shape.text, PROMPT_WIDTH),
        timestep=torch.tensor([0.5]),
        img_shapes=[[(1, *sides(shape.image))]],
    )


def _wan_config(shape: Shape) -> dict[str, Any]:
    return _attention(shape) | dict(
        num_layers=shape.double,
        text_dim=PROMPT_WIDTH,
        ffn_dim=round(shape.width * 2.7 / 8) * 8,  # 13824 of 5120
        rope_max_seq_len=max(1024, shape.image),
    )


def _wan_inputs(shape: Shape, rand: Callable[..., Tensor]) -> dict[str, Any]:
    frames = next(count for count in (21, 20, 16, 8, 4, 2, 1) if shape.image % count == 0)
    height, width = sides(shape.image // frames)
    return dict(
        hidden_states=rand(1, 16, frames, 2 * height, 2 * width),
        encoder_hidden_states=rand(1, shape.text, PROMPT_WIDTH),
        timestep=torch.tensor([500.0]),
    )


RECIPES = {
    "flux": Recipe("FluxTransformer2DModel", _flux_config, _flux_inputs),
    "flux2": Recipe("Flux2Transformer2DModel", _flux2_config, _flux2_inputs),
    "sd3": Recipe("SD3Transformer2DModel", _sd3_config, _sd3_inputs),
    "qwen": Recipe("QwenImageTransformer2DModel", _qwen_config, _qwen_inputs),
    "wan": Recipe("WanTransformer3DModel", _wan_config, _wan_inputs),
}
