"""Tiny pipelines of the other families, with random weights: every part runs and matters, the pictures mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from cocodiff.tiny.models import TinyT5Tokenizer

WIDTH, HEADS, TEXT_TOKENS = 48, 8, 48
PAD, END = "<pad>", "</s>"


def fill(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values for every parameter, so that none is zero (modulations, gates, outputs) and none is large."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and "norm" in name and "linear" not in name:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1 or "table" in name or "pos_embed" in name:
                parameter.copy_(0.2 * noise)
            elif any(table in name for table in ("shared", "embed_tokens", "token_embedding", "position_embedding")):
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return module.eval().requires_grad_(False)


def _tokenizer() -> TinyT5Tokenizer:
    """A byte is a token: any prompt works."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([PAD, END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = TinyT5Tokenizer(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, model_max_length=TEXT_TOKENS, padding_side="right"
    )
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def _language_model(layers: int) -> Any:
    config = Qwen3Config(
        vocab_size=258,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=12,
        max_position_embeddings=TEXT_TOKENS,
    )
    return fill(Qwen3ForCausalLM(config))


def _t5(config: type, model: type, width: int) -> Any:
    sizes = dict(vocab_size=258, d_model=width, d_kv=12, d_ff=2 * width, num_layers=2, num_heads=4, dropout_rate=0.0)
    return fill(model(config(**sizes)))


def _clip() -> Any:
    config = CLIPTextConfig(
        vocab_size=258,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=1,
    )
    return fill(CLIPTextModelWithProjection(config))


def _vae(channels: int, kind: type = diffusers.AutoencoderKL, **more: Any) -> Any:
    return fill(
        kind(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **more,
        )
    )


def _flux2() -> dict[str, Any]:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=HEADS,
        joint_attention_dim=3 * WIDTH,  # three layers of the text encoder
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = _vae(4, diffusers.AutoencoderKLFlux2)
    return dict(vae=vae, text_encoder=_language_model(28), tokenizer=_tokenizer(), transformer=fill(transformer))


def _sd3() -> dict[str, Any]:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=8 * HEADS,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=64,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    parts: dict[str, Any] = dict(vae=_vae(16, shift_factor=0.06, scaling_factor=1.5), transformer=fill(transformer))
    for suffix in ("", "_2"):
        parts |= {f"text_encoder{suffix}": _clip(), f"tokenizer{suffix}": _tokenizer()}
    return parts | dict(text_encoder_3=_t5(T5Config, T5EncoderModel, 2 * WIDTH), tokenizer_3=_tokenizer())


def _qwen() -> dict[str, Any]:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=4,
        attention_head_dim=12,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 4),
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
    return dict(vae=fill(vae), text_encoder=_language_model(2), tokenizer=_tokenizer(), transformer=fill(transformer))


def _wan() -> dict[str, Any]:
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=4 * WIDTH,
        num_layers=4,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    text_encoder = _t5(UMT5Config, UMT5EncoderModel, WIDTH)
    return dict(vae=fill(vae), text_encoder=text_encoder, tokenizer=_tokenizer(), transformer=fill(transformer))


COMPONENTS: dict[str, Callable[[], dict[str, Any]]] = {"flux2": _flux2, "sd3": _sd3, "qwen": _qwen, "wan": _wan}


def load_pipeline(family: str, pipeline: str) -> Any:
    """A pipeline of this diffusers class; the same weights each time. The caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = COMPONENTS[family]()
    if pipeline == "WanImageToVideoPipeline":  # as Wan 2.2's small model: the first frame is part of the latents
        parts |= dict(image_encoder=None, image_processor=None, expand_timesteps=True)
    pipe = getattr(diffusers, pipeline)(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **parts)
    if family == "qwen":  # its template has more tokens than ours allows
        pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
    if hasattr(pipe, "default_sample_size"):
        pipe.default_sample_size = 64 // pipe.vae_scale_factor
    return pipe
