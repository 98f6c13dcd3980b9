"""The transformer's door: whole tensors outside, this rank's tokens inside.

`Door` stands in place of `transformer.forward`. It checks that every self-attention is still ours, cuts what the family
names into shards (ragged, nothing padded), runs the model, and gathers the picture's tokens after its last projection.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cocodiff.compat import Patches, carriers, refuse_modifications
from cocodiff.errors import ConfigError, MismatchError, PatchError
from cocodiff.launch.agree import agree
from cocodiff.launch.job import Job
from cocodiff.models import Family
from cocodiff.models.family import Cut
from cocodiff.parallel.tokens import Tokens
from cocodiff.pipeline.cfg_parallel import Branches
from cocodiff.selective.run import SelectiveCall
from cocodiff.state import Engine


class Door:
    """Callable in place of one transformer's forward.

    Args:
        forward: what stood there before, called with shards.
        attentions: the modules whose processors must stay ours.
        patches: all that was done to this transformer; taken back when its last wrapped pipeline lets go.
        job: the run whose groups the engine uses; closed then, too.
    """

    def __init__(
        self,
        engine: Engine,
        family: Family,
        transformer: Any,
        forward: Callable,
        attentions: list[nn.Module],
        patches: Patches,
        job: Job,
    ) -> None:
        self.engine, self.transformer, self.job, self.users = engine, transformer, job, 1
        self._family, self._forward, self._patches = family, forward, patches
        self._signature = inspect.signature(forward)
        self._attentions = [(attn, attn.processor) for attn in attentions]
        self._carriers = carriers(transformer, attentions)
        self.running = False  # inside the forward, where every other rank must be, too
        self._in_pipeline = False
        self._differs: list[Tensor] = []
        self._branches: Branches | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.job.watched("the transformer's forward"):
            self.running = True
            try:
                return self._run(*args, **kwargs)
            finally:
                self.running = False

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self.check()
        if torch.is_grad_enabled():
            raise PatchError("exchanges carry no gradients: call the transformer under torch.no_grad().")
        given = self._signature.bind(*args, **kwargs).arguments
        self._refuse(given)
        if self._in_pipeline:
            self._compare(given)
        else:
            agree(given, self.engine.mesh.host_group, "the transformer's input (called outside its wrapped pipeline)")
        conditioning = given.get("encoder_hidden_states")  # the pipeline's own object, not half of it
        if self._branches is None:
            return self._on_shards(given, conditioning)
        as_tuple = given.get("return_dict") is False
        output = self._branches.run(given, lambda part: self._on_shards(part | {"return_dict": False}, conditioning)[0])
        if as_tuple:
            return (output,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output)

    def _compare(self, given: dict[str, Any]) -> None:
        """Ranks that compute from different tensors are found: at once in the first forward, later ones at the end.

        Of two branches, the second call is compared by those who compute it: the others are still at the first.
        """
        second = self._branches is not None and self._branches.second
        if second and not self._branches.computes:  # type: ignore[union-attr]
            return
        lists = [value if isinstance(value, list | tuple) else [value] for value in given.values()]
        axis = self.engine.mesh.sequence if second else None
        self._differs.append(self.engine.differs((x for one in lists for x in one if isinstance(x, Tensor)), axis))
        if len(self._differs) == 1:
            self._settle()

    def _on_shards(self, given: dict[str, Any], conditioning: Any) -> Any:
        engine, family = self.engine, self._family
        counts, selection = (
            family.token_counts(self.transformer, given),
            engine.selection if self._in_pipeline else None,
        )
        batch, engine.coding = given["hidden_states"].shape[0], None
        if selection is not None and given.get("skip_layers") is None:  # SD3's guidance by what few layers do is exact
            engine.coding = selection.step(conditioning, given["hidden_states"], (self, *counts.items(), batch))
        tokens = Tokens.split(counts, engine.mesh.sequence.size, engine.mesh.sequence.rank)
        for name, cut in family.cuts.items():
            if given.get(name) is not None:
                given[name] = _shard(given[name], tokens.rows(cut.stream), counts[cut.stream], cut, name)
        with engine.span("forward"), engine.sharded(tokens), self._gathered(list(counts)[-1]):
            if engine.coding is not None and engine.coding.first:
                attentions: list[Any] = [attn for attn, _ in self._attentions]
                layers = [(attn.heads, attn.inner_dim // attn.heads) for attn in attentions]
                engine.begin(layers, batch, given["hidden_states"].itemsize)
            output = self._forward(**given)
        if selection is not None and engine.coding is not None:
            selection.forwarded(engine.coding, engine.worst)
        engine.coding = None
        return output

    @contextmanager
    def _gathered(self, stream: str) -> Iterator[None]:
        """While inside, the last projection gives all tokens: what follows it (unpatchify) needs them."""
        last = self.transformer.proj_out.register_forward_hook(
            lambda module, args, shard: self.engine.gather(shard, stream)
        )
        try:
            yield
        finally:
            last.remove()

    @contextmanager
    def in_pipeline(self, guided: bool = False, times: Callable[[], Sequence[float]] | None = None) -> Iterator[None]:
        """Around a call of a wrapped pipeline, which compares its arguments itself.

        What reaches the transformer is compared, too, since encoders or callbacks may do different things on different
        ranks: at once in the first forward, later ones without waiting for the answer before the end.

        Args:
            guided: the pipeline calls the transformer twice a step, for guidance.
            times: of the run's steps, known from the first forward on; transmission is selective with them alone.
        """
        if self._in_pipeline:
            raise PatchError("another call over the same transformer is running in this process: one at a time.")
        self._in_pipeline, self._differs, engine = True, [], self.engine
        if self.engine.mesh.cfg.size > 1:
            self._branches = Branches(self.engine, self._family, self.transformer, guided)
        branches = self._branches
        engine.selection = engine.coding = None
        if engine.links is not None and engine.selective is not None and times is not None:
            count = 2 if guided and branches is None and not self._family.batched else 1
            engine.selection = SelectiveCall(
                engine.selective, engine.kv_only, times, count, engine.device, engine.say, engine.links
            )
        try:
            yield
        finally:
            self._in_pipeline, self._branches = False, None
        self._settle(everywhere=branches is not None)  # each half has compared its own branch alone
        if branches is not None:
            branches.settle()

    def _settle(self, everywhere: bool = False) -> None:
        if not self._differs:
            return
        found = torch.stack(self._differs)
        if self.engine.anywhere(found.any()) if everywhere else bool(found.any()):
            steps = found.nonzero().flatten().tolist()
            first = f"first in its call {steps[0]} of {len(found)}" if steps else "seen by the other branch"
            raise MismatchError(
                f"the transformer's inputs were not the same on all ranks ({first}): a callback, an encoder, a random "
                "draw or a kernel whose results vary."
            )

    def release(self) -> None:
        """One wrapped pipeline lets go of the transformer; the last one takes the patches with it."""
        if self.users == 1:
            self._patches.undo()
            self.engine.users -= 1
            if self.engine.users == 0:
                self.engine.close()
                self.job.close()
        self.users -= 1

    def check(self) -> None:
        """PatchError unless every part of ours is in place and nothing was added that shards cannot follow."""
        for attn, processor in self._attentions:
            if attn.processor is not processor:
                raise PatchError(
                    f"an attention processor was replaced after cocodiff.wrap (now {type(attn.processor).__name__}): "
                    "its attention would see this rank's tokens alone. Undo that (unload_ip_adapter, or no "
                    "set_attn_processor), then cocodiff.unwrap(pipe) and cocodiff.wrap(pipe)."
                )
            backend = getattr(processor, "_attention_backend", None)
            if self.engine.ring is not None and getattr(backend, "value", backend) not in (None, "native"):
                raise ConfigError(
                    f"ring_degree={self.engine.mesh.ring.size} merges parts of attention by their log-sum-exps, for "
                    f"which it has kernels of its own; {backend!r} was set. Reset it, or use ring_degree=1."
                )
        self._patches.check()
        refuse_modifications(self.transformer, self._carriers)

    def _refuse(self, given: dict[str, Any]) -> None:
        kwargs = {**(given.get("joint_attention_kwargs") or {}), **(given.get("attention_kwargs") or {})}
        unknown = dict.fromkeys(kwargs.keys() - {"scale"}, "it is for attention processors, whose place cocodiff takes")
        for name, reason in {**unknown, **self._family.refused}.items():  # `scale` is LoRA's, and diffusers applies it
            if {**given, **kwargs}.get(name) is not None:
                raise ConfigError(f"{name} was given, but {reason}. Leave it out, or run without cocodiff.wrap.")


def _shard(value: Any, rows: slice, length: int, cut: Cut, name: str) -> Any:
    """These rows of a tensor, or of each tensor in a list; one without that dim (a timestep for all) stays whole."""
    if not isinstance(value, Tensor):
        return type(value)(_shard(item, rows, length, cut, name) for item in value)
    if value.ndim < 2:
        return value
    if value.shape[cut.dim] != length:
        raise ConfigError(f"{name} has {value.shape[cut.dim]} rows, but its stream has {length} tokens.")
    return value.narrow(cut.dim, rows.start, rows.stop - rows.start)
