"""FLUX.2. Reference images are image tokens like others."""

from __future__ import annotations

from cocodiff.models.family import Cut, Family, packed_token_counts
from cocodiff.models.flux2.layers import DOUBLE, SINGLE

FLUX2 = Family(
    name="flux2",
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    blocks={"transformer_blocks": DOUBLE, "single_transformer_blocks": SINGLE},
    token_counts=packed_token_counts,
    cuts={
        "hidden_states": Cut("image"),
        "encoder_hidden_states": Cut("text"),
        "img_ids": Cut("image"),
        "txt_ids": Cut("text"),
    },
    guided=lambda pipeline, call: (
        type(pipeline).__name__.startswith("Flux2Klein")
        and call["guidance_scale"] > 1
        and not pipeline.config.is_distilled
    ),
    refused={"kv_cache_mode": "keys of reference images that are kept between steps lie on other ranks' heads"},
)
