"""FLUX.1: joint attention of [text, image] in double blocks, one stream with a parallel MLP in single blocks.

The forwards below are diffusers' (0.42) cut at the exchanges: everything after attention works row by row, so it is
written for a slice of rows. Projections are called as modules, never by their weights: LoRA and hooks keep working.

Legend: B batch, S sequence, H heads, D head_dim, C channels. Rows are this rank's tokens, text first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cocodiff.attention import attention
from cocodiff.engine import Engine
from cocodiff.errors import PatchError
from cocodiff.kernels import rotate_pairs
from cocodiff.models.family import Family
from cocodiff.patches import Patches


class FluxLayer:
    """`cocodiff.attention.Layer` for one FluxAttention; `text` is None in single blocks, whose stream is joined."""

    def __init__(
        self,
        attn: Any,
        image: Tensor,
        text: Tensor | None,
        rotary: Any,
        finish: Callable[..., Any],
        beside: Callable[[slice], Tensor] | None,
        backend: Any,
    ) -> None:
        self.attn, self.image, self.text, self.rotary = attn, image, text, rotary
        self.num_heads: int = attn.heads
        self.finish = finish
        self._beside, self._backend = beside, backend
        self._fused: list[tuple[Tensor, ...]] | None = None

    def value(self) -> Tensor:
        return torch.cat(self._project(2, "to_v", "add_v_proj"), dim=1)

    def key(self) -> Tensor:
        return self._rotated(self._project(1, "to_k", "add_k_proj"), "norm_k", "norm_added_k")

    def query(self) -> Tensor:
        return self._rotated(self._project(0, "to_q", "add_q_proj"), "norm_q", "norm_added_q")

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(query, key, value, backend=self._backend)

    def beside(self, rows: slice) -> Tensor | None:
        return None if self._beside is None else self._beside(rows)

    def _project(self, index: int, image_name: str, text_name: str) -> list[Tensor]:
        """Text (if any) and image, `(B, S, H, D)` each, by one of the three projections."""
        attn = self.attn
        if attn.fused_projections and self._fused is None:  # one matrix makes all three: V cannot come first
            self._fused = [attn.to_qkv(self.image).chunk(3, dim=-1)]
            if self.text is not None:
                self._fused.insert(0, attn.to_added_qkv(self.text).chunk(3, dim=-1))
        if self._fused is not None:
            parts = [fused[index] for fused in self._fused]
        else:
            parts = [getattr(attn, image_name)(self.image)]
            if self.text is not None:
                parts.insert(0, getattr(attn, text_name)(self.text))
        return [part.unflatten(-1, (-1, attn.head_dim)) for part in parts]

    def _rotated(self, parts: list[Tensor], image_norm: str, text_norm: str) -> Tensor:
        parts[-1] = getattr(self.attn, image_norm)(parts[-1])
        if self.text is not None:
            parts[0] = getattr(self.attn, text_norm)(parts[0])
        joint = torch.cat(parts, dim=1)
        return joint if self.rotary is None else rotate_pairs(joint, *self.rotary)


class FluxProcessor:
    """Stands where diffusers' FluxAttnProcessor stood, so that everyone can see who attends."""

    _attention_backend = None  # what `set_attention_backend` sets
    _parallel_config = None

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        finish: Callable[..., Any] | None = None,
        beside: Callable[[slice], Tensor] | None = None,
    ) -> list[Any]:
        if finish is None or attention_mask is not None:
            what = "a block's forward was replaced" if finish is None else "an attention_mask was passed"
            raise PatchError(f"{what} after cocodiff.wrap: FLUX cannot run so on shards. Wrap again, last.")
        backend = self._attention_backend
        layer = FluxLayer(attn, hidden_states, encoder_hidden_states, image_rotary_emb, finish, beside, backend)
        return attention(self._engine, layer)


