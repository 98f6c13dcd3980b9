"""The codec of residuals: rows less what the receiver predicts or holds, rotated and quantised to 1 to 8 bits.

Both ends' copies follow from the payload, so they stay equal bit for bit.

Legend: R rows of all blocks, W width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from cocodiff.kernels import codes
from cocodiff.selective.copies import DAMPING, Copies, Held, Rows
from cocodiff.selective.parcel import Parcel, held_rows, highest, squared_norms, with_masks, without_masks

CACHED_ELEMENTS = 2**16  # MEASURED on a CPU: more at once take up to 1.6 times as long each, fewer cost more calls
LARGEST_ROTATION = 64  # elements that are mixed: a row is cut into equal parts of at most so many


class ResidualCodec:
    """A `Codec`. One object may play both ends: parcels have their keys.

    >>> from dataclasses import replace
    >>> from cocodiff.selective.copies import CopyKey
    >>> from cocodiff.selective.schedule import Coding
    >>> codec = ResidualCodec(Copies())
    >>> parcel = Parcel(CopyKey(0, 0, "v", "send", "0"), (2,), ((0, 1),), 8, 4, Coding(8), time=0.0)
    >>> rows = torch.arange(16.0).view(2, 8).sin()
    >>> payload, _ = codec.encode(parcel, rows)
    >>> received = codec.decode(replace(parcel, key=CopyKey(0, 0, "v", "receive", "0")), payload, torch.float32)
    >>> bool((received - rows).norm() < 0.02 * rows.norm())
    True
    """

    def __init__(self, copies: Copies) -> None:
        self.copies = copies

    def encode(self, parcel: Parcel, x: Tensor) -> tuple[Tensor, Tensor]:
        held = held_rows(self.copies, parcel, x)
        if not parcel.whole:
            return _encode_some(parcel, held, x)
        parts, norms = [], []
        for rows in rows_at_a_time(x):
            own = rotated(x[rows].float())
            before, base = _base(parcel, held, rows)
            payload, levels, steps = codes.quantise(own - base, parcel.coding.bits)
            new = base.addcmul_(levels, steps)
            held.update(rows, new, before, parcel.time)
            parts.append(payload)
            norms.append(squared_norms(own - new, own))
        held.time = parcel.time
        return torch.cat(parts).flatten(), torch.stack(norms).sum(0)

    def decode(self, parcel: Parcel, payload: Tensor, dtype: torch.dtype) -> Tensor:
        held = held_rows(self.copies, parcel, payload)
        if not parcel.whole:
            return _decode_some(parcel, held, payload).to(dtype)
        coded, out = payload.view(-1, parcel.row_bytes), payload.new_empty(parcel.rows, parcel.width, dtype=dtype)
        for rows in rows_at_a_time(out):
            before, base = _base(parcel, held, rows)
            new = base.addcmul_(*codes.decode(coded[rows], parcel.width, parcel.coding.bits))
            held.update(rows, new, before, parcel.time)
            out[rows] = rotated(new, back=True)
        held.time = parcel.time
        return out


def _encode_some(parcel: Parcel, held: Held, x: Tensor) -> tuple[Tensor, Tensor]:
    """Encode the rows whose residuals are largest; the others stay as they are held."""
    own = rotated(x.float())
    base = _base(parcel, held, slice(None))[1]
    chosen = highest(parcel, torch.linalg.vector_norm(own - base, dim=1))
    before, base = held.value[chosen].float(), base[chosen]
    payload, levels, steps = codes.quantise(own[chosen] - base, parcel.coding.bits)
    held.update(chosen, base.addcmul_(levels, steps), before, parcel.time)
    _age(parcel, held)
    return with_masks(parcel, payload, chosen), squared_norms(own - held.value.float(), own)


def _decode_some(parcel: Parcel, held: Held, payload: Tensor) -> Tensor:
    """Decode the rows that travelled and return all, `(R, W)` float32."""
    chosen, coded = without_masks(parcel, payload)
    before, base = _base(parcel, held, chosen)
    new = base.addcmul_(*codes.decode(coded, parcel.width, parcel.coding.bits))
    held.update(chosen, new, before, parcel.time)
    _age(parcel, held)
    return rotated(held.value.float(), back=True)


def _base(parcel: Parcel, held: Held, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return some rows as they are held, and what is subtracted from their new values (own memory), float32."""
    return held.predict(rows, parcel.time, DAMPING[parcel.coding.bits] if parcel.coding.predicted else 0.0)


def _age(parcel: Parcel, held: Held) -> None:
    """Set the copy's time where some rows travelled; where none did it keeps the old one."""
    if parcel.coding.share:
        held.time = parcel.time


def rotated(x: Tensor, back: bool = False) -> Tensor:
    """Rotate each row of `(R, W)` so that all its elements are alike and one scale fits them, or rotate it back."""
    size = max(part for part in range(1, min(x.shape[1], LARGEST_ROTATION) + 1) if x.shape[1] % part == 0)
    matrix = _rotation(size, x.device)
    return (x.reshape(-1, size) @ (matrix.T if back else matrix)).view(x.shape)


@lru_cache(maxsize=64)
def _rotation(size: int, device: torch.device) -> Tensor:
    """Make a random orthogonal matrix, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(size, size, generator=generator, dtype=torch.float64, device="cpu")
    return torch.linalg.qr(random).Q.to(device, torch.float32)


def rows_at_a_time(x: Tensor) -> list[slice]:
    """Cut the rows of `(R, W)` so that a core's cache holds each cut; one cut where `x` is not on a CPU."""
    rows, width = x.shape
    cut = max(1, CACHED_ELEMENTS // width) if x.device.type == "cpu" else max(rows, 1)
    return [slice(start, min(start + cut, rows)) for start in range(0, rows, cut)]
