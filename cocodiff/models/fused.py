"""The projections of an attention module: a linear layer each, or one matrix for several of them.

Each projection of one matrix uses its own rows of the weight, so that V can come first all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

Projections = Mapping[str, Callable[[Tensor], Tensor]]  # by label: "q", "k", "v"


@dataclass(frozen=True)
class FusedPart:
    """One of the projections that a matrix makes: `rows` of its weight.

    Only for a plain linear layer (`cocodiff.compat.is_plain_linear`): where something was added to it the weight is not
    all that it does, and the layer must be called as a whole.
    """

    linear: Any
    rows: slice

    def __call__(self, x: Tensor) -> Tensor:
        bias = self.linear.bias
        return F.linear(x, self.linear.weight[self.rows], None if bias is None else bias[self.rows])


def fused_parts(linear: Any, sizes: Mapping[str, int]) -> Projections:
    """The projections of one matrix. `sizes`: rows of its weight for each label, in order."""
    parts, start = {}, 0
    for label, size in sizes.items():
        parts[label] = FusedPart(linear, slice(start, start + size))
        start += size
    return parts


def is_fused(attn: Any) -> bool:
    """Whether diffusers would read the fused matrix of this attention module.

    Of the class `Attention` its processor says so alone: what it calls `fused_projections` stays set after unfusing.
    """
    if type(attn).__name__ == "Attention":
        return getattr(attn.processor, "replaced", type(attn.processor).__name__).startswith("Fused")
    return bool(attn.fused_projections)


def projections(attn: Any) -> Projections:
    """Q, K and V of a diffusers attention module, fused or not."""
    if is_fused(attn):
        return fused_parts(attn.to_qkv, dict.fromkeys("qkv", attn.inner_dim))
    return {"q": attn.to_q, "k": attn.to_k, "v": attn.to_v}


def added_projections(attn: Any) -> Projections:
    """Q, K and V of the stream whose projections diffusers calls "added": text."""
    if is_fused(attn):
        return fused_parts(attn.to_added_qkv, dict.fromkeys("qkv", attn.inner_dim))
    return {"q": attn.add_q_proj, "k": attn.add_k_proj, "v": attn.add_v_proj}
