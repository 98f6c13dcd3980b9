"""Which tokens of which stream each rank holds while the transformer runs on shards."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cocodiff.errors import ConfigError
from cocodiff.parallel.layout import split_sizes


@dataclass(frozen=True)
class Tokens:
    """Tokens of one sequence, per stream and rank, and which rank this is.

    A rank's joint sequence is its shard of every stream, in the order of `streams`.

    After an exchange the global order is therefore rank by rank (text 0, image 0, text 1, image 1, ...): any mask must
    follow it, attention without a mask does not care.
    """

    streams: Mapping[str, tuple[int, ...]]
    rank: int = 0
    _made: dict[Hashable, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def split(cls, lengths: Mapping[str, int], num_ranks: int, rank: int = 0) -> Tokens:
        """Ragged and balanced: shards of a stream differ by at most a token, and so do joint sequences of two streams.

        >>> Tokens.split({"text": 7, "image": 9}, 4).joint
        (4, 4, 4, 4)
        """
        streams = {
            name: split_sizes(length, num_ranks, larger_last=bool(index % 2))
            for index, (name, length) in enumerate(lengths.items())
        }
        tokens = cls(streams, rank)
        if min(tokens.joint) < 1:
            total = " + ".join(f"{length} {name}" for name, length in lengths.items())
            raise ConfigError(
                f"{total} tokens cannot be shared among {num_ranks} ranks: every rank needs one. "
                f"Use at most {sum(lengths.values())} ranks or a larger picture."
            )
        return tokens

    @property
    def joint(self) -> tuple[int, ...]:
        """Tokens of each rank's joint sequence."""
        return tuple(sum(parts) for parts in zip(*self.streams.values(), strict=True))

    def rows(self, stream: str, rank: int | None = None) -> slice:
        """Where a rank's shard of a stream lies in the whole stream; this rank's, unless another is named."""
        sizes, rank = self.streams[stream], self.rank if rank is None else rank
        start = sum(sizes[:rank])
        return slice(start, start + sizes[rank])

    @property
    def mine(self) -> tuple[int, ...]:
        """This rank's tokens of each stream."""
        return tuple(sizes[self.rank] for sizes in self.streams.values())

    def once(self, key: Hashable, source: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, made once for a key and a source: the layers of a forward have one mask.

        >>> tokens, valid = Tokens.split({"text": 2}, 1), torch.ones(1, 2)
        >>> tokens.once("mask", valid, lambda: valid > 0) is tokens.once("mask", valid, lambda: valid > 0)
        True
        """
        made = self._made.get(key)
        if made is None or made[0] is not source:
            self._made[key] = made = source, make()
        return made[1]

    def exchanged(self, whole: Tensor, joint_rows: Sequence[tuple[int, slice]]) -> Tensor:
        """`(B, S)` of all tokens, stream after stream -> those of these joint rows of ranks, in this order.

        >>> tokens = Tokens.split({"text": 2, "image": 4}, 2)
        >>> tokens.exchanged(torch.tensor([[10, 11, 20, 21, 22, 23]]), [(0, slice(0, 3)), (1, slice(0, 3))]).tolist()
        [[10, 20, 21, 11, 22, 23]]
        """
        parts = whole.split([sum(sizes) for sizes in self.streams.values()], dim=1)
        joint = [
            torch.cat([part[:, self.rows(name, rank)] for name, part in zip(self.streams, parts, strict=True)], dim=1)
            for rank in range(len(self.joint))
        ]
        return torch.cat([joint[rank][:, rows] for rank, rows in joint_rows], dim=1)
