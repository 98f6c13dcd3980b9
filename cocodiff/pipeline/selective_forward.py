"""Where selective transmission meets a forward of the transformer: it begins, is checked for memory, and ends."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from cocodiff.errors import ConfigError
from cocodiff.exchange.collectives import max_over
from cocodiff.parallel.layout import split_sizes
from cocodiff.parallel.tokens import Tokens
from cocodiff.selective.memory import free_bytes, held_bytes
from cocodiff.selective.run import StepCoding
from cocodiff.state import CallState, ForwardState

Sizes = Sequence[tuple[int, int]]  # heads and head_dim of each attention that is exchanged


def begin_forward(
    call: CallState, owner: Hashable, layers: Sizes, given: dict[str, Any], conditioning: Any, tokens: Tokens
) -> StepCoding | None:
    """Begin a forward: what selective transmission does in it, or None where it is exact.

    Args:
        owner: the transformer, of which a pipeline may have several.
        given: arguments of its forward, before they are cut.
        conditioning: the prompt's embeddings, as the pipeline gave them.

    Raises:
        ConfigError: in the first forward of a call, on every rank, where the copies would not fit.
    """
    if call.selective is None:
        call.selective = call.make_selective(call)
    if call.selective is None or given.get("skip_layers") is not None:
        return None  # SD3's guidance by skipped layers is a forward beside the branches, now and then
    latents = given["hidden_states"]
    shape = (owner, *((name, sum(sizes)) for name, sizes in tokens.streams.items()), len(latents))
    coding = call.selective.step(conditioning, latents, shape, call.branch_name)
    if coding is not None and coding.first:
        _check_memory(layers, ForwardState(call, tokens, coding), len(latents), latents.itemsize)
    return coding


def end_forward(call: CallState, coding: StepCoding | None) -> None:
    """End a forward: the guard on errors, and copies that are of no more use. Collective over the sequence."""
    if call.selective is not None and coding is not None:
        call.selective.forwarded(coding, lambda number: max_over(number, call.connected.sequence))


def _check_memory(layers: Sizes, state: ForwardState, batch: int, itemsize: int) -> None:
    """Raise ConfigError on every rank unless what the call will hold fits. Collective over the sequence."""
    call, mesh, coding = state.call, state.call.mesh, state.coding
    assert call.selective is not None and coding is not None and call.plan.coded_from is not None
    held = [(h, d) for h, d in layers if state.plan_layer(h * d, itemsize).coded]
    for heads, head_dim in held:
        for width in {share * head_dim for share in split_sizes(heads, mesh.ulysses.size)}:  # all, so that all raise
            coding.check_width(width, itemsize)
    call.selective.cover(len(held), len(layers))
    if len(held) < len(layers):
        level = mesh.cluster.levels[call.plan.coded_from].name
        call.session.warn(
            f"{len(held)} of {len(layers)} layers coded",
            f"by the cluster's figures the exact exchanges of {len(layers) - len(held)} of {len(layers)} layers hide "
            "under their compute, so they stay exact. If the link is slower than that, measure it (cocodiff bench "
            f"collectives), or say Selective(level={level!r}).",
        )
    streams = {name: sum(counts) for name, counts in state.tokens.streams.items()}
    needed = held_bytes(
        mesh.cluster, mesh.degrees, call.plan.coded_from, mesh.everyone.rank, streams, held, batch,
        call.selective.branches, mesh.placement,
    )  # fmt: skip
    device = call.session.device
    free = free_bytes(device)
    if free is not None and device.type == "cpu":
        free //= math.prod(mesh.cluster.sizes[: call.plan.coded_from])  # ranks inside share it
    short = torch.tensor(0.0 if free is None else float(needed - free), device=device)
    if max_over(short, call.connected.sequence) > 0:
        raise ConfigError(
            f"selective transmission would hold {needed / 1e9:.2f} GB on rank {mesh.everyone.rank}, which has "
            f"{(free or 0) / 1e9:.2f} GB left, and some rank has too little. Use more ranks, a smaller picture, "
            "or transmission='exact', which holds nothing."
        )
