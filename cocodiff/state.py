"""Who owns what: a session (a wrapped pipeline), a call of it, a forward of a transformer in that call.

A session lives as long as the wrapped pipeline and knows nothing of a call that runs. A call and a forward are made
when they begin, passed down as arguments, and dropped when they end.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cocodiff.config import Config
from cocodiff.exchange.connected import ConnectedMesh, TransportMaker
from cocodiff.exchange.lanes import Lane, make_lane, share_one_lane
from cocodiff.exchange.transport import make_transport
from cocodiff.launch.job import Job
from cocodiff.observe.bytes import ByteCounter
from cocodiff.observe.timeline import COMPUTE, Timeline
from cocodiff.parallel.layout import Layout, split_sizes
from cocodiff.parallel.mesh import Degrees, Mesh
from cocodiff.parallel.placement import Placement
from cocodiff.parallel.tokens import Tokens
from cocodiff.plan import LayerPlan, ModelFacts, RunPlan, plan_layer
from cocodiff.selective.run import SelectiveCall, StepCoding
from cocodiff.topology import Cluster

MAX_MESHES = 4  # connected at once; the one that was used least recently is freed

_log = logging.getLogger(__name__)


class Session:
    """What a wrapped pipeline owns on this rank of several: its lanes, its connected meshes, its counters.

    Args:
        cluster: of all ranks, with concrete sizes.
        plan_run: chooses how the pipeline runs, by what its transformer is like; None where that waits for a call.
        transport: makes the transport of a group.

    Attributes:
        users: transformers that run on it; the last one closes it. It also ends when nobody has it any more.
        busy: held while a call runs.
        bytes: what was sent, ever.
        timeline: gets every span of compute while one is recording.
        planned: plans that were made in calls, by what they were made for.
    """

    def __init__(
        self,
        job: Job,
        config: Config,
        cluster: Cluster,
        plan_run: Callable[[ModelFacts], RunPlan | None],
        transport: TransportMaker = make_transport,
    ) -> None:
        self.job, self.config, self.cluster = job, config, cluster
        self.users, self.bytes = 0, ByteCounter()
        self.timeline: Timeline | None = None
        self._plan_run, self._transport = plan_run, transport
        self._lanes: dict[int | str, Lane] = {}
        self._plans: dict[ModelFacts, RunPlan | None] = {}
        self.planned: dict[object, RunPlan] = {}
        self._meshes: OrderedDict[tuple[Degrees, Placement | None], ConnectedMesh] = OrderedDict()
        self._settled: dict[int | str, int] = {}
        self._warned: set[str] = set()
        self.busy = threading.Lock()
        # End the lanes and free the groups, not the job; nothing may be in flight.
        self.close = weakref.finalize(self, _end, self._meshes, self._lanes)
        self.close.atexit = False

    @property
    def device(self) -> torch.device:
        return self.job.device

    @property
    def is_new(self) -> bool:
        """Whether nothing is connected yet."""
        return not self._meshes

    def plan(self, model: ModelFacts) -> RunPlan | None:
        """How a transformer runs; decided once for each kind of transformer, alike on all ranks. None: at each call."""
        if model not in self._plans:
            self._plans[model] = self._plan_run(model)
        return self._plans[model]

    def connect(self, plan: RunPlan) -> ConnectedMesh:
        """The mesh of a plan, with its groups. Collective over all ranks when it is made."""
        key = plan.degrees, plan.placement
        if key not in self._meshes:
            assert self.job.host_group is not None
            mesh = Mesh.create(self.cluster, plan.degrees, self.job.backend, self.job.host_group, plan.placement)
            self._meshes[key] = ConnectedMesh.connect(mesh, self.lane, self.bytes, self._transport)
            if len(self._meshes) > MAX_MESHES:
                self._meshes.popitem(last=False)[1].mesh.close(together=True)
        self._meshes.move_to_end(key)
        return self._meshes[key]

    def lane(self, key: int | str) -> Lane:
        """The lane of a level of the cluster, or one of another name beside the links."""
        name = key if isinstance(key, str) else self.cluster.levels[key].name
        if isinstance(key, int) and share_one_lane(self.device):
            key, name = 0, "links"
        if key not in self._lanes:
            self._lanes[key] = make_lane(name, self.device)
            self._lanes[key].timeline = self.timeline
        return self._lanes[key]

    def warn(self, about: str, text: str) -> None:
        """Warn once about one thing, on rank 0."""
        if self.job.is_main and about not in self._warned:
            _log.warning(text)
        self._warned.add(about)

    @property
    def unsettled(self) -> dict[str, int]:
        """What was submitted to each level's lane since the last call that ended well: nothing, unless one failed.

        Lanes beside the links (coding) do not count: ranks may have other work for them.
        """
        links = [(level, lane) for level, lane in self._lanes.items() if isinstance(level, int)]
        return {str(level): lane.submitted - self._settled.get(level, 0) for level, lane in links}

    def settle(self) -> None:
        """A call ended well: nothing of it is under way on any rank."""
        self._settled = {key: lane.submitted for key, lane in self._lanes.items()}

    def catch_up(self) -> None:
        """After an exception: let all that is computed from here on come after what is on the lanes."""
        for lane in self._lanes.values():
            lane.catch_up()

    def span(self, label: str) -> AbstractContextManager[None]:
        """Name a stretch of compute in the timeline, if one is kept."""
        return nullcontext() if self.timeline is None else self.timeline.span(COMPUTE, label)

    @contextmanager
    def recording(self) -> Iterator[Timeline]:
        """While inside, keep a timeline of all lanes, whose time begins on all ranks at once. Collective."""
        timeline = Timeline(self.device)
        dist.barrier(group=self.job.host_group)
        timeline.restart()
        self._set_timeline(timeline)
        try:
            yield timeline
        finally:
            self._set_timeline(None)

    def _set_timeline(self, timeline: Timeline | None) -> None:
        self.timeline = timeline
        for lane in self._lanes.values():
            lane.timeline = timeline


def _end(meshes: Mapping[tuple[Degrees, Placement | None], ConnectedMesh], lanes: Mapping[int | str, Lane]) -> None:
    with ExitStack() as stack:  # last in, first out
        for connected in meshes.values():
            stack.callback(connected.mesh.close)
        for lane in lanes.values():
            stack.callback(lane.close)


@dataclass
class CallState:
    """One call of a pipeline, or one of a transformer by itself.

    Attributes:
        dtype: of the transformer.
        chosen: how it runs, and the mesh for that; None until its first forward, where that decides.
        arguments: of the pipeline's call as diffusers wrote it, by name.
        guided: whether the pipeline calls the transformer twice a step, for guidance; known from its first forward on.
        make_selective: makes `selective` at the first forward, None where everything is exact.
        selective: selective transmission over this call.
        branch_name: what diffusers calls the branch of guidance that runs ("cond", "uncond"); None where it says none.
        differing: transformer -> of each of its forwards, whether the inputs differed between ranks.
        first_branch: of a pair of calls on two cfg halves, the first one's output and inputs, until the second ends.
        unpaired: of each pair, whether its two calls were of different steps.
        rounded: ranks were found to differ in the last bits of what they computed: only more counts from there on.
        finite: of each forward, whether its latents were finite.
    """

    session: Session
    dtype: torch.dtype
    chosen: tuple[RunPlan, ConnectedMesh] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    guided: Callable[[], bool] = lambda: False
    make_selective: Callable[[CallState], SelectiveCall | None] = lambda call: None
    selective: SelectiveCall | None = None
    branch_name: str | None = None
    differing: dict[object, list[Tensor]] = field(default_factory=dict)
    first_branch: tuple[Any, dict[str, Tensor]] | None = None
    unpaired: list[Tensor] = field(default_factory=list)
    rounded: bool = False
    finite: list[Tensor] = field(default_factory=list)

    def choose(self, plan: RunPlan) -> None:
        """Run by this plan from here on. Collective over all ranks where its mesh is new."""
        self.chosen = plan, self.session.connect(plan)

    @property
    def plan(self) -> RunPlan:
        assert self.chosen is not None
        return self.chosen[0]

    @property
    def connected(self) -> ConnectedMesh:
        assert self.chosen is not None
        return self.chosen[1]

    @property
    def mesh(self) -> Mesh:
        return self.connected.mesh

    def drop(self) -> None:
        """Let go of all tensors: the call has failed."""
        self.first_branch = None
        self.differing.clear()
        self.unpaired.clear()
        self.finite.clear()
        if self.selective is not None:
            self.selective.free()


@dataclass(frozen=True)
class ForwardState:
    """One forward of a transformer on this rank's shards.

    Attributes:
        tokens: who has which tokens.
        coding: what selective transmission does in this forward; None where it is exact.
    """

    call: CallState
    tokens: Tokens
    coding: StepCoding | None = None

    @property
    def connected(self) -> ConnectedMesh:
        return self.call.connected

    @property
    def rank(self) -> int:
        """This rank's place on the ulysses axis, by which exchanges and layouts count."""
        return self.call.mesh.ulysses.rank

    @property
    def part(self) -> int:
        """Which part of the sequence is here: this rank's place on the ring axis."""
        return self.call.mesh.ring.rank

    def span(self, label: str) -> AbstractContextManager[None]:
        return self.call.session.span(label)

    @property
    def output_stays_inside(self) -> bool:
        """Whether keys and values cross slower links than outputs.

        Then a piece is finished as soon as it is attended, so that its next keys and values leave at once. If not,
        all pieces are attended first, since outputs travel meanwhile.
        """
        mesh = self.call.mesh
        return mesh.ring.size > 1 and mesh.ulysses.level < mesh.ring.level

    def layouts(self, num_heads: int, stream: str | None = None) -> list[Layout]:
        """Tokens and heads of every rank of each part of the sequence, for one attention layer.

        Args:
            stream: the layer attends to the tokens of that one only.
        """
        seq_lens, inner = self._seq_lens(stream), self.call.mesh.ulysses.size
        heads = split_sizes(num_heads, inner)
        return [Layout(seq_lens[start : start + inner], heads) for start in range(0, len(seq_lens), inner)]

    def plan_layer(self, width: int, itemsize: int, stream: str | None = None) -> LayerPlan:
        """How one attention layer runs. `width` is heads x head_dim, of `itemsize` bytes each."""
        session, share = self.call.session, None if self.coding is None else self.coding.share
        return plan_layer(
            self.call.plan, session.cluster, session.device.type, self._seq_lens(stream), width, itemsize, share
        )

    def _seq_lens(self, stream: str | None) -> tuple[int, ...]:
        return self.tokens.joint if stream is None else self.tokens.streams[stream]
