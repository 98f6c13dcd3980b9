"""What the families share: a layer made of streams, each with weights of its own, that attend jointly.

A family's file says what its streams are: how rows are normed, projected and finished. Projections are called as
modules, never by their weights, where anything is added to them (LoRA, hooks).

Legend: B batch, S sequence, H heads, D head_dim, C channels. Rows are this rank's tokens, stream after stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cocodiff.blocks import joined
from cocodiff.kernels import rotate_pairs
from cocodiff.models.fused import Fused

Norm = Callable[[Tensor], Tensor]


@dataclass
class Stream:
    """One stream of a block, on pieces of its rows; `rows` says which of this rank's rows of the stream they are.

    Attributes:
        modulated: `(x, rows)` -> normed and modulated input of the projections.
        project: "q", "k" and "v", each `(B, rows, C)` -> `(B, rows, H * D)`; or one matrix for them.
        norm_query, norm_key: of `(B, rows, H, D)`.
        finish: `(residual, attended, rows)` -> the block's output; None where its layer does that.
    """

    modulated: Callable[[Tensor, slice], Tensor]
    project: Mapping[str, Callable[[Tensor], Tensor]] | Fused
    norm_query: Norm | None
    norm_key: Norm | None
    finish: Callable[[Tensor, Tensor, slice], Tensor] | None = None


class JointLayer:
    """`cocodiff.attention.Layer` of streams that attend jointly.

    Args:
        attn: the attention module, for its heads and its processor's backend.
        streams: in joint order.
        lengths: this rank's rows of each stream.
        itemsize: bytes of an element.
        rotary: cos and sin `(S_local, D)` for this rank's joint rows, each angle twice; None where nothing is rotated.
        mask: which keys may be attended to, bool `(B, S)` of all tokens in the order of the whole streams, one stream
            after the other; None where all may.
    """

    def __init__(
        self,
        attn: Any,
        streams: Sequence[Stream],
        lengths: Sequence[int],
        itemsize: int,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self.attn, self.streams, self.rotary, self.mask = attn, list(streams), rotary, mask
        self.owner = attn
        self.num_heads: int = attn.heads
        self.width: int = attn.inner_dim
        self.itemsize = itemsize
        self.lengths = list(lengths)
        self._rows: dict[int, slice] = {}
        self.residual: dict[int, tuple[Tensor, ...]] = {}  # piece -> rows of each stream
        self.normed: dict[int, tuple[Tensor, ...]] = {}
        self._fused: dict[tuple[int, int], dict[str, Tensor]] = {}  # (stream, piece) -> by label

    def enter(self, piece: int, rows: slice, inputs: tuple[Tensor, ...]) -> None:
        self._rows[piece], self.residual[piece] = rows, inputs
        both = zip(self.streams, inputs, self.stream_rows(piece), strict=True)
        self.normed[piece] = tuple(stream.modulated(x, part) for stream, x, part in both)

    def value(self, piece: int) -> Tensor:
        return torch.cat(self.project("v", [piece]), dim=1)

    def key(self, piece: int) -> Tensor:
        parts = zip(self.streams, self.project("k", [piece]), strict=True)
        return self._rotated([_normed(stream.norm_key, part) for stream, part in parts], self._rows[piece])

    def query(self) -> Tensor:
        parts = zip(self.streams, self.project("q", list(self.normed)), strict=True)
        return self._rotated([_normed(stream.norm_query, part) for stream, part in parts], slice(None))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self.attn.processor._attention_backend)

    def parallel_branch(self, state: Any) -> Tensor | None:
        return None

    def finish(self, piece: int, attended: Tensor, beside: Tensor | None) -> Any:
        parts = attended.split([rows.stop - rows.start for rows in self.stream_rows(piece)], dim=1)
        each = zip(self.streams, self.residual[piece], parts, self.stream_rows(piece), strict=True)
        return tuple(stream.finish(residual, part, rows) for stream, residual, part, rows in each)  # type: ignore

    def stream_rows(self, piece: int) -> list[slice]:
        """Which rows of each stream a piece has."""
        return rows_within(self._rows[piece], self.lengths)

    def project(self, label: str, pieces: Sequence[int]) -> list[Tensor]:
        """`(B, rows, H, D)` of each stream, the rows of these pieces, by one of its projections."""
        parts = []
        for index, stream in enumerate(self.streams):
            if isinstance(stream.project, Fused) and stream.project.at_once:
                part = _cat([self._all(index, piece)[label] for piece in pieces])
            else:
                x = _cat([self.normed[piece][index] for piece in pieces])
                one = stream.project
                part = one.one(label, x) if isinstance(one, Fused) else one[label](x)
            parts.append(part.unflatten(-1, (self.num_heads, -1)) if label in "qkv" else part)
        return parts

    def _all(self, index: int, piece: int) -> dict[str, Tensor]:
        fused = self.streams[index].project
        assert isinstance(fused, Fused)
        if (index, piece) not in self._fused:
            self._fused[index, piece] = fused.all(self.normed[piece][index])
        return self._fused[index, piece]

    def _rotated(self, parts: list[Tensor], rows: slice) -> Tensor:
        joint = torch.cat(parts, dim=1)
        return joint if self.rotary is None else rotate_pairs(joint, *(angles[rows] for angles in self.rotary))


class ParallelLayer(JointLayer):
    """A block of one stream with an MLP beside attention, and one matrix after both.

    Args:
        lengths: rows of each tensor that the block is called with; their rows are one stream.
        mlp: of this layer -> `(B, rows, C_mlp)` of all its rows.
        out: of `(B, rows, H * D + C_mlp)`, gated: the block's change of the residual.
    """

    def __init__(
        self,
        attn: Any,
        stream: Stream,
        lengths: Sequence[int],
        itemsize: int,
        rotary: tuple[Tensor, Tensor] | None,
        mlp: Callable[[ParallelLayer], Tensor],
        out: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(attn, [stream], [sum(lengths)], itemsize, rotary)
        self._parts, self._mlp, self._out = list(lengths), mlp, out

    def enter(self, piece: int, rows: slice, inputs: tuple[Tensor, ...]) -> None:
        super().enter(piece, rows, (torch.cat(inputs, dim=1) if len(inputs) > 1 else inputs[0],))

    def parallel_branch(self, state: Any) -> Tensor:
        return self._mlp(self)

    def finish(self, piece: int, attended: Tensor, beside: Tensor | None) -> tuple[Tensor, ...]:
        assert beside is not None
        out = clipped(self.residual[piece][0] + self._out(torch.cat([attended, beside], dim=2)))
        return out.split([part.stop - part.start for part in rows_within(self._rows[piece], self._parts)], dim=1)

    def normed_all(self) -> Tensor:
        return _cat([normed for (normed,) in self.normed.values()])

    def project_all(self, label: str) -> Tensor:
        """One of the stream's projections of all rows."""
        return self.project(label, list(self.normed))[0]


