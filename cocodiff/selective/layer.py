"""What the exchanges of one attention layer need in one forward: the codec, its parcels, and where errors are kept."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cocodiff.selective.copies import CopyKey, Route
from cocodiff.selective.parcel import Codec, Parcel
from cocodiff.selective.schedule import StepSchedule

# (step, layer, label) -> of each parcel, the squared norms of what it misses and of what it had to carry, (2,)
Missed = defaultdict[tuple[int, int, str], list[Tensor]]
Place = tuple[str, str, int]  # end, piece and part of a `CopyKey`


@dataclass(frozen=True)
class LayerCoding:
    """One layer in one forward.

    Attributes:
        branch, layer, step: their numbers.
        time: of the step, as in `cocodiff.selective.copies`.
        missed: gets the errors of what is encoded.
    """

    branch: int
    layer: int
    step: int
    time: float
    schedule: StepSchedule
    codec: Codec
    missed: Missed
    _pieces: Counter[str] = field(default_factory=Counter)

    def next_piece(self, label: str) -> int:
        """Number the next exchange of this label: 0, 1, ... for the pieces of a layer."""
        self._pieces[label] += 1
        return self._pieces[label] - 1

    def parcel(
        self, label: str, place: Place, blocks: tuple[int, ...], routes: tuple[Route, ...], width: int, itemsize: int
    ) -> Parcel:
        """Make the parcel of some blocks; `place` distinguishes the copies of one layer and label."""
        key = CopyKey(self.branch, self.layer, label, *place)
        coding = self.schedule.coding(width, itemsize, first=self.codec.copies.get(key) is None)
        return Parcel(key, blocks, routes, width, itemsize, coding, self.time)

    def encode(self, parcel: Parcel, elements: Tensor) -> Tensor:
        """Encode a one-dimensional buffer of the parcel's elements to its payload, one-dimensional, uint8."""
        payload, norms = self.codec.encode(parcel, elements.view(-1, parcel.width))
        self.missed[self.step, self.layer, parcel.key.label].append(norms)
        return payload

    def decode(self, parcel: Parcel, payload: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode a payload to the parcel's elements, one-dimensional."""
        return self.codec.decode(parcel, payload, dtype).flatten()
