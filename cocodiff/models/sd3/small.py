"""Small SD3 and SD3.5 pipelines with random weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
from transformers import T5Config, T5EncoderModel

from cocodiff.models.random_parts import (
    ENCODER_WIDTH,
    HEADS,
    POOLED_WIDTH,
    TEXT_WIDTH,
    Inputs,
    fill,
    make_clip,
    make_kl_vae,
    make_pipeline,
    make_t5,
    make_tokenizer,
)
from cocodiff.models.small import Small

TEXT2IMAGE = "StableDiffusion3Pipeline"
IMG2IMG = "StableDiffusion3Img2ImgPipeline"
INPAINT = "StableDiffusion3InpaintPipeline"
ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")


def _transformer(**more: Any) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        attention_head_dim=8,
        num_attention_heads=HEADS,
        caption_projection_dim=8 * HEADS,
        **more,
    )
    return fill(transformer)


def tiny(pipeline: str) -> Any:
    width = 2 * ENCODER_WIDTH
    transformer = _transformer(
        num_layers=4,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        pos_embed_max_size=64,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    makers = [make_clip, make_tokenizer] * 2 + [partial(make_t5, T5Config, T5EncoderModel, width), make_tokenizer]
    encoders = {name: make() for name, make in zip(ENCODERS, makers, strict=True)}
    return make_pipeline(pipeline, vae=fill(make_kl_vae(16)), transformer=transformer, **encoders)


def random_pipeline(pipeline: str, dual: bool = True) -> Any:
    """SD3.5, with two blocks that attend twice, or SD3."""
    transformer = _transformer(
        num_layers=3,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=24,
        dual_attention_layers=(0, 1) if dual else (),
        qk_norm="rms_norm" if dual else None,
    )
    return make_pipeline(pipeline, vae=make_kl_vae(16), transformer=transformer, **dict.fromkeys(ENCODERS))


def call(name: str, inputs: Inputs) -> dict[str, Any]:
    """Both branches of guidance are in one batch."""
    more = dict(
        pooled_prompt_embeds=inputs.pooled,
        negative_prompt_embeds=inputs.prompt,
        negative_pooled_prompt_embeds=inputs.pooled,
    )
    found = inputs.call() | {key: draw() for key, draw in more.items()}
    return found | dict(guidance_scale=3.0) | inputs.edit(name)


SMALL = Small(
    tasks={"text2image": TEXT2IMAGE, "img2img": IMG2IMG, "inpaint": INPAINT},
    tiny=tiny,
    pipelines={
        "sd3 text2image": partial(random_pipeline, TEXT2IMAGE, dual=False),
        "sd35 text2image": partial(random_pipeline, TEXT2IMAGE),
        "sd35 img2img": partial(random_pipeline, IMG2IMG),
        "sd35 inpaint": partial(random_pipeline, INPAINT),
    },
    call=call,
)
