"""Small Qwen-Image pipelines with random weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import torch

from cocodiff.models.random_parts import (
    ENCODER_WIDTH,
    HEADS,
    TEXT_WIDTH,
    Inputs,
    fill,
    make_language_model,
    make_pipeline,
    make_tokenizer,
)
from cocodiff.models.small import Small


def _transformer(**more: Any) -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        attention_head_dim=12,
        num_attention_heads=HEADS,
        axes_dims_rope=(4, 4, 4),
        **more,
    )
    return fill(transformer)


def _vae() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def tiny(pipeline: str) -> Any:
    transformer = _transformer(num_layers=4, joint_attention_dim=ENCODER_WIDTH)
    pipe = make_pipeline(
        pipeline,
        vae=fill(_vae()),
        text_encoder=make_language_model(2),
        tokenizer=make_tokenizer(),
        transformer=transformer,
    )
    # Its own template has more tokens than our tokenizer allows.
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
    return pipe


def random_pipeline(pipeline: str) -> Any:
    edit = pipeline == "QwenImageEditPipeline"
    transformer = _transformer(num_layers=3, joint_attention_dim=TEXT_WIDTH, zero_cond_t=edit)
    parts: dict[str, Any] = dict(vae=_vae(), text_encoder=None, tokenizer=None, transformer=transformer)
    if edit:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as module

        module.calculate_dimensions = lambda area, ratio: (
            64,
            32,
            None,
        )  # not the million pixels it makes of any picture
        parts["processor"] = None
    return make_pipeline(pipeline, **parts)


def call(name: str, inputs: Inputs) -> dict[str, Any]:
    """Two forwards a step; prompts of different lengths, padded where the batch is ragged."""
    inputs = replace(inputs, height=2 * inputs.height, width=2 * inputs.width)  # eight pixels a token
    found = inputs.call() | dict(negative_prompt_embeds=inputs.prompt(3), true_cfg_scale=2.0)
    for branch in ("prompt", "negative_prompt"):
        batch, length = found[f"{branch}_embeds"].shape[:2]
        valid = torch.ones(batch, length, dtype=torch.long)
        valid[-1, length - length // 3 :] = 0
        found[f"{branch}_embeds_mask"] = valid
    return found | inputs.edit(name)


SMALL = Small(
    tasks={
        "text2image": "QwenImagePipeline",
        "img2img": "QwenImageImg2ImgPipeline",
        "inpaint": "QwenImageInpaintPipeline",
    },
    tiny=tiny,
    pipelines={
        "qwen text2image": partial(random_pipeline, "QwenImagePipeline"),
        "qwen img2img": partial(random_pipeline, "QwenImageImg2ImgPipeline"),
        "qwen inpaint": partial(random_pipeline, "QwenImageInpaintPipeline"),
        "qwen edit": partial(random_pipeline, "QwenImageEditPipeline"),
    },
    call=call,
)
