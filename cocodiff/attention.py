"""The heart: one attention layer over sequence shards, V first. A new reader starts here.

Ulysses (arXiv 2309.14509) computes attention over all tokens for a few heads on each rank: V, K and Q are exchanged
from "my tokens, all heads" to "all tokens, my heads", and the output back. Exact; the art is in *when*. All work but
attention itself goes by rows, so this rank's rows are cut into pieces, and a piece goes on as soon as it can:

    compute:  V K 0 | V K 1 | Q | beside | attend 0 | attend 1 | finish 0, V K 0 of the next layer | finish 1, V K 1 ..
    link:       v ── k ── v ── k ── q 0 ── q 1 ─────── o 0 ─────── o 1 ──────────── v ── k of the next layer ── v ── k

- V needs neither norm nor rotation, so it is projected first and travels while K is made (CoCoDiff, arXiv 2604.14561).
  Attention needs all rows of K and V but only those rows of Q that it works on: so Q is made and travels last.
- `beside` is work that attention does not need (FLUX's single blocks have a parallel MLP): it runs under Q's exchange.
- The output returns piece by piece. Whatever follows row by row (output projection, gates, feed-forward) runs on the
  rows that have arrived, and on to V and K of the *next* layer, so that the link has work between two layers, too.

Legend: B batch, S sequence, H heads, D head_dim, C channels; `_local` sizes belong to this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from cocodiff.engine import Engine
from cocodiff.exchange import Layout, Pending, to_heads, to_sequence


class Layer(Protocol):
    """One self-attention of a model family with the rows' work around it, cut where exchanges begin and end.

    Rows are this rank's, in numbered pieces. `value`, `key` and `query` give `(B, rows, H, D)`, normed and rotated.
    """

    num_heads: int
    width: int  # heads x head_dim
    itemsize: int  # bytes of an element of V

    def enter(self, piece: int, rows: slice, inputs: Any) -> None:
        """Take the block's input for a piece; the other methods may now be called for it."""

    def value(self, piece: int) -> Tensor: ...

    def key(self, piece: int) -> Tensor: ...

    def query(self) -> Tensor:
        """Of all rows, which have entered: what need not be cut is not, since small matrix products are slow ones."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Softmax attention, `(B, S_query, H_local, D)`, on the device's own kernel.

        Keys and values lie piece by piece, and within a piece rank by rank (`Layout.order`); a mask must follow that.
        """

    def beside(self) -> Tensor | None:
        """Work on all rows that attention does not need, `(B, rows, C)`; None where there is none."""

    def finish(self, piece: int, attended: Tensor, beside: Tensor | None) -> Any:
        """The rest of the block: the next block's input for this piece. `attended` is `(B, rows, H * D)`."""


class Flight:
    """One layer under way: V and K of the pieces that have entered are being exchanged."""

    def __init__(self, engine: Engine, layer: Layer) -> None:
        self.engine, self.layer, self.layout = engine, layer, engine.layout(layer.num_heads)
        self.exchange, count = engine.plan(self.layout, layer.width, layer.itemsize)
        self.pieces = self.layout.pieces(engine.rank, count)
        self.pending: dict[str, list[Pending]] = {"v": [], "k": []}
        self._joined: dict[str, Tensor] = {}

    def enter(self, piece: int, inputs: Any) -> None:
        """Start what attention needs all rows of. Collective: all ranks enter the same pieces in the same order."""
        self.layer.enter(piece, self.pieces[piece][0], inputs)
        with self.engine.span("v"):
            value = self.layer.value(piece)
        self._send("v", piece, value)
        with self.engine.span("k"):
            key = self.layer.key(piece)
        self._send("k", piece, key)

    def joined(self, label: str) -> Tensor:
        """V or K of all tokens, `(B, S, H_local, D)`: piece by piece, and within a piece rank by rank."""
        with self.engine.span(f"wait {label}"):
            arrived = [pending.wait() for pending in self.pending.pop(label)]
        return arrived[0] if len(arrived) == 1 else self._joined.pop(label).transpose(0, 1)

    def drop(self) -> None:
        """Give up what is under way. It arrives all the same: what the lanes use must not be freed before."""
        for pending in [one for several in self.pending.values() for one in several]:
            pending.wait()

    def _send(self, label: str, piece: int, x: Tensor) -> None:
        rank, layout = self.engine.rank, self.pieces[piece][1]
        place = None
        if len(self.pieces) > 1:  # pieces arrive where attention reads them
            if piece == 0:
                batch, heads, head_dim = x.shape[0], self.layout.num_heads[rank], x.shape[-1]
                self._joined[label] = x.new_empty(sum(self.layout.seq_lens), batch, heads, head_dim)
            start = sum(sum(before.seq_lens) for _, before in self.pieces[:piece])
            place = self._joined[label][start : start + sum(layout.seq_lens)].view(-1)  # never a copy
        self.pending[label].append(to_heads(self.exchange, x, layout, rank, label, place))


