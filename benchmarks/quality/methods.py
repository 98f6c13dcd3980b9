"""Other uses of the same bytes, to compare with: what the receiver has after a step, and how many bytes crossed.

One process plays both sides, so nothing is packed. A receiver keeps the rows that it got last, in bfloat16; rows that
travel arrive as they are.

Legend: R rows of all blocks, W elements of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cocodiff.config import Selective
from cocodiff.errors import ConfigError
from cocodiff.kernels import codes
from cocodiff.selective.residual import rotated, rows_at_a_time
from cocodiff.selective.schedule import share

COMPARED = {
    "changed_rows": "the rows that differ most from what the receiver holds",
    "random_rows": "rows at random",
    "oldest_rows": "the rows that were not sent for longest",
    "plain": "all rows with as few bits as it takes, no residual",
    "skip": "everything at every n-th step, nothing between",
}
# (step, rows (R, W), rows of each block) -> what the receiver has, (R, W), and the bytes that crossed
Method = Callable[[int, Tensor, Sequence[int]], tuple[Tensor, int]]


def comparison(name: str, budget: float, steps: int, width: int, itemsize: int, kv_only: bool = False) -> Method:
    """A method of `COMPARED` for one tensor of one layer, with nothing held yet.

    Args:
        budget: share of the bytes of an exact exchange, over a run of so many steps, as of `cocodiff.Selective`.
        width: elements of a row, of `itemsize` bytes each where they travel as they are.

    Raises:
        ConfigError: the budget cannot hold what the method needs.
    """
    whole, sendable = itemsize * 8, share(Selective(budget=budget), steps, kv_only)
    if sendable == 1:  # a run of few steps
        return lambda step, rows, blocks: (rows, rows.numel() * itemsize)
    bits = sendable * whole  # of an element, on average
    if name == "plain":
        fitting = [count for count in codes.BITS if codes.payload_bytes(width, count) * 8 / width <= bits]
        if not fitting:
            raise ConfigError(f"a budget of {budget:.3g} holds no bit of each element in rows of {width}.")
        return lambda step, rows, blocks: _quantised(rows, max(fitting))
    sendable = bits / whole * steps  # so many whole steps
    if sendable < 1:
        raise ConfigError(f"a budget of {budget:.3g} does not hold the first of {steps} steps, which is whole.")
    if name == "skip":
        sent = {round(index * steps / int(sendable)) for index in range(int(sendable))}
        shares = [float(step in sent) for step in range(steps)]
    else:
        mask = 1 / whole / width if name == "changed_rows" else 0  # which rows these are: a bit a row
        shares = [1.0] + [max((sendable - 1) / max(steps - 1, 1) - mask, 0.0)] * (steps - 1)
    return Rows(name, shares, itemsize)


class Rows:
    """Some rows of each block at each step, so many as its share says; `Method`."""

    def __init__(self, name: str, shares: Sequence[float], itemsize: int) -> None:
        self._name, self._shares, self._itemsize = name, shares, itemsize
        self._held: Tensor | None = None

    def __call__(self, step: int, rows: Tensor, blocks: Sequence[int]) -> tuple[Tensor, int]:
        held = torch.zeros_like(rows, dtype=torch.bfloat16) if self._held is None else self._held
        changes = torch.linalg.vector_norm(rows.float() - held.float(), dim=1)
        chosen, mask_bytes, start = [], 0, 0
        for count in blocks:
            sent = (
                count * int(part) if (part := self._shares[step]) in (0, 1) else min(count, max(1, int(part * count)))
            )
            if self._name == "changed_rows":
                best = changes[start : start + count].topk(sent).indices
                mask_bytes += -(-count // 8) if 0 < sent < count else 0
            elif self._name == "random_rows":
                best = torch.randperm(count, generator=torch.Generator().manual_seed(step))[:sent]
            else:
                best = (torch.arange(sent) + step * sent) % count
            chosen.append(best + start)
            start += count
        places = torch.cat(chosen)
        received = held.to(rows.dtype)
        received[places] = rows[places]
        self._held = received.to(torch.bfloat16)
        return received, len(places) * rows.shape[1] * self._itemsize + mask_bytes


def _quantised(rows: Tensor, bits: int) -> tuple[Tensor, int]:
    """All rows in so many bits an element, nothing subtracted first."""
    received = torch.empty_like(rows)
    for some in rows_at_a_time(rows):
        levels, steps = codes.decode(codes.encode(rotated(rows[some].float()), bits), rows.shape[1], bits)
        received[some] = rotated(levels * steps, back=True)
    return received, len(rows) * codes.payload_bytes(rows.shape[1], bits)
