"""The blocks of a transformer in a row: each block's forward, and what is handed on to the next ahead of its call.

Rows that one block has finished enter the next block at once, before that one is called. When it is called with
exactly the tensors that were handed on, its exchanges are under way. With others (a ControlNet adds to them in between)
what went ahead is dropped, and nothing more goes ahead in this forward of the transformer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cocodiff.attention import attention, sequential
from cocodiff.compat import Patches
from cocodiff.layer import Flight, Layer
from cocodiff.parallel.tokens import Tokens
from cocodiff.state import Engine

HOOKS = ("_hf_hook", "_diffusers_hook")  # they run when a block is called (offloading): nothing may go ahead of that


@dataclass(frozen=True)
class _Block:
    module: nn.Module
    streams: tuple[str, ...]
    make_layer: Callable[[Tokens, Any, dict[str, Any]], Layer]
    signature: inspect.Signature


class Blocks:
    """All blocks of one transformer, in the order in which it calls them.

    Args:
        whole: argument -> stream, for those that the first block gets whole: they are cut there.
    """

    def __init__(self, engine: Engine, whole: Mapping[str, str] | None = None) -> None:
        self.engine, self._whole = engine, dict(whole or {})
        self._row: list[_Block] = []
        self._handed: tuple[int, list[Any], Flight] | None = None
        self._tokens: Tokens | None = None  # of the forward that is running
        self._go_ahead = True

    def append(
        self,
        block: nn.Module,
        streams: Sequence[str],
        make_layer: Callable[[Tokens, Any, dict[str, Any]], Layer],
        patches: Patches,
    ) -> None:
        """Put ours in place of the forward of the next block.

        Args:
            streams: the arguments of its forward that hold tokens, in joint order; what it returns, too.
            make_layer: takes the forward's tokens, the block and the other arguments.
        """
        entry = _Block(block, tuple(streams), make_layer, inspect.signature(block.forward))
        patches.set(block, "forward", partial(self._forward, len(self._row)))
        self._row.append(entry)

    def _forward(self, index: int, *args: Any, **kwargs: Any) -> tuple[Tensor, ...] | Tensor:
        engine, block = self.engine, self._row[index]
        arguments = dict(block.signature.bind(*args, **kwargs).arguments)
        inputs = [arguments.pop(name) for name in block.streams]
        if self._tokens is not engine.tokens:  # a new forward; what a failed one left is dropped
            self._tokens, self._go_ahead, self._handed = engine.tokens, True, None
            inputs = [self._cut_whole(name, x) for name, x in zip(block.streams, inputs, strict=True)]
        if engine.config.schedule == "sequential":
            return _returned(
                joined(sequential(engine, block.make_layer(engine.tokens, block.module, arguments), inputs))
            )
        flight = self._take(index, [*inputs, *arguments.values()])
        if flight is None:
            flight = Flight(engine, block.make_layer(engine.tokens, block.module, arguments))
            for piece, (rows, _) in enumerate(flight.pieces):
                flight.enter(piece, _cut(inputs, rows))
        ahead = self._next(index, flight, arguments)
        outputs = joined(attention(flight, ahead))
        if ahead is not None:
            self._handed = index + 1, [*outputs, *arguments.values()], ahead
        return _returned(outputs)

    def _cut_whole(self, name: str, x: Tensor) -> Tensor:
        if name not in self._whole:
            return x
        return x[:, self.engine.tokens.rows(self._whole[name])]

    def _take(self, index: int, arguments: list[Any]) -> Flight | None:
        """What was handed on to this block, if it is called with just that."""
        handed, self._handed = self._handed, None
        if handed is None:
            return None
        expected, before, flight = handed
        same = index == expected and len(before) == len(arguments)
        if same and all(a is b for a, b in zip(before, arguments, strict=True)):
            return flight
        self._go_ahead = False
        flight.drop()
        return None

    def _next(self, index: int, flight: Flight, arguments: dict[str, Any]) -> Flight | None:
        """The next block's flight, where pieces can go ahead into it."""
        if not self._go_ahead or len(flight.pieces) == 1 or index + 1 == len(self._row):
            return None
        this, block = self._row[index : index + 2]
        if block.streams != this.streams or block.signature.parameters.keys() != this.signature.parameters.keys():
            return None
        if any(hook in vars(module) for module in (block.module, *block.module.children()) for hook in HOOKS):
            return None
        ahead = Flight(self.engine, block.make_layer(self.engine.tokens, block.module, arguments))
        return ahead if ahead.pieces == flight.pieces else None


def _cut(streams: Sequence[Tensor], rows: slice) -> tuple[Tensor, ...]:
    """These rows of the joint sequence, stream by stream; `(B, rows, C)` each, some may have none."""
    parts, start = [], 0
    for stream in streams:
        length = stream.shape[1]
        parts.append(stream[:, max(rows.start - start, 0) : max(rows.stop - start, 0)])
        start += length
    return tuple(parts)


def _returned(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | Tensor:
    """As diffusers' blocks do: one stream is no tuple."""
    return outputs[0] if len(outputs) == 1 else outputs


def joined(pieces: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Of each stream, the rows of all these pieces."""
    return tuple(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
