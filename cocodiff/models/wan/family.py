"""Wan 2.1 and 2.2: video."""

from __future__ import annotations

import math
from typing import Any

from cocodiff.models.family import Cut, Family
from cocodiff.models.wan.layers import BLOCK


def token_counts(transformer: Any, given: dict[str, Any]) -> dict[str, int]:
    sizes = zip(given["hidden_states"].shape[-3:], transformer.config.patch_size, strict=True)
    frames, height, width = (size // patch for size, patch in sizes)
    return {"video": frames * height * width}


WAN = Family(
    name="wan",
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    blocks={"blocks": BLOCK},
    token_counts=token_counts,
    cuts={"timestep": Cut("video", dim=1)},
    whole={"hidden_states": "video"},
    guided=lambda pipeline, call: call.get("guidance_scale", 1.0) > 1,
    output_shape=lambda transformer, given: (
        given["hidden_states"].shape[0],
        transformer.proj_out.out_features // math.prod(transformer.config.patch_size),
        *given["hidden_states"].shape[2:],
    ),
    long=True,
    transformers=("transformer", "transformer_2"),
)