def attention(flight: Flight, ahead: Flight | None) -> list[Any]:
    """The rest of a layer whose pieces have entered, V first: what `layer.finish` gave, in the order of rows.

    Each finished piece enters `ahead`, the next layer, if there is one and it is cut like this one.
    """
    engine, layer, exchange, pieces = flight.engine, flight.layer, flight.exchange, flight.pieces
    rank, span = engine.rank, engine.span

    with span("q"):
        query = layer.query()
    query_pending = [to_heads(exchange, query[:, rows], layout, rank, "q") for rows, layout in pieces]
    del query  # packed for the lanes

    with span("beside"):
        beside = layer.beside()

    value, key = flight.joined("v"), flight.joined("k")
    output_pending = []
    for pending, (_, layout) in zip(query_pending, pieces, strict=True):
        with span("wait q"):
            query = pending.wait()
        with span("attend"):
            output = layer.attend(query, key, value).to(query.dtype)
        output_pending.append(to_sequence(exchange, output, layout, rank, "o"))

    finished = []
    for piece, (pending, (rows, _)) in enumerate(zip(output_pending, pieces, strict=True)):
        with span("wait o"):
            attended = pending.wait()
        with span("finish"):
            finished.append(layer.finish(piece, attended, None if beside is None else beside[:, rows]))
        if ahead is not None:
            ahead.enter(piece, finished[piece])
    return finished


def sequential(engine: Engine, layer: Layer, inputs: Any) -> list[Any]:
    """The textbook order: nothing overlaps, the same elements."""
    layout = engine.layout(layer.num_heads)
    layer.enter(0, slice(0, layout.seq_lens[engine.rank]), inputs)
    with engine.span("beside"):
        beside = layer.beside()
    attended = attended_whole(engine, layer, layout)
    with engine.span("finish"):
        return [layer.finish(0, attended, beside)]


def attended_whole(engine: Engine, layer: Layer, layout: Layout) -> Tensor:
    """Attention of a layer that entered in one piece, `(B, S_local, H * D)`: V first, or in the textbook order.

    For attention beside that of a block, too: over `layout`'s tokens, which need not be those of the forward.
    """
    rank, span = engine.rank, engine.span
    exchange, _ = engine.plan(layout, layer.width, layer.itemsize)
    in_flight = engine.config.schedule != "sequential"
    projections: dict[str, Callable[[], Tensor]] = {
        "v": partial(layer.value, 0),
        "k": partial(layer.key, 0),
        "q": layer.query,
    }
    shards, started, arrived = {}, {}, {}
    for label in "vkq" if in_flight else "qkv":
        with span(label):
            shards[label] = projections[label]()
        if in_flight:
            started[label] = to_heads(exchange, shards.pop(label), layout, rank, label)
    for label in "vkq" if in_flight else "qkv":
        with span(f"wait {label}"):
            pending = started.get(label) or to_heads(exchange, shards.pop(label), layout, rank, label)
            arrived[label] = pending.wait()
    with span("attend"):
        output = layer.attend(arrived["q"], arrived["k"], arrived["v"]).to(arrived["q"].dtype)
    with span("wait o"):
        return to_sequence(exchange, output, layout, rank, "o").wait()
