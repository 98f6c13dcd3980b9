"""This process as one rank of the run: joined to the others, on its device, with a gloo group for metadata."""

from __future__ import annotations

import contextlib
import os
import socket
import weakref
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


class Joined:
    """A guard and a group of all ranks, freed by `close` or, without it, with the last job that has them. Once."""

    def __init__(self, guard: Guard, host_group: dist.ProcessGroup) -> None:
        self.guard, self.host_group = guard, host_group
        self.close = weakref.finalize(self, _leave, guard, host_group)
        self.close.atexit = False  # the guard ends itself, and the system frees the rest


def _leave(guard: Guard, host_group: dist.ProcessGroup) -> None:
    guard.close()
    with contextlib.suppress(ValueError, RuntimeError, AssertionError):  # the script may have freed all groups before
        dist.destroy_process_group(host_group)


@dataclass(frozen=True)
class Job:
    """The run that this rank belongs to.

    Attributes:
        hosts: the name of every rank's host.
        backend: the backend of the groups that carry tensors; "none" on one rank.
        backend_reason: why it was chosen, in one sentence.
        joined: the guard, which ends this rank after another has failed, and a gloo group of all ranks for metadata;
            None on one rank.
        shared: whether several pipelines use this job, so that none of them may close it.
    """

    rank: int
    world_size: int
    device: torch.device
    launcher: str
    hosts: tuple[str, ...]
    backend: str = "none"
    backend_reason: str = "one rank"
    joined: Joined | None = None
    shared: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def host_group(self) -> dist.ProcessGroup | None:
        return None if self.joined is None else self.joined.host_group

    @property
    def guard(self) -> Guard | None:
        return None if self.joined is None else self.joined.guard

    @contextmanager
    def watched(self, what: str, in_step: Callable[[], bool] | None = None) -> Iterator[None]:
        """While inside, end this rank if another one fails, instead of letting it wait (see `Guard.watch`)."""
        if self.guard is None:
            yield
        else:
            with self.guard.watch(what, in_step):
                yield

    def close(self) -> None:
        """Stop the guard and free the host group, unless the job is shared. Collective and idempotent.

        The default group stays.
        """
        if not self.shared and self.joined is not None:
            self.joined.close()


def start_job(device: str | torch.device | None) -> Job:
    """Find the ranks, choose this rank's device, and join torch.distributed's default group. Collective.

    A default group that exists already is checked and used. Raises `LaunchError` if the ranks or a backend cannot be
    found.
    """
    ranks = discover(os.environ)
    place = local_device(device, ranks)
    joined = dist.is_available() and dist.is_initialized()
    if not joined and ranks.world_size == 1:
        return Job(0, 1, place, ranks.launcher, (socket.gethostname(),))
    if joined and dist.get_world_size() == 1:
        return Job(0, 1, place, "torch.distributed", (socket.gethostname(),))
    backend, reason = choose_backend(place.type)
    join(ranks, backend, place)  # only checks a group that exists
    if joined:
        backend, reason = _backend_of(place), "of the existing process group"
    rank, world_size = dist.get_rank(), dist.get_world_size()
    host_group = dist.new_group(list(range(world_size)), backend="gloo")
    hosts = _hosts(gather_json([socket.gethostname(), ranks.local_rank, ranks.launcher], host_group))
    guard = Guard(dist.distributed_c10d._get_default_store(), rank, world_size)
    return Job(rank, world_size, place, ranks.launcher, hosts, backend, reason, Joined(guard, host_group))


def _backend_of(device: torch.device) -> str:
    """Return the backend that the existing default group uses for this type of device."""
    by_device = dict(part.split(":") for part in dist.get_backend_config().split(",") if ":" in part)
    return by_device.get(device.type, dist.get_backend())


def _hosts(everyone: list[tuple[str, int, str]]) -> tuple[str, ...]:
    """Return a name of every rank's host from each rank's host name, local rank and launcher.

    Hosts in network namespaces or containers may share one name. Then every local rank of zero starts a new host.
    """
    names = [name for name, _, _ in everyone]
    if len(set(names)) > 1 or any(launcher == "none" for _, _, launcher in everyone):
        return tuple(names)
    hosts, index = [], -1
    for name, local_rank, _ in everyone:
        index += local_rank == 0
        hosts.append(f"{name}/{index}" if index > 0 else name)
    return tuple(hosts)
