"""Rows -> payload -> rows, against what the receiver holds; both ends' copies follow from the payload alone.

A payload is, for each block (the rows of one peer): a bit a row where the receiver must be told which rows travel,
then those rows, each `cocodiff.kernels.codes` or as it is.

Legend: R rows of all blocks, K those that travel, W width.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from cocodiff.kernels import codes
from cocodiff.similarity import COPY_DTYPE, DAMPING, Copies, Held, Route
from cocodiff.transmission import RAW, Coding

LARGEST_ROTATION = 128  # elements that are mixed: a row is cut into equal parts of at most so many


@dataclass(frozen=True)
class Parcel:
    """Some blocks of one exchange, of rows of one width.

    Attributes:
        key: of the copy, as of `cocodiff.similarity.Copies`.
        mask_key: under which the rows that were chosen for V are found for K and Q.
        label: "v", "k", "q" or "o".
        blocks: rows of each, and `routes` their ranks.
        coding: of this step.
        step, time: of the run; `time` as in `cocodiff.similarity`.
    """

    key: tuple[Hashable, ...]
    mask_key: tuple[Hashable, ...]
    label: str
    blocks: tuple[int, ...]
    routes: tuple[Route, ...]
    width: int
    coding: Coding
    step: int
    time: float

    @property
    def rows(self) -> int:
        return sum(self.blocks)

    @property
    def whole(self) -> bool:
        """Whether all rows travel."""
        return all(self.coding.chosen(rows) == rows for rows in self.blocks)

    def block_bytes(self, row_bytes: int) -> list[int]:
        """Of the payload, for each block."""
        return [self.coding.bytes_of(rows, row_bytes, self.label) for rows in self.blocks]


class Coder:
    """Encodes and decodes parcels, and keeps their copies. It may play both ends, by their keys.

    >>> from dataclasses import replace
    >>> coder = Coder(Copies())
    >>> parcel = Parcel((0, 0, "v", "send", 0), (), "v", (2,), ((0, 1),), 8, Coding(8), step=0, time=0.0)
    >>> rows = torch.randn(2, 8)
    >>> payload, _ = coder.encode(parcel, rows)
    >>> received = coder.decode(replace(parcel, key=(0, 0, "v", "receive", 0)), payload, torch.float32)
    >>> bool((received - rows).norm() < 0.02 * rows.norm())
    True
    """

    def __init__(self, copies: Copies) -> None:
        self.copies = copies
        self._masks: dict[Hashable, Tensor] = {}  # rows chosen for V, for K and Q
        self._rotations: dict[tuple[int, torch.device], Tensor] = {}

    def encode(self, parcel: Parcel, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(R, W)` -> payload (one-dimensional, uint8), and the squared norms of what it misses and of `x`, `(2,)`."""
        coding, held = parcel.coding, self._held(parcel)
        own = x.float() if coding.bits == RAW else self._turned(x.float())
        base = _base(parcel, held, own)
        chosen = self._choose(parcel, held, own, base)
        if coding.bits == RAW:
            rows = _some(x, chosen).contiguous()
            payload, new = rows.view(torch.uint8), rows.float()
        else:
            base = _some(base, chosen)
            payload = codes.encode(_some(own, chosen) - base, coding.bits)
            new = _decoded(payload, base, coding.bits)
        held = self._keep(parcel, held, new, chosen)
        if held is not None and coding.pick == "value":
            held.reference = own
        if chosen is not None:
            payload = _with_masks(parcel, payload, chosen)
        missed = own - (new if chosen is None or held is None else held.value.float())
        norms = torch.stack([torch.linalg.vector_norm(missed), torch.linalg.vector_norm(own)])
        return payload.flatten(), norms.square()

    def decode(self, parcel: Parcel, payload: Tensor, dtype: torch.dtype) -> Tensor:
        """What the receiver has after a payload, `(R, W)`."""
        coding, held = parcel.coding, self._held(parcel)
        rows = payload.view(-1, coding.row_bytes(parcel.width, dtype.itemsize)) if parcel.whole else payload
        chosen = None
        if not parcel.whole:
            chosen, rows = self._chosen(parcel, payload, coding.row_bytes(parcel.width, dtype.itemsize))
        if coding.bits == RAW:
            rows = rows.contiguous().view(dtype)
            new = rows.float()
        else:
            new = _decoded(rows, _some(_base(parcel, held, rows), chosen), coding.bits)
        held = self._keep(parcel, held, new, chosen)
        if chosen is None:
            return rows if coding.bits == RAW else self._turned(new, back=True).to(dtype)
        assert held is not None
        if coding.bits == RAW:
            everything = held.value.to(dtype)
            everything[chosen] = rows
            return everything
        return self._turned(held.value.float(), back=True).to(dtype)

    def _held(self, parcel: Parcel) -> Held | None:
        return self.copies.get(parcel.key, parcel.rows, parcel.width)

    def _keep(self, parcel: Parcel, held: Held | None, new: Tensor, chosen: Tensor | None) -> Held | None:
        """The copy after an exchange; none where nothing is subtracted from what travels."""
        if parcel.coding.base == "nothing":
            return None
        if held is None:
            assert chosen is None, "the first exchange of a copy has all rows"
            routes = tuple(zip(parcel.blocks, parcel.routes, strict=True))
            held = Held(new.to(COPY_DTYPE), torch.zeros_like(new, dtype=COPY_DTYPE), parcel.time, routes)
            self.copies.put(parcel.key, held)
        else:
            held.update(new, parcel.time, chosen)
        return held

    def _choose(self, parcel: Parcel, held: Held | None, own: Tensor, base: Tensor) -> Tensor | None:
        """The sender's rows that travel, `(K,)` in order; None for all."""
        coding = parcel.coding
        if parcel.whole:
            return None
        if coding.pick in ("random", "oldest") or coding.share == 0:
            return _agreed(parcel, own.device)
        if coding.pick == "value" and parcel.label in ("q", "k"):
            return self._masks[parcel.mask_key]
        assert held is not None
        if coding.pick == "value":
            reference = held.value.float() if held.reference is None else held.reference
            scores = torch.linalg.vector_norm(own - reference, 1, dim=1)
            if parcel.label == "v":
                scores = _over_peers(scores, parcel)
        else:
            scores = torch.linalg.vector_norm(own - base, dim=1)
        each, start = [], 0
        for rows in parcel.blocks:
            best = scores[start : start + rows].topk(coding.chosen(rows)).indices
            each.append(best.sort().values + start)
            start += rows
        chosen = torch.cat(each)
        self._masks[parcel.mask_key] = chosen
        return chosen

    def _chosen(self, parcel: Parcel, payload: Tensor, row_bytes: int) -> tuple[Tensor, Tensor]:
        """The receiver's rows that travelled, `(K,)`, and they themselves, `(K, row_bytes)`."""
        coding = parcel.coding
        if not coding.told(parcel.rows, parcel.label):
            kept = self._masks.get(parcel.mask_key) if coding.pick == "value" and coding.share else None
            return _agreed(parcel, payload.device) if kept is None else kept, payload.view(-1, row_bytes)
        each, parts, start = [], [], 0
        for part, rows in zip(payload.split(parcel.block_bytes(row_bytes)), parcel.blocks, strict=True):
            count, bitmap = coding.chosen(rows), -(-rows // 8) if 0 < coding.chosen(rows) < rows else 0
            mask = codes.unpack_mask(part[:bitmap], rows) if bitmap else part.new_ones(rows, dtype=torch.bool)
            # Set ones first, each in its order: a sort has a known size, on every device, where `nonzero` would wait.
            each.append(mask.to(torch.uint8).argsort(descending=True, stable=True)[:count] + start)
            parts.append(part[bitmap:])
            start += rows
        chosen = torch.cat(each)
        self._masks[parcel.mask_key] = chosen
        return chosen, torch.cat(parts).view(-1, row_bytes)

    def _turned(self, x: Tensor, back: bool = False) -> Tensor:
        """Each row in a basis where all its elements are alike, and back: one scale then fits them all."""
        size = max(part for part in range(1, min(x.shape[1], LARGEST_ROTATION) + 1) if x.shape[1] % part == 0)
        if (size, x.device) not in self._rotations:
            random = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            self._rotations[size, x.device] = torch.linalg.qr(random).Q.to(x.device, torch.float32)
        matrix = self._rotations[size, x.device]
        return (x.reshape(-1, size) @ (matrix.T if back else matrix)).view(x.shape)


def _base(parcel: Parcel, held: Held | None, like: Tensor) -> Tensor:
    """What is subtracted, `(R, W)`; zero where nothing is held."""
    coding = parcel.coding
    if held is None or coding.base == "nothing":
        return torch.zeros(1, 1, device=like.device).expand(parcel.rows, parcel.width)
    return held.predict(parcel.time, DAMPING.get(coding.bits, 0.0) if coding.base == "predicted" else 0.0)


def _decoded(payload: Tensor, base: Tensor, bits: int) -> Tensor:
    levels, steps = codes.decode(payload, base.shape[1], bits)
    return torch.addcmul(base, levels, steps)


def _some(x: Tensor, chosen: Tensor | None) -> Tensor:
    return x if chosen is None else x[chosen]


def _over_peers(scores: Tensor, parcel: Parcel) -> Tensor:
    """Sums over what a rank has for its peers: the same tokens, for other heads. One mask is for all of them."""
    each = scores.split(list(parcel.blocks))
    totals: dict[int, Tensor] = {}
    for (source, _), mine in zip(parcel.routes, each, strict=True):
        totals[source] = totals[source] + mine if source in totals else mine
    return torch.cat([totals[source] for source, _ in parcel.routes])


def _agreed(parcel: Parcel, device: torch.device) -> Tensor:
    """Rows that both ends know without a word: drawn by the step's number, or the next in turn, or none."""
    each, start = [], 0
    for rows in parcel.blocks:
        count = parcel.coding.chosen(rows)
        if parcel.coding.pick == "random":
            drawn = torch.randperm(rows, generator=torch.Generator().manual_seed(parcel.step))[:count]
        else:
            drawn = (torch.arange(count) + parcel.step * count) % rows
        each.append(drawn.sort().values + start)
        start += rows
    return torch.cat(each).to(device)


def _with_masks(parcel: Parcel, payload: Tensor, chosen: Tensor) -> Tensor:
    """The payload's rows, block by block, each after its bitmap if the receiver must be told."""
    if not parcel.coding.told(parcel.rows, parcel.label):
        return payload
    mask = torch.zeros(parcel.rows, dtype=torch.bool, device=payload.device)
    mask[chosen] = True
    counts = [parcel.coding.chosen(rows) for rows in parcel.blocks]
    parts: list[Tensor] = []
    for bits, rows, count in zip(mask.split(list(parcel.blocks)), payload.split(counts), counts, strict=True):
        parts += [codes.pack_mask(bits), rows.flatten()] if 0 < count < len(bits) else [rows.flatten()]
    return torch.cat(parts)
