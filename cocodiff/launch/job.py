"""This process as one rank of the run: joined to the others, on its device, with a gloo group for metadata."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from cocodiff.errors import LaunchError
from cocodiff.launch.agree import gather_json
from cocodiff.launch.backend import (
    choose_backend,
    chosen_indices,
    current_index,
    device_name,
    local_device,
    requested_device,
    shared_devices,
)
from cocodiff.launch.guard import Guard
from cocodiff.launch.join import check_existing, join, let_idle
from cocodiff.launch.mpi import leave_without_waiting
from cocodiff.launch.ranks import Ranks, discover
from cocodiff.launch.rendezvous import host_digest
from cocodiff.launch.waits import Waits


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
    def watched(self, what: str) -> Iterator[None]:
        """While inside, end this rank if another one fails, instead of letting it wait (see `Guard.watch`).

        Raises `LaunchError` if the script has destroyed the process groups.
        """
        if self.guard is None:
            yield
            return
        if self.host_group is not None and not is_alive(self.host_group):
            raise LaunchError(
                "the process groups were destroyed after cocodiff.wrap (torch.distributed.destroy_process_group): "
                "call that after the last call of the pipeline, or unwrap(pipe) and wrap(pipe) again"
            )
        with self.guard.watch(what):
            yield

    def close(self) -> None:
        """Stop the guard and free the host group, unless the job is shared. Collective and idempotent.

        The default group stays.
        """
        if not self.shared and self.joined is not None:
            self.joined.close()


def is_alive(group: dist.ProcessGroup) -> bool:
    """Return whether torch.distributed still knows this group: the script may have destroyed it."""
    try:
        return bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError):
        return False


def start_job(device: str | torch.device | None) -> Job:
    """Find the ranks, choose this rank's device, and join torch.distributed's default group. Collective.

    A default group that exists already is checked and used. Raises `LaunchError` if the ranks or a backend cannot be
    found, or ranks would share a device.
    """
    try:
        return _start(device, Waits.read(os.environ))
    except LaunchError:
        leave_without_waiting()  # other ranks may wait for this one, and MPI would wait for them
        raise


def _start(device: str | torch.device | None, waits: Waits) -> Job:
    ranks = discover(os.environ)
    if dist.is_available() and dist.is_initialized():
        return _start_in_group(device, ranks, waits)
    place = local_device(device, ranks)
    if ranks.world_size == 1:
        return Job(0, 1, place, ranks.launcher, (socket.gethostname(),))
    backend, reason = choose_backend(place.type)
    if place.type == "cuda":
        # Several communicators on several streams need one order of launches; NCCL 2.26 can take the host's.
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    join(ranks, backend, place, waits, device_name(place, os.environ))
    host_group = _host_group(waits)
    hosts = _hosts(gather_json([socket.gethostname(), ranks.local_rank, ranks.launcher], host_group))
    return _job(ranks, place, hosts, backend, reason, host_group, waits)


def _start_in_group(device: str | torch.device | None, ranks: Ranks, waits: Waits) -> Job:
    """Make the job of a default group that the script, or what started it, has made."""
    kind = requested_device(device)
    if dist.get_world_size() == 1:
        return Job(0, 1, local_device(device, ranks), "torch.distributed", (socket.gethostname(),))
    if kind.type == "cuda":
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")  # the group may not have connected yet
    check_existing(ranks, kind.type)
    host_group = _host_group(waits)
    rank, names = dist.get_rank(), gather_json([host_digest().hex(), current_index(kind.type)], host_group)
    digests = [digest for digest, _ in names]
    if ranks.launcher == "none":  # mp.spawn, a notebook's launcher: the group says how many ranks there are, and where
        local_rank, local_size = digests[:rank].count(digests[rank]), digests.count(digests[rank])
        ranks = Ranks(rank, local_rank, len(names), local_size, "none")
    place = local_device(device, ranks, chosen_indices(digests, [index for _, index in names])[rank])
    told = [socket.gethostname(), ranks.local_rank, ranks.launcher, device_name(place, os.environ)]
    everyone = gather_json(told, host_group)
    shared = shared_devices([(digest, one[3]) for digest, one in zip(digests, everyone, strict=True)])
    if shared:
        raise LaunchError(shared)
    hosts, reason = _hosts([one[:3] for one in everyone]), "of the existing process group"
    return _job(ranks, place, hosts, _backend_of(place), reason, host_group, waits)


def _host_group(waits: Waits) -> dist.ProcessGroup:
    """Make a gloo group of all ranks. Collective over the default group."""
    everyone = list(range(dist.get_world_size()))
    try:
        group = dist.new_group(everyone, backend="gloo", timeout=timedelta(seconds=waits.start_seconds))
    except RuntimeError as error:
        raise LaunchError(
            f"no gloo group of all ranks can be made beside the default group ({error}): look for an earlier error of "
            "another rank; on xpu give init_process_group no device_id, or leave making the group to cocodiff"
        ) from error
    let_idle(group, waits)
    return group


def _job(
    ranks: Ranks,
    place: torch.device,
    hosts: tuple[str, ...],
    backend: str,
    reason: str,
    host_group: dist.ProcessGroup,
    waits: Waits,
) -> Job:
    rank, world_size = host_group.rank(), host_group.size()
    # The secret travels in the group, not by the store, which is open to whoever reaches it.
    token = gather_json(secrets.token_hex(16) if rank == 0 else "", host_group)[0]
    store = dist.distributed_c10d._get_default_store()
    guard = Guard(store, rank, world_size, waits=waits, token=token)
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
