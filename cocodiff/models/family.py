"""What cocodiff must know about a family of models: mostly data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from cocodiff.blocks import BlockRow
from cocodiff.compat import Patches


@dataclass(frozen=True)
class Cut:
    """Where an argument is cut: the stream whose tokens it has in this dim."""

    stream: str
    dim: int = -2


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        pipelines: diffusers pipeline classes that it covers.
        token_counts: of the transformer and its forward's arguments: tokens of each stream, in joint order. The last
            stream is the one that the transformer gives back.
        cuts: arguments of forward that are cut at the door; tensors, or lists of them. (Others are whole, and what
            enters the first block is cut there, see `Blocks`.)
        install: puts our processors and block forwards into one transformer; gives the attention modules they serve.
        guided: of a pipeline and its call's arguments: whether it calls the transformer twice a step, for guidance.
        output_shape: of the transformer and its forward's arguments: the shape of what comes back.
        batched: arguments of forward that have a batch, in a family whose batch holds both branches of guidance.
        long: it usually attends to so many tokens that attention outweighs the rest of a layer.
        refused: argument of forward, or entry of its attention kwargs -> why it cannot work yet.
        transformers: the components of a pipeline that run on shards; those a pipeline has not are left out.
    """

    name: str
    pipelines: tuple[str, ...]
    token_counts: Callable[[Any, dict[str, Any]], dict[str, int]]
    cuts: Mapping[str, Cut]
    install: Callable[[BlockRow, Any, Patches], list[nn.Module]]
    guided: Callable[[Any, dict[str, Any]], bool] = lambda pipeline, call: False
    output_shape: Callable[[Any, dict[str, Any]], tuple[int, ...]] = lambda transformer, given: (
        *given["hidden_states"].shape[:-1],
        transformer.proj_out.out_features,
    )
    batched: tuple[str, ...] = ()
    long: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    transformers: tuple[str, ...] = ("transformer",)
    whole: Mapping[str, str] = field(default_factory=dict)
