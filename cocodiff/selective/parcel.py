"""Blocks of rows on their way over a slow link, and what the payloads of all codecs have in common.

A payload holds block after block (the rows for one peer): a bit a row that says which rows travel, where the receiver
needs to know, then the rows that travel.

Legend: R rows of all blocks, K rows that travel, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cocodiff.kernels import codes
from cocodiff.selective.copies import Copies, CopyKey, Held, Route
from cocodiff.selective.schedule import Coding


@dataclass(frozen=True)
class Parcel:
    """Some blocks of one exchange, of rows of one width.

    Attributes:
        key: of the copy.
        blocks: rows of each block, and `routes`: from which rank to which it goes.
        itemsize: bytes of an element as it is.
        coding: of this step.
        time: of the run, as in `cocodiff.selective.copies`.
    """

    key: CopyKey
    blocks: tuple[int, ...]
    routes: tuple[Route, ...]
    width: int
    itemsize: int
    coding: Coding
    time: float

    @property
    def rows(self) -> int:
        return sum(self.blocks)

    @property
    def whole(self) -> bool:
        """Whether all rows travel."""
        return all(self.coding.chosen(rows) == rows for rows in self.blocks)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row that travels."""
        return self.coding.row_bytes(self.width, self.itemsize)

    @property
    def block_bytes(self) -> list[int]:
        """Bytes of each block in the payload."""
        return [self.coding.block_bytes(rows, self.row_bytes, self.key.label) for rows in self.blocks]


class Codec(Protocol):
    """Encodes and decodes parcels, and updates the copies of the end whose key a parcel has."""

    copies: Copies

    def encode(self, parcel: Parcel, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode rows `(R, W)`.

        Returns:
            The payload, one-dimensional, uint8, and the squared norms of what it misses and of `x`, `(2,)`.
        """

    def decode(self, parcel: Parcel, payload: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode a payload to what the receiver has after it, `(R, W)`."""


def held_rows(copies: Copies, parcel: Parcel, like: Tensor) -> Held:
    """Find the parcel's copy; before its first exchange make one, of zeros on the device of `like`."""
    held = copies.get(parcel.key)
    if held is None:
        assert parcel.whole, "the first exchange of a copy has all rows"
        routes = tuple(zip(parcel.blocks, parcel.routes, strict=True))
        held = Held.nothing(parcel.rows, parcel.width, parcel.time, routes, like)
        copies.put(parcel.key, held)
    assert held.value.shape == (parcel.rows, parcel.width), (parcel, held.value.shape)
    return held


def highest(parcel: Parcel, scores: Tensor) -> Tensor:
    """Choose the rows of each block that have the highest scores `(R,)`, as many as travel: `(K,)`, in order."""
    each, start = [], 0
    for rows in parcel.blocks:
        best = scores[start : start + rows].topk(parcel.coding.chosen(rows)).indices
        each.append(best.sort().values + start)
        start += rows
    return torch.cat(each)


def with_masks(parcel: Parcel, coded: Tensor, chosen: Tensor) -> Tensor:
    """Make a payload of the chosen rows, `(K, bytes of a row)`."""
    mask = torch.zeros(parcel.rows, dtype=torch.bool, device=coded.device)
    mask[chosen] = True
    counts = [parcel.coding.chosen(rows) for rows in parcel.blocks]
    parts: list[Tensor] = []
    for bits, rows in zip(mask.split(list(parcel.blocks)), coded.split(counts), strict=True):
        if parcel.coding.has_mask(len(bits), parcel.key.label):
            parts.append(codes.pack_mask(bits))
        parts.append(rows.flatten())
    return torch.cat(parts)


def without_masks(parcel: Parcel, payload: Tensor) -> tuple[Tensor, Tensor]:
    """Take a payload apart: which rows travelled, `(K,)`, and those rows, `(K, bytes of a row)`.

    Where a block has no mask though only some of its rows travelled, the first so many stand for those.
    """
    each, parts, start = [], [], 0
    for part, rows in zip(payload.split(parcel.block_bytes), parcel.blocks, strict=True):
        mask = part.new_ones(rows)
        if parcel.coding.has_mask(rows, parcel.key.label):
            mask_bytes = -(-rows // 8)
            mask, part = codes.unpack_mask(part[:mask_bytes], rows).to(torch.uint8), part[mask_bytes:]
        # Set ones first, each in its order: a sort has a known size, on every device, where `nonzero` would wait.
        each.append(mask.argsort(descending=True, stable=True)[: parcel.coding.chosen(rows)] + start)
        parts.append(part)
        start += rows
    return torch.cat(each), torch.cat(parts).view(-1, parcel.row_bytes)


def squared_norms(missed: Tensor, own: Tensor) -> Tensor:
    """Squared norms of what a parcel misses and of what it had to carry, `(2,)`."""
    return torch.stack([torch.linalg.vector_norm(missed), torch.linalg.vector_norm(own)]).square()
