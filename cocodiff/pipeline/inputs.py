"""Compares the inputs of a transformer's forwards between ranks: encoders and callbacks may differ there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cocodiff.errors import MismatchError
from cocodiff.exchange.collectives import anywhere, differs, differs_much
from cocodiff.exchange.transport import Transport
from cocodiff.pipeline.cfg_parallel import check_pairs, computes
from cocodiff.state import CallState


def last_bits(dtype: torch.dtype) -> float:
    """Relative difference up to which ranks may differ by how their devices round, and no more."""
    return 1e-3 if dtype.itemsize >= 4 else 2e-2


def compare_inputs(call: CallState, transformer: object, given: dict[str, Any]) -> None:
    """Find ranks that compute from different tensors: at once in the first forward, later ones at the end of the call.

    Where the first inputs differ in the last bits alone, all ranks go on with those of rank 0, and only larger
    differences count from there on. Of two branches on two halves, the second forward is compared by those who compute
    it: the others are still at the first. Collective.
    """
    second = call.first_branch is not None
    if not second:
        call.finite.append(given["hidden_states"].isfinite().all())
    elif not computes(call):
        return
    lists = [value if isinstance(value, list | tuple) else [value] for value in given.values()]
    tensors = [x for one in lists for x in one if isinstance(x, Tensor)]
    ranks = call.connected.sequence if second else call.connected.everyone
    seen, limit = call.differing.setdefault(transformer, []), last_bits(call.dtype)
    seen.append(differs_much(tensors, ranks, limit) if call.rounded else differs(tensors, ranks))
    if len(seen) > 1:
        return
    if not call.rounded and bool(seen[0]):
        call.rounded, seen[0] = True, differs_much(tensors, ranks, limit)
        if not bool(seen[0]):
            _take_from_first(tensors, ranks)
    check_inputs(call)


def _take_from_first(tensors: Sequence[Tensor], ranks: Transport) -> None:
    """Give all ranks the first one's inputs, in place."""
    for x in tensors:
        theirs = ranks.all_gather(x.contiguous(), "compare").wait()[0]
        if all(stride or size == 1 for size, stride in zip(x.shape, x.stride(), strict=True)):  # not one for many
            x.copy_(theirs)


def check_inputs(call: CallState, everywhere: bool = False) -> None:
    """Raise MismatchError where inputs of some forward differed between ranks.

    Args:
        everywhere: ask all ranks, since each cfg half has compared its own branch only.
    """
    flags = [flag for several in call.differing.values() for flag in several]
    if not flags:
        return
    found = torch.stack(flags)
    if anywhere(found.any(), call.connected.everyone) if everywhere else bool(found.any()):
        steps = found.nonzero().flatten().tolist()
        first = f"first in its call {steps[0]} of {len(found)}" if steps else "seen by the other branch"
        raise MismatchError(
            f"the transformer's inputs were not the same on all ranks ({first}): a callback, an encoder, a random "
            "draw or a kernel whose results vary."
        )


def check_call(call: CallState) -> None:
    """After a call that ended well: raise where ranks computed from different inputs, or branches were no pairs."""
    halves = call.mesh.cfg.size > 1
    check_inputs(call, everywhere=halves)
    if halves:
        check_pairs(call)
