"""FLUX.2: as FLUX.1, but modulations are made once for all blocks, and one matrix makes all of a single block's inputs.

What follows is diffusers' forwards (0.42) cut at the exchanges. Reference images are image tokens like others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cocodiff.blocks import BlockRow
from cocodiff.compat import Patches
from cocodiff.models.family import Cut, Family
from cocodiff.models.flux.family import projections, token_counts
from cocodiff.models.fused import Fused
from cocodiff.models.install import install_blocks
from cocodiff.models.joint import JointLayer, ParallelLayer, Stream, gated_stream, to_out
from cocodiff.parallel.tokens import Tokens


def double_layer(
    tokens: Tokens,
    block: Any,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> JointLayer:
    """Text and image with weights of their own (Flux2TransformerBlock)."""
    attn = block.attn
    text_mods, image_mods = (_chunked(mods, 6) for mods in (temb_mod_txt, temb_mod_img))
    text = gated_stream(
        lambda rows: text_mods, block.norm1_context, projections(attn, added=True),
        (attn.norm_added_q, attn.norm_added_k), attn.to_add_out, block.norm2_context, block.ff_context, clip=True,
    )  # fmt: skip
    image = gated_stream(
        lambda rows: image_mods, block.norm1, projections(attn, added=False),
        (attn.norm_q, attn.norm_k), to_out(attn), block.norm2, block.ff,
    )  # fmt: skip
    lengths = tokens.mine
    return JointLayer(attn, [text, image], lengths, temb_mod_img.itemsize, image_rotary_emb)


def single_layer(
    tokens: Tokens,
    block: Any,
    encoder_hidden_states: None,
    temb_mod: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> ParallelLayer:
    """Text and image in one tensor (Flux2SingleTransformerBlock); V's rows of the fused matrix come first."""
    attn = block.attn
    shift, scale, gate = _chunked(temb_mod, 3)
    sizes = dict.fromkeys("qkv", attn.inner_dim) | {"mlp": attn.mlp_hidden_dim * attn.mlp_mult_factor}
    stream = Stream(
        lambda x, rows: block.norm(x) * (1 + scale) + shift,
        Fused(attn.to_qkv_mlp_proj, sizes),
        attn.norm_q,
        attn.norm_k,
    )
    return ParallelLayer(
        attn, stream, [sum(tokens.mine)], temb_mod.itemsize, image_rotary_emb,
        mlp=lambda layer: attn.mlp_act_fn(layer.project_all("mlp")), out=lambda x: gate * attn.to_out(x),
    )  # fmt: skip


def _chunked(mods: Tensor, count: int) -> tuple[Tensor, ...]:
    """`(B, count * C)` -> so many of `(B, 1, C)`."""
    return (mods.unsqueeze(1) if mods.ndim == 2 else mods).chunk(count, dim=-1)


def install(row: BlockRow, transformer: Any, patches: Patches) -> list[nn.Module]:
    double, single = transformer.transformer_blocks, transformer.single_transformer_blocks
    both, known = ("encoder_hidden_states", "hidden_states"), ("Flux2AttnProcessor",)
    found = install_blocks(row, double, "Flux2TransformerBlock", {"attn": known}, both, double_layer, patches)
    one, known = ("hidden_states",), ("Flux2ParallelSelfAttnProcessor",)
    return found + install_blocks(
        row, single, "Flux2SingleTransformerBlock", {"attn": known}, one, single_layer, patches
    )


FLUX2 = Family(
    name="flux2",
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    token_counts=token_counts,
    cuts={
        "hidden_states": Cut("image"),
        "encoder_hidden_states": Cut("text"),
        "img_ids": Cut("image"),
        "txt_ids": Cut("text"),
    },
    install=install,
    guided=lambda pipeline, call: (
        type(pipeline).__name__.startswith("Flux2Klein")
        and call["guidance_scale"] > 1
        and not pipeline.config.is_distilled
    ),
    refused={"kv_cache_mode": "keys of reference images that are kept between steps lie on other ranks' heads"},
)
