"""Rows of numbers as 1, 2, 4 or 8 bits each, with one byte of scale a row (plain-torch reference).

A row is quantised in even steps to the middle of `2**bits` cells around zero. Its step is a power of 2**(1/6), whose
exponent is the first byte of the row's payload; the codes follow, packed, lowest bits first. Steps have 8 significant
bits and levels no more, so that `level * step` is exact in float32: whoever decodes gets the same bits, however a
device orders or fuses what follows. A row that holds NaN or infinity decodes to NaN.

Legend: R rows, W width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

BITS = (1, 2, 4, 8)
# The step that loses least on Gaussian numbers, in units of their root mean square (Max 1960); 1 bit: of their mean
# absolute value, which is optimal for any numbers; 8 bits: of their largest, since clipping would cost more.
_STEPS = {2: 0.9957, 4: 0.3352}
_STEPS_PER_OCTAVE, _ZERO_AT, _BROKEN = 6, 160, 255


def payload_bytes(width: int, bits: int) -> int:
    """Of one row: the scale and the packed codes.

    >>> payload_bytes(48, 1), payload_bytes(48, 4), payload_bytes(3, 1)
    (7, 25, 2)
    """
    return 1 + -(-width * bits // 8)


def encode(x: Tensor, bits: int) -> Tensor:
    """`(R, W)` float32 -> `(R, payload_bytes(W, bits))` uint8.

    >>> encode(torch.tensor([[3.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0, -3.0]]), 1).tolist()
    [[170, 109]]
    """
    return quantise(x, bits)[0]


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `encode` gives, and what `decode` would make of that."""
    rows, width = x.shape
    scale, middle = _scale(x, bits), 2 ** (bits - 1)
    if short := -width % (8 // bits):
        x = F.pad(x, (0, short))
    if bits == 1:
        codes = (x >= 0).view(torch.uint8)
    else:
        inverse = _steps(x.device)[1][scale.int()]
        codes = torch.addcmul(_scalar(middle, x.device), x, inverse).clamp_(0, 2 * middle - 1).to(torch.uint8)
    payload = x.new_empty(rows, payload_bytes(width, bits), dtype=torch.uint8)
    payload[:, :1] = scale
    payload[:, 1:] = _pack(codes, bits)
    return payload, codes[:, :width].to(torch.float32).sub_(middle - 0.5), _steps(x.device)[0][scale.int()]


def decode(payload: Tensor, width: int, bits: int) -> tuple[Tensor, Tensor]:
    """What `encode` made -> levels `(R, W)` and steps `(R, 1)`, float32: the rows are `levels * steps`, exactly.

    >>> levels, steps = decode(torch.tensor([[170, 109]], dtype=torch.uint8), 8, 1)
    >>> (levels * steps)[0, :2].tolist()
    [1.5859375, -1.5859375]
    """
    levels = F.embedding(payload[:, 1:].int(), _levels(bits, payload.device)).flatten(1)
    return levels[:, :width], _steps(payload.device)[0][payload[:, :1].int()]


def _scale(x: Tensor, bits: int) -> Tensor:
    """The byte of each row's step, `(R, 1)`."""
    if bits == 1:
        step = torch.linalg.vector_norm(x, 1, dim=1, keepdim=True) * (2 / x.shape[1])
    elif bits == 8:
        step = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True) * (1 / 127)
    else:
        step = torch.linalg.vector_norm(x, dim=1, keepdim=True) * (_STEPS[bits] * x.shape[1] ** -0.5)
    byte = (torch.log2(step) * _STEPS_PER_OCTAVE + _ZERO_AT).round_().clamp_(0, _BROKEN - 1)
    return torch.where(torch.isfinite(step), byte, _BROKEN).to(torch.uint8)


@lru_cache(maxsize=8)
def _steps(device: torch.device) -> tuple[Tensor, Tensor]:
    """Byte -> step, of 8 significant bits, and its inverse; the first is for zeros, the last for broken ones."""
    exponents = (torch.arange(256, dtype=torch.float64, device="cpu") - _ZERO_AT) / _STEPS_PER_OCTAVE
    steps = torch.exp2(exponents).bfloat16().float()
    inverse = steps.reciprocal()
    steps[0], steps[_BROKEN], inverse[0] = 0.0, torch.nan, 0.0
    return steps.to(device), inverse.to(device)


@lru_cache(maxsize=32)
def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.tensor(float(value), device=device)


@lru_cache(maxsize=32)
def _levels(bits: int, device: torch.device) -> Tensor:
    """Packed byte -> the levels in it, `(256, 8 / bits)`."""
    shifts = torch.arange(0, 8, bits, device="cpu")
    codes = (torch.arange(256, device="cpu")[:, None] >> shifts) & (2**bits - 1)
    return (codes - (2 ** (bits - 1) - 0.5)).float().to(device)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """`(R, W)` uint8 codes, whole bytes of them -> `(R, W * bits / 8)`: 8 bytes at a time, folded by shifts."""
    if bits == 8:
        return codes
    wide = codes.view({4: torch.int16, 2: torch.int32, 1: torch.int64}[bits])
    for fold in range({4: 1, 2: 2, 1: 3}[bits]):
        wide = wide | wide >> ((8 - bits) << fold)
    return (wide & 255).to(torch.uint8)


def pack_mask(mask: Tensor) -> Tensor:
    """`(R,)` bool -> `(ceil(R / 8),)` uint8.

    >>> pack_mask(torch.tensor([True, False, False, True])).tolist()
    [9]
    """
    return _pack(F.pad(mask, (0, -len(mask) % 8)).view(torch.uint8)[None], 1)[0]


def unpack_mask(payload: Tensor, rows: int) -> Tensor:
    """What `pack_mask` made -> `(rows,)` bool."""
    bits = payload[:, None] >> torch.arange(8, dtype=torch.uint8, device=payload.device)
    return (bits & 1).flatten()[:rows].bool()
