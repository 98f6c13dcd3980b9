"""The blocks of a transformer in a row: each block's forward, and what is handed on to the next ahead of its call.

Rows that one block has finished enter the next block at once, before that one is called. When it is called with
exactly the tensors that were handed on, its exchanges are under way. With others (a ControlNet adds to them in between)
what went ahead is dropped, and nothing more goes ahead in this forward of the transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cocodiff.attention import Flight, Layer, attention, sequential
from cocodiff.engine import Engine
from cocodiff.patches import Patches

HOOKS = ("_hf_hook", "_diffusers_hook")  # they run when a block is called (offloading): nothing may go ahead of that


class Blocks:
    """All blocks of one transformer, in the order in which it calls them.

    Args:
        streams: the arguments of a block's forward that hold this rank's tokens, in joint order; what it returns, too.
    """

    def __init__(self, engine: Engine, streams: Sequence[str]) -> None:
        self._engine, self._streams = engine, tuple(streams)
        self._row: list[tuple[nn.Module, Callable[..., Layer]]] = []
        self._handed: tuple[list[Any], Flight] | None = None
        self._go_ahead = True

    def append(self, block: nn.Module, make_layer: Callable[..., Layer], patches: Patches) -> None:
        """Put ours in place of the forward of the next block. `make_layer` takes the arguments but for the streams."""
        patches.set(block, "forward", partial(self._forward, len(self._row)))
        self._row.append((block, make_layer))

    def _forward(self, index: int, **arguments: Any) -> tuple[Tensor, ...]:
        engine, make_layer = self._engine, self._row[index][1]
        inputs = tuple(arguments.pop(name) for name in self._streams)
        if engine.config.schedule == "sequential":
            return joined(sequential(engine, make_layer(**arguments), inputs))
        flight = self._take(index, [*inputs, *arguments.values()])
        if flight is None:
            flight = Flight(engine, make_layer(**arguments))
            for piece, (rows, _) in enumerate(flight.pieces):
                flight.enter(piece, _cut(inputs, rows))
        ahead = self._next(index, flight, arguments)
        outputs = joined(attention(flight, ahead))
        if ahead is not None:
            self._handed = [*outputs, *arguments.values()], ahead
        return outputs

    def _take(self, index: int, arguments: list[Any]) -> Flight | None:
        """What was handed on to this block, if it is called with just that."""
        handed, self._handed = self._handed, None
        if index == 0:
            self._go_ahead = True  # a new forward; what a failed one left is dropped
            return None
        if handed is None:
            return None
        if len(handed[0]) == len(arguments) and all(a is b for a, b in zip(*(handed[0], arguments), strict=True)):
            return handed[1]
        self._go_ahead = False
        handed[1].drop()
        return None

    def _next(self, index: int, flight: Flight, arguments: dict[str, Any]) -> Flight | None:
        """The next block's flight, where pieces can go ahead into it."""
        if not self._go_ahead or len(flight.pieces) == 1 or index + 1 == len(self._row):
            return None
        block, make_layer = self._row[index + 1]
        if any(hook in vars(module) for module in (block, *block.children()) for hook in HOOKS):
            return None
        ahead = Flight(self._engine, make_layer(**arguments))
        return ahead if ahead.pieces == flight.pieces else None


def _cut(streams: Sequence[Tensor], rows: slice) -> tuple[Tensor, ...]:
    """These rows of the joint sequence, stream by stream; `(B, rows, C)` each, some may have none."""
    parts, start = [], 0
    for stream in streams:
        length = stream.shape[1]
        parts.append(stream[:, max(rows.start - start, 0) : max(rows.stop - start, 0)])
        start += length
    return tuple(parts)


def joined(pieces: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Of each stream, the rows of all these pieces."""
    return tuple(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
