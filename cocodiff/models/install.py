"""Puts our forwards and processors on a transformer's blocks, where they are what we know."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from cocodiff.blocks import Block, BlockRow
from cocodiff.compat import Patches
from cocodiff.errors import ConfigError, PatchError
from cocodiff.layer import Layer


class BlockProcessor:
    """Stands where diffusers' attention processor stood, so that everyone can see who attends; the blocks do it."""

    _parallel_config = None

    def __init__(self, replaced: Any) -> None:
        self._attention_backend = getattr(replaced, "_attention_backend", None)  # what `set_attention_backend` sets

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise PatchError("a block's forward was replaced after cocodiff.wrap: it cannot run so on shards. Wrap last.")


def install_blocks(
    row: BlockRow,
    blocks: Iterable[nn.Module],
    name: str,
    processors: Mapping[str, Sequence[str]],
    streams: Sequence[str],
    make_layer: Callable[..., Layer],
    patches: Patches,
    local: Sequence[str] = (),
) -> list[nn.Module]:
    """Append blocks of one class to the row; the attention modules that are ours now.

    Args:
        name: of diffusers' class of block. ConfigError where one is of another.
        processors: attention of a block -> the processors whose work `make_layer` does. ConfigError for others.
        streams: the forward's arguments that hold tokens, in joint order.
        make_layer: `(engine, block, **the other arguments)`.
        local: attentions that stay diffusers' own.
    """
    attentions: list[nn.Module] = []
    for block in blocks:
        if type(block).__name__ != name or not type(block).__module__.startswith("diffusers."):
            raise ConfigError(
                f"the transformer has a {type(block).__name__} of {type(block).__module__} where cocodiff knows "
                f"diffusers' {name}. docs/adding-a-model.md tells how to add it."
            )
        for attribute, known in processors.items():
            attn: Any = getattr(block, attribute, None)
            if attn is None:
                continue
            if type(attn.processor).__name__ not in known:
                raise ConfigError(
                    f"{name}.{attribute} attends by {type(attn.processor).__name__}, whose projections cocodiff does "
                    f"not know; it knows {', '.join(known)}. Unload what set it, or see docs/adding-a-model.md."
                )
            if attribute not in local:
                patches.set(attn, "processor", BlockProcessor(attn.processor), may_be_replaced=True)
                attentions.append(attn)
        entry = Block(
            block,
            tuple(streams),
            lambda tokens, arguments, block=block: make_layer(tokens, block, **arguments),
            inspect.signature(block.forward),
        )
        patches.set(block, "forward", row.append(entry))
    return attentions
