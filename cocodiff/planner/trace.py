"""Reads what one rank does in one forward: the real transformer on the meta device, our parts over recorders.

Blocks that are built alike do alike: of each run of such blocks the first, one more and the last are run, and the one
between stands for all others (a one-block trace would miss what is handed on from block to block; AoiZora found that
two blocks rank plans well, one does not).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cocodiff.config import Config
from cocodiff.exchange.collectives import swap
from cocodiff.exchange.connected import ConnectedMesh
from cocodiff.exchange.lanes import Lane
from cocodiff.launch.job import Job
from cocodiff.models import Family
from cocodiff.parallel.mesh import Axis, Mesh
from cocodiff.pipeline.install import install_transformer
from cocodiff.plan import RunPlan
from cocodiff.planner.functions import Known
from cocodiff.planner.program import Program, Step
from cocodiff.planner.recording import RecordedGroup, Recorder, RecordingLane, RecordingTransport
from cocodiff.state import CallState, Session
from cocodiff.topology import Cluster

KEPT = 3  # blocks of each run of equal ones: the first, one that stands for those between, the last


@dataclass(frozen=True)
class Thinned:
    """The blocks of a transformer that are run, and for how many each stands: list by list, by the list's name.

    Attributes:
        weight_bytes: of all its parameters.
    """

    blocks: Mapping[str, list[nn.Module]]
    times: Mapping[str, list[int]]
    weight_bytes: int

    @classmethod
    def of(cls, transformer: nn.Module, family: Family) -> Thinned:
        weight_bytes = sum(x.numel() * x.itemsize for x in (*transformer.parameters(), *transformer.buffers()))
        several = {name: _thinned(list(getattr(transformer, name))) for name in family.blocks}
        blocks, times = {name: one[0] for name, one in several.items()}, {name: one[1] for name, one in several.items()}
        return cls(blocks, times, weight_bytes)


def trace(
    transformer: nn.Module,
    thinned: Thinned,
    family: Family,
    given: Mapping[str, Any],
    cluster: Cluster,
    plan: RunPlan,
    known: Known,
) -> Program:
    """Run one forward of rank 0 and write it down.

    Args:
        transformer: of diffusers, on the meta device; its lists of blocks are put back.
        given: a forward's arguments; of tensors only shapes and dtypes count.
        cluster: of all ranks, with concrete sizes.
        plan: with a concrete exchange and number of pieces.
        known: functions of traces before, which make this one quicker; filled further.
    """
    recorder, lists = Recorder(known), {name: getattr(transformer, name) for name in family.blocks}
    for name, blocks in thinned.blocks.items():
        setattr(transformer, name, nn.ModuleList(blocks))
    try:
        session = _session(recorder, cluster, plan)
        forward = install_transformer(transformer, family, session)
        parts = _run(recorder, forward, session, plan, given)
    finally:
        for name, blocks in lists.items():
            setattr(transformer, name, blocks)
    counts = [1, *(count for one in thinned.times.values() for count in one), 1]
    return Program(tuple(zip(parts, counts, strict=True)), thinned.weight_bytes, recorder.memory.peak_bytes)


def _thinned(blocks: list[nn.Module]) -> tuple[list[nn.Module], list[int]]:
    runs: list[list[nn.Module]] = []
    signature = None
    for block in blocks:
        one = type(block), tuple((name, tuple(x.shape)) for name, x in block.named_parameters())
        if one != signature:
            runs.append([])
        runs[-1].append(block)
        signature = one
    kept: list[nn.Module] = []
    times: list[int] = []
    for run in runs:
        few = run if len(run) <= KEPT else [run[0], run[1], run[-1]]
        kept += few
        times += [1] * len(run) if len(run) <= KEPT else [1, len(run) - 2, 1]
    return kept, times


def _session(recorder: Recorder, cluster: Cluster, plan: RunPlan) -> Session:
    job = Job(0, cluster.num_ranks, torch.device("meta"), "none", ("",) * cluster.num_ranks, "recording", joined=None)
    session = Session(job, Config(), cluster, lambda facts: plan)
    lanes: dict[int, Lane] = {}

    def lane(level: int) -> Lane:
        return lanes.setdefault(level, RecordingLane(recorder, level))

    def make(axis: Axis, lane: Any, counter: Any) -> RecordingTransport:
        group: Any = axis.group
        return RecordingTransport(recorder, "alone" if group is None else group.axis, axis, lane, counter)

    connected = ConnectedMesh.connect(recorded_mesh(cluster, plan), lane, session.bytes, make)
    session.connect = lambda plan: connected  # type: ignore[method-assign] # there are no groups to make
    session.timeline = recorder  # type: ignore[assignment]
    return session


def recorded_mesh(cluster: Cluster, plan: RunPlan) -> Mesh:
    """The mesh of rank 0 with recorded groups."""
    host: Any = RecordedGroup("host", 0, tuple(range(cluster.num_ranks)))

    def new_group(name: str, ranks: tuple[int, ...]) -> Any:
        return RecordedGroup(name, ranks.index(0) if 0 in ranks else 0, ranks)

    return Mesh.arrange(cluster, plan.degrees, "recording", host, plan.placement, new_group)


def _run(recorder: Recorder, forward: Any, session: Session, plan: RunPlan, given: Mapping[str, Any]) -> list:
    parts: list[tuple[Step, ...]] = []
    transformer = forward.transformer
    call = CallState(session, transformer.dtype)
    call.choose(plan)
    row = forward.row

    def begins(module: Any, args: Any) -> None:
        parts.append(recorder.part())

    hooks = [block.module.register_forward_pre_hook(begins) for block in row.blocks]

    def ends(module: Any, args: Any, output: Any) -> None:
        parts.append(recorder.part())

    hooks.append(row.blocks[-1].module.register_forward_hook(ends))
    on_meta = {name: _meta(value) for name, value in given.items()}
    try:
        with torch.no_grad(), recorder.recording():
            output = forward.on_shards(call, dict(on_meta) | {"return_dict": False}, None)[0]
            if plan.degrees.cfg > 1:
                swap(output, call.connected.sequence, call.connected.cfg)
        parts.append(recorder.part())
    finally:
        for hook in hooks:
            hook.remove()
        forward.patches.undo()
    return parts


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, (list, tuple)):
        return type(value)(_meta(one) for one in value)
    return value
