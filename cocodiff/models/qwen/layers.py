"""Qwen-Image's blocks: text and image with weights of their own; text is padded and masked, rotations are complex.

The arithmetic is that of diffusers' forwards (0.42), cut where exchanges begin and end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cocodiff.errors import ConfigError
from cocodiff.models.fused import Projections
from cocodiff.models.joint import JointLayer
from cocodiff.models.stages import (
    Arguments,
    BlockSpec,
    Mods,
    StreamSpec,
    clipped,
    gated,
    modulated,
    norm_added_heads,
    to_out,
)
from cocodiff.parallel.tokens import Tokens


def text_modulation(block: Any, arguments: Arguments) -> Mods:
    temb = arguments["temb"]
    return _chunked(block.txt_mod(temb.chunk(2)[0] if block.zero_cond_t else temb))  # the other half is for references


def text_modulate(block: Any, mods: Mods, x: Tensor) -> Tensor:
    return modulated(block.txt_norm1(x), mods)


def text_finish(block: Any, mods: Mods, residual: Tensor, attended: Tensor) -> Tensor:
    return clipped(gated(mods, residual, block.attn.to_add_out(attended), block.txt_norm2, block.txt_mlp))


def text_projections(attn: Any) -> Projections:
    return {"q": attn.add_q_proj, "k": attn.add_k_proj, "v": attn.add_v_proj}


def image_modulation(block: Any, arguments: Arguments) -> Mods:
    """With `modulate_index` `(B, S_local)` each row takes the mods of one half of the batch or the other."""
    mods, index = _chunked(block.img_mod(arguments["temb"])), arguments.get("modulate_index")
    if index is None:
        return mods
    halves = [mod.chunk(2) for mod in mods]
    return tuple(torch.where(index[:, :, None] == 0, first, second) for first, second in halves)


def image_modulate(block: Any, mods: Mods, x: Tensor) -> Tensor:
    return modulated(block.img_norm1(x), mods)


def image_finish(block: Any, mods: Mods, residual: Tensor, attended: Tensor) -> Tensor:
    return clipped(gated(mods, residual, to_out(block.attn, attended), block.img_norm2, block.img_mlp))


def image_projections(attn: Any) -> Projections:
    """Never fused: diffusers' processor does not use a fused matrix either."""
    return {"q": attn.to_q, "k": attn.to_k, "v": attn.to_v}


def rotary(tokens: Tokens, arguments: Arguments) -> tuple[Tensor, Tensor] | None:
    if arguments.get("image_rotary_emb") is None:
        return None
    of_image, of_text = arguments["image_rotary_emb"]
    turns = torch.cat([of_text[tokens.rows("text")], of_image[tokens.rows("image")]])
    turns = turns.repeat_interleave(2, dim=-1)
    return turns.real, turns.imag


def mask(tokens: Tokens, arguments: Arguments) -> Tensor | None:
    """Of padded text; all of the image may be attended to."""
    valid = arguments.get("encoder_hidden_states_mask")
    if valid is None:
        return None
    if valid.shape[1:] != (sum(tokens.streams["text"]),):
        raise ConfigError(f"encoder_hidden_states_mask {tuple(valid.shape)} is not (batch, text tokens).")
    image = sum(tokens.streams["image"])
    return tokens.once("mask", valid, lambda: torch.cat([valid, valid.new_ones(valid.shape[0], image)], dim=1))


def _chunked(mods: Tensor) -> Mods:
    """`(B, 6 * C)` -> six tensors `(B, 1, C)`."""
    return tuple(mod.unsqueeze(1) for mod in mods.chunk(6, dim=-1))


DOUBLE = BlockSpec(
    name="QwenImageTransformerBlock",
    processors={"attn": ("QwenDoubleStreamAttnProcessor2_0",)},
    inputs=("encoder_hidden_states", "hidden_states"),
    arguments=(
        "encoder_hidden_states_mask",
        "temb",
        "image_rotary_emb",
        "joint_attention_kwargs",
        "modulate_index",
    ),
    streams=(
        StreamSpec(text_modulation, text_modulate, text_finish, text_projections, norm_added_heads),
        StreamSpec(image_modulation, image_modulate, image_finish, image_projections),
    ),
    layer=JointLayer,
    cuts={"modulate_index": "image"},
    rotary=rotary,
    mask=mask,
)
