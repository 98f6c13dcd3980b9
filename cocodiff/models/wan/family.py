"""Wan 2.1 and 2.2: video; self-attention is exchanged, cross-attention to the prompt needs this rank's tokens alone.

What follows is diffusers' forwards (0.42) cut at the exchanges: all rows' work in float32 where theirs is.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor, nn

from cocodiff.blocks import BlockRow
from cocodiff.compat import Patches
from cocodiff.models.family import Cut, Family
from cocodiff.models.fused import Fused
from cocodiff.models.install import install_blocks
from cocodiff.models.joint import JointLayer, Stream, separate, to_out
from cocodiff.parallel.tokens import Tokens


def make_layer(
    tokens: Tokens, block: Any, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
) -> JointLayer:
    """One WanTransformerBlock. `temb` is `(B, 6, C)`, or `(B, S_local, 6, C)` where each token has its timestep."""
    attn = block.attn1
    mods = (block.scale_shift_table + temb.float()).chunk(6, dim=-2)

    def of(rows: slice) -> list[Tensor]:
        return [mod[:, rows, 0] if temb.ndim == 4 else mod for mod in mods]

    def modulated(x: Tensor, rows: slice) -> Tensor:
        shift, scale = of(rows)[:2]
        return (block.norm1(x.float()) * (1 + scale) + shift).type_as(x)

    def finish(x: Tensor, attended: Tensor, rows: slice) -> Tensor:
        gate, shift, scale, gate_ff = of(rows)[2:]
        x = (x.float() + to_out(attn)(attended) * gate).type_as(x)
        x = x + block.attn2(block.norm2(x.float()).type_as(x), encoder_hidden_states, None, None)
        normed = (block.norm3(x.float()) * (1 + scale) + shift).type_as(x)
        return (x.float() + block.ffn(normed).float() * gate_ff).type_as(x)

    projections: Any = separate(attn, "to_q", "to_k", "to_v")
    if attn.fused_projections:
        projections = Fused(attn.to_qkv, dict.fromkeys("qkv", attn.inner_dim))
    norm_query, norm_key = (partial(_across_heads, norm) for norm in (attn.norm_q, attn.norm_k))
    stream = Stream(modulated, projections, norm_query, norm_key, finish)
    mine, lengths = tokens.rows("video"), tokens.mine
    cos, sin = (angles[0, mine, 0] for angles in rotary_emb)
    return JointLayer(attn, [stream], lengths, encoder_hidden_states.itemsize, (cos, sin))


def _across_heads(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm is over all heads of a token: before they part."""
    return norm(x.flatten(2)).unflatten(2, x.shape[2:])


def install(row: BlockRow, transformer: Any, patches: Patches) -> list[nn.Module]:
    known = {"attn1": ("WanAttnProcessor",), "attn2": ("WanAttnProcessor",)}
    blocks, streams = transformer.blocks, ("hidden_states",)
    return install_blocks(row, blocks, "WanTransformerBlock", known, streams, make_layer, patches, local=("attn2",))


def token_counts(transformer: Any, given: dict[str, Any]) -> dict[str, int]:
    sizes = zip(given["hidden_states"].shape[-3:], transformer.config.patch_size, strict=True)
    frames, height, width = (size // patch for size, patch in sizes)
    return {"video": frames * height * width}


WAN = Family(
    name="wan",
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    token_counts=token_counts,
    cuts={"timestep": Cut("video", dim=1)},
    install=install,
    guided=lambda pipeline, call: call["guidance_scale"] > 1,
    output_shape=lambda transformer, given: (
        given["hidden_states"].shape[0],
        transformer.proj_out.out_features // math.prod(transformer.config.patch_size),
        *given["hidden_states"].shape[2:],
    ),
    long=True,
    transformers=("transformer", "transformer_2"),
    whole={"hidden_states": "video"},
)
