"""SD3 and SD3.5."""

from __future__ import annotations

from typing import Any

from cocodiff.models.family import IP_ADAPTER, Cut, Family
from cocodiff.models.sd3.layers import JOINT


def token_counts(transformer: Any, given: dict[str, Any]) -> dict[str, int]:
    height, width = (size // transformer.config.patch_size for size in given["hidden_states"].shape[-2:])
    return {"text": given["encoder_hidden_states"].shape[1], "image": height * width}


SD3 = Family(
    name="sd3",
    pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    blocks={"transformer_blocks": JOINT},
    token_counts=token_counts,
    cuts={"encoder_hidden_states": Cut("text")},
    whole={"hidden_states": "image"},
    batched=("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
    refused={"ip_adapter_image_embeds": IP_ADAPTER, "ip_hidden_states": IP_ADAPTER},
)
