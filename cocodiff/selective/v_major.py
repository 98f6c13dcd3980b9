"""The codec of the CoCoDiff paper's rule (arXiv 2604.14561): whole rows as they are, those whose V changed most.

To compare with. K and Q send the rows that were chosen for V; outputs are chosen by their own change.

Legend: R rows of all blocks, K rows that travel, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cocodiff.selective.copies import COPY_DTYPE, Copies, CopyKey, Held
from cocodiff.selective.parcel import Parcel, held_rows, highest, squared_norms, with_masks, without_masks


class VMajorCodec:
    """A `Codec`. One object may play both ends: parcels have their keys."""

    def __init__(self, copies: Copies) -> None:
        self.copies = copies
        self._chosen_for_v: dict[CopyKey, Tensor] = {}

    def encode(self, parcel: Parcel, x: Tensor) -> tuple[Tensor, Tensor]:
        held, own = held_rows(self.copies, parcel, x), x.float()
        if _follows_v(parcel):
            chosen = self._chosen_for_v[_key_of_v(parcel)]
        else:
            reference = held.value if held.reference is None else held.reference
            scores = torch.linalg.vector_norm(own - reference.float(), 1, dim=1)
            chosen = highest(parcel, _summed_over_peers(scores, parcel) if parcel.key.label == "v" else scores)
            self._remember(parcel, chosen)
        _take(parcel, held, chosen, own[chosen])
        if parcel.coding.share < 1:  # after a whole step the next one still compares with the step before that
            held.reference = own.to(COPY_DTYPE)
        missed = own - held.value.float()
        missed[chosen] = 0.0  # what is held of them is rounded, but they travelled as they are
        return with_masks(parcel, x[chosen].view(torch.uint8), chosen), squared_norms(missed, own)

    def decode(self, parcel: Parcel, payload: Tensor, dtype: torch.dtype) -> Tensor:
        held, (chosen, coded) = held_rows(self.copies, parcel, payload), without_masks(parcel, payload)
        if _follows_v(parcel):
            chosen = self._chosen_for_v[_key_of_v(parcel)]
        else:
            self._remember(parcel, chosen)
        sent = coded.contiguous().view(dtype)
        _take(parcel, held, chosen, sent.float())
        everything = held.value.to(dtype)
        everything[chosen] = sent
        return everything

    def _remember(self, parcel: Parcel, chosen: Tensor) -> None:
        if parcel.key.label == "v":
            self._chosen_for_v[parcel.key] = chosen


def _follows_v(parcel: Parcel) -> bool:
    """Whether V's choice decides which rows travel."""
    return parcel.key.label in ("q", "k") and parcel.coding.share > 0 and not parcel.whole


def _key_of_v(parcel: Parcel) -> CopyKey:
    return parcel.key._replace(label="v")


def _take(parcel: Parcel, held: Held, chosen: Tensor, new: Tensor) -> None:
    held.update(chosen, new, held.value[chosen].float(), parcel.time)
    if parcel.coding.share:
        held.time = parcel.time


def _summed_over_peers(scores: Tensor, parcel: Parcel) -> Tensor:
    """Sum scores over what a rank has for its peers, the same tokens for other heads: one mask is for all of them."""
    each = scores.split(list(parcel.blocks))
    totals: dict[int, Tensor] = {}
    for (source, _), mine in zip(parcel.routes, each, strict=True):
        totals[source] = totals[source] + mine if source in totals else mine
    return torch.cat([totals[source] for source, _ in parcel.routes])
