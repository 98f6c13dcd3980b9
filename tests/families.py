"""Small pipelines of every other family, with random weights in which every part matters, and calls for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from cocodiff.tiny.untrained import fill

TEXT_WIDTH, POOLED_WIDTH, HEADS = 24, 20, 8


def _scheduler() -> Any:
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler()


def _kl(channels: int, **more: Any) -> Any:
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
        **more,
    )


def flux2(pipeline: str) -> Any:
    import diffusers

    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=pipeline == "Flux2Pipeline",
    )
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=1,
    )
    fill(transformer)
    parts = dict(scheduler=_scheduler(), vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    return getattr(diffusers, pipeline)(**parts)


def sd3(pipeline: str, dual: bool) -> Any:
    import diffusers

    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=8 * HEADS,
        pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=24,
        dual_attention_layers=(0, 1) if dual else (),
        qk_norm="rms_norm" if dual else None,
    )
    fill(transformer)
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    parts = dict.fromkeys(names) | dict(scheduler=_scheduler(), vae=_kl(16), transformer=transformer)
    return getattr(diffusers, pipeline)(**parts)


def qwen(pipeline: str, zero_cond_t: bool = False) -> Any:
    import diffusers

    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=12,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 4, 4),
        zero_cond_t=zero_cond_t,
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    fill(transformer)
    parts = dict(scheduler=_scheduler(), vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    if "Edit" in pipeline:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as module

        module.calculate_dimensions = lambda area, ratio: (
            64,
            32,
            None,
        )  # not the million pixels it makes of any picture
        parts["processor"] = None
    return getattr(diffusers, pipeline)(**parts)


def _wan_transformer(channels: int, seed: int, image: bool = False) -> Any:
    import diffusers

    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=16,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=3,
        rope_max_seq_len=64,
        image_dim=20 if image else None,
        added_kv_proj_dim=12 * HEADS if image else None,
    )
    fill(transformer, seed=seed)
    return transformer


def wan(pipeline: str, channels: int = 16, image: bool = False, two: bool = False, expand: bool = False) -> Any:
    import diffusers

    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    second = _wan_transformer(channels, 1) if two else None
    parts: dict[str, Any] = dict(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=_scheduler(), expand_timesteps=expand,
        transformer=_wan_transformer(channels, 0, image), transformer_2=second, boundary_ratio=0.5 if two else None,
    )  # fmt: skip
    if "ImageToVideo" in pipeline:
        parts |= dict(image_processor=None, image_encoder=None)
    if image:
        from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

        sizes = dict(hidden_size=20, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2)
        encoder = fill(CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4)))
        processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
        parts |= dict(image_processor=processor, image_encoder=encoder)
    return getattr(diffusers, pipeline)(**parts)


PIPELINES = {
    "flux2 text2image": lambda: flux2("Flux2Pipeline"),
    "flux2 reference": lambda: flux2("Flux2Pipeline"),
    "flux2 klein": lambda: flux2("Flux2KleinPipeline"),
    "sd3 text2image": lambda: sd3("StableDiffusion3Pipeline", dual=False),
    "sd35 text2image": lambda: sd3("StableDiffusion3Pipeline", dual=True),
    "sd35 img2img": lambda: sd3("StableDiffusion3Img2ImgPipeline", dual=True),
    "sd35 inpaint": lambda: sd3("StableDiffusion3InpaintPipeline", dual=True),
    "qwen text2image": lambda: qwen("QwenImagePipeline"),
    "qwen img2img": lambda: qwen("QwenImageImg2ImgPipeline"),
    "qwen inpaint": lambda: qwen("QwenImageInpaintPipeline"),
    "qwen edit": lambda: qwen("QwenImageEditPipeline", zero_cond_t=True),
    "wan t2v": lambda: wan("WanPipeline"),
    "wan i2v": lambda: wan("WanImageToVideoPipeline", channels=36, image=True),
    "wan ti2v": lambda: wan("WanImageToVideoPipeline", expand=True),
    "wan22 t2v": lambda: wan("WanPipeline", two=True),
}


def family_pipeline(name: str) -> Any:
    """The pipeline of this name; the same weights on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = PIPELINES[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def family_call(name: str, *, height: int, width: int, text_len: int, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Arguments for one call, with guidance where the pipeline has it; a latent comes back."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    family = name.split()[0]
    if family == "qwen":  # eight pixels a token
        height, width = 2 * height, 2 * width
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[: height // 2] = 255
    call: dict[str, Any] = dict(
        height=height,
        width=width,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(seed + 1),
        output_type="latent",
        prompt_embeds=rand(batch, text_len, TEXT_WIDTH),
    )
    if name == "flux2 reference":  # at least 64 pixels a side
        call["image"] = Image.fromarray(np.tile(pixels, (4, 4, 1))[:72, :64])
    if name == "flux2 klein":
        call |= dict(negative_prompt_embeds=rand(batch, text_len + 2, TEXT_WIDTH), guidance_scale=2.0)
    if family in ("sd3", "sd35"):  # both branches in one batch
        call |= dict(
            pooled_prompt_embeds=rand(batch, POOLED_WIDTH),
            negative_prompt_embeds=rand(batch, text_len, TEXT_WIDTH),
            negative_pooled_prompt_embeds=rand(batch, POOLED_WIDTH),
            guidance_scale=3.0,
        )
    if family == "qwen":  # two calls, prompts of different lengths, padded where the batch is ragged
        call |= dict(negative_prompt_embeds=rand(batch, text_len + 3, TEXT_WIDTH), true_cfg_scale=2.0)
        for branch, length in (("prompt", text_len), ("negative_prompt", text_len + 3)):
            valid = torch.ones(batch, length, dtype=torch.long)
            valid[-1, length - length // 3 :] = 0
            call[f"{branch}_embeds_mask"] = valid
    if family in ("wan", "wan22"):
        call |= dict(negative_prompt_embeds=rand(batch, text_len, TEXT_WIDTH), guidance_scale=2.0, num_frames=5)
    if name in ("wan i2v", "wan ti2v"):
        call["image"] = Image.fromarray(pixels)
    if name == "wan i2v":  # 512 text tokens are written into diffusers' cross-attention
        call |= {key: rand(batch, 512, TEXT_WIDTH) for key in ("prompt_embeds", "negative_prompt_embeds")}
    if name.endswith(("img2img", "inpaint", "edit")):
        call["image"] = Image.fromarray(pixels)
    if name.endswith(("img2img", "inpaint")):
        call |= dict(strength=0.9, num_inference_steps=4)
    if name.endswith("inpaint"):
        call["mask_image"] = Image.fromarray(mask)
    return call
