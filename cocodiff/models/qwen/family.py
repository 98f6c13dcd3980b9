"""Qwen-Image: joint attention of text and image in every block; text is padded and masked, rotations are complex.

What follows is diffusers' forwards (0.42) cut at the exchanges. Text enters the blocks whole, since the mask and the
angles of all its tokens are made from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cocodiff.blocks import BlockRow
from cocodiff.compat import Patches
from cocodiff.errors import ConfigError
from cocodiff.models.family import Family
from cocodiff.models.flux.family import token_counts
from cocodiff.models.install import install_blocks
from cocodiff.models.joint import JointLayer, gated_stream, separate, to_out
from cocodiff.parallel.tokens import Tokens


def make_layer(
    tokens: Tokens,
    block: Any,
    encoder_hidden_states_mask: Tensor | None,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Tensor | None = None,
) -> JointLayer:
    """One QwenImageTransformerBlock."""
    attn = block.attn
    text_temb = temb.chunk(2)[0] if block.zero_cond_t else temb  # the second half is for reference images
    text = gated_stream(
        _mods(block.txt_mod(text_temb)), block.txt_norm1, separate(attn, "add_q_proj", "add_k_proj", "add_v_proj"),
        (attn.norm_added_q, attn.norm_added_k), attn.to_add_out, block.txt_norm2, block.txt_mlp, clip=True,
    )  # fmt: skip
    if modulate_index is not None:
        modulate_index = modulate_index[:, tokens.rows("image")]
    image = gated_stream(
        _mods(block.img_mod(temb), modulate_index), block.img_norm1, separate(attn, "to_q", "to_k", "to_v"),
        (attn.norm_q, attn.norm_k), to_out(attn), block.img_norm2, block.img_mlp, clip=True,
    )  # fmt: skip
    rotary = mask = None
    if image_rotary_emb is not None:
        of_image, of_text = image_rotary_emb
        turns = torch.cat([of_text[tokens.rows("text")], of_image[tokens.rows("image")]])
        turns = turns.repeat_interleave(2, dim=-1)
        rotary = turns.real, turns.imag
    if encoder_hidden_states_mask is not None:
        mask = encoder_hidden_states_mask
        if mask.shape[1:] != (sum(tokens.streams["text"]),):
            raise ConfigError(f"encoder_hidden_states_mask {tuple(mask.shape)} is not (batch, text tokens).")
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], sum(tokens.streams["image"]))], dim=1)
    return JointLayer(attn, [text, image], tokens.mine, temb.itemsize, rotary, mask)


def _mods(mods: Tensor, index: Tensor | None = None) -> Callable[[slice], list[Tensor]]:
    """Rows -> shift, scale, gate twice. With an index `(B, S_local)` a row takes those of either half of the batch."""
    chunks = [mod.unsqueeze(1) for mod in mods.chunk(6, dim=-1)]
    if index is None:
        return lambda rows: chunks
    halves = [mod.chunk(2) for mod in chunks]
    return lambda rows: [torch.where(index[:, rows, None] == 0, first, second) for first, second in halves]


def install(row: BlockRow, transformer: Any, patches: Patches) -> list[nn.Module]:
    known, streams = {"attn": ("QwenDoubleStreamAttnProcessor2_0",)}, ("encoder_hidden_states", "hidden_states")
    blocks = transformer.transformer_blocks
    return install_blocks(row, blocks, "QwenImageTransformerBlock", known, streams, make_layer, patches)


QWEN = Family(
    name="qwen",
    pipelines=(
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageEditPipeline",
    ),
    token_counts=token_counts,
    cuts={},
    install=install,
    guided=lambda pipeline, call: (
        call["true_cfg_scale"] > 1
        and (call["negative_prompt"] is not None or call["negative_prompt_embeds"] is not None)
    ),
    whole={"hidden_states": "image", "encoder_hidden_states": "text"},
)
