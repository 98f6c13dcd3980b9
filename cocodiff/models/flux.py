"""FLUX.1: joint attention of [text, image] in double blocks, one stream with a parallel MLP in single blocks.

What follows is diffusers' forwards (0.42) cut at the exchanges: everything but attention works row by row, on pieces.
Projections are called as modules, never by their weights: LoRA and hooks keep working.

Legend: B batch, S sequence, H heads, D head_dim, C channels. Rows are this rank's tokens, text first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cocodiff.blocks import Blocks, joined
from cocodiff.engine import Engine
from cocodiff.errors import PatchError
from cocodiff.kernels import rotate_pairs
from cocodiff.models.family import Family
from cocodiff.patches import Patches


class FluxProcessor:
    """Stands where diffusers' FluxAttnProcessor stood, so that everyone can see who attends; the blocks do it."""

    _attention_backend = None  # what `set_attention_backend` sets
    _parallel_config = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise PatchError("a block's forward was replaced after cocodiff.wrap: FLUX cannot run so on shards. Wrap last.")


@dataclass
class Stream:
    """One stream of a block: its modules up to attention, and the modulation that this step's embedding gives them."""

    norm: nn.Module  # an AdaLayerNormZero, called part by part: its linear once, its norm for every piece
    project: dict[str, nn.Module]  # "q", "k", "v", or "qkv" where they are fused
    norm_query: nn.Module
    norm_key: nn.Module
    mods: tuple[Tensor, ...]  # shift, scale and gate of attention, then those of the feed-forward if it has one

    @classmethod
    def of(cls, attn: Any, norm: Any, temb: Tensor, added: bool) -> Stream:
        """The text stream of a joint attention (`added`), or its image stream, or the only one."""
        if attn.fused_projections:  # one matrix makes all three: V cannot come first
            project = {"qkv": attn.to_added_qkv if added else attn.to_qkv}
        else:
            names = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
            project = {label: getattr(attn, name) for label, name in zip("qkv", names, strict=True)}
        norms = ("norm_added_q", "norm_added_k") if added else ("norm_q", "norm_k")
        mods = norm.linear(norm.silu(temb))
        mods = tuple(mod.unsqueeze(1) for mod in mods.chunk(3 if mods.shape[1] == 3 * attn.query_dim else 6, dim=1))
        return cls(norm.norm, project, getattr(attn, norms[0]), getattr(attn, norms[1]), mods)

    def modulated(self, hidden_states: Tensor) -> Tensor:
        return self.norm(hidden_states) * (1 + self.mods[1]) + self.mods[0]


