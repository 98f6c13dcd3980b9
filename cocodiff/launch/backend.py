"""Chooses the device a rank computes on and the torch.distributed backend that carries its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cocodiff.errors import LaunchError
from cocodiff.launch.ranks import Ranks
from cocodiff.launch.words import rank_words

if TYPE_CHECKING:
    import torch


def requested_device(requested: str | torch.device | None) -> torch.device:
    """Return the device that was asked for; None means the accelerator that torch finds, else the CPU.

    Raises `LaunchError` for a device that torch does not know or that this host lacks.
    """
    import torch

    if requested is None:
        requested = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(requested)
    except (RuntimeError, TypeError) as error:
        raise LaunchError(f"device {requested!r} is no torch device ({error}): give cuda, xpu or cpu") from error
    if device.type != "cpu" and _visible_devices(device.type)[1] == 0:
        raise LaunchError(
            f"device {device.type!r} was requested, but torch {torch.__version__} sees none on this host: "
            "check the driver and the variables that hide devices, or ask for cpu"
        )
    return device


def local_device(requested: str | torch.device | None, ranks: Ranks, chosen: int | None = None) -> torch.device:
    """Return this rank's device and make it current if it is an accelerator.

    With several ranks the index of an accelerator is `chosen`, else `local_rank` modulo the number of visible devices,
    whatever index was requested, so that it is 0 under a launcher that shows each rank one device. Of a group that no
    launcher described, the rank counts. A single rank keeps the index it asked for.

    Args:
        chosen: the index that the script has made current on this rank, where it did so on every rank.

    Raises `LaunchError` for a device that torch does not know or that this host lacks.
    """
    import torch
    import torch.distributed as dist

    device = requested_device(requested)
    if device.type == "cpu":
        return torch.device("cpu")
    api, num_devices = _visible_devices(device.type)
    local_rank, several, index = ranks.local_rank, ranks.world_size > 1, device.index
    if ranks.launcher == "none" and not several and dist.is_initialized():
        local_rank, several = dist.get_rank(), dist.get_world_size() > 1
    if several or index is None:
        index = local_rank % num_devices if chosen is None else chosen
    if index >= num_devices:
        raise LaunchError(
            f"device {str(device)!r} was requested, but {num_devices} are visible: 0 to {num_devices - 1}"
        )
    if hasattr(api, "set_device"):  # mps has one device and no such function
        api.set_device(index)
    return torch.device(device.type, index)


def current_index(device_type: str) -> int | None:
    """Return the index of the current accelerator; None where torch has not used such devices in this process yet."""
    if device_type == "cpu":
        return None
    api, _ = _visible_devices(device_type)
    asks = hasattr(api, "is_initialized") and api.is_initialized() and hasattr(api, "current_device")
    return int(api.current_device()) if asks else None


def chosen_indices(hosts: Sequence[str], current: Sequence[int | None]) -> list[int | None]:
    """Return each rank's index that its script chose, from every rank's host and current accelerator.

    Equal ones on one host are torch's default and no choice: then it is None for all ranks of that host.
    """
    by_host: dict[str, list[int | None]] = {}
    for host, index in zip(hosts, current, strict=True):
        by_host.setdefault(host, []).append(index)
    chose = {host for host, found in by_host.items() if None not in found and len(set(found)) == len(found)}
    return [index if host in chose else None for host, index in zip(hosts, current, strict=True)]


def device_name(device: torch.device, environ: Mapping[str, str]) -> str | None:
    """Return a name that only ranks with the same device of a host have; None where that is not known or no matter.

    With COCODIFF_SHARE_DEVICES=1 it is no matter.
    """
    if device.type not in ("cuda", "xpu") or environ.get("COCODIFF_SHARE_DEVICES") == "1":
        return None
    api, num_devices = _visible_devices(device.type)
    if device.type == "cuda":
        uuid = getattr(api.get_device_properties(device.index), "uuid", None)
        if uuid is not None:
            return str(uuid)
    # A launcher may show each rank one device, another one to each, under the same index.
    return f"{device} of {num_devices}" if num_devices > 1 else None


def shared_devices(places: Sequence[tuple[str | None, str | None]]) -> str:
    """Return what is wrong where ranks of one host share a device, from every rank's host and `device_name`."""
    by_place: dict[tuple[str | None, str | None], list[int]] = {}
    for rank, place in enumerate(places):
        if place[1] is not None:
            by_place.setdefault(place, []).append(rank)
    sharing = [f"{rank_words(ranks)} ({name})" for (_, name), ranks in by_place.items() if len(ranks) > 1]
    if not sharing:
        return ""
    more = f" and {len(sharing) - 3} more" if len(sharing) > 3 else ""
    return (
        f"ranks share devices: {'; '.join(sharing[:3])}{more}. Start as many ranks on each host as it has devices, or "
        "set COCODIFF_SHARE_DEVICES=1"
    )