def gated_stream(
    mods: Callable[[slice], Sequence[Tensor]],
    norm: Norm,
    project: Mapping[str, Callable[[Tensor], Tensor]] | Fused,
    norms: tuple[Norm | None, Norm | None],
    out: Callable[[Tensor], Tensor],
    norm_ff: Norm,
    ff: Callable[[Tensor], Tensor],
    *,
    clip: bool = False,
) -> Stream:
    """The stream of a double block: modulated attention, gated; then a modulated feed-forward, gated (adaLN).

    Args:
        mods: rows -> shift, scale and gate of attention, then those of the feed-forward; each fits `(B, rows, C)`.
        norms: of queries and keys.
        clip: to float16's range at the end.
    """

    def modulated(x: Tensor, rows: slice) -> Tensor:
        shift, scale = mods(rows)[:2]
        return norm(x) * (1 + scale) + shift

    def finish(residual: Tensor, attended: Tensor, rows: slice) -> Tensor:
        gate, shift, scale, gate_ff = mods(rows)[2:]
        x = residual + gate * out(attended)
        x = x + gate_ff * ff(norm_ff(x) * (1 + scale) + shift)
        return clipped(x) if clip else x

    return Stream(modulated, project, *norms, finish)


def to_out(attn: Any) -> Callable[[Tensor], Tensor]:
    """The output projection of diffusers' attention modules, and the dropout after it."""
    return lambda x: attn.to_out[1](attn.to_out[0](x))


def separate(attn: Any, *names: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """The projections of these names, for Q, K and V."""
    return {label: getattr(attn, name) for label, name in zip("qkv", names, strict=True)}


def rows_within(rows: slice, lengths: Sequence[int]) -> list[slice]:
    """Rows of several tensors in a row -> which rows of each.

    >>> rows_within(slice(2, 6), [3, 5])
    [slice(2, 3, None), slice(0, 3, None)]
    """
    found, start = [], 0
    for length in lengths:
        first, last = (min(max(at - start, 0), length) for at in (rows.start, rows.stop))
        found.append(slice(first, last))
        start += length
    return found


def clipped(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return joined([[part] for part in parts])[0]
