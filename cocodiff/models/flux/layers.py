"""FLUX.1's blocks: [text, image] with weights of their own in double blocks, one stream with a parallel MLP in single.

The arithmetic is that of diffusers' forwards (0.42), cut where exchanges begin and end.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cocodiff.models.fused import added_projections
from cocodiff.models.joint import JointLayer, ParallelLayer
from cocodiff.models.stages import (
    Arguments,
    BlockSpec,
    Mods,
    StreamSpec,
    adaptive_mods,
    clipped,
    finish_image,
    finish_text,
    modulated,
    norm_added_heads,
)


def text_modulation(block: Any, arguments: Arguments) -> Mods:
    return adaptive_mods(block.norm1_context, arguments["temb"], 6)


def text_modulate(block: Any, mods: Mods, x: Tensor) -> Tensor:
    return modulated(block.norm1_context.norm(x), mods)


def image_modulation(block: Any, arguments: Arguments) -> Mods:
    return adaptive_mods(block.norm1, arguments["temb"], 6)


def image_modulate(block: Any, mods: Mods, x: Tensor) -> Tensor:
    return modulated(block.norm1.norm(x), mods)


def single_modulation(block: Any, arguments: Arguments) -> Mods:
    return adaptive_mods(block.norm, arguments["temb"], 3)


def single_modulate(block: Any, mods: Mods, x: Tensor) -> Tensor:
    return modulated(block.norm.norm(x), mods)


def single_parallel_branch(block: Any, mods: Mods, normed: Tensor) -> Tensor:
    return block.act_mlp(block.proj_mlp(normed))


def single_finish(block: Any, mods: Mods, residual: Tensor, attended: Tensor) -> Tensor:
    return clipped(residual + mods[2] * block.proj_out(attended))


INPUTS = ("encoder_hidden_states", "hidden_states")
ARGUMENTS = ("temb", "image_rotary_emb", "joint_attention_kwargs")

DOUBLE = BlockSpec(
    name="FluxTransformerBlock",
    processors={"attn": ("FluxAttnProcessor",)},
    inputs=INPUTS,
    arguments=ARGUMENTS,
    streams=(
        StreamSpec(text_modulation, text_modulate, finish_text, added_projections, norm_added_heads),
        StreamSpec(image_modulation, image_modulate, finish_image),
    ),
    layer=JointLayer,
)
SINGLE = BlockSpec(
    name="FluxSingleTransformerBlock",
    processors={"attn": ("FluxAttnProcessor",)},
    inputs=INPUTS,
    arguments=ARGUMENTS,
    streams=(StreamSpec(single_modulation, single_modulate, single_finish),),
    layer=ParallelLayer,
    parallel_branch=single_parallel_branch,
)
