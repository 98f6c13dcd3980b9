"""The heart: one attention layer over sequence shards, V first. A new reader starts here.

Ulysses (arXiv 2309.14509) computes attention over all tokens for a few heads on each rank: V, K and Q are exchanged
from "my tokens, all heads" to "all tokens, my heads", and the output back. Exact; the art is in *when*:

    compute:  V | K    | Q        | beside (first half) | attend 0 | attend 1 | beside | finish 0 | finish 1
    lanes:        v ───── k ───── q0 ── q1                          o0 ──────── o1

- V needs neither norm nor rotation, so it is projected first and travels while K and Q are made (CoCoDiff, arXiv
  2604.14561). K goes next and Q last, in pieces of query rows: attention needs all of K and V, but only the rows of Q
  that it works on. So what may still be in flight when attention starts is as little as possible.
- The output returns piece by piece, too, and whatever follows attention row by row (output projection, gates, feed-
  forward) runs on the rows that have arrived.
- `beside` is work that attention does not need (FLUX's single blocks have a parallel MLP): half of it runs under the
  exchanges towards attention, half under those back.

Legend: B batch, S sequence, H heads, D head_dim, C channels; `_local` sizes belong to this rank.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from cocodiff.engine import Engine
from cocodiff.exchange import to_heads, to_sequence


class Layer(Protocol):
    """One self-attention of a model family, cut where exchanges begin and end. Rows are local tokens.

    `value`, `key` and `query` give `(B, S_local, H, D)`, normed and rotated. Everything else works on rows alone.
    """

    num_heads: int

    def value(self) -> Tensor: ...

    def key(self) -> Tensor: ...

    def query(self) -> Tensor: ...

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Softmax attention, `(B, S_query, H_local, D)`, on the device's own kernel."""

    def beside(self, rows: slice) -> Tensor | None:
        """Work on these rows that attention does not need, `(B, rows, C)`; None where there is none."""

    def finish(self, rows: slice, attended: Tensor, beside: Tensor | None) -> Any:
        """The rest of the block for these rows; `attended` is `(B, rows, H * D)` before the output projection."""


def attention(engine: Engine, layer: Layer) -> list[Any]:
    """Run one layer by the configured schedule; what `layer.finish` gave, piece by piece in the order of rows."""
    return _sequential(engine, layer) if engine.config.schedule == "sequential" else _v_first(engine, layer)


def _v_first(engine: Engine, layer: Layer) -> list[Any]:
    rank, layout, span = engine.rank, engine.layout(layer.num_heads), engine.span

    with span("v"):
        value = layer.value()
    exchange, num_pieces = engine.plan(layout, value.shape[-2] * value.shape[-1] * value.itemsize)
    pieces = layout.pieces(rank, num_pieces)
    value_pending = to_heads(exchange, value, layout, rank, "v")
    with span("k"):
        key = layer.key()
    key_pending = to_heads(exchange, key, layout, rank, "k")
    with span("q"):
        query = layer.query()
    query_pending = [to_heads(exchange, query[:, rows], part, rank, "q") for rows, part in pieces]
    del value, key, query  # the lanes keep what they still send

    chunks = [rows for rows, _ in (pieces if num_pieces > 1 else layout.pieces(rank, 2))]
    before, after = chunks[: len(chunks) // 2], chunks[len(chunks) // 2 :]
    with span("beside"):
        beside = [layer.beside(rows) for rows in before]

    key, value = key_pending.wait(), value_pending.wait()
    output_pending = []
    for pending, (_, part) in zip(query_pending, pieces, strict=True):
        query = pending.wait()
        with span("attend"):
            output = layer.attend(query, key, value).to(query.dtype)
        output_pending.append(to_sequence(exchange, output, part, rank, "o"))
    with span("beside"):
        beside += [layer.beside(rows) for rows in after]
    if num_pieces == 1:
        beside = [None if beside[0] is None else torch.cat([part for part in beside if part is not None], dim=1)]

    finished = []
    for pending, (rows, _), done_beside in zip(output_pending, pieces, beside, strict=True):
        attended = pending.wait()
        with span("finish"):
            finished.append(layer.finish(rows, attended, done_beside))
    return finished


def _sequential(engine: Engine, layer: Layer) -> list[Any]:
    """The textbook order: nothing overlaps, the same elements."""
    rank, layout, span = engine.rank, engine.layout(layer.num_heads), engine.span
    rows = slice(0, layout.seq_lens[rank])

    with span("beside"):
        beside = layer.beside(rows)
    shards = []
    for label, project in (("q", layer.query), ("k", layer.key), ("v", layer.value)):
        with span(label):
            shards.append(project())
    exchange, _ = engine.plan(layout, shards[0].shape[-2] * shards[0].shape[-1] * shards[0].itemsize)
    query, key, value = (
        to_heads(exchange, shard, layout, rank, label).wait() for label, shard in zip("qkv", shards, strict=True)
    )
    with span("attend"):
        output = layer.attend(query, key, value).to(query.dtype)
    attended = to_sequence(exchange, output, layout, rank, "o").wait()
    with span("finish"):
        return [layer.finish(rows, attended, beside)]
