"""wrap / unwrap: fits the parts to one pipeline, by name, reversibly, on this instance alone."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch

from cocodiff.compat import Patches, refuse_modifications
from cocodiff.config import DEGREES, Config, Selective
from cocodiff.errors import ConfigError, PatchError
from cocodiff.launch.agree import agree
from cocodiff.launch.job import Job, start_job
from cocodiff.models import Family, family_of
from cocodiff.parallel.mesh import Degrees, Mesh, choose_degrees, outermost
from cocodiff.pipeline.call import Attachment, subclass, weights
from cocodiff.pipeline.forward import Door
from cocodiff.plan import layer_costs
from cocodiff.selective.schedule import coded_from, names_level
from cocodiff.state import Engine
from cocodiff.topology import Cluster, load_cluster

_log = logging.getLogger(__name__)


def wrap(
    pipeline: Any, config: Config | None = None, *, device: str | torch.device | None = None, **settings: Any
) -> Any:
    """Make a diffusers pipeline run over all ranks of this run; every rank gets the picture one device would draw.

    Args:
        pipeline: an instance (patched in place and returned) or a class (gives an object whose `from_pretrained`,
            `from_single_file`, `from_pipe` and call return wrapped pipelines).
        config: a `Config`, or the same fields as keywords.
        device: of this rank. None means the local accelerator if there is one, else the CPU; an accelerator's index
            is always the rank's own, whatever the script says.

    Raises:
        ConfigError: unsupported pipeline, settings that cannot work on this number of ranks.
        MismatchError: ranks were given different pipelines or settings.
        LaunchError: the launcher's ranks cannot be found or joined.

    On one rank nothing but the device changes. Collective: every rank calls it. Example:

        pipe = cocodiff.wrap(FluxPipeline.from_pretrained(path, torch_dtype=torch.bfloat16))
        image = pipe("a lighthouse at dusk").images[0]
        if pipe.cocodiff.is_main:
            image.save("lighthouse.png")
    """
    config = Config.of(config, settings)
    if isinstance(pipeline, type):
        family_of(pipeline)
        return WrappedClass(pipeline, config, replace(start_job(device), shared=True))
    attachment = vars(pipeline).get("cocodiff")
    if isinstance(attachment, Attachment):
        if attachment.config != config or (device is not None and torch.device(device).type != attachment.device.type):
            raise ConfigError(
                "this pipeline is wrapped already, with other settings. Call cocodiff.unwrap(pipe) first."
            )
        return pipeline
    family_of(type(pipeline))
    return attach(pipeline, config, start_job(device))


def unwrap(pipeline: Any) -> Any:
    """Take every patch off a wrapped pipeline and return it; the process group stays. ConfigError if not wrapped."""
    attachment = vars(pipeline).get("cocodiff")
    if not isinstance(attachment, Attachment):
        raise ConfigError(f"this {type(pipeline).__name__} is not wrapped, so there is nothing to unwrap.")
    for door in attachment.doors.values():
        door.release()
        pipeline.__class__ = attachment.pipeline_class
    if all(door.job is not attachment.job for door in attachment.doors.values()):
        attachment.job.close()  # otherwise its last door closes it, whose engine uses its groups
    del pipeline.cocodiff
    return pipeline


class WrappedClass:
    """A pipeline class whose instances come wrapped. It joins the ranks at once, so that a failing load is noticed."""

    def __init__(self, pipeline_class: type, config: Config, job: Job) -> None:
        self.pipeline_class, self._config, self._job = pipeline_class, config, job

    def from_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        return self._load("from_pretrained", args, kwargs)

    def from_single_file(self, *args: Any, **kwargs: Any) -> Any:
        return self._load("from_single_file", args, kwargs)

    def from_pipe(self, *args: Any, **kwargs: Any) -> Any:
        return self._load("from_pipe", args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return attach(self.pipeline_class(*args, **kwargs), self._config, self._job)

    def _load(self, constructor: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        from diffusers.utils import logging

        quiet = logging.is_progress_bar_enabled() and not self._job.is_main
        with self._job.watched(f"{self.pipeline_class.__name__}.{constructor}"):
            if quiet:
                logging.disable_progress_bar()
            try:
                pipeline = getattr(self.pipeline_class, constructor)(*args, **kwargs)
            finally:
                if quiet:
                    logging.enable_progress_bar()
        return attach(pipeline, self._config, self._job)


def attach(pipeline: Any, config: Config, job: Job) -> Any:
    """`wrap` for a pipeline and a run that was joined before; `wrap` has the rest of the story."""
    try:
        with job.watched("cocodiff.wrap"):
            if not any(hasattr(part, "_hf_hook") for part in pipeline.components.values()):
                pipeline.to(job.device)  # offloaded parts find their way by their hooks
            attachment = Attachment(job, config, type(pipeline))
            if job.world_size > 1:
                _install(pipeline, attachment)
                pipeline.__class__ = subclass(type(pipeline))
            else:
                for name in DEGREES:
                    if getattr(config, name) not in (None, 1):
                        raise ConfigError(f"{name}={getattr(config, name)} on one rank: start that many ranks.")
                if Selective.of(config.transmission) is not None:
                    _log.warning("transmission=%r does nothing on one rank, which sends nothing.", config.transmission)
            pipeline.cocodiff = attachment
    except BaseException:
        job.close()
        raise
    return pipeline


def _install(pipeline: Any, attachment: Attachment) -> None:
    job, config, family = attachment.job, attachment.config, family_of(type(pipeline))
    assert job.host_group is not None
    names = [name for name in family.transformers if getattr(pipeline, name, None) is not None]
    transformers = {name: getattr(pipeline, name) for name in names}
    for transformer in transformers.values():
        refuse_modifications(transformer, [])  # before weights are looked at: quantised ones have no plain values
    settings = {field.name: getattr(config, field.name) for field in fields(config)}
    given: dict[str, Any] = {name: one if isinstance(one, str) else repr(one) for name, one in settings.items()}
    cluster, attachment.cluster_reason = load_cluster(config.cluster, job.hosts, job.device.type)
    given |= {"cluster": cluster.to_json(), "pipeline": type(pipeline).__name__, "device type": job.device.type}
    for name, transformer in transformers.items():
        given[name] = {key: repr(value) for key, value in transformer.config.items() if key[0] != "_"}
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    given |= {f"weights of {name}": weights(part) for name, part in modules.items()}
    agree(given, job.host_group, "cocodiff.wrap")

    doors: dict[str, Door] = {}
    try:
        for name, transformer in transformers.items():
            door = vars(transformer).get("forward")
            if isinstance(door, Door):  # from_pipe: two pipelines share one transformer
                if door.engine.config != config:
                    raise ConfigError(
                        "another wrapped pipeline shares this transformer, with other settings: unwrap it first."
                    )
                door.users += 1
            else:
                made = next((door.engine for door in doors.values() if door.job is job), None)
                door = make_door(transformer, family, config, cluster, job, made)
            doors[name] = door
    except BaseException:
        for door in doors.values():
            door.release()
        raise
    attachment.doors = doors
    attachment.cluster = doors[names[0]].engine.mesh.cluster


def _say_where(config: Config, engine: Engine) -> None:
    cluster = engine.mesh.cluster
    if engine.links is None:
        names = [level.name for level in cluster.levels]
        slow = ", ".join(name for name, yes in zip(names, cluster.slow, strict=True) if yes) or "none"
        given = config.transmission
        named = given.level if isinstance(given, Selective) else None
        why = f"no slow level (of cluster {cluster.name!r} slow: {slow}). Selective(level=...) names one all the same"
        if named is not None:
            why = f"nothing beyond level {names[engine.mesh.sequence.level]!r}, which lies inside {named!r}"
        _log.warning("transmission=%r sends everything, as exact does: these ranks cross %s.", given, why)
        return
    what = "keys and values alone cross" if engine.kv_only else "Q, K, V and the output cross"
    _log.info("transmission is selective from level %r on; %s.", cluster.levels[engine.links.level].name, what)


def _degrees(transformer: Any, family: Family, config: Config, cluster: Cluster, device_type: str) -> Degrees:
    """The mesh of an exact run, or, where selective transmission applies and has something to save, of that."""
    attending = [module for module in transformer.modules() if hasattr(module, "processor")]
    heads = min((getattr(module, "heads", cluster.num_ranks) for module in attending), default=1)
    fused = device_type != "xpu"  # where parts have no fused kernel (`cocodiff.kernels.partial`)
    choose = partial(
        choose_degrees,
        cluster,
        heads,
        config.cfg_degree,
        config.ring_degree,
        config.ulysses_degree,
        long=family.long and fused,
    )
    exact, selective = choose(), Selective.of(config.transmission)
    slow = None if selective is None else coded_from(selective, cluster, outermost(cluster.sizes))
    if selective is None or slow is None or not fused:
        return exact
    sizes = transformer.config
    width, itemsize = sizes.num_attention_heads * sizes.attention_head_dim, transformer.dtype.itemsize
    costs = layer_costs(cluster, exact, config.exchange, device_type, width, itemsize)
    return choose(selective=True) if names_level(selective, cluster, slow) or costs.worth_coding else exact


def make_door(
    transformer: Any, family: Family, config: Config, cluster: Cluster, job: Job, engine: Engine | None = None
) -> Door:
    """In front of one transformer, over the pipeline's engine, if it has one already."""
    parts = [module for module in transformer.modules() if hasattr(module, "processor")]
    if any(type(part.processor).__module__.startswith("cocodiff.") for part in parts):
        raise PatchError("this transformer is wrapped already, but its forward was replaced. unwrap it first.")
    assert job.host_group is not None
    if engine is None:
        degrees = _degrees(transformer, family, config, cluster, job.device.type)
        engine = Engine(config, Mesh.create(cluster, degrees, job.backend, job.host_group), job.device)
        if job.is_main:
            _log.info("mesh: %s (%s)", degrees, degrees.reason)
            if Selective.of(config.transmission) is not None:
                _say_where(config, engine)
    patches = Patches()
    try:
        attentions = family.install(engine, transformer, patches)
        forward = vars(transformer).get("_old_forward", transformer.forward)
        door = Door(engine, family, transformer, forward, attentions, patches, job)
        patches.set(transformer, "forward", door)
        door.check()
    except BaseException:
        patches.undo()
        if engine.users == 0:
            engine.close()
        raise
    engine.users += 1
    return door
