"""The methods that a bench compares, each on its own copy of the model: `step()` is one step of denoising."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cocodiff.bench.models import build_inputs
from cocodiff.config import Config, Selective
from cocodiff.errors import ConfigError
from cocodiff.exchange.connected import TransportMaker
from cocodiff.exchange.transport import LocalTransport, make_transport
from cocodiff.launch.job import Job
from cocodiff.models import family_named
from cocodiff.models.shapes import Shape
from cocodiff.pipeline.call import call_running
from cocodiff.pipeline.forward import ShardedForward
from cocodiff.pipeline.install import install_transformer
from cocodiff.planner import plan_run
from cocodiff.state import Session
from cocodiff.topology import load_cluster

RUN = 20  # steps of a run: as many as it takes not to be a short one
DESCRIPTIONS = {
    "single": "one rank, unwrapped diffusers",
    "diffusers": "diffusers' own context parallelism (Ulysses)",
    "ulysses": "ours: one flat exchange, sequential",
    "exact": "ours: every exact mechanism",
    "high": "ours, 1/4 of the bytes on slow links",
    "balanced": "ours, 1/8 of the bytes on slow links",
    "fast": "ours, 1/16 of the bytes on slow links; 1/32 where keys and values alone cross",
    "v_major": "the CoCoDiff paper's selection of rows, 1/2 of the bytes on slow links",
}

OURS = ("exact", "high", "balanced", "fast", "v_major")  # which have a choice of meshes


def check_methods(names: Sequence[str]) -> None:
    """Raise ConfigError if one of the names is no method."""
    if unknown := [name for name in names if name not in DESCRIPTIONS]:
        raise ConfigError(f"--methods {','.join(unknown)}: there are {', '.join(DESCRIPTIONS)}.")


class Method:
    """One way to run the model.

    Args:
        step: one forward; the picture's tokens on every rank that has any.
        forward: the transformer of ours, where there is one: its session counts bytes and keeps timelines.
        everyone: false where rank 0 runs alone.
        around: entered around a series of steps.
        run: steps of a whole run, where one step is not like another; else None.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[], Tensor],
        forward: ShardedForward | None = None,
        everyone: bool = True,
        around: Callable[[], Any] = contextlib.nullcontext,
        run: int | None = None,
    ) -> None:
        self.name, self.step, self.forward, self.everyone, self.around = name, step, forward, everyone, around
        self.run = run


def make_method(
    name: str,
    model: torch.nn.Module,
    shape: Shape,
    job: Job,
    cluster: str,
    degrees: Mapping[str, int] = MappingProxyType({}),
    guided: bool = False,
) -> Method:
    """Collective. Raises where the method cannot run this shape on these ranks: its row says why.

    Args:
        degrees: of the mesh of `exact`.
        guided: a step computes two branches.
    """
    if name == "single":
        alone = _copy(model).to(job.device) if job.is_main else None
        return Method(name, _step(alone, shape, job, guided), everyone=False)
    if job.world_size == 1:
        raise ConfigError("one rank has nothing to exchange: start the bench under a launcher, or with --ranks.")
    if name == "diffusers":
        return _diffusers(model, shape, job, guided)
    baseline = Config(exchange="flat", schedule="sequential", cluster=cluster, ulysses_degree=job.world_size)
    config = baseline
    if name != "ulysses":
        transmission = Selective.v_major() if name == "v_major" else name
        config = Config.of(None, {"cluster": cluster, "transmission": transmission, **degrees})
    return our_method(name, config, model, shape, job, guided)


def _step(model: Any, shape: Shape, job: Job, guided: bool) -> Callable[[], Tensor]:
    """One step as pipelines do it: one call, or one for each branch, or one with both in its batch."""
    branches = [build_inputs(shape, job.device, branch) for branch in range(2 if guided else 1)]
    batched = family_named(shape.family).batched
    if guided and batched:
        both = {
            name: torch.cat([one[name] for one in branches]) if name in batched else branches[0][name]
            for name in branches[0]
        }
        branches = [both]

    def step() -> Tensor:
        # A tuple: diffusers' own context parallelism cannot take another output apart.
        outputs = [model(**inputs, return_dict=False)[0] for inputs in branches]
        if guided and batched:
            outputs = list(outputs[0].chunk(2))
        return outputs[-1] + 3.0 * (outputs[0] - outputs[-1]) if guided else outputs[0]

    return step


def our_method(
    name: str,
    config: Config,
    model: torch.nn.Module,
    shape: Shape,
    job: Job,
    guided: bool = False,
    transport: TransportMaker = make_transport,
) -> Method:
    """Wrap a copy of the model by a config. Collective.

    Args:
        guided: a step computes two branches.
        transport: makes the transport of each group.
    """
    cluster, _ = load_cluster(config.cluster, job.hosts, job.device.type)
    family = family_named(shape.family)
    choose = partial(plan_run, config, cluster, job.device.type)
    session = Session(replace(job, shared=True), config, cluster, choose, transport)
    copied = _copy(model).to(job.device)
    forward = install_transformer(copied, family, session)
    plan = forward.plan()
    run = None if plan is None or plan.coded_from is None else RUN
    times = None if run is None else lambda: [float(RUN - step) for step in range(RUN)]
    batched = bool(family.batched)
    around = partial(call_running, [forward], lambda: guided and not batched, batched, times)
    return Method(name, _step(copied, shape, job, guided), forward, around=around, run=run)


def _diffusers(model: Any, shape: Shape, job: Job, guided: bool) -> Method:
    """As its documentation says, with what it needs besides: see the comments."""
    from diffusers import ContextParallelConfig

    blocks = family_named(shape.family).blocks.values()
    text = shape.text if any("encoder_hidden_states" in spec.inputs for spec in blocks) else 0  # Wan's is not cut
    if shape.heads % job.world_size or text % job.world_size or shape.image % job.world_size:
        raise ConfigError(
            f"{shape.heads} heads, {shape.text} text and {shape.image} image tokens must all divide by "
            f"{job.world_size} ranks for diffusers"
        )
    theirs = _copy(model).to(job.device)
    with _one_accelerator():
        theirs.enable_parallelism(config=ContextParallelConfig(ulysses_degree=job.world_size))
    return Method("diffusers", _step(theirs, shape, job, guided))


def _copy(model: Any) -> Any:
    """Modules of its own to patch, over the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


@contextlib.contextmanager
def _one_accelerator() -> Iterator[None]:
    """It divides by the number of accelerators, of which a CPU has none."""
    count = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: count() or 1
    try:
        yield
    finally:
        torch.accelerator.device_count = count


def compute_method(model: Any, shape: Shape, job: Job, cluster: str, guided: bool = False) -> Method:
    """What all ranks compute together when exchanges cost a copy: `ulysses` with nothing sent."""
    config = Config(exchange="flat", schedule="sequential", cluster=cluster, ulysses_degree=job.world_size)
    return our_method("compute", config, model, shape, job, guided, LocalTransport)


def synchronize(job: Job) -> None:
    """All ranks here, all work of their devices done."""
    if job.device.type != "cpu":
        torch.get_device_module(job.device).synchronize()
    if job.host_group is not None:
        dist.barrier(group=job.host_group)
