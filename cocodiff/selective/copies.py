"""Copies of what each receiver holds: both ends of a slow link keep them, equal bit for bit, and predict from them.

    predicted = held + damping * time * velocity        held <- predicted + decoded        velocity <- change / time

`time` has passed since the copy was last updated, in steps of the run as its scheduler spaces them: layers that are
skipped age and never mix, and a scheduler that stands still or goes back is followed. Rows that were not sent then keep
their velocity, as if they had moved on by it. Both ends compute from decoded
bytes only. Copies are bfloat16, MEASURED to be enough (docs/selective.md); sums are float32, and every product in them
is exact there, so that no device's order or fusing of operations changes a bit.

Legend: R rows, W width.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# With one bit a residual is mostly noise, which a full step onwards would amplify: MEASURED, 1.0 gains nothing over 0.9
# (docs/selective.md), and it is near instability (a trial lost 3 dB there).
DAMPING = {8: 1.0, 4: 1.0, 2: 1.0, 1: 0.90625}
# Steps: a change over less is taken as one over so much. Schedules begin with 0.06 at the least (Wan, shift 12); over a
# moment only noise changes, which a whole step onwards would be that much larger.
SHORTEST = 0.125
COPY_DTYPE = torch.bfloat16
COPY_BYTES = 2 * COPY_DTYPE.itemsize  # of an element: value and velocity


Rows = slice | Tensor
Route = tuple[int, int]  # from a rank to another; from a rank to itself for what goes around a ring
ENDS = ("send", "receive")


class CopyKey(NamedTuple):
    """Which copy this is.

    Attributes:
        branch: of guidance, a number.
        layer: a number.
        label: "v", "k", "q" or "o".
        end: "send" or "receive".
        piece: of the layer's rows: "0", "1", ..., or "ring 0", ... for keys and values that go around a ring.
        part: of the ring, or of the piece's blocks those of one width.
    """

    branch: int
    layer: int
    label: str
    end: str
    piece: str
    part: int = 0


@dataclass
class Held:
    """Rows as one receiver has them, `(R, W)` each, and the time they are of.

    Attributes:
        routes: rows of each block, and the ranks from and to which they go.
        reference: the sender's own last values, with which `v_major` compares.
    """

    value: Tensor
    velocity: Tensor
    time: float
    routes: tuple[tuple[int, Route], ...]
    reference: Tensor | None = None

    @classmethod
    def nothing(cls, rows: int, width: int, time: float, routes: tuple[tuple[int, Route], ...], like: Tensor) -> Held:
        """Zeros, which both ends hold before the first exchange."""
        value, velocity = (like.new_zeros(rows, width, dtype=COPY_DTYPE) for _ in range(2))
        return cls(value, velocity, time, routes)

    def predict(self, rows: Rows, time: float, damping: float) -> tuple[Tensor, Tensor]:
        """Return some rows as they are held, and as they are predicted for a time, float32.

        A second exchange at one time starts from what the first gave.
        """
        value, ahead = self.value[rows].float(), _short(damping * (time - self.time))
        return value, torch.add(value, self.velocity[rows].float(), alpha=ahead)

    def update(self, rows: Rows, new: Tensor, before: Tensor, time: float) -> None:
        """Put decoded rows, float32, into the copy.

        Other rows stay, and so does their velocity: where they are headed is still the best guess for the next time
        they are sent. Whoever has put all rows sets `time`.

        Args:
            before: these rows as `predict` gave them as held.
        """
        if passed := time - self.time:
            passed = math.copysign(max(abs(passed), SHORTEST), passed)
            self.velocity[rows] = (new - before).mul_(1 / passed).to(COPY_DTYPE)
        self.value[rows] = new.to(COPY_DTYPE)


def _short(number: float) -> float:
    """Round to 8 significant bits: the product with a bfloat16 is then exact in float32."""
    return torch.tensor(number, dtype=torch.float64, device="cpu").to(torch.bfloat16).item()


class Copies:
    """Everything that this rank holds, as a sender and as a receiver."""

    def __init__(self) -> None:
        self._held: dict[CopyKey, Held] = {}

    def get(self, key: CopyKey) -> Held | None:
        """The rows held under a key; None where nothing is held yet."""
        return self._held.get(key)

    def forget(self, branch: int) -> None:
        """Drop the copies of one branch."""
        self._held = {key: held for key, held in self._held.items() if key.branch != branch}

    def put(self, key: CopyKey, held: Held) -> None:
        self._held[key] = held

    @property
    def held_bytes(self) -> int:
        """Memory of all copies."""
        tensors = [x for held in list(self._held.values()) for x in (held.value, held.velocity, held.reference)]
        return sum(x.numel() * x.itemsize for x in tensors if x is not None)

    def digests(self, end: str) -> dict[str, str]:
        """Hash each block that one end holds ("send" or "receive"); the other end has the same by the same name.

        A name consists of branch, layer, label, piece and route.
        """
        found = {}
        for key, held in self._held.items():
            if key.end != end:
                continue
            start = 0
            for rows, route in held.routes:
                both = torch.stack([x[start : start + rows] for x in (held.value, held.velocity)])
                start += rows
                bits = both.cpu().contiguous().view(torch.uint8).numpy().tobytes()
                name = str((key.branch, key.layer, key.label, key.piece, route))
                found[name] = hashlib.sha256(bits).hexdigest()
        return found
