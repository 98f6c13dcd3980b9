"""Send and receive layouts of the Ulysses exchange (plain-torch references).

A send buffer is one-dimensional: blocks, one per destination rank, one behind the other. A block is `(S, B, H, D)`,
tokens outermost, so that what arrives from ranks 0, 1, 2, ... is already the global sequence: the receiving side of
`pack_heads` is a view, and for B = 1 so is the sending side of `pack_rows`.

Legend: B batch, S sequence, H heads, D head_dim. "Local" sizes belong to this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def _concatenate(parts: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """One buffer of the parts in the given order, each copied once, straight into its place."""
    buffer = parts[0].new_empty(sum(part.numel() for part in parts))
    start = 0
    for index in order:
        part = parts[index]
        buffer[start : start + part.numel()].view(part.shape).copy_(part)
        start += part.numel()
    return buffer


def pack_heads(x: Tensor, num_heads: Sequence[int], order: Sequence[int]) -> Tensor:
    """Send buffer for sequence shard -> head shard: every local token, split by heads.

    Args:
        x: `(B, S_local, H, D)`, all heads of this rank's tokens.
        num_heads: heads of each rank, `sum(num_heads) == H`.
        order: destination ranks in the order in which their blocks stand in the buffer.

    Returns:
        `(numel,)`: for each destination a block `(S_local, B, num_heads[destination], D)`.

    >>> import torch
    >>> pack_heads(torch.arange(4.0).view(1, 2, 2, 1), [1, 1], order=[0, 1]).tolist()
    [0.0, 2.0, 1.0, 3.0]
    """
    return _concatenate(x.transpose(0, 1).split(list(num_heads), dim=2), order)


def unpack_heads(buffer: Tensor, batch: int, num_heads_local: int, head_dim: int) -> Tensor:
    """What `pack_heads` of all ranks sent here, in rank order, as `(B, S, H_local, D)`: a view, nothing moves.

    >>> import torch
    >>> unpack_heads(torch.arange(4.0), batch=1, num_heads_local=1, head_dim=1).shape
    torch.Size([1, 4, 1, 1])
    """
    return buffer.view(-1, batch, num_heads_local, head_dim).transpose(0, 1)


def pack_rows(x: Tensor, seq_lens: Sequence[int], order: Sequence[int]) -> Tensor:
    """Send buffer for head shard -> sequence shard: the local heads, split by tokens.

    Args:
        x: `(B, S, H_local, D)`, this rank's heads of every token, tokens in rank order.
        seq_lens: tokens of each rank, `sum(seq_lens) == S`.
        order: destination ranks in the order in which their blocks stand in the buffer.

    Returns:
        `(numel,)`: for each destination a block `(seq_lens[destination], B, H_local, D)`.

    >>> import torch
    >>> pack_rows(torch.arange(4.0).view(1, 4, 1, 1), [3, 1], order=[1, 0]).tolist()
    [3.0, 0.0, 1.0, 2.0]
    """
    rows = x.transpose(0, 1)
    if rows.is_contiguous() and all(rank == place for place, rank in enumerate(order)):
        return rows.reshape(-1)
    return _concatenate(rows.split(list(seq_lens), dim=0), order)


def unpack_rows(buffer: Tensor, batch: int, num_heads: Sequence[int], head_dim: int) -> Tensor:
    """What `pack_rows` of all ranks sent here, in rank order: their heads joined again for the local tokens.

    Returns:
        `(B, S_local, H * D)`, contiguous, as an output projection reads it.

    >>> import torch
    >>> unpack_rows(torch.arange(4.0), batch=1, num_heads=[1, 1], head_dim=1).tolist()
    [[[0.0, 2.0], [1.0, 3.0]]]
    """
    heads = sum(num_heads)
    seq_len_local = buffer.numel() // (batch * heads * head_dim)
    out = buffer.new_empty(batch, seq_len_local, heads, head_dim)
    start = first = 0
    for count in num_heads:
        numel = seq_len_local * batch * count * head_dim
        block = buffer[start : start + numel].view(seq_len_local, batch, count, head_dim)
        out[:, :, first : first + count].copy_(block.transpose(0, 1))
        start, first = start + numel, first + count
    return out.flatten(2)
