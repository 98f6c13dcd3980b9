"""Joins the default process group after a check that all ranks chose the same backend."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from cocodiff.errors import LaunchError, MismatchError
from cocodiff.launch.backend import serves
from cocodiff.launch.ranks import Ranks
from cocodiff.launch.rendezvous import open_store

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

_log = logging.getLogger(__name__)
# Rank 0 may hold the store. It waits at most this long for the others to read the verdict before it raises.
_VERDICT_SECONDS = 10.0


def join(ranks: Ranks, backend: str, device: torch.device, timeout_seconds: float = 600) -> None:
    """Join torch.distributed's default group with `backend` for tensors on `device`. Collective.

    A group that exists already is only checked. The ranks meet at MASTER_ADDR and MASTER_PORT if these are set,
    otherwise over mpi4py. `timeout_seconds` limits each wait for other ranks, here and in the group's collectives.

    Raises `LaunchError` if the ranks cannot meet or the backend cannot carry such tensors, and `MismatchError`, the
    same on every rank, if ranks chose different backends.
    """
    import torch.distributed as dist

    if not dist.is_available():
        raise LaunchError("this torch was built without torch.distributed: install a build that has it")
    if dist.is_initialized():
        _check_existing(ranks)
        check_backend(device.type)
        return
    parts = _by_device(backend)
    name = parts.get(device.type, parts.get("", ""))
    if not name or not serves(name, device.type):
        raise LaunchError(_no_service(backend, device.type))
    if not dist.is_backend_available(backend):
        raise LaunchError(f"backend {backend!r} is not available in this torch: use choose_backend({device.type!r})")

    store = open_store(ranks, timeout_seconds)
    if ranks.world_size > 1:
        # With a number for each join, a second group of this process on the same store has keys of its own.
        join_number = store.add(f"cocodiff/joined/{ranks.rank}", 1)
        store = dist.PrefixStore(f"cocodiff/join/{join_number}", store)
        _agree(store, ranks, f"{backend} for {device.type}")
    timeout = timedelta(seconds=timeout_seconds)
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("default_pg", store),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timeout,
            device_id=None if device.type == "cpu" else device,
        )
    except (RuntimeError, ValueError) as error:
        raise LaunchError(f"rank {ranks.rank} cannot join with backend {backend!r} on {device}: {error}") from error
    if ranks.rank == 0:
        _log.info("joined %d ranks started by %s with backend %s", ranks.world_size, ranks.launcher, backend)


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


def _check_existing(ranks: Ranks) -> None:
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    if ranks.launcher != "none" and (rank, size) != (ranks.rank, ranks.world_size):
        raise LaunchError(
            f"the existing process group calls this rank {rank} of {size}, but the launcher "
            f"({ranks.launcher}) says {ranks.rank} of {ranks.world_size}: initialise torch.distributed over "
            "all ranks, or not at all"
        )


def _agree(store: dist.Store, ranks: Ranks, choice: str) -> None:
    """Compare all ranks' choices on rank 0, and raise the same MismatchError on every rank if they differ."""
    try:
        store.set(f"choice/{ranks.rank}", choice)
        if ranks.rank == 0:
            chosen: dict[str, list[int]] = {}
            for rank in range(ranks.world_size):
                chosen.setdefault(store.get(f"choice/{rank}").decode(), []).append(rank)
            verdict = ""
            if len(chosen) > 1:
                verdict = "; ".join(f"{text} on ranks {_listing(found)}" for text, found in chosen.items())
            store.set("verdict", verdict)
        else:
            verdict = store.get("verdict").decode()
            store.add("read", 1)
    except RuntimeError as error:
        raise LaunchError(
            f"rank {ranks.rank} of {ranks.world_size} waited in vain for the others to start ({error}): look "
            "for an earlier error of another rank"
        ) from error
    if not verdict:
        return
    if ranks.rank == 0:
        deadline = time.monotonic() + _VERDICT_SECONDS
        while store.add("read", 0) < ranks.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.02)
    raise MismatchError(
        f"ranks chose different backends: {verdict}; install the same software on every host and request the "
        "same device"
    )


def _listing(found: list[int], shown: int = 8) -> str:
    text = ", ".join(str(rank) for rank in found[:shown])
    return text + (f" and {len(found) - shown} more" if len(found) > shown else "")
