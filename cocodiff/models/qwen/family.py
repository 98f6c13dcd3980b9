"""Qwen-Image. Text enters the blocks whole, since the mask and the angles of all its tokens are made from it."""

from __future__ import annotations

from cocodiff.models.family import Family, packed_token_counts
from cocodiff.models.qwen.layers import DOUBLE

QWEN = Family(
    name="qwen",
    pipelines=(
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageEditPipeline",
    ),
    blocks={"transformer_blocks": DOUBLE},
    token_counts=packed_token_counts,
    whole={"hidden_states": "image", "encoder_hidden_states": "text"},
    guided=lambda pipeline, call: (
        call.get("true_cfg_scale", 1.0) > 1
        and any(call.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
    ),
)
