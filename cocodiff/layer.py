"""One attention layer under way: what it needs of a model family, and its keys and values on their way.

Over the ulysses axis a rank gets all tokens of its part of the sequence, for a few heads; over the ring axis keys and
values of the other parts come after them, for the same heads. Attention starts with the part that is here, and merges
each that arrives (`cocodiff.kernels.partial`).

Legend: B batch, S sequence, H heads, D head_dim, C channels; `_local` sizes belong to this rank.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from cocodiff.exchange import Exchange, Pending, Ring, to_heads
from cocodiff.kernels import attend_partial, merge_partial
from cocodiff.kernels.partial import Partial
from cocodiff.selective.ring import SelectiveRing
from cocodiff.state import ForwardState


class Layer(Protocol):
    """One self-attention of a model family with the rows' work around it, cut where exchanges begin and end.

    Rows are this rank's, in numbered pieces. `value`, `key` and `query` give `(B, rows, H, D)`, normed and rotated.
    """

    owner: Hashable  # the module it is the attention of: in every forward the same
    num_heads: int
    width: int  # heads x head_dim
    itemsize: int  # bytes of an element of V
    mask: Tensor | None  # which keys may be attended to, bool (B, S), stream after stream; None where all may

    def enter(self, piece: int, rows: slice, inputs: Any) -> None:
        """Take the block's input for a piece; the other methods may now be called for it."""

    def value(self, piece: int) -> Tensor: ...

    def key(self, piece: int) -> Tensor: ...

    def query(self) -> Tensor:
        """Queries of all rows, which have entered: what need not be cut is not, as small matrix products are slow."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax attention, `(B, S_query, H_local, D)`, on the device's own kernel; `mask` as in `key_mask` below."""

    def parallel_branch(self, state: ForwardState) -> Tensor | None:
        """Work on all rows that attention does not need, `(B, rows, C)`; None where there is none."""

    def finish(self, piece: int, attended: Tensor, parallel: Tensor | None) -> Any:
        """The rest of the block: the next block's input for this piece. `attended` is `(B, rows, H * D)`."""


