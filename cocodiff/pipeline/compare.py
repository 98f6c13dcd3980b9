"""What all ranks must have in common around a call: what the pipeline is like before it, what it gave after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cocodiff.errors import MismatchError
from cocodiff.exchange.collectives import sketch
from cocodiff.launch.agree import digest, gather_json
from cocodiff.pipeline.inputs import last_bits
from cocodiff.pipeline.weights import Fingerprints
from cocodiff.state import CallState


def pipeline_state(pipeline: Any, fingerprints: Fingerprints) -> dict[str, Any]:
    """Fields for `agree`: weights, adapters, scheduler and attention back end of a pipeline on this rank."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    state: dict[str, Any] = {}
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            state |= fingerprints.of(name, part)
            backends = {getattr(getattr(m, "processor", None), "_attention_backend", None) for m in part.modules()}
            state[f"attention back ends of {name}"] = sorted(map(str, backends))
    scheduler = getattr(pipeline, "scheduler", None)
    state["scheduler"] = type(scheduler).__name__
    state["configuration of the scheduler"] = {
        key: repr(value) for key, value in getattr(scheduler, "config", {}).items() if key[0] != "_"
    }
    state["attention back end"] = str(_AttentionBackendRegistry.get_active_backend()[0])
    return state


def check_result(result: Any, call: CallState, name: str) -> None:
    """Compare what a call returned between ranks, and say once where it is no picture. Collective over all ranks.

    Raises:
        MismatchError: on all ranks, where it differs by more than the last bits (a callback at the last step, a VAE).
    """
    values = list(_tensors(result))
    digests = gather_json(digest(values), call.mesh.host_group)
    if any(one != digests[0] for one in digests):
        sketches = torch.tensor(gather_json([sketch(x).tolist() for x in values], call.mesh.host_group))
        away = (sketches - sketches[0]).norm(dim=-1) / sketches[0].norm(dim=-1).clamp_min(1e-30)
        far = away.amax(dim=1).tolist()
        if wrong := [str(rank) for rank, one in enumerate(far) if one > last_bits(call.dtype)]:
            raise MismatchError(
                f"what the call of {name} returned differs between ranks: from rank 0's by {max(far):.2g} (relative) "
                f"on rank {', '.join(wrong)}. Did a callback do something else there, or does the VAE differ?"
            )
    _say_if_no_picture(values, call, name)


def _say_if_no_picture(values: list[Tensor], call: CallState, name: str) -> None:
    finite = torch.stack(call.finite).tolist() if call.finite else []
    if not all(finite):
        branches = 2 if call.guided() and call.mesh.cfg.size == 1 else 1
        step, steps = finite.index(False) // branches, len(finite) // branches
        began = f"at step {step - 1} of {steps}, counted from 0" if step else "before the first step"
        call.session.warn(
            "NaN",
            f"{name} made numbers that are not finite {began}: the picture is broken. float16 overflows where bfloat16 "
            "does not.",
        )
    elif any(not x.isfinite().all() for x in values):
        call.session.warn(
            "NaN", f"{name} returned numbers that are not finite: made after the last input of the transformer."
        )
    elif values and not any(x.any() for x in values):
        call.session.warn("black", f"{name} returned a picture that is black everywhere.")


def _tensors(result: Any) -> Iterator[Tensor]:
    """Every tensor, array and picture in what a pipeline returned, on the host."""
    if isinstance(result, Tensor):
        yield result.detach().cpu()
    elif isinstance(result, dict):
        for value in result.values():
            yield from _tensors(value)
    elif isinstance(result, list | tuple):
        for value in result:
            yield from _tensors(value)
    elif isinstance(result, np.ndarray) or (hasattr(result, "tobytes") and hasattr(result, "mode")):
        yield torch.from_numpy(np.array(result))
