"""What is attached to a wrapped pipeline, and what happens around each of its calls."""

from __future__ import annotations

import functools
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from cocodiff.config import Config
from cocodiff.errors import PatchError
from cocodiff.launch.agree import agree, share_random_state
from cocodiff.launch.job import Job
from cocodiff.models import family_of
from cocodiff.parallel.mesh import Mesh
from cocodiff.pipeline.call_report import account
from cocodiff.pipeline.forward import Door
from cocodiff.state import Engine
from cocodiff.topology import Cluster

_log = logging.getLogger(__name__)


@dataclass
class Attachment:
    """What `pipe.cocodiff` is: this rank's place in the run, and what was attached to the pipeline.

    Attributes:
        is_main: true on the one rank that saves and prints.
        cluster, cluster_reason: the topology in use and where it came from; None on one rank.
        doors: by name, the transformers that run on shards; none on one rank, where nothing but the device was changed.
    """

    job: Job
    config: Config
    pipeline_class: type
    cluster: Cluster | None = None
    cluster_reason: str = "one rank"
    doors: dict[str, Door] = field(default_factory=dict)
    said_idle: bool = False
    last: dict[str, Any] | None = None

    def report(self) -> dict[str, Any]:
        """What the last call sent, missed and held; docs/selective.md explains the keys.

        Raises:
            PatchError: no call has ended yet.
        """
        if self.job.world_size == 1:
            return {"transmission": None, "reason": "one rank sends nothing", "bytes": {}, "share": {}}
        if self.last is None:
            raise PatchError("there is nothing to report: no call has ended yet.")
        return self.last

    @property
    def engine(self) -> Engine | None:
        """Mesh, lanes and exchanges; None on one rank."""
        return next((door.engine for door in self.doors.values()), None)

    @property
    def mesh(self) -> Mesh | None:
        """The axes and this rank's place on them: `print(pipe.cocodiff.mesh)`; None on one rank."""
        return None if self.engine is None else self.engine.mesh

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


def weights(module: torch.nn.Module) -> torch.Tensor:
    """A few values of each parameter: enough to tell other weights, and adapters, from these."""
    with torch.no_grad():
        sample = [p.flatten()[:8].to(torch.float32) for p in module.parameters() if not p.is_meta]
        return torch.cat(sample).cpu() if sample else torch.zeros(0, device="cpu")


def _adapters(module: torch.nn.Module) -> list[str]:
    """Which adapters are active where, and how strongly; their weights are parameters."""
    tuned = [(name, part) for name, part in module.named_modules() if hasattr(part, "active_adapters")]
    return [f"{name} {part.active_adapters} {getattr(part, 'scaling', '')}" for name, part in tuned if name]


def subclass(base: type) -> type:
    """The pipeline's class with a call of ours: diffusers looks `__call__` up on the type, not on the instance."""
    original: Callable = base.__call__  # type: ignore[operator]
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        given.pop("self")
        with _running(self, given):
            return original(self, *args, **kwargs)

    return type(base.__name__, (base,), {"__call__": call, "__module__": base.__module__, "__doc__": base.__doc__})


def _times(pipeline: Any) -> list[float]:
    """The scheduler's, of the steps that the call runs: an image-to-image call leaves out the first ones."""
    return pipeline.scheduler.timesteps.tolist()[-pipeline._num_timesteps :]


@contextmanager
def _running(pipeline: Any, given: dict[str, Any]) -> Iterator[None]:
    """Around one call of a wrapped pipeline: the ranks compare what they were given and share their randomness."""
    attachment: Attachment = pipeline.cocodiff
    job, doors, group = attachment.job, attachment.doors, attachment.job.host_group
    assert group is not None
    with job.watched(f"a call of {type(pipeline).__name__}", lambda: any(door.running for door in doors.values())):
        state: dict[str, Any] = {}
        for name, door in doors.items():
            if getattr(pipeline, name) is not door.transformer:
                raise PatchError(f"pipe.{name} was replaced after cocodiff.wrap: unwrap(pipe) and wrap(pipe) again.")
            state[f"adapters of {name}"] = _adapters(door.transformer)
            state[f"weights of {name}"] = weights(door.transformer)
        place = torch.device(pipeline._execution_device)
        if place.type != job.device.type or place.index not in (None, job.device.index):
            raise PatchError(f"the pipeline is on {place}, but this rank's device is {job.device}: do not move it.")
        submitted = [door.engine.unsettled for door in doors.values()]
        steps = {"exchanges so far (a call failed on some ranks: unwrap and wrap again)": submitted}
        agree(given | state | steps, group, f"the call of {type(pipeline).__name__}")
        share_random_state(job.device, group)
        bars = getattr(pipeline, "_progress_bar_config", None)
        if not job.is_main:
            pipeline.set_progress_bar_config(**{**(bars or {}), "disable": True})
        family, mesh = family_of(attachment.pipeline_class), attachment.mesh
        guided = family.guided(pipeline, given)
        if mesh is not None and mesh.cfg.size > 1 and not (guided or family.batched or attachment.said_idle):
            attachment.said_idle = True
            if job.is_main:
                _log.warning("cfg_degree=2, but this call has no guidance: both halves of the ranks compute the same.")
        engine = attachment.engine
        before = (Counter(), Counter()) if engine is None else engine.tally.snapshot()
        try:
            with ExitStack() as stack:
                for door in doors.values():
                    stack.enter_context(door.in_pipeline(guided, partial(_times, pipeline)))
                yield
            for door in doors.values():
                door.engine.settled()
        finally:
            if not job.is_main:
                if bars is None:
                    del pipeline._progress_bar_config
                else:
                    pipeline._progress_bar_config = bars
    if engine is not None:  # a call of its own: a rank that waits in the other for one that is here must hear of that
        with job.watched("the report of a call"):
            attachment.last = account(engine, before)