def _cat(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _double_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """FluxTransformerBlock.forward on shards."""
    text_len, attn = encoder_hidden_states.shape[1], block.attn
    norm_image, *image_mods = block.norm1(hidden_states, emb=temb)
    norm_text, *text_mods = block.norm1_context(encoder_hidden_states, emb=temb)

    def project_out(attended: Tensor) -> Tensor:
        return attn.to_out[1](attn.to_out[0](attended))

    def finish(rows: slice, attended: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        text = slice(min(rows.start, text_len), min(rows.stop, text_len))
        image = slice(max(rows.start - text_len, 0), max(rows.stop - text_len, 0))
        cut = text.stop - text.start
        image_out = _feed_forward(
            hidden_states[:, image], project_out(attended[:, cut:]), image_mods, block.norm2, block.ff
        )
        text_out = _feed_forward(
            encoder_hidden_states[:, text],
            attn.to_add_out(attended[:, :cut]),
            text_mods,
            block.norm2_context,
            block.ff_context,
        )
        if text_out.dtype == torch.float16:
            text_out = text_out.clip(-65504, 65504)
        return text_out, image_out

    pieces = attn(
        hidden_states=norm_image,
        encoder_hidden_states=norm_text,
        image_rotary_emb=image_rotary_emb,
        finish=finish,
        **(joint_attention_kwargs or {}),
    )
    return _cat([text for text, _ in pieces]), _cat([image for _, image in pieces])


def _feed_forward(residual: Tensor, projected: Tensor, mods: list[Tensor], norm: nn.Module, ff: nn.Module) -> Tensor:
    """Gated attention output, then the gated feed-forward: rows of one stream of a double block."""
    gate_msa, shift_mlp, scale_mlp, gate_mlp = (mod.unsqueeze(1) for mod in mods)
    hidden_states = residual + gate_msa * projected
    return hidden_states + gate_mlp * ff(norm(hidden_states) * (1 + scale_mlp) + shift_mlp)


def _single_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """FluxSingleTransformerBlock.forward on shards; its MLP runs while exchanges are in flight."""
    text_len = encoder_hidden_states.shape[1]
    residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    norm_hidden_states, gate = block.norm(residual, emb=temb)

    def beside(rows: slice) -> Tensor:
        return block.act_mlp(block.proj_mlp(norm_hidden_states[:, rows]))

    def finish(rows: slice, attended: Tensor, mlp: Tensor) -> Tensor:
        projected = block.proj_out(torch.cat([attended, mlp], dim=2))
        out = residual[:, rows] + gate.unsqueeze(1) * projected
        return out.clip(-65504, 65504) if out.dtype == torch.float16 else out

    joint = _cat(
        block.attn(
            hidden_states=norm_hidden_states,
            image_rotary_emb=image_rotary_emb,
            finish=finish,
            beside=beside,
            **(joint_attention_kwargs or {}),
        )
    )
    return joint[:, :text_len], joint[:, text_len:]


def install(engine: Engine, transformer: Any, patches: Patches) -> list[nn.Module]:
    """Our processors and block forwards, on this transformer's instances alone."""
    attentions = []
    for blocks, forward in (
        (transformer.transformer_blocks, _double_block),
        (transformer.single_transformer_blocks, _single_block),
    ):
        for block in blocks:
            processor = FluxProcessor(engine)
            processor._attention_backend = getattr(block.attn.processor, "_attention_backend", None)
            patches.set(block.attn, "processor", processor, may_be_replaced=True)
            patches.set(block, "forward", partial(forward, block))
            attentions.append(block.attn)
    return attentions


IP_ADAPTER = "IP-Adapters attend to their image tokens in a processor of their own, which cocodiff does not have yet"

FLUX = Family(
    name="flux",
    pipelines=(
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxKontextPipeline",
        "FluxControlNetPipeline",
    ),
    streams=("text", "image"),
    lengths={"text": "encoder_hidden_states", "image": "hidden_states"},
    split={
        "hidden_states": "image",
        "encoder_hidden_states": "text",
        "img_ids": "image",
        "txt_ids": "text",
        "controlnet_block_samples": "image",
        "controlnet_single_block_samples": "image",
    },
    install=install,
    refused={"ip_adapter_image_embeds": IP_ADAPTER, "ip_hidden_states": IP_ADAPTER},
)
