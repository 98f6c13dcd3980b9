"""Small Wan pipelines with random weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from cocodiff.models.random_parts import (
    ENCODER_WIDTH,
    HEADS,
    TEXT_WIDTH,
    Inputs,
    fill,
    make_pipeline,
    make_t5,
    make_tokenizer,
)
from cocodiff.models.small import Small

TEXT2VIDEO, IMAGE2VIDEO = "WanPipeline", "WanImageToVideoPipeline"


def _transformer(seed: int = 0, **more: Any) -> Any:
    sizes: dict[str, Any] = dict(num_attention_heads=HEADS, attention_head_dim=12, in_channels=16, out_channels=16)
    return fill(diffusers.WanTransformer3DModel(**sizes | dict(freq_dim=32) | more), seed)


def _vae() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def tiny(pipeline: str) -> Any:
    parts: dict[str, Any] = dict(
        vae=fill(_vae()),
        text_encoder=make_t5(UMT5Config, UMT5EncoderModel, ENCODER_WIDTH),
        tokenizer=make_tokenizer(),
        transformer=_transformer(text_dim=ENCODER_WIDTH, ffn_dim=4 * ENCODER_WIDTH, num_layers=4),
    )
    if pipeline == IMAGE2VIDEO:  # as Wan 2.2's small model: the first frame is part of the latents
        parts |= dict(image_encoder=None, image_processor=None, expand_timesteps=True)
    return make_pipeline(pipeline, **parts)


def random_pipeline(
    pipeline: str, channels: int = 16, image: bool = False, two: bool = False, expand: bool = False
) -> Any:
    """A pipeline without a text encoder.

    Args:
        channels: of the transformer's input.
        image: with an image encoder, as Wan 2.1's image to video.
        two: transformers, as Wan 2.2's large models.
        expand: each token has its own timestep, as in Wan 2.2's small model.
    """
    vae = _vae()
    make = partial(
        _transformer, in_channels=channels, text_dim=TEXT_WIDTH, ffn_dim=64, num_layers=3, rope_max_seq_len=64
    )
    adapter: dict[str, Any] = dict(image_dim=20, added_kv_proj_dim=12 * HEADS) if image else {}
    parts: dict[str, Any] = dict(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        expand_timesteps=expand,
        transformer=make(**adapter),
        transformer_2=make(seed=1) if two else None,
        boundary_ratio=0.5 if two else None,
    )
    if pipeline == IMAGE2VIDEO:
        parts |= dict(image_processor=None, image_encoder=None)
    if image:
        sizes: dict[str, Any] = dict(hidden_size=20, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2)
        encoder = fill(CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4)))
        processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
        parts |= dict(image_processor=processor, image_encoder=encoder)
    return make_pipeline(pipeline, **parts)


def call(name: str, inputs: Inputs) -> dict[str, Any]:
    found = inputs.call() | dict(negative_prompt_embeds=inputs.prompt(), guidance_scale=2.0, num_frames=5)
    if name == "wan i2v":  # 512 text tokens are written into diffusers' cross-attention
        long = (inputs.batch, 512, TEXT_WIDTH)
        found |= {key: inputs.rand(*long) for key in ("prompt_embeds", "negative_prompt_embeds")}
    return found | inputs.edit(name)


SMALL = Small(
    tasks={"text2video": TEXT2VIDEO, "image2video": IMAGE2VIDEO},
    tiny=tiny,
    pipelines={
        "wan t2v": partial(random_pipeline, TEXT2VIDEO),
        "wan i2v": partial(random_pipeline, IMAGE2VIDEO, channels=36, image=True),
        "wan ti2v": partial(random_pipeline, IMAGE2VIDEO, expand=True),
        "wan22 t2v": partial(random_pipeline, TEXT2VIDEO, two=True),
    },
    call=call,
)
