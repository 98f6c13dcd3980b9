"""Classifier-free guidance over the cfg axis: each half of the ranks computes one branch.

Two calls a step (conditional, then unconditional): the first half of the ranks runs the first call, the other half the
second, at the same time. What a half does not compute it gives out empty, and fills when the second call ends: in
place, so that views which the pipeline has taken meanwhile are filled, too. Until then it holds NaN.

One call with both branches in its batch: each half runs one half of the batch. Right for any batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cocodiff.errors import PatchError
from cocodiff.models import Family
from cocodiff.state import Engine


class Branches:
    """Both branches of every step in one call of a pipeline.

    Args:
        guided: whether the pipeline calls the transformer twice a step. If not, halves compute the same.
    """

    def __init__(self, engine: Engine, family: Family, transformer: Any, guided: bool) -> None:
        self._engine, self._family, self._transformer, self._guided = engine, family, transformer, guided
        self._first: tuple[Tensor, dict[str, Any]] | None = None  # of a pair: the first call's output, and what it got
        self._apart: list[Tensor] = []  # whether two calls taken for a pair were of different steps

    @property
    def second(self) -> bool:
        """Whether the coming call is the second of a pair."""
        return self._first is not None

    @property
    def computes(self) -> bool:
        """Whether this rank's half computes the coming call."""
        return not self._guided or self._engine.mesh.cfg.rank == int(self.second)

    def run(self, given: dict[str, Any], forward: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        """One call of the transformer: its output, now or at the end of the pair."""
        if self._family.batched:
            return self._half_batch(given, forward)
        if not self._guided:
            return forward(given)
        shape, dtype = tuple(self._family.output_shape(self._transformer, given)), given["hidden_states"].dtype
        if self.computes:
            output = forward(given)
            if output.shape != shape or output.dtype != dtype:
                raise PatchError(f"the transformer gave {tuple(output.shape)} {output.dtype}, not {shape} {dtype}.")
        else:
            output = torch.full(shape, math.nan, dtype=dtype, device=self._engine.device)
        if self._first is None:
            self._first = output, {name: given[name].clone() for name in ("timestep", "hidden_states")}
            return output
        (before, got), self._first = self._first, None
        # Latents, too: in bfloat16 neighbouring steps may have one timestep. NaN that was consumed differs from itself.
        self._apart.append(torch.stack([(x != given[name]).any() for name, x in got.items()]).any())
        mine = output if self._engine.mesh.cfg.rank else before
        both = self._engine.swap(mine)
        before.copy_(both[0])
        output.copy_(both[1])
        return output

    def _half_batch(self, given: dict[str, Any], forward: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        batch = given["hidden_states"].shape[0]
        if batch % 2:
            return forward(given)
        start = self._engine.mesh.cfg.rank * batch // 2
        half = {
            name: value[start : start + batch // 2] if name in self._family.batched else value
            for name, value in given.items()
        }
        return self._engine.swap(forward(half)).flatten(0, 1)

    def settle(self) -> None:
        """PatchError on every rank if the calls of the run did not come in pairs: what was drawn is wrong then."""
        apart = bool(self._apart) and self._engine.anywhere(torch.stack(self._apart).any())
        if self._first is not None or apart:
            raise PatchError(
                "cfg_degree=2 expected two calls of the transformer at each step, conditional and unconditional, and "
                "got others (a callback that changes the guidance?). Use cfg_degree=1."
            )