class LayerInFlight:
    """One layer under way: V and K of the pieces that have entered are being exchanged.

    Args:
        stream: attend to its tokens only, not to all.
        whole: never cut into pieces.
    """

    def __init__(self, state: ForwardState, layer: Layer, stream: str | None = None, whole: bool = False) -> None:
        self.state, self.layer = state, layer
        self.layouts = state.layouts(layer.num_heads, stream)
        plan, connected = state.plan_layer(layer.width, layer.itemsize, stream), state.connected
        self.exchange: Exchange = connected.exchanges[plan.exchange]
        self.ring: Ring | SelectiveRing | None = connected.around
        if plan.coded:
            assert state.coding is not None
            self.exchange, self.ring = state.coding.exchanges((layer.owner, stream), connected, plan.exchange)
        count = 1 if whole else plan.pieces
        self.parts = [layout.pieces(state.rank, count) for layout in self.layouts]
        self.pieces = self.parts[state.part]
        self.pending: dict[tuple[str, int], list[Pending]] = {}  # (label, distance of the part) -> piece by piece
        self._joined: dict[str, Tensor] = {}

    def enter(self, piece: int, inputs: Any) -> None:
        """Start what attention needs all rows of. Collective: all ranks enter the same pieces in the same order."""
        self.layer.enter(piece, self.pieces[piece][0], inputs)
        with self.state.span("v"):
            value = self.layer.value(piece)
        self.send("v", piece, value)
        with self.state.span("k"):
            key = self.layer.key(piece)
        self.send("k", piece, key)

    def send(self, label: str, piece: int, x: Tensor) -> None:
        """Send a piece of V or K to the ranks of this part of the sequence, and from each on to the other parts."""
        rank, layout = self.state.rank, self.pieces[piece][1]
        batch, _, _, head_dim = x.shape
        width = layout.num_heads[rank] * head_dim
        rows = [sum(part[piece][1].seq_lens) * batch for part in self.parts]
        own = to_heads(self.exchange, x, layout, rank, label, self._place(label, piece, x))
        arriving = [own]
        if self.ring is not None:
            tickets = self.ring.start(own.ticket, rows, width, x.dtype, label)
            arriving += [Pending(ticket, own.unpack) for ticket in tickets]
        for distance, pending in enumerate(arriving):
            self.pending.setdefault((label, distance), []).append(pending)

    def _place(self, label: str, piece: int, x: Tensor) -> Tensor | None:
        """Where attention will read the piece; None where there is only one."""
        if len(self.pieces) == 1:
            return None
        lengths = [sum(layout.seq_lens) for _, layout in self.pieces]
        if piece == 0:
            heads = self.pieces[0][1].num_heads[self.state.rank]
            self._joined[label] = x.new_empty(sum(lengths), x.shape[0], heads, x.shape[-1])
        start = sum(lengths[:piece])
        return self._joined[label][start : start + lengths[piece]].view(-1)  # never a copy

    def joined(self, label: str) -> Tensor:
        """V or K of this part, `(B, S_part, H_local, D)`: piece by piece, and within a piece rank by rank."""
        with self.state.span(f"wait {label}"):
            arrived = [pending.wait() for pending in self.pending.pop((label, 0))]
        return arrived[0] if len(arrived) == 1 else self._joined.pop(label).transpose(0, 1)

    def key_mask(self, distance: int, pieces: slice = slice(None)) -> Tensor | None:
        """Which keys of these pieces of a part may be attended to, bool `(B, 1, 1, S_key)`, in the order they have.

        Args:
            distance: of the part, so many places before this one on the ring axis.
        """
        mask = self.layer.mask
        if mask is None:
            return None
        part = (self.state.part - distance) % len(self.parts)
        seq_lens, count, tokens = self.layouts[part].seq_lens, len(self.pieces), self.state.tokens

        def exchanged() -> Tensor:
            ranks = len(seq_lens)
            order = [(part * ranks + rank, rows) for rank, rows in self.layouts[part].order(count)]
            chosen = [one for first in range(count)[pieces] for one in order[first * ranks : (first + 1) * ranks]]
            return tokens.exchanged(mask, chosen)[:, None, None, :]

        return tokens.once((part, seq_lens, count, pieces.start, pieces.stop), mask, exchanged)

    def _keys(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """V, K and their mask, as they arrive: all of this part, then the others, nearest first, piece by piece."""
        yield self.joined("v"), self.joined("k"), self.key_mask(0)
        for distance in range(1, len(self.parts)):
            pairs = zip(self.pending.pop(("v", distance)), self.pending.pop(("k", distance)), strict=True)
            for piece, (value, key) in enumerate(pairs):
                with self.state.span("wait v"):
                    value_arrived = value.wait()
                with self.state.span("wait k"):
                    key_arrived = key.wait()
                yield value_arrived, key_arrived, self.key_mask(distance, slice(piece, piece + 1))

    def attended(self, queries: Sequence[Pending]) -> Iterator[Tensor]:
        """Attention of each piece of queries over all keys, `(B, S_piece, H_local, D)`: keys as they arrive."""
        span, last = self.state.span, (len(self.parts) - 1) * len(self.pieces)
        arrived: list[Tensor] = []
        merged: dict[int, Partial] = {}
        for number, (value, key, mask) in enumerate(self._keys()):
            for piece, pending in enumerate(queries):
                if number == 0:
                    with span("wait q"):
                        arrived.append(pending.wait())
                query = arrived[piece]
                with span("attend"):
                    if last == 0:
                        output = self.layer.attend(query, key, value, mask)
                    else:
                        here = attend_partial(query, key, value, mask)
                        merged[piece] = merge_partial(merged[piece], here) if number else here
                        output = merged[piece][0]
                if number == last:
                    yield output.to(query.dtype)

    def drop(self) -> None:
        """Give up what is under way. It arrives all the same: what the lanes use must not be freed before."""
        for pending in [one for several in self.pending.values() for one in several]:
            pending.wait()
