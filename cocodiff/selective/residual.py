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
from cocodiff.selective.copies import COPY_DTYPE, DAMPING, Copies, Held, Route, Rows
from cocodiff.selective.schedule import RAW, Coding

CACHED_ELEMENTS = 2**16  # MEASURED on a CPU: more at once take up to 1.6 times as long each, fewer cost more calls
LARGEST_ROTATION = 64  # elements that are mixed: a row is cut into equal parts of at most so many


@dataclass(frozen=True)
class Parcel:
    """Some blocks of one exchange, of rows of one width.

    Attributes:
        key: of the copy, as of `cocodiff.selective.copies.Copies`.
        mask_key: under which the rows that were chosen for V are found for K and Q.
        label: "v", "k", "q" or "o".
        blocks: rows of each, and `routes` their ranks.
        coding: of this step.
        step, time: of the run; `time` as in `cocodiff.selective.copies`.
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
        coding, held = parcel.coding, self._held(parcel, x)
        if coding.bits == RAW:
            return self._encode_raw(parcel, held, x)
        if not parcel.whole:
            return self._encode_some(parcel, held, x)
        parts, norms = [], []
        for rows in _some_at_a_time(x):
            own = self._turned(x[rows].float())
            before, base = _based(parcel, held, rows, own)
            payload, levels, steps = codes.quantise(own - base, coding.bits)
            new = base.addcmul_(levels, steps)
            _take(parcel, held, rows, new, before)
            parts.append(payload)
            norms.append(_energies(own - new, own))
        _moved(parcel, held)
        return torch.cat(parts).flatten(), torch.stack(norms).sum(0)

    def decode(self, parcel: Parcel, payload: Tensor, dtype: torch.dtype) -> Tensor:
        """What the receiver has after a payload, `(R, W)`."""
        coding, held = parcel.coding, self._held(parcel, payload)
        row_bytes = coding.row_bytes(parcel.width, dtype.itemsize)
        if coding.bits == RAW:
            return self._decode_raw(parcel, held, payload, dtype, row_bytes)
        if not parcel.whole:
            return self._decode_some(parcel, held, payload, dtype, row_bytes)
        coded, out = payload.view(-1, row_bytes), payload.new_empty(parcel.rows, parcel.width, dtype=dtype)
        for rows in _some_at_a_time(out):
            before, base = _based(parcel, held, rows, out[rows])
            new = base.addcmul_(*codes.decode(coded[rows], parcel.width, coding.bits))
            _take(parcel, held, rows, new, before)
            out[rows] = self._turned(new, back=True)
        _moved(parcel, held)
        return out

    def _encode_some(self, parcel: Parcel, held: Held | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """Coded rows, the others held."""
        assert held is not None
        own = self._turned(x.float())
        base = _based(parcel, held, slice(None), own)[1]
        chosen = self._choose(parcel, torch.linalg.vector_norm(own - base, dim=1))
        before, base = held.value[chosen].float(), base[chosen]
        payload, levels, steps = codes.quantise(own[chosen] - base, parcel.coding.bits)
        _take(parcel, held, chosen, base.addcmul_(levels, steps), before)
        _moved(parcel, held)
        return _with_masks(parcel, payload, chosen), _energies(own - held.value.float(), own)

    def _decode_some(
        self, parcel: Parcel, held: Held | None, payload: Tensor, dtype: torch.dtype, row_bytes: int
    ) -> Tensor:
        assert held is not None
        chosen, coded = self._told(parcel, payload, row_bytes)
        before, base = _based(parcel, held, chosen, payload)
        _take(parcel, held, chosen, base.addcmul_(*codes.decode(coded, parcel.width, parcel.coding.bits)), before)
        _moved(parcel, held)
        return self._turned(held.value.float(), back=True).to(dtype)

    def _encode_raw(self, parcel: Parcel, held: Held | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows as they are, the others held: for methods to compare with."""
        own = x.float()
        if held is None:
            return x.contiguous().view(torch.uint8).flatten(), _energies(torch.zeros_like(own), own)
        by_value = parcel.coding.pick == "value"
        reference = (held.value if held.reference is None or not by_value else held.reference).float()
        scores = torch.linalg.vector_norm(own - reference, 1 if by_value else 2, dim=1)
        chosen = self._choose(parcel, _over_peers(scores, parcel) if by_value and parcel.label == "v" else scores)
        _take(parcel, held, chosen, own[chosen], held.value[chosen].float())
        _moved(parcel, held)
        if by_value:
            held.reference = own.to(COPY_DTYPE)
        missed = own - held.value.float()
        missed[chosen] = 0.0  # what is held of them is rounded, but they travelled as they are
        return _with_masks(parcel, x[chosen].view(torch.uint8), chosen), _energies(missed, own)

    def _decode_raw(
        self, parcel: Parcel, held: Held | None, payload: Tensor, dtype: torch.dtype, row_bytes: int
    ) -> Tensor:
        if held is None:
            return payload.contiguous().view(dtype).view(parcel.rows, parcel.width)
        chosen, coded = self._told(parcel, payload, row_bytes)
        sent = coded.contiguous().view(dtype)
        _take(parcel, held, chosen, sent.float(), held.value[chosen].float())
        _moved(parcel, held)
        everything = held.value.to(dtype)
        everything[chosen] = sent
        return everything

    def _held(self, parcel: Parcel, like: Tensor) -> Held | None:
        """The parcel's copy; None where nothing is subtracted from what travels."""
        if parcel.coding.base == "nothing":
            return None
        held = self.copies.get(parcel.key)
        assert held is None or held.value.shape == (parcel.rows, parcel.width), (parcel, held.value.shape)
        if held is None:
            assert parcel.whole, "the first exchange of a copy has all rows"
            routes = tuple(zip(parcel.blocks, parcel.routes, strict=True))
            held = Held.nothing(parcel.rows, parcel.width, parcel.time, routes, like)
            self.copies.put(parcel.key, held)
        return held

    def _choose(self, parcel: Parcel, scores: Tensor) -> Tensor:
        """The sender's rows that travel, `(K,)` in order: those with the highest scores, unless both ends know."""
        coding = parcel.coding
        if (known := self._known(parcel, scores.device)) is not None:
            return known
        each, start = [], 0
        for rows in parcel.blocks:
            best = scores[start : start + rows].topk(coding.chosen(rows)).indices
            each.append(best.sort().values + start)
            start += rows
        return self._remembered(parcel, torch.cat(each))

    def _told(self, parcel: Parcel, payload: Tensor, row_bytes: int) -> tuple[Tensor, Tensor]:
        """The receiver's rows that travelled, `(K,)`, and they themselves, `(K, row_bytes)`."""
        if (known := self._known(parcel, payload.device)) is not None:
            return known, payload.view(-1, row_bytes)
        each, parts, start = [], [], 0
        for part, rows in zip(payload.split(parcel.block_bytes(row_bytes)), parcel.blocks, strict=True):
            count, mask = parcel.coding.chosen(rows), part.new_ones(rows)
            if parcel.coding.told(rows, parcel.label):
                bitmap = -(-rows // 8)
                mask, part = codes.unpack_mask(part[:bitmap], rows).to(torch.uint8), part[bitmap:]
            # Set ones first, each in its order: a sort has a known size, on every device, where `nonzero` would wait.
            each.append(mask.argsort(descending=True, stable=True)[:count] + start)
            parts.append(part)
            start += rows
        return self._remembered(parcel, torch.cat(each)), torch.cat(parts).view(-1, row_bytes)

    def _remembered(self, parcel: Parcel, chosen: Tensor) -> Tensor:
        if parcel.coding.pick == "value":
            self._masks[parcel.mask_key] = chosen
        return chosen

    def _known(self, parcel: Parcel, device: torch.device) -> Tensor | None:
        """Rows that both ends know without a word; None where the sender chooses."""
        coding, each, start = parcel.coding, [], 0
        if not parcel.whole and coding.share and coding.pick == "value" and parcel.label in ("q", "k"):
            return self._masks[parcel.mask_key]
        if not parcel.whole and coding.share and coding.pick in ("residual", "value"):
            return None
        for rows in parcel.blocks:
            count = coding.chosen(rows)
            if coding.pick == "random":
                generator = torch.Generator().manual_seed(parcel.step)
                drawn = torch.randperm(rows, generator=generator, device="cpu")[:count]
            else:  # the next in turn; or all, or none
                drawn = (torch.arange(count, device="cpu") + parcel.step * count) % rows
            each.append(drawn.sort().values + start)
            start += rows
        return torch.cat(each).to(device)

    def _turned(self, x: Tensor, back: bool = False) -> Tensor:
        """Each row in a basis where all its elements are alike, and back: one scale then fits them all."""
        size = max(part for part in range(1, min(x.shape[1], LARGEST_ROTATION) + 1) if x.shape[1] % part == 0)
        if (size, x.device) not in self._rotations:
            random = torch.randn(
                size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
            )
            self._rotations[size, x.device] = torch.linalg.qr(random).Q.to(x.device, torch.float32)
        matrix = self._rotations[size, x.device]
        return (x.reshape(-1, size) @ (matrix.T if back else matrix)).view(x.shape)


def _based(parcel: Parcel, held: Held | None, rows: Rows, like: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows as they are held, and what is subtracted from them (memory of its own), float32."""
    if held is None:
        zeros = torch.zeros_like(like, dtype=torch.float32)
        return zeros, zeros
    coding = parcel.coding
    damping = DAMPING.get(coding.bits, 0.0) if coding.base == "predicted" else 0.0
    return held.predict(rows, parcel.time, damping)


def _take(parcel: Parcel, held: Held | None, rows: Rows, new: Tensor, before: Tensor) -> None:
    if held is not None:
        held.update(rows, new, before, parcel.time)


def _moved(parcel: Parcel, held: Held | None) -> None:
    """All that travelled was taken; where nothing did, what is held ages."""
    if held is not None and parcel.coding.share:
        held.time = parcel.time


def _some_at_a_time(x: Tensor) -> list[slice]:
    """Rows in cuts that a core's cache holds; all at once elsewhere."""
    rows, width = x.shape
    cut = max(1, CACHED_ELEMENTS // width) if x.device.type == "cpu" else max(rows, 1)
    return [slice(start, min(start + cut, rows)) for start in range(0, rows, cut)]


def _energies(missed: Tensor, own: Tensor) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(missed), torch.linalg.vector_norm(own)]).square()


def _over_peers(scores: Tensor, parcel: Parcel) -> Tensor:
    """Sums over what a rank has for its peers: the same tokens, for other heads. One mask is for all of them."""
    each = scores.split(list(parcel.blocks))
    totals: dict[int, Tensor] = {}
    for (source, _), mine in zip(parcel.routes, each, strict=True):
        totals[source] = totals[source] + mine if source in totals else mine
    return torch.cat([totals[source] for source, _ in parcel.routes])


def _with_masks(parcel: Parcel, payload: Tensor, chosen: Tensor) -> Tensor:
    """The payload's rows, block by block, each after its bitmap where the receiver must be told."""
    mask = torch.zeros(parcel.rows, dtype=torch.bool, device=payload.device)
    mask[chosen] = True
    counts = [parcel.coding.chosen(rows) for rows in parcel.blocks]
    parts: list[Tensor] = []
    for bits, rows in zip(mask.split(list(parcel.blocks)), payload.split(counts), strict=True):
        if parcel.coding.told(len(bits), parcel.label):
            parts.append(codes.pack_mask(bits))
        parts.append(rows.flatten())
    return torch.cat(parts)
