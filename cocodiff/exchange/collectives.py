"""Gathers and comparisons between the ranks of an axis; each is collective over its transport's ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from cocodiff.exchange.transport import Transport

SKETCH = 64  # sums of a tensor by which it is compared


def gather_rows(x: Tensor, seq_lens: tuple[int, ...], transport: Transport) -> Tensor:
    """Gather `(B, S_local, C)` shards of every rank to `(B, S, C)` on every rank, tokens in rank order.

    Ragged shards travel padded to the longest (they differ by a token): one collective that every backend has.
    """
    if transport.size == 1:
        return x
    batch, seq_len_local, channels = x.shape
    padded = x.new_zeros(max(seq_lens), batch, channels)
    padded[:seq_len_local] = x.transpose(0, 1)
    gathered = transport.all_gather(padded, "gather").wait()
    return torch.cat([part[:length] for part, length in zip(gathered, seq_lens, strict=True)]).transpose(0, 1)


def differs(tensors: Iterable[Tensor], transport: Transport) -> Tensor:
    """Compare tensors between ranks by a sum of their bits: a bool on the device, for which nothing waits."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = []
    for x in tensors:
        bits = x.contiguous().flatten().view(kinds[x.itemsize])
        places = torch.arange(1, bits.numel() + 1, device=x.device)  # int64, wraps: order counts, too
        sums.append((bits * places).sum())
    if transport.size == 1:
        return torch.zeros((), dtype=torch.bool, device=sums[0].device)
    everyone = transport.all_gather(torch.stack(sums), "compare").wait()
    return (everyone != everyone[0]).any()


def sketch(x: Tensor) -> Tensor:
    """`(64,)` sums of a tensor's elements with random signs, the same on all ranks: a count sketch.

    The distance of two sketches is about that of the tensors. What is not finite counts as zero.
    """
    generator = torch.Generator(x.device).manual_seed(0)
    flat = x.to(torch.float64 if x.device.type == "cpu" else torch.float32).flatten().nan_to_num(posinf=0, neginf=0)
    signs = torch.randint(0, 2, flat.shape, generator=generator, device=x.device, dtype=torch.int8) * 2 - 1
    return F.pad(flat * signs, (0, -flat.numel() % SKETCH)).view(-1, SKETCH).sum(0)


def differs_much(tensors: Iterable[Tensor], transport: Transport, limit: float) -> Tensor:
    """Whether a tensor of some rank is further from rank 0's than `limit` of its norm (by sketches), on the device."""
    sketches = [sketch(x) for x in tensors]
    if transport.size == 1:
        return torch.zeros((), dtype=torch.bool, device=sketches[0].device)
    everyone = transport.all_gather(torch.stack(sketches), "compare").wait()
    away = (everyone - everyone[0]).norm(dim=-1)
    return (away > limit * everyone[0].norm(dim=-1)).any()


def anywhere(flag: Tensor, transport: Transport) -> bool:
    """Whether a flag is set on any rank."""
    return bool(transport.all_gather(flag.to(torch.uint8), "compare").wait().any())


def max_over(number: Tensor, transport: Transport) -> float:
    """The largest of a number on all ranks."""
    return float(number if transport.size == 1 else transport.all_gather(number, "guard").wait().max())


def swap(x: Tensor, sequence: Transport, cfg: Transport) -> Tensor:
    """Exchange a tensor of the same shape between the two cfg halves: `(2, *shape)`, that of either half.

    It is equal on all ranks of a half. Each rank sends the other half its share of the elements; the shares are put
    together within the half (`sequence`).
    """
    share = -(-x.numel() // sequence.size)
    flat = F.pad(x.flatten(), (0, share * sequence.size - x.numel()))
    mine = flat[sequence.rank * share : (sequence.rank + 1) * share]
    shares = cfg.all_gather(mine, "branches").wait()
    if sequence.size > 1:
        shares = sequence.all_gather(shares, "branches").wait().transpose(0, 1).flatten(1)
    return shares[:, : x.numel()].view(2, *x.shape)
