"""wrap / unwrap: one line around a diffusers pipeline, and back."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from cocodiff.compat import is_offloaded, offload_to
from cocodiff.config import DEGREES, Config, Selective
from cocodiff.errors import ConfigError
from cocodiff.launch.backend import idle_devices
from cocodiff.launch.job import Job, start_job
from cocodiff.models import family_of
from cocodiff.pipeline.call import subclass
from cocodiff.pipeline.handle import Handle
from cocodiff.pipeline.install import install, release
from cocodiff.planner import plan_call, plan_run

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
            is the rank's own; where the script has made the group and a different device current on every rank, those.

    Raises:
        ConfigError: unsupported pipeline, settings that cannot work on this number of ranks.
        MismatchError: ranks were given different pipelines or settings.
        LaunchError: the launcher's ranks cannot be found or joined.

    On one rank nothing but the device changes. Collective: every rank calls it. Example:

        pipe = cocodiff.wrap(FluxPipeline.from_pretrained(path, dtype=torch.bfloat16))
        image = pipe("a lighthouse at dusk").images[0]
        if pipe.cocodiff.is_main:
            image.save("lighthouse.png")
    """
    config = Config.of(config, settings)
    if not isinstance(pipeline, type) and not hasattr(pipeline, "components"):
        raise ConfigError(
            f"cocodiff.wrap takes a diffusers pipeline or its class, not {_named(pipeline)}: load it first, as with "
            "FluxPipeline.from_pretrained(...), and give the whole pipeline, none of its parts."
        )
    if isinstance(pipeline, type):
        family_of(pipeline)
        return WrappedClass(pipeline, config, replace(start_job(device), shared=True))
    handle = vars(pipeline).get("cocodiff")
    if isinstance(handle, Handle):
        if handle.config != config or (device is not None and torch.device(device).type != handle.device.type):
            raise ConfigError(
                "this pipeline is wrapped already, with other settings. Call cocodiff.unwrap(pipe) first."
            )
        return pipeline
    family_of(type(pipeline))
    return wrap_instance(pipeline, config, start_job(device))


def unwrap(pipeline: Any) -> Any:
    """Take every patch off a wrapped pipeline and return it; the process group stays. ConfigError if not wrapped."""
    handle = vars(pipeline).get("cocodiff")
    if not isinstance(handle, Handle):
        raise ConfigError(f"this {type(pipeline).__name__} is not wrapped, so there is nothing to unwrap.")
    sessions = [forward.session for forward in handle.forwards.values()]
    for forward in handle.forwards.values():
        release(forward)
        pipeline.__class__ = handle.pipeline_class
    for session in sessions:
        if session.users == 0:
            session.job.close()
    if all(session.job is not handle.job for session in sessions):
        handle.job.close()  # otherwise a session that others still use has its groups
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
        return wrap_instance(self.pipeline_class(*args, **kwargs), self._config, self._job)

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
        return wrap_instance(pipeline, self._config, self._job)


def wrap_instance(pipeline: Any, config: Config, job: Job) -> Any:
    """`wrap` for a pipeline and a run that was joined before; `wrap` has the rest of the story."""
    try:
        with job.watched("cocodiff.wrap"):
            if job.world_size > 1 and job.device.type != "cpu":
                offload_to(pipeline, job.device)
            if not any(is_offloaded(part) for part in pipeline.components.values()):
                pipeline.to(job.device)  # offloaded parts find their way by their hooks
            handle = Handle(job, config, type(pipeline))
            if job.world_size > 1:
                install(pipeline, handle, plan_run, plan_call)
                pipeline.__class__ = subclass(type(pipeline))
            else:
                _say_one_rank(job)
                for name in DEGREES:
                    if getattr(config, name) not in (None, 1):
                        raise ConfigError(f"{name}={getattr(config, name)} on one rank: start that many ranks.")
                if Selective.of(config.transmission) is not None:
                    _log.warning("transmission=%r does nothing on one rank, which sends nothing.", config.transmission)
            pipeline.cocodiff = handle
    except BaseException:
        job.close()
        raise
    return pipeline


def _say_one_rank(job: Job) -> None:
    """Nobody should believe that several devices draw where the launcher was forgotten."""
    idle = idle_devices(job.launcher, job.device)
    if idle:
        _log.warning(idle)
    else:
        launcher = "no launcher" if job.launcher == "none" else job.launcher
        _log.info("one rank on %s, started by %s: the pipeline runs as without cocodiff", job.device, launcher)


def _named(thing: Any) -> str:
    """A text or None as it is; else the type, since what a module prints has hundreds of lines."""
    return f"{thing!r:.60}" if thing is None or isinstance(thing, str) else f"an object of type {type(thing).__name__}"
