"""Small FLUX.2 pipelines with random weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import numpy as np
from PIL import Image

from cocodiff.models.random_parts import (
    ENCODER_WIDTH,
    HEADS,
    TEXT_WIDTH,
    Inputs,
    fill,
    make_language_model,
    make_pipeline,
    make_tokenizer,
    make_vae,
)
from cocodiff.models.small import Small


def _transformer(**more: Any) -> Any:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=HEADS,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        **more,
    )
    return fill(transformer)


def tiny(pipeline: str) -> Any:
    width = 3 * ENCODER_WIDTH  # three layers of the text encoder
    transformer = _transformer(num_single_layers=4, joint_attention_dim=width, guidance_embeds=False)
    vae = make_vae(diffusers.AutoencoderKLFlux2, 4, use_quant_conv=False, use_post_quant_conv=False)
    return make_pipeline(
        pipeline,
        vae=fill(vae),
        text_encoder=make_language_model(28),
        tokenizer=make_tokenizer(),
        transformer=transformer,
    )


def random_pipeline(pipeline: str) -> Any:
    guidance = pipeline == "Flux2Pipeline"
    transformer = _transformer(num_single_layers=2, joint_attention_dim=TEXT_WIDTH, guidance_embeds=guidance)
    vae = make_vae(diffusers.AutoencoderKLFlux2, 4)
    return make_pipeline(pipeline, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)


def call(name: str, inputs: Inputs) -> dict[str, Any]:
    found = inputs.call()
    if name == "flux2 reference":  # at least 64 pixels a side
        found["image"] = Image.fromarray(np.tile(inputs.pixels, (4, 4, 1))[:72, :64])
    if name == "flux2 klein":
        found |= dict(negative_prompt_embeds=inputs.prompt(2), guidance_scale=2.0)
    return found


SMALL = Small(
    tasks={"text2image": "Flux2KleinPipeline"},
    tiny=tiny,
    pipelines={
        "flux2 text2image": partial(random_pipeline, "Flux2Pipeline"),
        "flux2 reference": partial(random_pipeline, "Flux2Pipeline"),
        "flux2 klein": partial(random_pipeline, "Flux2KleinPipeline"),
    },
    call=call,
)
