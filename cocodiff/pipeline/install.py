"""Fits our parts to one pipeline: compares the ranks, makes the session, puts a sharded forward on each transformer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from cocodiff.blocks import BlockRow
from cocodiff.compat import Originals, own_forward, refuse_modifications
from cocodiff.config import Config, Selective
from cocodiff.errors import ConfigError, PatchError
from cocodiff.launch.agree import agree
from cocodiff.models import Family, family_of
from cocodiff.pipeline.compare import pipeline_state
from cocodiff.pipeline.forward import PlanCall, ShardedForward
from cocodiff.pipeline.handle import Handle
from cocodiff.pipeline.install_blocks import install_blocks
from cocodiff.pipeline.patches import Patches
from cocodiff.plan import ModelFacts, RunPlan
from cocodiff.state import Session
from cocodiff.topology import Cluster, load_cluster

_log = logging.getLogger(__name__)

PlanRun = Callable[[Config, Cluster, str, ModelFacts], RunPlan | None]


def install(pipeline: Any, handle: Handle, plan_run: PlanRun, plan_call: PlanCall) -> None:
    """Put ours on every transformer of a pipeline. Collective over all ranks, more than one.

    Raises:
        ConfigError, PatchError: the pipeline or the settings cannot work; nothing is left on the pipeline.
        MismatchError: the ranks were given different pipelines or settings.
    """
    job, config, family = handle.job, handle.config, family_of(type(pipeline))
    names = [name for name in family.transformers if getattr(pipeline, name, None) is not None]
    transformers = {name: getattr(pipeline, name) for name in names}
    for transformer in transformers.values():
        refuse_modifications(transformer, Originals())
    cluster, handle.cluster_reason = load_cluster(config.cluster, job.hosts, job.device.type)
    _compare(pipeline, handle, transformers, cluster)
    handle.cluster = cluster
    if not transformers:  # an encoder of prompts: nothing is exchanged
        return
    made: Session | None = None
    forwards: dict[str, ShardedForward] = {}
    try:
        for name, transformer in transformers.items():
            forward = vars(transformer).get("forward")
            if isinstance(forward, ShardedForward):  # from_pipe: two pipelines share one transformer
                if forward.session.config != config:
                    raise ConfigError(
                        "another wrapped pipeline shares this transformer, with other settings: unwrap it first."
                    )
                forward.users += 1
            else:
                made = made or Session(job, config, cluster, partial(plan_run, config, cluster, job.device.type))
                forward = install_transformer(transformer, family, made, plan_call)
            forwards[name] = forward
    except BaseException:
        for forward in forwards.values():
            release(forward)
        raise
    handle.forwards = forwards
    handle.cluster = forwards[names[0]].session.cluster


def unplanned(forward: ShardedForward, given: Mapping[str, Any], branches: int) -> RunPlan:
    """Where the session has a plan for all calls."""
    raise AssertionError("no plan was made")


def install_transformer(
    transformer: Any, family: Family, session: Session, plan_call: PlanCall = unplanned
) -> ShardedForward:
    """Put our forwards on one transformer and its blocks. Collective where the session's mesh is new."""
    parts = [module for module in transformer.modules() if hasattr(module, "processor")]
    if any(type(part.processor).__module__.startswith("cocodiff.") for part in parts):
        raise PatchError("this transformer is wrapped already, but its forward was replaced. unwrap it first.")
    facts, patches, row = model_facts(family, transformer), Patches(), BlockRow(family.whole)
    try:
        first = session.is_new
        plan = session.plan(facts)
        if first and session.job.host_group is not None:  # ranks with other plans would wait in other groups
            agree({"plan": repr(plan)}, session.job.host_group, "cocodiff.wrap")
        mesh = None if plan is None else session.connect(plan).mesh
        if first and session.job.is_main and plan is not None and mesh is not None:
            _log.info("mesh: %s (%s)", plan.degrees, plan.degrees.reason)
            if plan.selective is not None:
                _say_where(plan, mesh, session)
        attentions = install_blocks(family, row, transformer, patches)
        forward = ShardedForward(
            session, family, facts, transformer, own_forward(transformer), row, attentions, patches, plan_call
        )  # fmt: skip
        patches.set(transformer, "forward", forward)
        if hasattr(transformer, "cache_context"):
            patches.set(transformer, "cache_context", forward.announced(transformer.cache_context))
        forward.check(mesh)
    except BaseException:
        patches.undo()
        if session.users == 0:
            session.close()
        raise
    session.users += 1
    return forward


def release(forward: ShardedForward) -> None:
    """One wrapped pipeline lets go of a transformer; the last one takes the patches with it, and ends its session.

    The job stays: whoever waits for a failure to be reported closes it after that.
    """
    if forward.users == 1:
        forward.patches.undo()
        forward.session.users -= 1
        if forward.session.users == 0:
            forward.session.close()
    forward.users -= 1


def model_facts(family: Family, transformer: Any) -> ModelFacts:
    """What a plan needs to know of a transformer."""
    attending = [part.heads for part in transformer.modules() if hasattr(part, "processor") and hasattr(part, "heads")]
    sizes = transformer.config
    width = sizes.num_attention_heads * sizes.attention_head_dim
    return ModelFacts(min(attending, default=1), width, transformer.dtype.itemsize, family.long)


def _compare(pipeline: Any, handle: Handle, transformers: dict[str, Any], cluster: Cluster) -> None:
    """Raise MismatchError unless all ranks have the same pipeline, settings and weights."""
    job, config = handle.job, handle.config
    assert job.host_group is not None
    settings = {field.name: getattr(config, field.name) for field in fields(config)}
    given: dict[str, Any] = {name: one if isinstance(one, str) else repr(one) for name, one in settings.items()}
    given |= {"cluster": cluster.to_json(), "pipeline": type(pipeline).__name__, "device type": job.device.type}
    for name, transformer in transformers.items():
        given[name] = {key: repr(value) for key, value in transformer.config.items() if key[0] != "_"}
    agree(given | pipeline_state(pipeline, handle.fingerprints), job.host_group, "cocodiff.wrap")
    left_out = [f"{name} ({count} tensors)" for name, count in handle.fingerprints.left_out.items() if count]
    if left_out and job.is_main:
        _log.warning(
            "weights were compared between ranks by shape and type alone in %s: they are quantised, on disk, or moved "
            "in when they are used. Give every rank the same.",
            ", ".join(left_out),
        )


def _say_where(plan: RunPlan, mesh: Any, session: Session) -> None:
    """Log where transmission is selective, or warn why it is nowhere."""
    cluster, given = session.cluster, session.config.transmission
    names = [level.name for level in cluster.levels]
    if plan.coded_from is None:
        slow = ", ".join(name for name, yes in zip(names, cluster.slow, strict=True) if yes) or "none"
        named = given.level if isinstance(given, Selective) else None
        why = f"no slow level (of cluster {cluster.name!r} slow: {slow}). Selective(level=...) names one all the same"
        if named is not None:
            why = f"nothing beyond level {names[mesh.sequence.level]!r}, which lies inside {named!r}"
        _log.warning("transmission=%r sends everything, as exact does: these ranks cross %s.", given, why)
        return
    what = "keys and values alone cross" if plan.kv_only(mesh) else "Q, K, V and the output cross"
    _log.info("transmission is selective from level %r on; %s.", names[plan.coded_from], what)
