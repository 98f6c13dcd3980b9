"""Parts of small pipelines with random weights in which every part matters, and what their calls are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, Qwen3Config, Qwen3ForCausalLM

from cocodiff.tiny.models import TinyT5Tokenizer

HEADS = 8
TEXT_WIDTH, POOLED_WIDTH = 24, 20  # of prompts that a call gives as embeddings
ENCODER_WIDTH, ENCODER_TOKENS = 48, 48  # of text encoders
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


def make_pipeline(name: str, **parts: Any) -> Any:
    """A pipeline of this diffusers class, with a flow-matching scheduler."""
    return getattr(diffusers, name)(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **parts)


def make_vae(kind: type, channels: int, **more: Any) -> Any:
    """A VAE of two blocks for pictures, as diffusers initialises it: from the global random state."""
    return kind(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=1,
        **more,
    )


def make_kl_vae(channels: int) -> Any:
    return make_vae(
        diffusers.AutoencoderKL,
        channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )


def make_tokenizer() -> TinyT5Tokenizer:
    """A byte is a token: any prompt works."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([PAD, END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = TinyT5Tokenizer(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, model_max_length=ENCODER_TOKENS, padding_side="right"
    )
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def make_language_model(layers: int) -> Any:
    config = Qwen3Config(
        vocab_size=258,
        hidden_size=ENCODER_WIDTH,
        intermediate_size=2 * ENCODER_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=12,
        max_position_embeddings=ENCODER_TOKENS,
    )
    return fill(Qwen3ForCausalLM(config))


def make_t5(config: type, model: type, width: int) -> Any:
    sizes = dict(vocab_size=258, d_model=width, d_kv=12, d_ff=2 * width, num_layers=2, num_heads=4, dropout_rate=0.0)
    return fill(model(config(**sizes)))


def make_clip() -> Any:
    config = CLIPTextConfig(
        vocab_size=258,
        hidden_size=ENCODER_WIDTH,
        intermediate_size=2 * ENCODER_WIDTH,
        projection_dim=ENCODER_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=ENCODER_TOKENS,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=1,
    )
    return fill(CLIPTextModelWithProjection(config))


@dataclass
class Inputs:
    """What one call of a small pipeline is made of: sizes in pixels and tokens, and random numbers from a seed."""

    height: int
    width: int
    text_len: int
    batch: int = 1
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def prompt(self, more_tokens: int = 0) -> torch.Tensor:
        """Embeddings `(B, S_text, TEXT_WIDTH)` of a random prompt."""
        return self.rand(self.batch, self.text_len + more_tokens, TEXT_WIDTH)

    def pooled(self) -> torch.Tensor:
        return self.rand(self.batch, POOLED_WIDTH)

    @property
    def pixels(self) -> np.ndarray:
        shape = (self.height, self.width, 3)
        return np.random.default_rng(self.seed).integers(0, 255, shape, dtype=np.uint8)

    def call(self) -> dict[str, Any]:
        """Arguments that all pipelines take; a latent comes back. Draws the prompt."""
        return dict(
            height=self.height,
            width=self.width,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(self.seed + 1),
            output_type="latent",
            prompt_embeds=self.prompt(),
        )

    def edit(self, name: str) -> dict[str, Any]:
        """More arguments where the pipeline starts from a picture, which the end of its name says."""
        call: dict[str, Any] = {}
        if name.endswith(("img2img", "inpaint", "fill", "kontext", "edit", "i2v")):
            call["image"] = Image.fromarray(self.pixels)
        if name.endswith(("img2img", "inpaint")):
            call |= dict(strength=0.9, num_inference_steps=4)
        if name.endswith(("inpaint", "fill")):
            mask = np.zeros((self.height, self.width), dtype=np.uint8)
            mask[: self.height // 2] = 255
            call["mask_image"] = Image.fromarray(mask)
        return call
