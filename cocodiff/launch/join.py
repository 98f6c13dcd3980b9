"""Joins the default process group after a check that all ranks chose the same backend."""

from __future__ import annotations

import json
import logging
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from cocodiff.errors import LaunchError, MismatchError
from cocodiff.launch.backend import serves, shared_devices
from cocodiff.launch.ranks import Ranks
from cocodiff.launch.rendezvous import host_digest, open_store
from cocodiff.launch.waits import Waits
from cocodiff.launch.words import printable, rank_words

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

_log = logging.getLogger(__name__)
# Rank 0 may hold the store. It waits at most this long for the others to read the verdict before it raises.
_VERDICT_SECONDS = 10.0


def join(
    ranks: Ranks, backend: str, device: torch.device, waits: Waits | None = None, device_name: str | None = None
) -> None:
    """Join torch.distributed's default group with `backend` for tensors on `device`. Collective.

    A group that exists already is only checked. The ranks meet at MASTER_ADDR and MASTER_PORT if these are set,
    otherwise over mpi4py. Meeting is limited by `waits.start_seconds`, the group's collectives later by
    `waits.collective_seconds`.

    Raises `LaunchError` if the ranks cannot meet, the backend cannot carry such tensors or several ranks of a host
    have a device of the same `device_name`, and `MismatchError` if ranks chose different backends. The last two are
    the same on every rank.
    """
    import torch.distributed as dist

    waits = waits or Waits()
    if not dist.is_available():
        raise LaunchError("this torch was built without torch.distributed: install a build that has it")
    if dist.is_initialized():
        check_existing(ranks, device.type)
        return
    parts = _by_device(backend)
    name = parts.get(device.type, parts.get("", ""))
    if not name or not serves(name, device.type):
        raise LaunchError(_no_service(backend, device.type))
    if not dist.is_backend_available(backend):
        raise LaunchError(f"backend {backend!r} is not available in this torch: use choose_backend({device.type!r})")

    store = open_store(ranks, waits)
    if ranks.world_size > 1:
        # With a number for each join, a second group of this process on the same store has keys of its own.
        join_number = store.add(f"cocodiff/joined/{ranks.rank}", 1)
        store = dist.PrefixStore(f"cocodiff/join/{join_number}", store)
        _agree(store, ranks, [f"{backend} for {device.type}", host_digest().hex(), device_name], waits)
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("default_pg", store),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timedelta(seconds=waits.start_seconds),
            # Bound to another accelerator the default group could have no gloo group beside it.
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise LaunchError(f"rank {ranks.rank} cannot join with backend {backend!r} on {device}: {error}") from error
    let_idle(dist.distributed_c10d._get_default_group(), waits)
    if ranks.rank == 0:
        _log.info("joined %d ranks started by %s with backend %s", ranks.world_size, ranks.launcher, backend)


def let_idle(group: dist.ProcessGroup, waits: Waits) -> None:
    """Let the collectives of a group that has just been made wait for `waits.collective_seconds`.

    Making it has a shorter time-out. torch can change that of gloo and nccl only.
    """
    import torch.distributed as dist

    if dist.get_backend(group) in ("gloo", "nccl"):
        dist.distributed_c10d._set_pg_timeout(waits.collective, group)


def check_backend(device_type: str) -> None:
    """Raise `LaunchError` with the cure unless the default group can carry `device_type` tensors.

    Gloo does not count for an accelerator, since it copies every byte through the host. The default group must exist.
    """
    import torch.distributed as dist

    config = dist.get_backend_config()
    parts = _by_device(config)
    name = parts.get(device_type, parts.get("", ""))
    if not name or not serves(name, device_type):
        raise LaunchError(_no_service(config, device_type))


def _by_device(backend: str) -> dict[str, str]:
    """Parse a backend such as "cpu:gloo,cuda:nccl" into names by device. A plain name gets the key "" (any device)."""
    if ":" not in backend:
        return {"": backend.lower()}
    return dict(part.strip().split(":", 1) for part in backend.lower().split(",") if ":" in part)


