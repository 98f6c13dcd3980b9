"""Puts our forwards and processors on a transformer's blocks, where they are what we know."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import nn

from cocodiff.blocks import Block, BlockRow
from cocodiff.errors import ConfigError, PatchError
from cocodiff.models import Family
from cocodiff.models.joint import make_layer
from cocodiff.models.stages import BlockSpec
from cocodiff.pipeline.patches import Patches


class BlockProcessor:
    """Stands where diffusers' attention processor stood, so that everyone can see who attends; the blocks do it."""

    _parallel_config = None

    def __init__(self, replaced: Any) -> None:
        self.replaced = type(replaced).__name__
        if hasattr(replaced, "_attention_backend"):  # what `set_attention_backend` sets; SD3's processors have none
            self._attention_backend = replaced._attention_backend

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise PatchError("a block's forward was replaced after cocodiff.wrap: it cannot run so on shards. Wrap last.")


def install_blocks(family: Family, row: BlockRow, transformer: Any, patches: Patches) -> list[nn.Module]:
    """Append all blocks of a transformer to the row; returns the attention modules whose work is ours now.

    ConfigError where a block or an attention processor is not what the family's specs describe.
    """
    attentions: list[nn.Module] = []
    for attribute, spec in family.blocks.items():
        for block in getattr(transformer, attribute):
            attentions += _replace_processors(block, spec, patches)
            entry = Block(block, spec.inputs, partial(make_layer, spec), inspect.signature(block.forward))
            patches.set(block, "forward", row.append(entry))
    return attentions


def _replace_processors(block: nn.Module, spec: BlockSpec, patches: Patches) -> list[nn.Module]:
    if type(block).__name__ != spec.name or not type(block).__module__.startswith("diffusers."):
        raise ConfigError(
            f"the transformer has a {type(block).__name__} of {type(block).__module__} where cocodiff knows "
            f"diffusers' {spec.name}. docs/adding-a-model.md tells how to add it."
        )
    attentions: list[nn.Module] = []
    for attribute, known in spec.processors.items():
        attn: Any = getattr(block, attribute, None)
        if attn is None:
            continue
        kind = type(attn.processor)
        if kind.__name__ not in known or not kind.__module__.startswith("diffusers."):
            raise ConfigError(
                f"{spec.name}.{attribute} attends by {kind.__name__} of {kind.__module__}, whose projections "
                f"cocodiff does not know; it knows diffusers' {', '.join(known)}. Unload what set it, or see "
                "docs/adding-a-model.md."
            )
        if attribute not in spec.local:
            patches.set(attn, "processor", BlockProcessor(attn.processor), may_be_replaced=True)
            attentions.append(attn)
    return attentions
