"""Small FLUX.1 pipelines: the trained one of `cocodiff.tiny`, and random ones for tests."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch

from cocodiff.models.random_parts import HEADS, POOLED_WIDTH, TEXT_WIDTH, Inputs, make_kl_vae, make_pipeline
from cocodiff.models.small import Small
from cocodiff.tiny.models import load_components

CLASSES = {
    "text2image": "FluxPipeline",
    "img2img": "FluxImg2ImgPipeline",
    "inpaint": "FluxInpaintPipeline",
    "fill": "FluxFillPipeline",
    "kontext": "FluxKontextPipeline",
}
SIZES = dict(
    in_channels=16,
    attention_head_dim=12,
    joint_attention_dim=TEXT_WIDTH,
    pooled_projection_dim=POOLED_WIDTH,
    axes_dims_rope=(4, 4, 4),
)


def tiny(pipeline: str) -> Any:
    return getattr(diffusers, pipeline)(**load_components())


def random_pipeline(task: str = "text2image", *, heads: int = HEADS, double: int = 2, single: int = 2) -> Any:
    """A pipeline for one of the tasks of CLASSES. `double`, `single`: blocks of the transformer."""
    channels = {"fill": 16 * 2 + 4 * 4}.get(task, 16)  # fill: noisy latents, masked latents, 2 x 2 x 4 mask values
    sizes: dict[str, Any] = SIZES | dict(in_channels=channels, num_attention_heads=heads)
    transformer = diffusers.FluxTransformer2DModel(
        **sizes,
        out_channels=16,
        num_layers=double,
        num_single_layers=single,
        guidance_embeds=task in ("fill", "kontext"),
    )
    vae = make_kl_vae(4)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 1 and "norm" in name and "linear" not in name:
                parameter.uniform_(0.5, 1.5)  # scales of the RMS norms
            elif parameter.ndim == 1:
                parameter.normal_(std=0.2)
            else:
                parameter.normal_(std=1.2 / parameter.shape[-1] ** 0.5)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return make_pipeline(CLASSES[task], vae=vae, transformer=transformer, **parts)


def random_controlnet() -> Any:
    """A ControlNet for `random_pipeline`; its output layers, zero when made, are filled."""
    sizes: dict[str, Any] = SIZES
    controlnet = diffusers.FluxControlNetModel(num_layers=2, num_single_layers=2, num_attention_heads=HEADS, **sizes)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter.normal_(std=0.15)
    return controlnet


def call(name: str, inputs: Inputs) -> dict[str, Any]:
    found = inputs.call() | dict(pooled_prompt_embeds=inputs.pooled()) | inputs.edit(name)
    if name.endswith("kontext"):
        found |= dict(max_area=inputs.height * inputs.width, _auto_resize=False)
    if name.endswith(("text2image", "kontext")):  # true CFG: two forwards a step
        found |= dict(
            true_cfg_scale=2.0,
            negative_prompt_embeds=inputs.prompt(),
            negative_pooled_prompt_embeds=inputs.pooled(),
        )
    return found


SMALL = Small(
    tasks={task: CLASSES[task] for task in ("text2image", "inpaint", "img2img")},
    tiny=tiny,
    pipelines={f"flux {task}": partial(random_pipeline, task) for task in CLASSES},
    call=call,
)
