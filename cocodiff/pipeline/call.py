"""Around each call of a wrapped pipeline: the ranks compare what they were given and share their randomness."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from cocodiff.errors import PatchError, UsageError
from cocodiff.launch.agree import agree, share_random_state
from cocodiff.models import family_of
from cocodiff.pipeline.call_report import call_report
from cocodiff.pipeline.compare import check_result, pipeline_state
from cocodiff.pipeline.forward import ShardedForward
from cocodiff.pipeline.handle import Handle
from cocodiff.pipeline.inputs import check_call
from cocodiff.selective.exchange import SlowLinks
from cocodiff.selective.run import SelectiveCall
from cocodiff.state import CallState


def subclass(base: type) -> type:
    """The pipeline's class with a call of ours: diffusers looks `__call__` up on the type, not on the instance.

    A user's subclass that calls diffusers' own call gets a second one of ours before that: its arguments tell whether
    there is guidance, whatever the user's call makes of them.
    """
    original: Callable = base.__call__  # type: ignore[operator]

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _run(self, original, args, kwargs)

    own = {"__module__": base.__module__, "__doc__": base.__doc__}
    theirs = next(one for one in base.__mro__ if one.__module__.startswith("diffusers.") and "__call__" in vars(one))
    if theirs.__call__ is original:  # type: ignore[operator]
        return type(base.__name__, (base,), {"__call__": call, **own})

    @functools.wraps(theirs.__call__)  # type: ignore[operator]
    def inner(self: Any, *args: Any, **kwargs: Any) -> Any:
        for forward in self.cocodiff.forwards.values():
            if forward.call is not None:
                forward.call.arguments.clear()
                forward.call.arguments.update(_by_name(theirs.__call__, self, args, kwargs))  # type: ignore[operator]
        return theirs.__call__(self, *args, **kwargs)  # type: ignore[operator]

    between = type(theirs.__name__, (theirs,), {"__call__": inner, "__module__": theirs.__module__})
    return type(base.__name__, (base, between), {"__call__": call, **own})


def _by_name(function: Callable, pipeline: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a pipeline's call by their names, defaults too. TypeError that names the pipeline."""
    signature = inspect.signature(function)
    try:
        bound = signature.bind(pipeline, *args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{type(pipeline).__name__}.__call__: {error}") from None
    bound.apply_defaults()
    given = dict(bound.arguments)
    given.pop(next(iter(signature.parameters)))
    more = [name for name, one in signature.parameters.items() if one.kind is one.VAR_KEYWORD]
    return given | (given.pop(more[0]) if more else {})


@contextmanager
def call_running(
    forwards: Sequence[ShardedForward],
    guided: Callable[[], bool],
    batched: bool,
    times: Callable[[], Sequence[float]] | None,
) -> Iterator[CallState]:
    """While inside, these transformers of one pipeline run one call of it; collective where its mesh is new.

    Args:
        guided: whether the pipeline calls the transformer twice a step, for guidance; asked in the first forward.
        batched: the batch holds both branches of guidance.
        times: of the run's steps, known from the first forward on; transmission is selective with them only.
    """
    session, plan = forwards[0].session, forwards[0].pinned
    call = CallState(session, forwards[0].transformer.dtype)
    if plan is not None:
        call.choose(plan)
    call.guided = functools.cache(guided)
    if times is not None:
        call.make_selective = partial(_selective, batched=batched, times=times)
    with ExitStack() as stack:
        for forward in forwards:
            stack.enter_context(forward.in_call(call))
        try:
            yield call
        except BaseException:
            call.drop()  # whoever keeps the exception keeps the call, by its frames
            raise


def _selective(call: CallState, batched: bool, times: Callable[[], Sequence[float]]) -> SelectiveCall | None:
    """What selective transmission is in a call, as its first forward begins; None where everything is exact."""
    plan, session = call.plan, call.session
    if plan.selective is None or plan.coded_from is None:
        return None
    branches = 2 if call.guided() and call.mesh.cfg.size == 1 and not batched else 1
    links = SlowLinks(plan.coded_from, session.lane("encode"), session.lane("decode"))
    return SelectiveCall(
        plan.selective, plan.kv_only(call.mesh), times, branches, session.device, session.warn, links
    )  # fmt: skip


def _run(pipeline: Any, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One call of a wrapped pipeline on several ranks."""
    handle: Handle = pipeline.cocodiff
    job, forwards, session, name = handle.job, handle.forwards, handle.session, type(pipeline).__name__
    assert job.host_group is not None and session is not None
    if not session.busy.acquire(blocking=False):
        raise UsageError(f"a call of this {name} is running in another thread: one call at a time.")
    try:
        with job.watched(f"a call of {name}"):
            given = _by_name(original, pipeline, args, kwargs)
            _compare(pipeline, handle, given)
            share_random_state(job.device, job.host_group)
            family, before = family_of(handle.pipeline_class), session.bytes.snapshot()
            running = call_running(
                list(forwards.values()), lambda: family.guided(pipeline, given), bool(family.batched),
                partial(_times, pipeline),
            )  # fmt: skip
            with _quiet(pipeline, job.is_main), running as call:
                call.arguments = given  # which a call within this one may replace
                result = original(pipeline, *args, **kwargs)
            if call.chosen is not None and call.mesh.cfg.size > 1 and not (family.batched or call.guided()):
                text = "cfg_degree=2, but this call has no guidance: both halves of the ranks compute the same."
                session.warn("idle half", text)
            session.settle()
        if call.chosen is None:  # no transformer ran
            return result
        with job.watched("the report of a call"):  # a rank that waits in the other for one that is here must hear it
            check_call(call)
            check_result(result, call, name)
            handle.last_report = call_report(call, before)
        return result
    finally:
        session.busy.release()


def _compare(pipeline: Any, handle: Handle, given: dict[str, Any]) -> None:
    """Raise MismatchError unless all ranks were given the same and are alike; PatchError where parts were replaced."""
    job, name = handle.job, type(pipeline).__name__
    assert job.host_group is not None and handle.session is not None
    for part, forward in handle.forwards.items():
        if getattr(pipeline, part) is not forward.transformer:
            raise PatchError(f"pipe.{part} was replaced after cocodiff.wrap: unwrap(pipe) and wrap(pipe) again.")
    place = torch.device(pipeline._execution_device)
    if place.type != job.device.type or place.index not in (None, job.device.index):
        raise PatchError(f"the pipeline is on {place}, but this rank's device is {job.device}: do not move it.")
    state = pipeline_state(pipeline, handle.fingerprints)
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
