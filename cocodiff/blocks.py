"""The row of a transformer's blocks: their forwards on shards, and what is handed on to the next ahead of its call.

Rows that one block has finished enter the next block at once, before that one is called. When it is called with
exactly the tensors that were handed on, its exchanges are under way. With others (a ControlNet adds to them in
between), or where something was written into them, what went ahead is dropped, and nothing more goes ahead in
this forward of the transformer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cocodiff.attention import attention, sequential
from cocodiff.compat import acts_when_called
from cocodiff.errors import PatchError
from cocodiff.layer import Layer, LayerInFlight
from cocodiff.parallel.tokens import Tokens
from cocodiff.state import ForwardState


@dataclass(frozen=True)
class Block:
    """One block of the row.

    Attributes:
        streams: the arguments of its forward that hold tokens, in joint order; it returns them, too.
        make_layer: makes its attention layer of tokens, the module and the other arguments.
    """

    module: nn.Module
    streams: tuple[str, ...]
    make_layer: Callable[[Tokens, nn.Module, Mapping[str, Any]], Layer]
    signature: inspect.Signature


class BlockRow:
    """All blocks of one transformer, in the order in which it calls them.

    Args:
        whole: argument -> stream, for those that the first block gets whole: they are cut there.
    """

    def __init__(self, whole: Mapping[str, str]) -> None:
        self.blocks: list[Block] = []
        self._whole = dict(whole)
        self._running: RowForward | None = None

    def append(self, block: Block) -> Callable[..., Any]:
        """Add the next block; gives the forward that stands in place of the block's own."""
        self.blocks.append(block)
        return partial(self._forward, len(self.blocks) - 1)

    @contextmanager
    def running(self, state: ForwardState) -> Iterator[None]:
        """While inside, the blocks run on the shards of this forward."""
        self._running = RowForward(self.blocks, self._whole, state)
        try:
            yield
            self._running.end()
        except BaseException:
            state.call.session.catch_up()  # lanes may still read and write what is freed with the exception's frames
            raise
        finally:
            self._running = None

    def _forward(self, index: int, *args: Any, **kwargs: Any) -> tuple[Tensor, ...] | Tensor:
        if self._running is None:
            raise PatchError(
                "attention ran outside the wrapped transformer's forward: something replaced `transformer.forward` "
                "after cocodiff.wrap (removing hooks that were added before it does). Call cocodiff.unwrap(pipe) and "
                "cocodiff.wrap(pipe) again, last."
            )
        return self._running.run(index, args, kwargs)


class RowForward:
    """The row in one forward of the transformer: what is handed on from block to block."""

    def __init__(self, blocks: Sequence[Block], whole: Mapping[str, str], state: ForwardState) -> None:
        self._blocks, self._whole, self._state = blocks, whole, state
        self._handed: tuple[int, list[Any], list[int], LayerInFlight] | None = None
        self._go_ahead = True

    def run(self, index: int, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, ...] | Tensor:
        """One block, called with its forward's arguments."""
        state, block = self._state, self._blocks[index]
        arguments = dict(block.signature.bind(*args, **kwargs).arguments)
        inputs = [self._cut_whole(name, arguments.pop(name)) for name in block.streams]
        self._whole = {}  # the first block has cut them
        if state.call.plan.schedule == "sequential":
            return _returned(joined(sequential(state, self._layer(block, arguments), inputs)))
        in_flight = self._take(index, [*inputs, *arguments.values()])
        if in_flight is None:
            in_flight = LayerInFlight(state, self._layer(block, arguments))
            for piece, (rows, _) in enumerate(in_flight.pieces):
                in_flight.enter(piece, _cut(inputs, rows))
        ahead = self._next(index, in_flight, arguments)
        outputs = joined(attention(in_flight, ahead))
        if ahead is not None:
            given = [*outputs, *arguments.values()]
            self._handed = index + 1, given, _versions(given), ahead
        return _returned(outputs)

    def end(self) -> None:
        """The forward has ended well: what was handed on to a block that was not called is dropped."""
        if self._handed is not None:
            self._handed[-1].drop()

    def _layer(self, block: Block, arguments: Mapping[str, Any]) -> Layer:
        return block.make_layer(self._state.tokens, block.module, arguments)

    def _cut_whole(self, name: str, x: Tensor) -> Tensor:
        if name not in self._whole:
            return x
        return x[:, self._state.tokens.rows(self._whole[name])]

    def _take(self, index: int, arguments: list[Any]) -> LayerInFlight | None:
        """What was handed on to this block, if it is called with just that."""
        handed, self._handed = self._handed, None
        if handed is None:
            return None
        expected, before, versions, in_flight = handed
        same = index == expected and len(before) == len(arguments) and versions == _versions(before)
        if same and all(a is b for a, b in zip(before, arguments, strict=True)):
            return in_flight
        self._go_ahead = False
        in_flight.drop()
        return None

    def _next(self, index: int, in_flight: LayerInFlight, arguments: Mapping[str, Any]) -> LayerInFlight | None:
        """The next block's layer, where pieces can go ahead into it."""
        if not self._go_ahead or len(in_flight.pieces) == 1 or index + 1 == len(self._blocks):
            return None
        this, block = self._blocks[index : index + 2]
        if block.streams != this.streams or block.signature.parameters.keys() != this.signature.parameters.keys():
            return None
        if acts_when_called(block.module):
            return None
        ahead = LayerInFlight(self._state, self._layer(block, arguments))
        return ahead if ahead.pieces == in_flight.pieces else None


def _versions(values: Sequence[Any]) -> list[int]:
    """How often each tensor was written to; those of inference mode do not count that."""
    return [x._version for x in values if isinstance(x, Tensor) and not x.is_inference()]


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
    """Join the rows of all these pieces, stream by stream."""
    return tuple(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
