"""Small pipelines with random weights in which every part matters: nothing is zero at the start, nothing is large."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

TASKS = ("text2image", "img2img", "inpaint", "fill", "kontext")
TEXT_WIDTH, POOLED_WIDTH = 24, 20


def flux_pipeline(
    task: str = "text2image",
    *,
    heads: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    double: int = 2,
    single: int = 2,
) -> Any:
    """One of the five FLUX pipelines, without text encoders (prompts are embeddings)."""
    import diffusers

    torch.manual_seed(seed)
    names = {"text2image": "Flux", "img2img": "FluxImg2Img", "inpaint": "FluxInpaint"}
    names |= {"fill": "FluxFill", "kontext": "FluxKontext"}
    channels = {"fill": 16 * 2 + 4 * 4}.get(task, 16)  # fill: noisy latents, masked latents, 2 x 2 x 4 mask values
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=channels,
        out_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=12,
        num_attention_heads=heads,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=task in ("fill", "kontext"),
        axes_dims_rope=(4, 4, 4),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 1 and "norm" in name and "linear" not in name:
                parameter.uniform_(0.5, 1.5)  # scales of the RMS norms
            elif parameter.ndim == 1:
                parameter.normal_(std=0.2)
            else:
                parameter.normal_(std=1.2 / parameter.shape[-1] ** 0.5)
    parts = dict(text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
    pipe = getattr(diffusers, f"{names[task]}Pipeline")(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=transformer, **parts
    )
    if dtype != torch.float32:
        pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_call(
    task: str, *, height: int = 36, width: int = 28, text_len: int = 7, batch: int = 1, seed: int = 0
) -> dict:
    """Arguments for one call: odd sizes and an odd prompt unless said otherwise; a latent comes back."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    call: dict[str, Any] = dict(
        prompt_embeds=rand(batch, text_len, TEXT_WIDTH),
        pooled_prompt_embeds=rand(batch, POOLED_WIDTH),
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(seed + 1),
        output_type="latent",
        height=height,
        width=width,
    )
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[: height // 2] = 255
    if task in ("img2img", "inpaint", "fill", "kontext"):
        call["image"] = Image.fromarray(pixels)
    if task in ("img2img", "inpaint"):
        call |= dict(strength=0.9, num_inference_steps=4)
    if task in ("inpaint", "fill"):
        call["mask_image"] = Image.fromarray(mask)
    if task == "kontext":
        call |= dict(max_area=height * width, _auto_resize=False)
    if task in ("text2image", "kontext"):  # true CFG: two forwards a step
        call |= dict(
            true_cfg_scale=2.0,
            negative_prompt_embeds=rand(batch, text_len, TEXT_WIDTH),
            negative_pooled_prompt_embeds=rand(batch, POOLED_WIDTH),
        )
    return call


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def controlnet_pipeline() -> Any:
    """FluxControlNetPipeline; the ControlNet's output layers, zero when made, are filled."""
    import diffusers

    parts = flux_pipeline().components
    torch.manual_seed(7)
    controlnet = diffusers.FluxControlNetModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=8,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        axes_dims_rope=(4, 4, 4),
    )
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter.normal_(std=0.15)
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    pipe = diffusers.FluxControlNetPipeline(**{name: parts[name] for name in names}, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def in_pieces(ranks: int | None = None) -> Any:
    """A cluster of one slow level whose messages cost nothing to start: rows are cut, and pieces go ahead."""
    import os

    import cocodiff

    return cocodiff.Cluster("test", (cocodiff.Level("link", ranks or int(os.environ["WORLD_SIZE"]), 1e-6, 1e-6),))