def idle_devices(launcher: str, device: torch.device) -> str:
    """Return what to warn of where one rank uses one of several devices that it sees, and no launcher started it.

    The empty string where there is nothing to warn of: a launcher was asked for one rank, or there is one device.
    """
    num_devices = _visible_devices(device.type)[1]
    if launcher != "none" or num_devices < 2:
        return ""
    return (
        f"one rank: no launcher's variables were found, and {num_devices} {device.type} devices are visible, of which "
        f"{device} alone is used. To use all: torchrun --nproc-per-node {num_devices}, or mpiexec -n {num_devices}"
    )


def choose_backend(device_type: str) -> tuple[str, str]:
    """Return the name of the backend for tensors on `device_type`, and one sentence that says why.

    cuda uses nccl, xpu torch's own xccl (oneccl_bindings_for_pytorch ended with torch 2.8), and cpu gloo, or MPI in a
    torch that has MPI but no gloo. Metadata on the host needs a gloo group besides:
    `dist.new_group(backend="gloo")`. Ranks with the same software choose the same backend; `join` checks that.

    Raises `LaunchError` if no backend can carry such tensors. Gloo never replaces an accelerator's backend, since it
    would copy every byte through the host.
    """
    import torch
    import torch.distributed as dist

    version = torch.__version__
    if not dist.is_available():
        raise LaunchError(f"torch {version} was built without torch.distributed: install a build that has it")
    if device_type == "cuda":
        if dist.is_nccl_available():
            return "nccl", "cuda tensors travel with nccl"
        raise LaunchError(f"torch {version} has no nccl for cuda tensors: install a build for CUDA or ROCm")
    if device_type == "xpu":
        if dist.is_xccl_available():
            return "xccl", f"torch {version} brings xccl for xpu tensors"
        raise LaunchError(f"torch {version} has no xccl for xpu tensors: install a build for XPU")
    if device_type == "cpu":
        if dist.is_gloo_available():
            return "gloo", "cpu tensors travel with gloo"
        if dist.is_mpi_available():
            return "mpi", f"torch {version} has no gloo but was built with MPI"
        raise LaunchError(f"torch {version} has neither gloo nor MPI for cpu tensors: install a build with gloo")
    raise LaunchError(f"no torch.distributed backend carries {device_type!r} tensors: use cuda, xpu or cpu")


def serves(backend: str, device_type: str) -> bool:
    """Return whether a backend of this name carries `device_type` tensors without a copy through the host.

    torch accepts gloo for cuda tensors, but gloo copies them through the host. A backend with another name is trusted.
    """
    homes = {"nccl": "cuda", "xccl": "xpu", "gloo": "cpu"}
    return homes.get(backend, device_type) == device_type


def _visible_devices(device_type: str) -> tuple[Any, int]:
    """Return torch's module for this type of device, and the number of such devices on this host."""
    import torch

    try:
        api = torch.get_device_module(device_type)
        return api, int(api.device_count())
    except (RuntimeError, AttributeError, AssertionError):
        return None, 0
