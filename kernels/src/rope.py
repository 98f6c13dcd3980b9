"""Rotary position embedding on interleaved pairs (plain-torch reference)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[2i], x[2i+1]) of each head by a position's angles.

    Args:
        x: `(B, S, H, D)`, any float dtype.
        cos, sin: `(S, D)` float32, each angle repeated for both members of its pair (RoFormer, arXiv 2104.09864;
            the interleaved form that FLUX uses).

    Returns:
        `(B, S, H, D)` in x's dtype; the arithmetic is float32 and in diffusers' order, so results are bit-equal.

    >>> x = torch.tensor([[[[1.0, 0.0]]]])                     # one pair, turned by 90 degrees
    >>> rotate_pairs(x, torch.zeros(1, 2), torch.ones(1, 2)).flatten().tolist()
    [0.0, 1.0]
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    return (x.float() * cos + turned.float() * sin).to(x.dtype)
