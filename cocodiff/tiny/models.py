"""Builds the components of the tiny FLUX pipelines from configs, and saves and loads their weights.

They have about 5.6 million parameters: a `FluxTransformer2DModel` (2 double + 4 single blocks, 8 heads x 24), an
`AutoencoderKL` that halves height and width, and frozen random text encoders. A 64 x 64 picture has 32 x 32 latents and
256 image tokens.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from cocodiff.tiny import pictures

WEIGHTS = Path(__file__).parent / "weights"
TEXT_TOKENS = 16
"""Text tokens that a prompt is padded to. The longest caption has 13 with the T5 tokenizer, 14 with CLIP's."""

LATENT_SIZE = pictures.SIZE // 2
"""Height and width of the latents of a default picture; the pipelines' `default_sample_size`."""

_TEXT_WIDTH = 96
_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"


class TinyT5Tokenizer(PreTrainedTokenizerFast):
    """A word-level tokenizer that pads and cuts to its `model_max_length` at most.

    FLUX pipelines ask for `max_length=512` by default, but the tiny transformer was trained with 16 text tokens.
    Shorter lengths are kept.
    """

    def __call__(self, *args: Any, max_length: int | None = None, **kwargs: Any) -> Any:
        if max_length is not None:
            max_length = min(max_length, self.model_max_length)
        return super().__call__(*args, max_length=max_length, **kwargs)


def _words() -> list[str]:
    """Return the words of the grammar, sorted."""
    return sorted({word for scene in pictures.all_scenes() for word in scene.caption.split()})


def _t5_tokenizer() -> TinyT5Tokenizer:
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *_words()])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocab["</s>"])])
    return TinyT5Tokenizer(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_TOKENS,
    )


def _byte_pairs(words: list[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges, the most frequent pair first, that make each of `words` one token."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(piece) > 1 for piece in pieces):
        counts = Counter(pair for piece in pieces for pair in zip(piece, piece[1:], strict=False))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for piece in pieces:
            i = 0
            while i < len(piece) - 1:
                if (piece[i], piece[i + 1]) == best:
                    piece[i : i + 2] = [piece[i] + piece[i + 1]]
                i += 1
    return merges


def _clip_tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = _byte_pairs(_words())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, _CLIP_START, _CLIP_END]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_TOKENS)


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build a CLIP text model whose random weights carry words and positions into the pooled output, (B, 96)."""
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=2 * _TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            projection_dim=_TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for name, parameter in model.named_parameters():
        if "embedding" in name:
            torch.nn.init.normal_(parameter, std=1.0)
        elif parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.5 / math.sqrt(parameter.shape[1]))
    return model


def _text_encoder_2(tokenizer: TinyT5Tokenizer) -> T5EncoderModel:
    """Build a T5 encoder, (B, S) -> (B, S, 96). Strong random position biases mix each token with its neighbours."""
    model = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=_TEXT_WIDTH,
            d_kv=24,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=24,
            feed_forward_proj="relu",
            dropout_rate=0.0,
        )
    )
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter, std=3.0)
        elif "shared" in name or "embed_tokens" in name:
            torch.nn.init.normal_(parameter, std=1.0)
        elif parameter.ndim == 2:
            # T5 does not divide attention scores by sqrt(d_kv), so its queries start small.
            gain = 0.3 if name.endswith(".q.weight") else 1.5
            torch.nn.init.normal_(parameter, std=gain / math.sqrt(parameter.shape[1]))
    return model


def _vae(scaling_factor: float, shift_factor: float) -> AutoencoderKL:
    """Build an autoencoder between pictures (B, 3, 64, 64) in [-1, 1] and latents (B, 4, 32, 32)."""
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=pictures.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


def _transformer() -> FluxTransformer2DModel:
    """Build a transformer from packed latents (B, 256, 16) and text (B, 16, 96) to the velocity (B, 256, 16)."""
    model = FluxTransformer2DModel(
        in_channels=16,  # four latent channels x 2 x 2 patch
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=24,
        num_attention_heads=8,
        joint_attention_dim=_TEXT_WIDTH,
        pooled_projection_dim=_TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(4, 10, 10),
    )
    # With zero modulation and output every block starts as the identity, which trains faster and more stably.
    torch.nn.init.zeros_(model.proj_out.weight)
    for name, parameter in model.named_parameters():
        if name.endswith("linear.weight") and "norm" in name:
            torch.nn.init.zeros_(parameter)
    return model


def build_components(scaling_factor: float = 1.0, shift_factor: float = 0.0, seed: int = 0) -> dict[str, Any]:
    """Build all components of a FLUX pipeline with random weights from `seed`, by the pipeline's argument names.

    The scheduler neither shifts sigmas nor adapts them to the resolution, as in the transformer's training. The
    caller's random state does not change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = _clip_tokenizer(), _t5_tokenizer()
        components: dict[str, Any] = {
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer_2,
            "text_encoder": _text_encoder(tokenizer),
            "text_encoder_2": _text_encoder_2(tokenizer_2),
            "vae": _vae(scaling_factor, shift_factor),
            "transformer": _transformer(),
        }
    for part in model_parts(components).values():
        part.eval().requires_grad_(False)
    return components


def model_parts(components: dict[str, Any]) -> dict[str, torch.nn.Module]:
    """Return the components that are modules."""
    return {name: part for name, part in components.items() if isinstance(part, torch.nn.Module)}


def save_components(components: dict[str, Any], folder: Path = WEIGHTS) -> None:
    """Write the weights into `folder`/<name>.safetensors in float16, and the scale of the latents into vae.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in model_parts(components).items():
        # T5 ties two names to one tensor, but safetensors accepts each tensor only once.
        unique = {t.data_ptr(): key for key, t in reversed(part.state_dict().items())}
        tensors = {key: part.state_dict()[key].to(torch.float16).contiguous() for key in unique.values()}
        save_file(tensors, folder / f"{name}.safetensors")
        (folder / f"{name}.safetensors").chmod(0o644)  # save_file makes it readable only by its owner
    config = components["vae"].config
    scale = {"scaling_factor": config.scaling_factor, "shift_factor": config.shift_factor}
    (folder / "vae.json").write_text(json.dumps(scale) + "\n")


def load_components(folder: Path = WEIGHTS, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Build the components with the weights of `folder`, cast to `dtype`. RuntimeError if weights do not fit."""
    components = build_components(**json.loads((folder / "vae.json").read_text()))
    for name, part in model_parts(components).items():
        with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        missing = part.load_state_dict(state, strict=False)
        tied = {key for key in missing.missing_keys if key.endswith("embed_tokens.weight")}
        if missing.unexpected_keys or set(missing.missing_keys) - tied:
            raise RuntimeError(f"{folder / name}.safetensors does not fit the model: {missing}")
        torch.nn.Module.to(part, dtype)  # diffusers' own `to` warns without naming a module
    return components
