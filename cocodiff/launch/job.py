"""This process as one rank of the run: joined, on its device, able to talk to the others on the host."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cocodiff.launch.agree import gather_json
from cocodiff.launch.backend import choose_backend, local_device
from cocodiff.launch.guard import Guard
from cocodiff.launch.join import join
from cocodiff.launch.ranks import discover


@dataclass(frozen=True)
class Job:
    """The run that this rank belongs to.

    Attributes:
        hosts: for every rank the name of its host.
        backend: of the tensors' groups, and why; "none" on one rank.
        host_group, guard: None on one rank.
        shared: several pipelines live on it, so none of them may close it.
    """

    rank: int
    world_size: int
    device: torch.device
    launcher: str
    hosts: tuple[str, ...]
    backend: str = "none"
    backend_reason: str = "one rank"
    host_group: dist.ProcessGroup | None = None
    guard: Guard | None = None
    shared: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextmanager
    def watched(self, what: str, in_step: Callable[[], bool] | None = None) -> Iterator[None]:
        """While inside, a failure of any rank ends this one, too, instead of leaving it to wait (see `Guard.watch`)."""
        if self.guard is None:
            yield
        else:
            with self.guard.watch(what, in_step):
                yield

    def close(self) -> None:
        """Free what this job made for itself, unless it is shared; the default group stays. Collective; idempotent."""
        if not self.shared and self.guard is not None and self.host_group is not None and not self.guard.closed:
            self.guard.close()
            dist.destroy_process_group(self.host_group)


def start_job(device: str | torch.device | None) -> Job:
    """Find the ranks, take this rank's device, join (an existing process group is left alone).

    Collective over all ranks. LaunchError where ranks or a backend cannot be found.
    """
    ranks = discover(os.environ)
    place = local_device(device, ranks)
    joined = dist.is_available() and dist.is_initialized()
    if not joined and ranks.world_size == 1:
        return Job(0, 1, place, ranks.launcher, (socket.gethostname(),))
    if joined and dist.get_world_size() == 1:
        return Job(0, 1, place, "torch.distributed", (socket.gethostname(),))
    backend, reason = choose_backend(place.type)
    join(ranks, backend, place)  # a group that exists is only checked
    if joined:
        backend, reason = _backend_of(place), "of the existing process group"
    rank, world_size = dist.get_rank(), dist.get_world_size()
    host_group = dist.new_group(list(range(world_size)), backend="gloo")
    hosts = _hosts(gather_json([socket.gethostname(), ranks.local_rank, ranks.launcher], host_group))
    guard = Guard(dist.distributed_c10d._get_default_store(), rank, world_size)
    return Job(rank, world_size, place, ranks.launcher, hosts, backend, reason, host_group, guard)


def _backend_of(device: torch.device) -> str:
    """The backend that the existing default group uses for this kind of device."""
    by_device = dict(part.split(":") for part in dist.get_backend_config().split(",") if ":" in part)
    return by_device.get(device.type, dist.get_backend())


def _hosts(everyone: list[tuple[str, int, str]]) -> tuple[str, ...]:
    """A name of its host for every rank.

    Hosts in network namespaces or containers may share one name; then a local rank of zero starts a new host.
    """
    names = [name for name, _, _ in everyone]
    if len(set(names)) > 1 or any(launcher == "none" for _, _, launcher in everyone):
        return tuple(names)
    hosts, index = [], -1
    for name, local_rank, _ in everyone:
        index += local_rank == 0
        hosts.append(f"{name}/{index}" if index > 0 else name)
    return tuple(hosts)
