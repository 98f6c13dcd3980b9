"""The transformer's door: whole tensors outside, this rank's tokens inside.

`Door` stands in place of `transformer.forward`. It checks that every self-attention is still ours, cuts what the family
names into shards (ragged, nothing padded), runs the model, and gathers the picture's tokens again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cocodiff.engine import Engine
from cocodiff.errors import ConfigError, MismatchError, PatchError
from cocodiff.launch.agree import agree
from cocodiff.models import Family
from cocodiff.patches import Patches
from cocodiff.tokens import Tokens


class Door:
    """Callable in place of one transformer's forward.

    Args:
        forward: what stood there before, called with shards.
        attentions: the modules whose processors must stay ours.
        patches: all that was done to this transformer; taken back when its last wrapped pipeline lets go.
    """

    def __init__(
        self,
        engine: Engine,
        family: Family,
        transformer: Any,
        forward: Callable,
        attentions: list[nn.Module],
        patches: Patches,
    ) -> None:
        self.engine, self.transformer, self.users = engine, transformer, 1
        self._family, self._forward, self._patches = family, forward, patches
        self._signature = inspect.signature(forward)
        self._processors = [(attn, attn.processor) for attn in attentions]
        self._in_pipeline = False
        self._differs: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._check()
        given = self._signature.bind(*args, **kwargs).arguments
        self._refuse(given)
        if self._in_pipeline:
            tensors = [value for value in given.values() if isinstance(value, Tensor) and not value.is_complex()]
            self._differs.append(self.engine.differs(tensors))
        else:
            agree(given, self.engine.mesh.host_group, "the transformer's input (called outside its wrapped pipeline)")
        engine, family = self.engine, self._family
        lengths = {stream: given[family.lengths[stream]].shape[-2] for stream in family.streams}
        tokens = Tokens.split(lengths, engine.mesh.world_size)
        for name, stream in family.split.items():
            if given.get(name) is not None:
                given[name] = _shard(given[name], tokens.rows(stream, engine.rank), lengths[stream], name)
        with engine.sharded(tokens):
            output = self._forward(**given)
            whole = engine.gather(output[0], "image")
        return (whole, *output[1:]) if isinstance(output, tuple) else type(output)(sample=whole)

    @contextmanager
    def in_pipeline(self) -> Iterator[None]:
        """Around a call of a wrapped pipeline, which compares its arguments itself.

        What reaches the transformer is compared, too, at every step but without waiting for the answer before the end:
        encoders or callbacks may do different things on different ranks.
        """
        self._in_pipeline, self._differs = True, []
        try:
            yield
        finally:
            self._in_pipeline = False
        if self._differs and bool(torch.stack(self._differs).any()):
            steps = [index for index, differs in enumerate(self._differs) if differs]
            raise MismatchError(
                f"the transformer's inputs were not the same on all ranks (first in its call {steps[0]} of "
                f"{len(self._differs)}): a callback, an encoder or a random draw differs between ranks."
            )

    def release(self) -> None:
        """One wrapped pipeline lets go of the transformer; the last one takes the patches with it."""
        if self.users == 1:
            self._patches.undo()
            self.engine.close()
        self.users -= 1

    def _check(self) -> None:
        for attn, processor in self._processors:
            if attn.processor is not processor:
                raise PatchError(
                    f"an attention processor was replaced after cocodiff.wrap (now {type(attn.processor).__name__}): "
                    "its attention would see this rank's tokens alone. Undo that (unload_ip_adapter, or no "
                    "set_attn_processor), then cocodiff.unwrap(pipe) and cocodiff.wrap(pipe)."
                )
        if torch.is_grad_enabled():
            raise PatchError("exchanges carry no gradients: call the transformer under torch.no_grad().")
        refuse_modifications(self.transformer)

    def _refuse(self, given: dict[str, Any]) -> None:
        entries = {**given, **(given.get("joint_attention_kwargs") or {})}
        for name, reason in self._family.refused.items():
            if entries.get(name) is not None:
                raise ConfigError(f"{name} was given, but {reason}. Leave it out, or run without cocodiff.wrap.")


def refuse_modifications(transformer: Any) -> None:
    """PatchError for what changes a transformer in ways that shards cannot follow; each with its reason."""
    reasons = {
        "a step cache is enabled": getattr(transformer, "is_cache_enabled", False)
        and "each rank would decide by its own tokens whether to skip a block, and ranks that disagree hang. "
        "Call transformer.disable_cache()",
        "diffusers' own parallelism is enabled": getattr(transformer, "_parallel_config", None) is not None
        and "it would split what is split already. Do not call enable_parallelism",
        "the transformer is compiled": any(getattr(m, "_compiled_call_impl", None) for m in transformer.modules())
        and "exchanges run in lanes that torch.compile cannot see. Do not compile it",
        "the transformer is quantised": getattr(transformer, "hf_quantizer", None) is not None
        and "activations quantised per tensor would depend on which tokens a rank holds. Load it unquantised",
    }
    for what, reason in reasons.items():
        if reason:
            raise PatchError(f"{what}, but {reason}.")


def _shard(value: Tensor | list[Tensor] | tuple[Tensor, ...], rows: slice, length: int, name: str) -> Any:
    """These rows (dim -2) of a tensor, or of each tensor in a list."""
    if not isinstance(value, Tensor):
        return type(value)(_shard(item, rows, length, name) for item in value)
    if value.shape[-2] != length:
        raise ConfigError(f"{name} has {value.shape[-2]} rows, but its stream has {length} tokens.")
    return value[..., rows, :]
