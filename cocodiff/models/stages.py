"""A class of transformer blocks as data: its streams, and the stages that the rows of each stream pass.

A stage is a function of the module: all that it works on are its arguments (the block, tensors), so torch.compile or a
kernel can take each stage once for each class of block. Projections are called as modules, not by their weights, since
LoRA and offloading hang on modules.

Legend: B batch, S sequence, H heads, D head_dim, C channels. Rows are this rank's tokens, stream after stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cocodiff.layer import Layer
from cocodiff.models.fused import Projections, projections
from cocodiff.parallel.tokens import Tokens

Mods = tuple[Tensor, ...]  # each (B, 1, C), or (B, S_local, C) where every token has its own
Arguments = Mapping[str, Any]  # of a block's forward, by name


def norm_heads(attn: Any, label: str, x: Tensor) -> Tensor:
    """Norm of queries ("q") or keys ("k"), `(B, rows, H, D)`, of each head by itself."""
    norm = getattr(attn, f"norm_{label}")
    return x if norm is None else norm(x)


def norm_added_heads(attn: Any, label: str, x: Tensor) -> Tensor:
    """The same for the stream whose projections diffusers calls "added": text."""
    norm = getattr(attn, f"norm_added_{label}")
    return x if norm is None else norm(x)


@dataclass(frozen=True)
class StreamSpec:
    """The stages of one stream. `attn` is the block's attention module.

    Attributes:
        modulation: `(block, arguments)` -> shift, scale and gates, once for all rows of a call.
        modulate: `(block, mods, x)` -> the normed and modulated input of the projections.
        finish: `(block, mods, residual, attended, *context)` -> the block's output for these rows.
        projections: of `attn`: "q", "k" and "v" -> what makes `(B, rows, H * D)` of `(B, rows, C)`. In a stream with a
            parallel branch "mlp" may make the input of that.
        norm: `(attn, label, x)` -> normed queries or keys.
    """

    modulation: Callable[[Any, Arguments], Mods]
    modulate: Callable[[Any, Mods, Tensor], Tensor]
    finish: Callable[..., Tensor]
    projections: Callable[[Any], Projections] = projections
    norm: Callable[[Any, str, Tensor], Tensor] = norm_heads


def _image_rotary_emb(tokens: Tokens, arguments: Arguments) -> tuple[Tensor, Tensor] | None:
    """Angles that were made from this rank's positions."""
    return arguments.get("image_rotary_emb")


def _no_mask(tokens: Tokens, arguments: Arguments) -> Tensor | None:
    return None


@dataclass(frozen=True)
class BlockSpec:
    """One class of block.

    Attributes:
        name: diffusers' class.
        processors: attention module of a block -> the processors whose work the stages do.
        inputs: arguments of its forward that hold tokens, in joint order; it returns the same.
        arguments: its other arguments, as far as the stages know them.
        streams: in joint order. Where there is one stream, all inputs are joined to it.
        layer: the class of `cocodiff.models.joint` (or a family's own) that runs the stages.
        attention: the attention module that is exchanged.
        local: attention modules that stay diffusers' own.
        like: the argument that has the dtype of the rows.
        cuts: argument `(B, S)` -> the stream by whose rows it is cut before `modulation`.
        context: arguments that `finish` gets, whole.
        rotary: `(tokens, arguments)` -> cos and sin `(S_local, D)` for this rank's joint rows, each angle twice; None
            where nothing is rotated.
        mask: `(tokens, arguments)` -> which keys may be attended to, bool `(B, S)` of all tokens, one whole stream
            after the other; None where all may.
        parallel_branch: `(block, mods, x)` -> `(B, rows, C_mlp)`, the work of one stream that attention does not need;
            `x` is what "mlp" of the projections makes of the normed rows, or these themselves.
    """

    name: str
    processors: Mapping[str, Sequence[str]]
    inputs: tuple[str, ...]
    arguments: tuple[str, ...]
    streams: tuple[StreamSpec, ...]
    layer: Callable[..., Layer]
    attention: str = "attn"
    local: tuple[str, ...] = ()
    like: str = "temb"
    cuts: Mapping[str, str] = field(default_factory=dict)
    context: tuple[str, ...] = ()
    rotary: Callable[[Tokens, Arguments], tuple[Tensor, Tensor] | None] = _image_rotary_emb
    mask: Callable[[Tokens, Arguments], Tensor | None] = _no_mask
    parallel_branch: Callable[[Any, Mods, Tensor], Tensor] | None = None


def adaptive_mods(norm: Any, temb: Tensor, count: int) -> Mods:
    """`count` tensors `(B, 1, C)` that a diffusers AdaLayerNorm makes of the step's embedding `(B, C_temb)`."""
    return tuple(mod.unsqueeze(1) for mod in norm.linear(norm.silu(temb)).chunk(count, dim=1))


def modulated(normed: Tensor, mods: Mods) -> Tensor:
    """By shift and scale, the first two of `mods`."""
    shift, scale = mods[:2]
    return normed * (1 + scale) + shift


def gated(
    mods: Mods,
    residual: Tensor,
    attended: Tensor,
    norm: Callable[[Tensor], Tensor],
    feed_forward: Callable[[Tensor], Tensor],
) -> Tensor:
    """The rest of a double block: attention's output, gated; then a modulated feed-forward, gated (adaLN).

    Args:
        mods: shift, scale and gate of attention, then those of the feed-forward.
        attended: after the output projection.
    """
    gate, shift, scale, gate_ff = mods[2:6]
    x = residual + gate * attended
    return x + gate_ff * feed_forward(norm(x) * (1 + scale) + shift)


def finish_text(block: Any, mods: Mods, residual: Tensor, attended: Tensor) -> Tensor:
    """`finish` of text in double blocks with diffusers' usual names."""
    return clipped(gated(mods, residual, block.attn.to_add_out(attended), block.norm2_context, block.ff_context))


def finish_image(block: Any, mods: Mods, residual: Tensor, attended: Tensor) -> Tensor:
    """`finish` of the image in double blocks with diffusers' usual names."""
    return gated(mods, residual, to_out(block.attn, attended), block.norm2, block.ff)


def to_out(attn: Any, attended: Tensor) -> Tensor:
    """The output projection of diffusers' attention modules, and the dropout after it."""
    return attn.to_out[1](attn.to_out[0](attended))


def clipped(x: Tensor) -> Tensor:
    """To the range of float16, in float16."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