class FluxLayer:
    """`cocodiff.attention.Layer` of one block. Text comes first; `text_len` is this rank's."""

    def __init__(
        self,
        engine: Engine,
        block: Any,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.block, self.attn, self.rotary = block, block.attn, image_rotary_emb
        self.streams = self.make_streams(temb)
        self.text_len = engine.tokens.streams["text"][engine.rank]
        self.num_heads: int = block.attn.heads
        self.width: int = block.attn.inner_dim
        self.itemsize = temb.itemsize
        self._rows: dict[int, slice] = {}
        self.residual: dict[int, tuple[Tensor, ...]] = {}  # piece -> rows of each stream
        self.normed: dict[int, tuple[Tensor, ...]] = {}
        self._fused: dict[int, list[list[Tensor]]] = {}

    def make_streams(self, temb: Tensor) -> list[Stream]:
        """In joint order."""
        raise NotImplementedError

    def enter(self, piece: int, rows: slice, inputs: tuple[Tensor, ...]) -> None:
        if len(self.streams) == 1:
            inputs = (torch.cat(inputs, dim=1),)
        self._rows[piece], self.residual[piece] = rows, inputs
        self.normed[piece] = tuple(stream.modulated(x) for stream, x in zip(self.streams, inputs, strict=True))

    def value(self, piece: int) -> Tensor:
        return torch.cat(self._project("v", [piece]), dim=1)

    def key(self, piece: int) -> Tensor:
        parts = zip(self.streams, self._project("k", [piece]), strict=True)
        return self._rotated([stream.norm_key(part) for stream, part in parts], self._rows[piece])

    def query(self) -> Tensor:
        parts = zip(self.streams, self._project("q", list(self.normed)), strict=True)
        return self._rotated([stream.norm_query(part) for stream, part in parts], slice(None))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(query, key, value, backend=self.attn.processor._attention_backend)

    def _project(self, label: str, pieces: Sequence[int]) -> list[Tensor]:
        """`(B, rows, H, D)` of each stream, the rows of these pieces, by one of the three projections."""
        if "qkv" in self.streams[0].project:
            parts = list(joined([self._fused_thirds(piece)["qkv".index(label)] for piece in pieces]))
        else:
            normed = joined([self.normed[piece] for piece in pieces])
            parts = [stream.project[label](x) for stream, x in zip(self.streams, normed, strict=True)]
        return [part.unflatten(-1, (-1, self.attn.head_dim)) for part in parts]

    def _fused_thirds(self, piece: int) -> list[list[Tensor]]:
        """Q, K and V of each stream, made at once by its one matrix."""
        if piece not in self._fused:
            both = zip(self.streams, self.normed[piece], strict=True)
            thirds = [stream.project["qkv"](x).chunk(3, dim=-1) for stream, x in both]
            self._fused[piece] = [list(third) for third in zip(*thirds, strict=True)]
        return self._fused[piece]

    def _rotated(self, parts: list[Tensor], rows: slice) -> Tensor:
        joint = torch.cat(parts, dim=1)
        return joint if self.rotary is None else rotate_pairs(joint, *(angles[rows] for angles in self.rotary))

    def _text_rows(self, piece: int) -> int:
        rows = self._rows[piece]
        return min(rows.stop, self.text_len) - min(rows.start, self.text_len)


class DoubleLayer(FluxLayer):
    """Text and image with weights of their own (FluxTransformerBlock)."""

    def make_streams(self, temb: Tensor) -> list[Stream]:
        return [
            Stream.of(self.attn, self.block.norm1_context, temb, added=True),
            Stream.of(self.attn, self.block.norm1, temb, added=False),
        ]

    def beside(self) -> None:
        return None

    def finish(self, piece: int, attended: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor]:
        block, attn, count = self.block, self.attn, self._text_rows(piece)
        text, image = self.residual[piece]
        text_out = _feed_forward(
            text, attn.to_add_out(attended[:, :count]), self.streams[0].mods, block.norm2_context, block.ff_context
        )
        projected = attn.to_out[1](attn.to_out[0](attended[:, count:]))
        image_out = _feed_forward(image, projected, self.streams[1].mods, block.norm2, block.ff)
        return _clipped(text_out), image_out


class SingleLayer(FluxLayer):
    """Text and image as one stream, with an MLP beside attention (FluxSingleTransformerBlock)."""

    def make_streams(self, temb: Tensor) -> list[Stream]:
        return [Stream.of(self.attn, self.block.norm, temb, added=False)]

    def beside(self) -> Tensor:
        return self.block.act_mlp(self.block.proj_mlp(joined(list(self.normed.values()))[0]))

    def finish(self, piece: int, attended: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor]:
        assert beside is not None
        projected = self.block.proj_out(torch.cat([attended, beside], dim=2))
        out = _clipped(self.residual[piece][0] + self.streams[0].mods[2] * projected)
        count = self._text_rows(piece)
        return out[:, :count], out[:, count:]


def _feed_forward(
    residual: Tensor, projected: Tensor, mods: tuple[Tensor, ...], norm: nn.Module, ff: nn.Module
) -> Tensor:
    """Gated attention output, then the gated feed-forward: rows of one stream of a double block."""
    _, _, gate_msa, shift_mlp, scale_mlp, gate_mlp = mods
    hidden_states = residual + gate_msa * projected
    return hidden_states + gate_mlp * ff(norm(hidden_states) * (1 + scale_mlp) + shift_mlp)


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def install(engine: Engine, transformer: Any, patches: Patches) -> list[nn.Module]:
    """Our processors and block forwards, on this transformer's instances alone."""
    attentions = []
    row = Blocks(engine, ("encoder_hidden_states", "hidden_states"))
    for blocks, make_layer in (
        (transformer.transformer_blocks, DoubleLayer),
        (transformer.single_transformer_blocks, SingleLayer),
    ):
        for block in blocks:
            processor = FluxProcessor()
            processor._attention_backend = getattr(block.attn.processor, "_attention_backend", None)
            patches.set(block.attn, "processor", processor, may_be_replaced=True)
            row.append(block, partial(make_layer, engine, block), patches)
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
