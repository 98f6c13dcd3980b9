"""The heart: one attention layer over sequence shards, V first. A new reader starts here.

Ulysses (arXiv 2309.14509) computes attention over all tokens for a few heads on each rank: V, K and Q are exchanged
from "my tokens, all heads" to "all tokens, my heads", and the output back. Exact; the art is in *when*. All work but
attention itself goes by rows, so this rank's rows are cut into pieces, and a piece goes on as soon as it can:

    compute:  V K 0 | V K 1 | Q | branch | attend 0 | attend 1 | finish 0, V K 0 of the next layer | finish 1, V K 1 ..
    link:       v ── k ── v ── k ── q 0 ── q 1 ─────── o 0 ─────── o 1 ──────────── v ── k of the next layer ── v ── k

- V needs neither norm nor rotation, so it is projected first and travels while K is made (CoCoDiff, arXiv 2604.14561).
  Attention needs all rows of K and V but only those rows of Q that it works on: so Q is made and travels last.
- The parallel branch is what attention does not need (the MLP of FLUX's single blocks): it runs under Q's exchange.
- The output returns piece by piece. Whatever follows row by row (output projection, gates, feed-forward) runs on the
  rows that have arrived, and on to V and K of the *next* layer, so that the link has work between two layers, too.

Legend: B batch, S sequence, H heads, D head_dim, C channels; `_local` sizes belong to this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from cocodiff.exchange import Pending, to_heads, to_sequence
from cocodiff.layer import Layer, LayerInFlight
from cocodiff.state import ForwardState


def attention(in_flight: LayerInFlight, ahead: LayerInFlight | None) -> list[Any]:
    """Run the rest of a layer whose pieces have entered: what `layer.finish` gave, in the order of rows.

    Each finished piece enters `ahead`, the next layer, if there is one and it is cut like this one.
    """
    state, layer, exchange, pieces = in_flight.state, in_flight.layer, in_flight.exchange, in_flight.pieces
    rank, span = state.rank, state.span

    with span("q"):
        query = layer.query()
    query_pending = [to_heads(exchange, query[:, rows], layout, rank, "q") for rows, layout in pieces]
    del query  # packed for the lanes

    with span("parallel"):
        parallel = layer.parallel_branch(state)

    output_pending: list[Pending] = []
    finished: list[Any] = []

    def finish() -> None:
        piece = len(finished)
        with span("wait o"):
            attended = output_pending[piece].wait()
        with span("finish"):
            rows = None if parallel is None else parallel[:, pieces[piece][0]]
            finished.append(layer.finish(piece, attended, rows))
        if ahead is not None:
            ahead.enter(piece, finished[piece])

    for piece, output in enumerate(in_flight.attended(query_pending)):
        output_pending.append(to_sequence(exchange, output, pieces[piece][1], rank, "o"))
        if state.output_stays_inside:
            finish()
    while len(finished) < len(pieces):
        finish()
    return finished


def sequential(state: ForwardState, layer: Layer, inputs: Any) -> list[Any]:
    """Run a layer in the textbook order: nothing overlaps, the same elements."""
    layer.enter(0, slice(0, sum(state.tokens.mine)), inputs)
    with state.span("parallel"):
        parallel = layer.parallel_branch(state)
    attended = attended_whole(state, layer)
    with state.span("finish"):
        return [layer.finish(0, attended, parallel)]


def attended_whole(state: ForwardState, layer: Layer, stream: str | None = None) -> Tensor:
    """Attend with a layer that entered in one piece, `(B, S_local, H * D)`: V first, or in the textbook order.

    A second attention of a block, over the tokens of one `stream`, runs so, too.
    """
    in_flight, overlapped = LayerInFlight(state, layer, stream, whole=True), state.call.plan.schedule != "sequential"
    rank, span, exchange, layout = state.rank, state.span, in_flight.exchange, in_flight.pieces[0][1]
    projections: dict[str, Callable[[], Tensor]] = {
        "v": partial(layer.value, 0),
        "k": partial(layer.key, 0),
        "q": layer.query,
    }
    queries: list[Pending] = []
    for label in "vkq" if overlapped else "qkv":
        with span(label):
            x = projections[label]()
        if label == "q":
            queries.append(to_heads(exchange, x, layout, rank, label))
        else:
            in_flight.send(label, 0, x)
        if not overlapped:
            with span(f"wait {label}"):
                sent = queries if label == "q" else in_flight.pending[label, len(in_flight.parts) - 1]
                sent[0].ticket.wait()
    (output,) = in_flight.attended(queries)
    with span("wait o"):
        return to_sequence(exchange, output, layout, rank, "o").wait()
