"""What cocodiff must know about a family of models: data."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from cocodiff.models.stages import BlockSpec

IP_ADAPTER = "IP-Adapters attend to their image tokens in a processor of their own, which cocodiff does not have yet"


@dataclass(frozen=True)
class Cut:
    """Where an argument is cut: the stream whose tokens it has in this dim."""

    stream: str
    dim: int = -2


def packed_token_counts(transformer: Any, given: dict[str, Any]) -> dict[str, int]:
    """Tokens of text and image where both reach the transformer as tokens, `(B, S, C)`."""
    return {"text": given["encoder_hidden_states"].shape[1], "image": given["hidden_states"].shape[1]}


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: of the family and of its folder.
        pipelines: diffusers pipeline classes that it covers.
        blocks: attribute of the transformer -> the class of the blocks in it, in the order in which they are called.
        token_counts: of the transformer and its forward's arguments: tokens of each stream, in joint order. The last
            stream is the one that the transformer gives back.
        cuts: arguments of the transformer's forward that are cut before it runs; tensors, or lists of them.
        whole: argument of a block -> stream, for those that reach the first block whole and are cut there.
        guided: of a pipeline and its call's arguments: whether it calls the transformer twice a step, for guidance.
        output_shape: of the transformer and its forward's arguments: the shape of what comes back.
        batched: arguments of forward that have a batch, in a family whose batch holds both branches of guidance.
        long: it usually attends to so many tokens that attention outweighs the rest of a layer.
        refused: argument of forward, or entry of its attention kwargs -> why it cannot work yet.
        transformers: the components of a pipeline that run on shards; those a pipeline has not are left out.
    """

    name: str
    pipelines: tuple[str, ...]
    blocks: Mapping[str, BlockSpec]
    token_counts: Callable[[Any, dict[str, Any]], dict[str, int]]
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    guided: Callable[[Any, dict[str, Any]], bool] = lambda pipeline, call: False
    output_shape: Callable[[Any, dict[str, Any]], tuple[int, ...]] = lambda transformer, given: (
        *given["hidden_states"].shape[:-1],
        transformer.proj_out.out_features,
    )
    batched: tuple[str, ...] = ()
    long: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    transformers: tuple[str, ...] = ("transformer",)

    def part(self, name: str) -> ModuleType:
        """A module of the family's folder that is imported only when it is used: "shapes", or "small"."""
        return importlib.import_module(f"cocodiff.models.{self.name}.{name}")
