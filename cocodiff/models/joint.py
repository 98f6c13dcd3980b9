"""Layers at run time: they hold what has entered a block, piece by piece, and run the stages of its spec on it.

Legend: B batch, S sequence, H heads, D head_dim, C channels. Rows are this rank's tokens, stream after stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cocodiff.blocks import joined
from cocodiff.compat import is_plain_linear
from cocodiff.errors import ConfigError
from cocodiff.kernels import rotate_pairs
from cocodiff.layer import Layer
from cocodiff.models.fused import FusedPart
from cocodiff.models.stages import Arguments, BlockSpec, Mods
from cocodiff.parallel.tokens import Tokens


def make_layer(spec: BlockSpec, tokens: Tokens, block: Any, arguments: Arguments) -> Layer:
    """The layer of one call of a block.

    Args:
        arguments: of the block's forward, but for those that hold tokens. ConfigError for one that the spec does not
            name.
    """
    if unknown := sorted(arguments.keys() - set(spec.arguments)):
        raise ConfigError(
            f"{spec.name} was called with {', '.join(unknown)}, which cocodiff does not know. "
            "docs/adding-a-model.md tells how to add it."
        )
    cuts = {name: stream for name, stream in spec.cuts.items() if arguments.get(name) is not None}
    arguments = {**arguments, **{name: arguments[name][:, tokens.rows(stream)] for name, stream in cuts.items()}}
    return spec.layer(
        spec,
        block,
        tokens.mine if len(spec.streams) > 1 else (sum(tokens.mine),),
        [stream.modulation(block, arguments) for stream in spec.streams],
        arguments[spec.like].itemsize,
        tuple(arguments[name] for name in spec.context),
        spec.rotary(tokens, arguments),
        spec.mask(tokens, arguments),
    )


@dataclass
class _Piece:
    """What has entered, stream by stream.

    Attributes:
        rows: which of this rank's joint rows.
        whole: stream -> what a fused matrix made, called as a module.
        sizes: rows of each of the block's inputs, where one stream comes in several.
    """

    rows: slice
    mods: list[Mods]
    residual: tuple[Tensor, ...]
    normed: tuple[Tensor, ...]
    whole: dict[int, Tensor] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)


class JointLayer:
    """`cocodiff.layer.Layer` of streams that attend jointly.

    Args:
        lengths: this rank's rows of each stream.
        mods: of each stream.
        itemsize: bytes of an element.
        context: more arguments of the streams' `finish`.
        rotary, mask: as in `BlockSpec`.
    """

    def __init__(
        self,
        spec: BlockSpec,
        block: Any,
        lengths: Sequence[int],
        mods: Sequence[Mods],
        itemsize: int,
        context: tuple[Any, ...] = (),
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self.spec, self.block, self.lengths, self.mods = spec, block, lengths, mods
        self.itemsize, self.context, self.rotary, self.mask = itemsize, context, rotary, mask
        self.owner = self.attn = getattr(block, spec.attention)
        self.num_heads: int = self.attn.heads
        self.width: int = self.attn.inner_dim
        self.projections = [stream.projections(self.attn) for stream in spec.streams]
        self.pieces: dict[int, _Piece] = {}

    def enter(self, piece: int, rows: slice, inputs: tuple[Tensor, ...]) -> None:
        parts = zip(self.mods, rows_within(rows, self.lengths), strict=True)
        mods = [tuple(mod if mod.shape[1] == 1 else mod[:, part] for mod in several) for several, part in parts]
        each = zip(self.spec.streams, mods, inputs, strict=True)
        normed = tuple(stream.modulate(self.block, several, x) for stream, several, x in each)
        self.pieces[piece] = _Piece(rows, mods, inputs, normed)

    def value(self, piece: int) -> Tensor:
        return torch.cat(self._heads("v", [piece]), dim=1)

    def key(self, piece: int) -> Tensor:
        return self._rotated("k", self._heads("k", [piece]), self.pieces[piece].rows)

    def query(self) -> Tensor:
        return self._rotated("q", self._heads("q", list(self.pieces)), slice(None))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

        # SD3's processors know no backend: they attend natively, whatever is set for all.
        backend = getattr(self.attn.processor, "_attention_backend", AttentionBackendName.NATIVE)
        return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend)

    def parallel_branch(self, state: Any) -> Tensor | None:
        return None

    def finish(self, piece: int, attended: Tensor, parallel: Tensor | None) -> tuple[Tensor, ...]:
        entered = self.pieces[piece]
        parts = attended.split([residual.shape[1] for residual in entered.residual], dim=1)
        each = zip(self.spec.streams, entered.mods, entered.residual, parts, strict=True)
        return tuple(
            stream.finish(self.block, mods, residual, part, *self.context) for stream, mods, residual, part in each
        )

    def project(self, stream: int, label: str, pieces: Sequence[int]) -> Tensor:
        """`(B, rows, C_out)`: one of a stream's projections, of the rows of these pieces."""
        projection = self.projections[stream][label]
        if not isinstance(projection, FusedPart) or is_plain_linear(projection.linear):
            return projection(_cat([self.pieces[piece].normed[stream] for piece in pieces]))
        parts = []
        for piece in (self.pieces[number] for number in pieces):
            if stream not in piece.whole:
                piece.whole[stream] = projection.linear(piece.normed[stream])
            parts.append(piece.whole[stream][..., projection.rows])
        return _cat(parts)

    def _heads(self, label: str, pieces: Sequence[int]) -> list[Tensor]:
        """`(B, rows, H, D)` of each stream."""
        streams = range(len(self.projections))
        return [self.project(stream, label, pieces).unflatten(-1, (self.num_heads, -1)) for stream in streams]

    def _rotated(self, label: str, parts: Sequence[Tensor], rows: slice) -> Tensor:
        """Queries or keys of all streams, normed and rotated. `rows`: which of this rank's joint rows they are."""
        each = zip(self.spec.streams, parts, strict=True)
        joint = torch.cat([stream.norm(self.attn, label, part) for stream, part in each], dim=1)
        return joint if self.rotary is None else rotate_pairs(joint, *(angles[rows] for angles in self.rotary))


