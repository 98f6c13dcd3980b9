"""SD3's blocks: text and image with weights of their own, no rotation; some of SD3.5's attend to the image twice.

The arithmetic is that of diffusers' forwards (0.42), cut where exchanges begin and end. The second attention, over the
image only, needs nothing of the first: it is a parallel branch. The last block drops its text after attention.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cocodiff.attention import attended_whole
from cocodiff.models.fused import added_projections
from cocodiff.models.joint import JointLayer
from cocodiff.models.stages import (
    Arguments,
    BlockSpec,
    Mods,
    StreamSpec,
    adaptive_mods,
    finish_image,
    gated,
    modulated,
    norm_added_heads,
    to_out,
)


def text_modulation(block: Any, arguments: Arguments) -> Mods:
    if not block.context_pre_only:
        return adaptive_mods(block.norm1_context, arguments["temb"], 6)
    scale, shift = adaptive_mods(block.norm1_context, arguments["temb"], 2)  # of an AdaLayerNormContinuous
    return shift, scale


def text_modulate(block: Any, mods: Mods, x: Tensor) -> Tensor:
    return modulated(block.norm1_context.norm(x), mods)


def text_finish(block: Any, mods: Mods, residual: Tensor, attended: Tensor) -> Tensor:
    if block.context_pre_only:
        return residual
    return gated(mods, residual, block.attn.to_add_out(attended), block.norm2_context, block.ff_context)


def image_modulation(block: Any, arguments: Arguments) -> Mods:
    """The last three of nine are shift, scale and gate of the second attention."""
    return adaptive_mods(block.norm1, arguments["temb"], 9 if block.use_dual_attention else 6)


def image_modulate(block: Any, mods: Mods, x: Tensor) -> Tensor:
    return modulated(block.norm1.norm(x), mods)


def second_modulate(block: Any, mods: Mods, x: Tensor) -> Tensor:
    return modulated(block.norm1.norm(x), mods[6:])


def second_finish(block: Any, mods: Mods, residual: Tensor, attended: Tensor) -> Tensor:
    """What the second attention adds to the image."""
    return mods[8] * to_out(block.attn2, attended)


class DualLayer(JointLayer):
    """A block that may have a second attention, over the image only."""

    def parallel_branch(self, state: Any) -> Tensor | None:
        """The second attention's gated output; zero for text, so that it has the rows of the block. Collective."""
        if not self.block.use_dual_attention:
            return None
        image = torch.cat([piece.residual[1] for piece in self.pieces.values()], dim=1)
        rows = image.shape[1]
        second = JointLayer(SECOND, self.block, (rows,), (self.mods[1],), self.itemsize)
        second.enter(0, slice(0, rows), (image,))
        (out,) = second.finish(0, attended_whole(state, second, "image"), None)
        return torch.cat([out.new_zeros(out.shape[0], self.lengths[0], out.shape[2]), out], dim=1)

    def finish(self, piece: int, attended: Tensor, parallel: Tensor | None) -> tuple[Tensor, ...]:
        if parallel is not None:
            text, image = self.pieces[piece].residual
            self.pieces[piece].residual = text, image + parallel[:, text.shape[1] :]
        return super().finish(piece, attended, parallel)


JOINT = BlockSpec(
    name="JointTransformerBlock",
    processors=dict.fromkeys(("attn", "attn2"), ("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0")),
    inputs=("encoder_hidden_states", "hidden_states"),
    arguments=("temb", "joint_attention_kwargs"),
    streams=(
        StreamSpec(text_modulation, text_modulate, text_finish, added_projections, norm_added_heads),
        StreamSpec(image_modulation, image_modulate, finish_image),
    ),
    layer=DualLayer,
)
SECOND = replace(
    JOINT,
    attention="attn2",
    inputs=("hidden_states",),
    streams=(StreamSpec(image_modulation, second_modulate, second_finish),),
    layer=JointLayer,
)
