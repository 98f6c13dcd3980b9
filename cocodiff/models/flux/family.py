"""FLUX.1: joint attention of [text, image] in double blocks, one stream with a parallel MLP in single blocks.

What follows is diffusers' forwards (0.42) cut at the exchanges; `cocodiff.models.joint` has what families share.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cocodiff.blocks import BlockRow
from cocodiff.compat import Patches
from cocodiff.models.family import Cut, Family
from cocodiff.models.fused import Fused
from cocodiff.models.install import install_blocks
from cocodiff.models.joint import JointLayer, ParallelLayer, Stream, gated_stream, separate, to_out
from cocodiff.parallel.tokens import Tokens


def double_layer(
    tokens: Tokens,
    block: Any,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> JointLayer:
    """Text and image with weights of their own (FluxTransformerBlock)."""
    attn = block.attn
    text = gated_stream(
        _mods(block.norm1_context, temb, 6), block.norm1_context.norm, projections(attn, added=True),
        (attn.norm_added_q, attn.norm_added_k), attn.to_add_out, block.norm2_context, block.ff_context, clip=True,
    )  # fmt: skip
    image = gated_stream(
        _mods(block.norm1, temb, 6), block.norm1.norm, projections(attn, added=False),
        (attn.norm_q, attn.norm_k), to_out(attn), block.norm2, block.ff,
    )  # fmt: skip
    return JointLayer(attn, [text, image], tokens.mine, temb.itemsize, image_rotary_emb)


def single_layer(
    tokens: Tokens,
    block: Any,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> ParallelLayer:
    """Text and image as one stream, with an MLP beside attention (FluxSingleTransformerBlock)."""
    attn = block.attn
    shift, scale, gate = _mods(block.norm, temb, 3)(slice(None))
    stream = Stream(
        lambda x, rows: block.norm.norm(x) * (1 + scale) + shift, projections(attn, added=False),
        attn.norm_q, attn.norm_k,
    )  # fmt: skip
    return ParallelLayer(
        attn, stream, tokens.mine, temb.itemsize, image_rotary_emb,
        mlp=lambda layer: block.act_mlp(block.proj_mlp(layer.normed_all())), out=lambda x: gate * block.proj_out(x),
    )  # fmt: skip


def _mods(norm: Any, temb: Tensor, count: int) -> Any:
    """What an AdaLayerNormZero makes of this step's embedding, once for all pieces."""
    mods = [mod.unsqueeze(1) for mod in norm.linear(norm.silu(temb)).chunk(count, dim=1)]
    return lambda rows: mods


def projections(attn: Any, added: bool) -> Any:
    if attn.fused_projections:
        return Fused(attn.to_added_qkv if added else attn.to_qkv, dict.fromkeys("qkv", attn.inner_dim))
    return separate(attn, *(("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")))


def install(row: BlockRow, transformer: Any, patches: Patches) -> list[nn.Module]:
    streams, known = ("encoder_hidden_states", "hidden_states"), {"attn": ("FluxAttnProcessor",)}
    double, single = transformer.transformer_blocks, transformer.single_transformer_blocks
    return install_blocks(row, double, "FluxTransformerBlock", known, streams, double_layer, patches) + install_blocks(
        row, single, "FluxSingleTransformerBlock", known, streams, single_layer, patches
    )


def token_counts(transformer: Any, given: dict[str, Any]) -> dict[str, int]:
    return {"text": given["encoder_hidden_states"].shape[1], "image": given["hidden_states"].shape[1]}


def guided(pipeline: Any, call: dict[str, Any]) -> bool:
    embeds = (call.get(f"negative_{name}_embeds") for name in ("prompt", "pooled_prompt"))
    negative = call.get("negative_prompt") is not None or all(value is not None for value in embeds)
    return call.get("true_cfg_scale", 1.0) > 1 and negative


IP_ADAPTER = "IP-Adapters attend to their image tokens in a processor of their own, which cocodiff does not have yet"

FLUX = Family(
    name="flux",
    pipelines=(
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxKontextPipeline",
        "FluxControlNetPipeline",
    ),
    token_counts=token_counts,
    cuts={
        "hidden_states": Cut("image"),
        "encoder_hidden_states": Cut("text"),
        "img_ids": Cut("image"),
        "txt_ids": Cut("text"),
        "controlnet_block_samples": Cut("image"),
        "controlnet_single_block_samples": Cut("image"),
    },
    install=install,
    guided=guided,
    refused={"ip_adapter_image_embeds": IP_ADAPTER, "ip_hidden_states": IP_ADAPTER},
)
