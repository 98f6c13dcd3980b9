"""What a wrapped pipeline carries as `pipe.cocodiff`: its place in the run, and what was installed on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from cocodiff.config import Config
from cocodiff.errors import UsageError
from cocodiff.launch.job import Job
from cocodiff.parallel.mesh import Mesh
from cocodiff.pipeline.forward import ShardedForward
from cocodiff.pipeline.weights import Fingerprints
from cocodiff.plan import RunPlan
from cocodiff.state import Session
from cocodiff.topology import Cluster


@dataclass
class Handle:
    """This rank's place in the run, and what was installed on the pipeline.

    Attributes:
        cluster: the topology in use; None on one rank.
        cluster_reason: where it came from.
        forwards: by name, the transformers that run on shards; none on one rank, where only the device was changed.
        fingerprints: of the weights, as far as they were hashed.
    """

    job: Job
    config: Config
    pipeline_class: type
    cluster: Cluster | None = None
    cluster_reason: str = "one rank"
    forwards: dict[str, ShardedForward] = field(default_factory=dict)
    fingerprints: Fingerprints = field(default_factory=Fingerprints)
    last_report: dict[str, Any] | None = None

    def report(self) -> dict[str, Any]:
        """What the last call sent, missed and held; docs/selective.md explains the keys.

        Raises:
            UsageError: no call has ended yet.
        """
        if self.job.world_size == 1:
            return {"transmission": None, "reason": "one rank sends nothing", "bytes": {}, "share": {}}
        if self.last_report is None:
            raise UsageError("there is nothing to report: no call has ended yet.")
        return self.last_report

    @property
    def session(self) -> Session | None:
        """What the pipeline owns on this rank: lanes, meshes, counters; None on one rank."""
        return next((forward.session for forward in self.forwards.values()), None)

    @property
    def plan(self) -> RunPlan | None:
        """How the pipeline runs: mesh, exchange, schedule, transmission.

        None on one rank, and before the first call where that decides (`plan="auto"`); then how it ran last.
        """
        return next((forward.plan() for forward in self.forwards.values()), None)

    @property
    def mesh(self) -> Mesh | None:
        """The axes and this rank's place on them: `print(pipe.cocodiff.mesh)`; None where there is no plan."""
        session, plan = self.session, self.plan
        return None if session is None or plan is None else session.connect(plan).mesh

    @property
    def rank(self) -> int:
        """This process's number in the run."""
        return self.job.rank

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.job.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that saves and prints."""
        return self.job.is_main

    @property
    def device(self) -> torch.device:
        """The device that this rank computes on."""
        return self.job.device
