"""The transformer's forward on shards: whole tensors outside, this rank's tokens inside.

`ShardedForward` stands in place of `transformer.forward`. It checks that every self-attention is still ours, cuts what
the family names into shards (ragged, nothing padded), runs the model, and gathers the picture's tokens after its last
projection.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cocodiff.blocks import BlockRow
from cocodiff.compat import Originals, refuse_modifications
from cocodiff.errors import ConfigError, PatchError, UsageError
from cocodiff.exchange.collectives import gather_rows
from cocodiff.launch.agree import agree
from cocodiff.models import Family
from cocodiff.models.family import Cut
from cocodiff.parallel.mesh import Mesh
from cocodiff.parallel.tokens import Tokens
from cocodiff.pipeline.cfg_parallel import run_branch
from cocodiff.pipeline.inputs import compare_inputs
from cocodiff.pipeline.patches import Patches
from cocodiff.pipeline.selective_forward import begin_forward, end_forward
from cocodiff.plan import ModelFacts, RunPlan
from cocodiff.state import CallState, ForwardState, Session

# A transformer's forward, its arguments and the branches of guidance -> how it runs. Collective over all ranks.
PlanCall = Callable[["ShardedForward", Mapping[str, Any], int], RunPlan]


class ShardedForward:
    """Stands in place of one transformer's forward.

    Args:
        forward: what stood there before, called with shards.
        row: the transformer's blocks.
        plan_call: how a forward runs where the session has no plan for all.
        attentions: the modules whose processors must stay ours.
        patches: all that was done to this transformer; taken back when its last wrapped pipeline lets go.

    Attributes:
        users: wrapped pipelines that share the transformer.
        call: the pipeline's call that runs; None between calls.
    """

    def __init__(
        self,
        session: Session,
        family: Family,
        facts: ModelFacts,
        transformer: Any,
        forward: Callable,
        row: BlockRow,
        attentions: Sequence[nn.Module],
        patches: Patches,
        plan_call: PlanCall,
    ) -> None:
        self._plan_call = plan_call
        self.session, self.transformer, self.users = session, transformer, 1
        self.patches, self.family, self.facts, self._forward, self.row = patches, family, facts, forward, row
        self._signature = inspect.signature(forward)
        self._attentions: list[tuple[Any, Any]] = [(attn, attn.processor) for attn in attentions]
        self._originals = Originals()
        self.call: CallState | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.session.job.watched("the transformer's forward"):
            return self._run(*args, **kwargs)

    @contextmanager
    def in_call(self, call: CallState) -> Iterator[None]:
        """Around a call of a wrapped pipeline, which compares its own arguments.

        Raises:
            UsageError: another call over the same transformer is running.
        """
        if self.call is not None:
            raise UsageError("another call over the same transformer is running in this process: one at a time.")
        self.call = call
        try:
            yield
        finally:
            self.call = None

    def announced(self, cache_context: Callable[..., Any]) -> Callable[..., Any]:
        """In place of the transformer's `cache_context`, by which diffusers names the branch of guidance that runs."""

        @contextmanager
        def named(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            with cache_context(name, *args, **kwargs):
                if self.call is not None:
                    self.call.branch_name = name
                try:
                    yield
                finally:
                    if self.call is not None:
                        self.call.branch_name = None

        return named

    def plan(self) -> RunPlan | None:
        """How this transformer runs, or ran last; None where its first call will decide."""
        return self.pinned or next(reversed(self.session.planned.values()), None)

    @property
    def pinned(self) -> RunPlan | None:
        """How all its calls run; None where each shape has a plan of its own."""
        return self.session.plan(self.facts)

    def check(self, mesh: Mesh | None) -> None:
        """Raise unless every part of ours is in place and nothing was set that shards cannot follow.

        Raises:
            PatchError: a part was replaced, or something was added.
            ConfigError: an attention backend that a ring cannot use.
        """
        for attn, processor in self._attentions:
            if attn.processor is not processor:
                raise PatchError(
                    f"an attention processor was replaced after cocodiff.wrap (now {type(attn.processor).__name__}): "
                    "its attention would see this rank's tokens alone. Undo that (unload_ip_adapter, or no "
                    "set_attn_processor), then cocodiff.unwrap(pipe) and cocodiff.wrap(pipe)."
                )
        self.patches.check()
        refuse_modifications(self.transformer, self._originals)
        blocks = [block for name in self.family.blocks for block in getattr(self.transformer, name)]
        if len(blocks) != len(self.row.blocks) or any(
            block is not known.module for block, known in zip(blocks, self.row.blocks, strict=True)
        ):
            raise PatchError(
                f"blocks of the transformer were replaced, added or removed after cocodiff.wrap ({len(blocks)} now, "
                f"{len(self.row.blocks)} then): unwrap(pipe) and wrap(pipe) again."
            )
        if mesh is not None and mesh.ring.size > 1:
            self._check_backends(mesh.ring.size)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        call = self.call or CallState(self.session, self.transformer.dtype)
        if torch.is_grad_enabled():
            raise UsageError("exchanges carry no gradients: call the transformer under torch.no_grad().")
        given = self._signature.bind(*args, **kwargs).arguments
        self._refuse(given)
        if call.chosen is None:
            self.check(None)
            call.choose(self.pinned or self._plan_call(self, given, self._branches(call, given)))
        self.check(call.mesh)
        if self.call is None:
            caller = "called by itself, or by a pipeline that is not wrapped: cocodiff.wrap(that) first"
            agree(given, call.mesh.host_group, f"the transformer's input ({caller})")
        else:
            compare_inputs(call, self, given)
        conditioning = given.get("encoder_hidden_states")  # the pipeline's own object, not half of it
        if self.call is None or call.mesh.cfg.size == 1:
            return self.on_shards(call, given, conditioning)
        as_tuple = given.get("return_dict") is False
        output = run_branch(
            call, self.family, self.transformer, given,
            lambda part: self.on_shards(call, part | {"return_dict": False}, conditioning)[0],
        )  # fmt: skip
        if as_tuple:
            return (output,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output)

    def _branches(self, call: CallState, given: dict[str, Any]) -> int:
        """How many branches of guidance a step has, as far as a forward knows: an even batch may hold both."""
        both = self.family.batched and len(given["hidden_states"]) % 2 == 0
        return 2 if both or call.guided() else 1

    def on_shards(self, call: CallState, given: dict[str, Any], conditioning: Any) -> Any:
        family, sequence = self.family, call.mesh.sequence
        counts = family.token_counts(self.transformer, given)
        tokens = Tokens.split(counts, sequence.size, sequence.rank)
        layers = [(attn.heads, attn.inner_dim // attn.heads) for attn, _ in self._attentions]
        coding = begin_forward(call, self, layers, given, conditioning, tokens)
        state = ForwardState(call, tokens, coding)
        for name, cut in family.cuts.items():
            if given.get(name) is not None:
                given[name] = _shard(given[name], tokens.rows(cut.stream), counts[cut.stream], cut, name)
        with state.span("forward"), self.row.running(state), self._gathered(state, list(counts)[-1]):
            output = self._forward(**given)
        end_forward(call, coding)
        return output

    @contextmanager
    def _gathered(self, state: ForwardState, stream: str) -> Iterator[None]:
        """While inside, the last projection gives all tokens: what follows it (unpatchify) needs them."""

        def gather(module: nn.Module, args: Any, shard: Tensor) -> Tensor:
            with state.span("wait gather"):
                return gather_rows(shard, state.tokens.streams[stream], state.connected.sequence)

        last = self.transformer.proj_out.register_forward_hook(gather)
        try:
            yield
        finally:
            last.remove()

    def _check_backends(self, ring_degree: int) -> None:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        for _, processor in self._attentions:
            if not hasattr(processor, "_attention_backend"):
                continue  # SD3's, which attend natively whatever is set
            backend = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
            if getattr(backend, "value", backend) != "native":
                raise ConfigError(
                    f"ring_degree={ring_degree} merges parts of attention by their log-sum-exps, for "
                    f"which it has kernels of its own; {backend!r} was set, for this transformer or for all (attention_"
                    "backend, DIFFUSERS_ATTN_BACKEND). Reset it, or use ring_degree=1."
                )

    def _refuse(self, given: dict[str, Any]) -> None:
        kwargs = {**(given.get("joint_attention_kwargs") or {}), **(given.get("attention_kwargs") or {})}
        unknown = dict.fromkeys(kwargs.keys() - {"scale"}, "it is for attention processors, whose place cocodiff takes")
        for name, reason in {**unknown, **self.family.refused}.items():  # `scale` is LoRA's, and diffusers applies it
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
