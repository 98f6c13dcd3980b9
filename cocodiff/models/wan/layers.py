"""Wan's blocks: self-attention of the video is exchanged; cross-attention to the prompt needs this rank's tokens only.

The arithmetic is that of diffusers' forwards (0.42), cut where exchanges begin and end: in float32 where theirs is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cocodiff.models.joint import JointLayer
from cocodiff.models.stages import Arguments, BlockSpec, Mods, StreamSpec, modulated, to_out
from cocodiff.parallel.tokens import Tokens


def modulation(block: Any, arguments: Arguments) -> Mods:
    """`temb` is `(B, 6, C)`, or `(B, S_local, 6, C)` where each token has its own timestep."""
    temb = arguments["temb"]
    mods = (block.scale_shift_table + temb.float()).chunk(6, dim=-2)
    return tuple(mod.squeeze(2) for mod in mods) if temb.ndim == 4 else mods


def modulate(block: Any, mods: Mods, x: Tensor) -> Tensor:
    return modulated(block.norm1(x.float()), mods).type_as(x)


def norm_all_heads(attn: Any, label: str, x: Tensor) -> Tensor:
    """The norm is over all heads of a token, `(B, rows, H, D)`."""
    return getattr(attn, f"norm_{label}")(x.flatten(2)).unflatten(2, x.shape[2:])


def finish(block: Any, mods: Mods, residual: Tensor, attended: Tensor, encoder_hidden_states: Tensor) -> Tensor:
    gate, shift, scale, gate_ff = mods[2:]
    x = (residual.float() + to_out(block.attn1, attended) * gate).type_as(residual)
    x = x + block.attn2(block.norm2(x.float()).type_as(x), encoder_hidden_states, None, None)
    normed = (block.norm3(x.float()) * (1 + scale) + shift).type_as(x)
    return (x.float() + block.ffn(normed).float() * gate_ff).type_as(x)


def rotary(tokens: Tokens, arguments: Arguments) -> tuple[Tensor, Tensor]:
    cos, sin = (angles[0, tokens.rows("video"), 0] for angles in arguments["rotary_emb"])
    return cos, sin


BLOCK = BlockSpec(
    name="WanTransformerBlock",
    processors={"attn1": ("WanAttnProcessor",), "attn2": ("WanAttnProcessor",)},
    inputs=("hidden_states",),
    arguments=("encoder_hidden_states", "temb", "rotary_emb"),
    streams=(StreamSpec(modulation, modulate, finish, norm=norm_all_heads),),
    layer=JointLayer,
    attention="attn1",
    local=("attn2",),
    like="encoder_hidden_states",
    context=("encoder_hidden_states",),
    rotary=rotary,
)
