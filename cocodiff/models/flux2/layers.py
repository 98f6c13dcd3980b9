"""FLUX.2's blocks: as FLUX.1's, but modulations are made once for all blocks, and one matrix makes all of a single
block's inputs.

The arithmetic is that of diffusers' forwards (0.42), cut where exchanges begin and end.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cocodiff.models.fused import Projections, added_projections, fused_parts
from cocodiff.models.joint import JointLayer, ParallelLayer
from cocodiff.models.stages import (
    Arguments,
    BlockSpec,
    Mods,
    StreamSpec,
    clipped,
    finish_image,
    finish_text,
    modulated,
    norm_added_heads,
)


def text_modulation(block: Any, arguments: Arguments) -> Mods:
    return _chunked(arguments["temb_mod_txt"], 6)


def text_modulate(block: Any, mods: Mods, x: Tensor) -> Tensor:
    return modulated(block.norm1_context(x), mods)


def image_modulation(block: Any, arguments: Arguments) -> Mods:
    return _chunked(arguments["temb_mod_img"], 6)


def image_modulate(block: Any, mods: Mods, x: Tensor) -> Tensor:
    return modulated(block.norm1(x), mods)


def single_modulation(block: Any, arguments: Arguments) -> Mods:
    return _chunked(arguments["temb_mod"], 3)


def single_modulate(block: Any, mods: Mods, x: Tensor) -> Tensor:
    return modulated(block.norm(x), mods)


def single_projections(attn: Any) -> Projections:
    sizes = dict.fromkeys("qkv", attn.inner_dim) | {"mlp": attn.mlp_hidden_dim * attn.mlp_mult_factor}
    return fused_parts(attn.to_qkv_mlp_proj, sizes)


def single_parallel_branch(block: Any, mods: Mods, projected: Tensor) -> Tensor:
    return block.attn.mlp_act_fn(projected)


def single_finish(block: Any, mods: Mods, residual: Tensor, attended: Tensor) -> Tensor:
    return clipped(residual + mods[2] * block.attn.to_out(attended))


def _chunked(mods: Tensor, count: int) -> Mods:
    """`(B, count * C)` -> `count` tensors `(B, 1, C)`."""
    return (mods.unsqueeze(1) if mods.ndim == 2 else mods).chunk(count, dim=-1)


DOUBLE = BlockSpec(
    name="Flux2TransformerBlock",
    processors={"attn": ("Flux2AttnProcessor",)},
    inputs=("encoder_hidden_states", "hidden_states"),
    arguments=("temb_mod_img", "temb_mod_txt", "image_rotary_emb", "joint_attention_kwargs"),
    streams=(
        StreamSpec(text_modulation, text_modulate, finish_text, added_projections, norm_added_heads),
        StreamSpec(image_modulation, image_modulate, finish_image),
    ),
    layer=JointLayer,
    like="temb_mod_img",
)
SINGLE = BlockSpec(
    name="Flux2SingleTransformerBlock",
    processors={"attn": ("Flux2ParallelSelfAttnProcessor",)},
    inputs=("hidden_states",),
    arguments=("encoder_hidden_states", "temb_mod", "image_rotary_emb", "joint_attention_kwargs"),
    streams=(StreamSpec(single_modulation, single_modulate, single_finish, single_projections),),
    layer=ParallelLayer,
    like="temb_mod",
    parallel_branch=single_parallel_branch,
)
