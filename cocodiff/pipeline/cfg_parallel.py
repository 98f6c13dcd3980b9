"""Classifier-free guidance over the cfg axis: each half of the ranks computes one branch.

Two calls a step (conditional, then unconditional): the first half of the ranks runs the first call, the other half the
second, at the same time. What a half does not compute it gives out empty, and fills when the second call ends: in
place, so that views which the pipeline has taken meanwhile are filled, too. Until then nobody can read it.

One call with both branches in its batch: each half runs one half of the batch. Right for any batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cocodiff.errors import PatchError
from cocodiff.exchange.collectives import anywhere, swap
from cocodiff.models import Family
from cocodiff.pipeline.branch_output import PAIRS, BranchOutput
from cocodiff.state import CallState


def computes(call: CallState) -> bool:
    """Whether this rank's half computes the coming forward."""
    return not call.guided() or call.mesh.cfg.rank == int(call.first_branch is not None)


Forward = Callable[[dict[str, Any]], Tensor]


def run_branch(call: CallState, family: Family, transformer: Any, given: dict[str, Any], forward: Forward) -> Tensor:
    """One forward of the transformer over both halves: its output, now or at the end of the pair."""
    if family.batched:
        return _half_batch(call, family, given, forward)
    if not call.guided():
        return forward(given)
    shape, dtype = tuple(family.output_shape(transformer, given)), _projected(given["hidden_states"])
    if computes(call):
        output = forward(given)
        if output.shape != shape or output.dtype != dtype:
            raise PatchError(f"the transformer gave {tuple(output.shape)} {output.dtype}, not {shape} {dtype}.")
    else:
        output = torch.full(shape, math.nan, dtype=dtype, device=call.session.device)
    if call.first_branch is None:
        output = BranchOutput.of(output)
        call.first_branch = output, {name: given[name].clone() for name in ("timestep", "hidden_states")}
        return output
    (before, got), call.first_branch = call.first_branch, None
    before = before.settle()
    # Latents, too: in bfloat16 neighbouring steps may have one timestep.
    call.unpaired.append(torch.stack([(x != given[name]).any() for name, x in got.items()]).any())
    both = _swap(call, output if call.mesh.cfg.rank else before)
    before.copy_(both[0])
    output.copy_(both[1])
    return output


def _projected(x: Tensor) -> torch.dtype:
    """The dtype of what a linear layer makes of a tensor: its own, or autocast's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def check_pairs(call: CallState) -> None:
    """Raise PatchError on every rank if the forwards of a call did not come in pairs: what was drawn is wrong then."""
    apart = bool(call.unpaired) and anywhere(torch.stack(call.unpaired).any(), call.connected.everyone)
    if call.first_branch is not None or apart:
        raise PatchError(PAIRS)


def _half_batch(call: CallState, family: Family, given: dict[str, Any], forward: Forward) -> Tensor:
    batch = given["hidden_states"].shape[0]
    if batch % 2:
        return forward(given)
    mine = slice(call.mesh.cfg.rank * batch // 2, (call.mesh.cfg.rank + 1) * batch // 2)
    half = dict(given)
    for name in family.batched:
        if isinstance(value := given.get(name), Tensor) and value.ndim and len(value) > 1:  # one row is for all
            half[name] = value[mine]
    return _swap(call, forward(half)).flatten(0, 1)


def _swap(call: CallState, x: Tensor) -> Tensor:
    with call.session.span("wait branches"):
        return swap(x, call.connected.sequence, call.connected.cfg)
