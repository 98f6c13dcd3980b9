"""wrap / unwrap: fits the parts to one pipeline, by name, reversibly, on this instance alone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from cocodiff.config import Config
from cocodiff.door import Door
from cocodiff.engine import Engine
from cocodiff.errors import ConfigError, PatchError
from cocodiff.launch.agree import agree, share_random_state
from cocodiff.launch.job import Job, start_job
from cocodiff.mesh import Mesh
from cocodiff.models import Family, family_of
from cocodiff.patches import Patches
from cocodiff.refuse import refuse_modifications
from cocodiff.topology import Cluster, load_cluster


@dataclass
class Attachment:
    """What `pipe.cocodiff` is: this rank's place in the run, and what was attached to the pipeline.

    Attributes:
        is_main: true on the one rank that saves and prints.
        cluster, cluster_reason: the topology in use and where it came from; None on one rank.
        engine: None on one rank, where nothing but the device was changed.
    """

    job: Job
    config: Config
    pipeline_class: type
    cluster: Cluster | None = None
    cluster_reason: str = "one rank"
    engine: Engine | None = None
    door: Door | None = None

    @property
    def rank(self) -> int:
        return self.job.rank

    @property
    def world_size(self) -> int:
        return self.job.world_size

    @property
    def is_main(self) -> bool:
        return self.job.is_main

    @property
    def device(self) -> torch.device:
        return self.job.device


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
    door = attachment.door
    if door is not None:
        door.release()
        pipeline.__class__ = attachment.pipeline_class
    if door is None or door.job is not attachment.job:  # the door closes the job whose groups it uses
        attachment.job.close()
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
                pipeline.__class__ = _subclass(type(pipeline))
            elif config.ulysses_degree not in (None, 1):
                raise ConfigError(f"ulysses_degree={config.ulysses_degree} on one rank: start that many ranks.")
            pipeline.cocodiff = attachment
    except BaseException:
        job.close()
        raise
    return pipeline


def _install(pipeline: Any, attachment: Attachment) -> None:
    transformer, job, config = pipeline.transformer, attachment.job, attachment.config
    assert job.host_group is not None
    refuse_modifications(transformer, [])  # before weights are looked at: quantised ones have no plain values
    given: dict[str, Any] = {field.name: repr(getattr(config, field.name)) for field in fields(config)}
    cluster, attachment.cluster_reason = load_cluster(config.cluster, job.hosts, job.device.type)
    given |= {"cluster": cluster.to_json(), "pipeline": type(pipeline).__name__, "device type": job.device.type}
    given["transformer"] = {name: repr(value) for name, value in transformer.config.items() if name[0] != "_"}
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    given |= {f"weights of {name}": _weights(part) for name, part in modules.items()}
    agree(given, job.host_group, "cocodiff.wrap")

    door = vars(transformer).get("forward")
    if isinstance(door, Door):  # from_pipe: two pipelines share one transformer
        if door.engine.config != config:
            raise ConfigError("another wrapped pipeline shares this transformer, with other settings: unwrap it first.")
        door.users += 1
    else:
        door = _make_door(transformer, family_of(type(pipeline)), config, cluster, job)
    attachment.door, attachment.engine, attachment.cluster = door, door.engine, door.engine.mesh.cluster


def _make_door(transformer: Any, family: Family, config: Config, cluster: Cluster, job: Job) -> Door:
    parts = [module for module in transformer.modules() if hasattr(module, "processor")]
    if any(type(part.processor).__module__.startswith("cocodiff.") for part in parts):
        raise PatchError("this transformer is wrapped already, but its forward was replaced. unwrap it first.")
    assert job.host_group is not None
    mesh = Mesh.create(cluster, config.ulysses_degree, job.backend, job.host_group)
    engine, patches = Engine(config, mesh, job.device), Patches()
    try:
        attentions = family.install(engine, transformer, patches)
        engine.check_heads(min(attn.heads for attn in attentions))  # type: ignore[type-var, arg-type]
        forward = vars(transformer).get("_old_forward", transformer.forward)
        door = Door(engine, family, transformer, forward, attentions, patches, job)
        patches.set(transformer, "forward", door)
        door.check()
    except BaseException:
        patches.undo()
        engine.close()
        raise
    return door


def _weights(module: torch.nn.Module) -> torch.Tensor:
    """A few values of each parameter: enough to tell other weights, and adapters, from these."""
    with torch.no_grad():
        sample = [p.flatten()[:8].to(torch.float32) for p in module.parameters() if not p.is_meta]
        return torch.cat(sample).cpu() if sample else torch.zeros(0, device="cpu")


def _adapters(module: torch.nn.Module) -> list[str]:
    """Which adapters are active where, and how strongly; their weights are parameters."""
    tuned = [(name, part) for name, part in module.named_modules() if hasattr(part, "active_adapters")]
    return [f"{name} {part.active_adapters} {getattr(part, 'scaling', '')}" for name, part in tuned if name]


def _subclass(base: type) -> type:
    """The pipeline's class with a call of ours: diffusers looks `__call__` up on the type, not on the instance."""
    original: Callable = base.__call__  # type: ignore[operator]
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        given.pop("self")
        with _running(self, given):
            return original(self, *args, **kwargs)

    return type(base.__name__, (base,), {"__call__": call, "__module__": base.__module__, "__doc__": base.__doc__})


@contextmanager
def _running(pipeline: Any, given: dict[str, Any]) -> Iterator[None]:
    """Around one call of a wrapped pipeline: the ranks compare what they were given and share their randomness."""
    attachment: Attachment = pipeline.cocodiff
    job, door, group = attachment.job, attachment.door, attachment.job.host_group
    assert door is not None and group is not None
    with job.watched(f"a call of {type(pipeline).__name__}", lambda: door.running):
        if pipeline.transformer is not door.transformer:
            raise PatchError("pipe.transformer was replaced after cocodiff.wrap: unwrap(pipe) and wrap(pipe) again.")
        place = torch.device(pipeline._execution_device)
        if place.type != job.device.type or place.index not in (None, job.device.index):
            raise PatchError(f"the pipeline is on {place}, but this rank's device is {job.device}: do not move it.")
        state = {"adapters": _adapters(pipeline.transformer), "weights": _weights(pipeline.transformer)}
        steps = {"exchanges so far (a call failed on some ranks: unwrap and wrap again)": door.engine.submitted}
        agree(given | state | steps, group, f"the call of {type(pipeline).__name__}")
        share_random_state(job.device, group)
        bars = getattr(pipeline, "_progress_bar_config", None)
        if not job.is_main:
            pipeline.set_progress_bar_config(**{**(bars or {}), "disable": True})
        try:
            with door.in_pipeline():
                yield
        finally:
            if not job.is_main:
                if bars is None:
                    del pipeline._progress_bar_config
                else:
                    pipeline._progress_bar_config = bars
