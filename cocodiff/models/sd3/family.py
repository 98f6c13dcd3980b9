"""SD3 and SD3.5: joint attention of text and image in every block, no rotation; some of SD3.5's blocks attend twice.

What follows is diffusers' forwards (0.42) cut at the exchanges. The second attention, over the image alone, needs
nothing of the first: it runs beside it. The last block drops its text after attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cocodiff.attention import attended_whole
from cocodiff.blocks import BlockRow
from cocodiff.compat import Patches
from cocodiff.models.family import Cut, Family
from cocodiff.models.flux.family import IP_ADAPTER, projections
from cocodiff.models.install import install_blocks
from cocodiff.models.joint import JointLayer, Stream, gated_stream, to_out
from cocodiff.parallel.tokens import Tokens


def make_layer(
    tokens: Tokens, block: Any, temb: Tensor, joint_attention_kwargs: dict[str, Any] | None = None
) -> JointLayer:
    """One JointTransformerBlock."""
    attn, norm = block.attn, block.norm1
    mods = [mod.unsqueeze(1) for mod in norm.linear(norm.silu(temb)).chunk(9 if block.use_dual_attention else 6, dim=1)]
    image = gated_stream(
        lambda rows: mods[:6], norm.norm, projections(attn, added=False), (attn.norm_q, attn.norm_k),
        to_out(attn), block.norm2, block.ff,
    )  # fmt: skip
    streams, lengths = [_text(block, temb), image], tokens.mine
    if block.use_dual_attention:
        return DualLayer(None, block, streams, lengths, temb.itemsize, mods[6:])
    return JointLayer(attn, streams, lengths, temb.itemsize)


def _text(block: Any, temb: Tensor) -> Stream:
    attn, norm = block.attn, block.norm1_context
    norms = (attn.norm_added_q, attn.norm_added_k)
    if block.context_pre_only:  # the last block; its norm is an AdaLayerNormContinuous, scale first
        scale, shift = (mod.unsqueeze(1) for mod in norm.linear(norm.silu(temb)).chunk(2, dim=1))
        return Stream(
            lambda x, rows: norm.norm(x) * (1 + scale) + shift, projections(attn, added=True), *norms,
            finish=lambda residual, attended, rows: residual,
        )  # fmt: skip
    mods = [mod.unsqueeze(1) for mod in norm.linear(norm.silu(temb)).chunk(6, dim=1)]
    return gated_stream(
        lambda rows: mods, norm.norm, projections(attn, added=True), norms, attn.to_add_out,
        block.norm2_context, block.ff_context,
    )  # fmt: skip


class DualLayer(JointLayer):
    """A block with a second attention over the image alone. `mods`: its shift, scale and gate."""

    def __init__(
        self,
        engine: Any,
        block: Any,
        streams: list[Stream],
        lengths: tuple[int, ...],
        itemsize: int,
        mods: list[Tensor],
    ) -> None:
        super().__init__(block.attn, streams, lengths, itemsize)
        self._engine, self._block, self._mods = engine, block, mods

    def parallel_branch(self, state: Any) -> Tensor:
        """The second attention's gated output; nothing for text, so that it has the rows of the block."""
        attn, (shift, scale, gate) = self._block.attn2, self._mods
        norm, image = self._block.norm1.norm, torch.cat([image for _, image in self.residual.values()], dim=1)
        stream = Stream(
            lambda x, rows: norm(x) * (1 + scale) + shift, projections(attn, added=False), attn.norm_q, attn.norm_k
        )
        second = JointLayer(attn, [stream], [image.shape[1]], self.itemsize)
        second.enter(0, slice(0, image.shape[1]), (image,))
        out = gate * to_out(attn)(attended_whole(state, second, "image"))
        return torch.cat([out.new_zeros(out.shape[0], self.lengths[0], out.shape[2]), out], dim=1)

    def finish(self, piece: int, attended: Tensor, beside: Tensor | None) -> Any:
        assert beside is not None
        text, image = self.residual[piece]
        self.residual[piece] = text, image + beside[:, text.shape[1] :]
        return super().finish(piece, attended, beside)


def install(row: BlockRow, transformer: Any, patches: Patches) -> list[nn.Module]:
    streams = ("encoder_hidden_states", "hidden_states")
    known = dict.fromkeys(("attn", "attn2"), ("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0"))
    blocks = transformer.transformer_blocks
    return install_blocks(row, blocks, "JointTransformerBlock", known, streams, make_layer, patches)


def token_counts(transformer: Any, given: dict[str, Any]) -> dict[str, int]:
    height, width = (size // transformer.config.patch_size for size in given["hidden_states"].shape[-2:])
    return {"text": given["encoder_hidden_states"].shape[1], "image": height * width}


SD3 = Family(
    name="sd3",
    pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    token_counts=token_counts,
    cuts={"encoder_hidden_states": Cut("text")},
    install=install,
    batched=("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
    refused={"ip_adapter_image_embeds": IP_ADAPTER, "ip_hidden_states": IP_ADAPTER},
    whole={"hidden_states": "image"},
)