class ParallelLayer(JointLayer):
    """A block of one stream with an MLP that needs no attention, and one matrix after both.

    Its rows may come in several tensors (text, image), and leave so. `finish` of its stream gets `(B, rows, H * D +
    C_mlp)`: the output of attention, then that of the parallel branch.
    """

    def enter(self, piece: int, rows: slice, inputs: tuple[Tensor, ...]) -> None:
        super().enter(piece, rows, (torch.cat(inputs, dim=1) if len(inputs) > 1 else inputs[0],))
        self.pieces[piece].sizes = [x.shape[1] for x in inputs]

    def parallel_branch(self, state: Any) -> Tensor:
        assert self.spec.parallel_branch is not None
        if "mlp" in self.projections[0]:
            x = self.project(0, "mlp", list(self.pieces))
        else:
            x = _cat([piece.normed[0] for piece in self.pieces.values()])
        return self.spec.parallel_branch(self.block, self.mods[0], x)

    def finish(self, piece: int, attended: Tensor, parallel: Tensor | None) -> tuple[Tensor, ...]:
        assert parallel is not None
        (out,) = super().finish(piece, torch.cat([attended, parallel], dim=2), None)
        return out.split(self.pieces[piece].sizes, dim=1)


def rows_within(rows: slice, lengths: Sequence[int]) -> list[slice]:
    """Which rows of each of several tensors, one after the other, these rows of all are.

    >>> rows_within(slice(2, 6), [3, 5])
    [slice(2, 3, None), slice(0, 3, None)]
    """
    found, start = [], 0
    for length in lengths:
        first, last = (min(max(at - start, 0), length) for at in (rows.start, rows.stop))
        found.append(slice(first, last))
        start += length
    return found


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return joined([[part] for part in parts])[0]