def _no_service(backend: str, device_type: str) -> str:
    names = {"cuda": "nccl", "xpu": "xccl", "cpu": "gloo"}
    name = names.get(device_type)
    cure = f'init_process_group("cpu:gloo,{device_type}:{name}")' if device_type != "cpu" else 'backend "gloo"'
    return f"the process group's backend {backend!r} cannot carry {device_type} tensors" + (
        f": make it with {cure}, or leave making it to cocodiff" if name else ": use cuda, xpu or cpu"
    )


def check_existing(ranks: Ranks, device_type: str) -> None:
    """Raise `LaunchError` unless the default group, which must exist, has the launcher's ranks and suits the device."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    if ranks.launcher != "none" and (rank, size) != (ranks.rank, ranks.world_size):
        raise LaunchError(
            f"the existing process group calls this rank {rank} of {size}, but the launcher "
            f"({ranks.launcher}) says {ranks.rank} of {ranks.world_size}: initialise torch.distributed over "
            "all ranks, or not at all"
        )
    check_backend(device_type)


def _agree(store: dist.Store, ranks: Ranks, choice: list[str | None], waits: Waits) -> None:
    """Compare all ranks' choices on rank 0, and raise the same error on every rank if they cannot run together.

    Args:
        choice: backend and type of device, host, and a name of the device; None for one that ranks may share.
    """
    try:
        store.set(f"choice/{ranks.rank}", json.dumps(choice))
        if ranks.rank == 0:
            verdict = _verdict(_choices(store, ranks, waits))
            store.set("verdict", verdict)
        else:  # a little longer than rank 0 waits for the others, so as to hear whom it missed
            store.wait(["verdict"], timedelta(seconds=waits.start_seconds + _VERDICT_SECONDS))
            verdict = store.get("verdict").decode(errors="replace")
            store.add("read", 1)
    except RuntimeError as error:
        raise LaunchError(
            f"rank {ranks.rank} of {ranks.world_size} waited {waits.start_seconds:g} s in vain for rank 0 to start "
            f"({error}): look there for an earlier error, or raise COCODIFF_START_SECONDS"
        ) from error
    if not verdict:
        return
    if ranks.rank == 0:
        deadline = time.monotonic() + _VERDICT_SECONDS
        while store.add("read", 0) < ranks.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.02)
    kind, _, text = verdict.partition(": ")
    raise (MismatchError if kind == "mismatch" else LaunchError)(printable(text, 2000))


def _choices(store: dist.Store, ranks: Ranks, waits: Waits) -> list[list[str | None] | None]:
    """Return what each rank chose, after a line about those that are late; None for one that never came."""
    keys = [f"choice/{rank}" for rank in range(ranks.world_size)]
    notice = min(waits.notice_seconds, waits.start_seconds)
    for seconds in (notice, waits.start_seconds - notice):
        try:
            store.wait(keys, timedelta(seconds=seconds))
            break
        except RuntimeError:
            late = [rank for rank, key in enumerate(keys) if not store.check([key])]
            if seconds == notice:
                _log.warning("rank 0 has waited %g s for %s to start", notice, rank_words(late))
    return [json.loads(store.get(key)) if store.check([key]) else None for key in keys]


def _verdict(choices: list[list[str | None] | None]) -> str:
    """Return what is wrong, after "launch: " or "mismatch: ", and "" if these ranks can run together."""
    missing = [rank for rank, choice in enumerate(choices) if choice is None]
    if missing:
        return (
            f"launch: {rank_words(missing)} of {len(choices)} did not start in time: look there for an earlier error, "
            "or raise COCODIFF_START_SECONDS"
        )
    chosen: dict[str | None, list[int]] = {}
    for rank, choice in enumerate(choices):
        assert choice is not None
        chosen.setdefault(choice[0], []).append(rank)
    if len(chosen) > 1:
        listing = "; ".join(f"{text} on {rank_words(found)}" for text, found in chosen.items())
        return (
            f"mismatch: ranks chose different backends: {listing}; install the same software on every host and request "
            "the same device"
        )
    shared = shared_devices([(choice[1], choice[2]) for choice in choices if choice is not None])
    return f"launch: {shared}" if shared else ""
