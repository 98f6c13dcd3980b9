"""FLUX.1."""

from __future__ import annotations

from typing import Any

from cocodiff.models.family import IP_ADAPTER, Cut, Family, packed_token_counts
from cocodiff.models.flux.layers import DOUBLE, SINGLE


def guided(pipeline: Any, call: dict[str, Any]) -> bool:
    embeds = (call.get(f"negative_{name}_embeds") for name in ("prompt", "pooled_prompt"))
    negative = call.get("negative_prompt") is not None or all(value is not None for value in embeds)
    return call.get("true_cfg_scale", 1.0) > 1 and negative


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
    blocks={"transformer_blocks": DOUBLE, "single_transformer_blocks": SINGLE},
    token_counts=packed_token_counts,
    cuts={
        "hidden_states": Cut("image"),
        "encoder_hidden_states": Cut("text"),
        "img_ids": Cut("image"),
        "txt_ids": Cut("text"),
        "controlnet_block_samples": Cut("image"),
        "controlnet_single_block_samples": Cut("image"),
    },
    guided=guided,
    refused={"ip_adapter_image_embeds": IP_ADAPTER, "ip_hidden_states": IP_ADAPTER},
)
