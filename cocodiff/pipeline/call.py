"""Around each call of a wrapped pipeline: the ranks compare what they were given and share their randomness."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from cocodiff.compat import describe_adapters, sample_weights
from cocodiff.errors import PatchError
from cocodiff.launch.agree import agree, share_random_state
from cocodiff.models import family_of
from cocodiff.pipeline.call_report import call_report
from cocodiff.pipeline.forward import ShardedForward, check_call
from cocodiff.pipeline.handle import Handle
from cocodiff.selective.exchange import SlowLinks
from cocodiff.selective.run import SelectiveCall
from cocodiff.state import CallState


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


@contextmanager
def call_running(
    forwards: Sequence[ShardedForward], guided: bool, batched: bool, times: Callable[[], Sequence[float]] | None
) -> Iterator[CallState]:
    """While inside, these transformers of one pipeline run one call of it; collective where its mesh is new.

    Args:
        guided: the pipeline calls the transformer twice a step, for guidance.
        batched: the batch holds both branches of guidance.
        times: of the run's steps, known from the first forward on; transmission is selective with them only.
    """
    session, plan = forwards[0].session, forwards[0].plan()
    call = CallState(session, plan, session.connect(plan), guided)
    if plan.selective is not None and plan.coded_from is not None and times is not None:
        branches = 2 if guided and call.mesh.cfg.size == 1 and not batched else 1
        links = SlowLinks(plan.coded_from, session.lane("encode"), session.lane("decode"))
        kv_only = plan.kv_only(call.mesh)
        call.selective = SelectiveCall(plan.selective, kv_only, times, branches, session.device, session.warn, links)
    with ExitStack() as stack:
        for forward in forwards:
            stack.enter_context(forward.in_call(call))
        try:
            yield call
        except BaseException:
            call.drop()  # whoever keeps the exception keeps the call, by its frames
            raise
    check_call(call)


@contextmanager
def _running(pipeline: Any, given: dict[str, Any]) -> Iterator[None]:
    """Around one call of a wrapped pipeline on several ranks."""
    handle: Handle = pipeline.cocodiff
    job, forwards, session = handle.job, handle.forwards, handle.session
    assert job.host_group is not None and session is not None
    with job.watched(f"a call of {type(pipeline).__name__}"):
        _compare(pipeline, handle, given)
        share_random_state(job.device, job.host_group)
        family = family_of(handle.pipeline_class)
        guided, before = family.guided(pipeline, given), session.bytes.snapshot()
        running = call_running(list(forwards.values()), guided, bool(family.batched), partial(_times, pipeline))
        with _quiet(pipeline, job.is_main), running as call:
            if call.mesh.cfg.size > 1 and not (guided or family.batched):
                text = "cfg_degree=2, but this call has no guidance: both halves of the ranks compute the same."
                session.warn("idle half", text)
            yield
        session.settle()
    with job.watched("the report of a call"):  # a rank that waits in the other for one that is here must hear of that
        handle.last_report = call_report(call, before)


def _compare(pipeline: Any, handle: Handle, given: dict[str, Any]) -> None:
    """Raise MismatchError unless all ranks were given the same and are alike; PatchError where parts were replaced."""
    job, name = handle.job, type(pipeline).__name__
    assert job.host_group is not None and handle.session is not None
    state: dict[str, Any] = {}
    for part, forward in handle.forwards.items():
        if getattr(pipeline, part) is not forward.transformer:
            raise PatchError(f"pipe.{part} was replaced after cocodiff.wrap: unwrap(pipe) and wrap(pipe) again.")
        state[f"adapters of {part}"] = describe_adapters(forward.transformer)
        state[f"weights of {part}"] = sample_weights(forward.transformer)
    place = torch.device(pipeline._execution_device)
    if place.type != job.device.type or place.index not in (None, job.device.index):
        raise PatchError(f"the pipeline is on {place}, but this rank's device is {job.device}: do not move it.")
    state["exchanges so far (a call failed on some ranks: unwrap and wrap again)"] = handle.session.unsettled
    agree(given | state, job.host_group, f"the call of {name}")


@contextmanager
def _quiet(pipeline: Any, is_main: bool) -> Iterator[None]:
    """While inside, progress bars show on rank 0 only."""
    if is_main:
        yield
        return
    bars = getattr(pipeline, "_progress_bar_config", None)
    pipeline.set_progress_bar_config(**{**(bars or {}), "disable": True})
    try:
        yield
    finally:
        if bars is None:
            del pipeline._progress_bar_config
        else:
            pipeline._progress_bar_config = bars


def _times(pipeline: Any) -> list[float]:
    """The scheduler's times of the steps that the call runs: an image-to-image call leaves out the first ones."""
    return pipeline.scheduler.timesteps.tolist()[-pipeline._num_timesteps :]
