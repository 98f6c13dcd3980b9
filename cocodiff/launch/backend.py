"""Which device a rank computes on, and which torch.distributed backend carries its tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cocodiff.errors import LaunchError
from cocodiff.launch.ranks import Ranks

if TYPE_CHECKING:
    import torch


def local_device(requested: str | torch.device | None, ranks: Ranks) -> torch.device:
    """This rank's device, made current if it is an accelerator.

    `requested` None means the accelerator that torch finds, else the CPU. Among several ranks an
    accelerator's index is always `local_rank` modulo the number of visible devices, whatever index was
    requested: a launcher that shows each rank one device gives it index 0. A single rank keeps the index it
    asked for.

    Raises `LaunchError` for a device that cannot be named or that this host lacks.
    """
    import torch

    if requested is None:
        requested = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(requested)
    except (RuntimeError, TypeError) as error:
        raise LaunchError(f"device {requested!r} is no torch device ({error}): give cuda, xpu or cpu") from error
    if device.type == "cpu":
        return torch.device("cpu")
    api, num_devices = _visible_devices(device.type)
    if num_devices == 0:
        raise LaunchError(
            f"device {device.type!r} was requested, but torch {torch.__version__} sees none on this host: "
            "check the driver and the variables that hide devices, or ask for cpu"
        )
    index = device.index
    if ranks.world_size > 1 or index is None:
        index = ranks.local_rank % num_devices
    if index >= num_devices:
        raise LaunchError(
            f"device {str(device)!r} was requested, but {num_devices} are visible: 0 to {num_devices - 1}"
        )
    if hasattr(api, "set_device"):  # mps has one device and no such function
        api.set_device(index)
    return torch.device(device.type, index)


def choose_backend(device_type: str) -> tuple[str, str]:
    """The backend for tensors on `device_type`, and one sentence saying why.

    cuda takes nccl, xpu torch's own xccl (oneccl_bindings_for_pytorch ended with torch 2.8), cpu gloo, else a torch
    built with MPI. The name is that of one backend: make a gloo group for host metadata beside it with
    `dist.new_group(backend="gloo")`. Every rank with the same software comes to the same; `join` checks that they did.

    Raises `LaunchError` when nothing can carry such tensors. Gloo never stands in for an accelerator's
    backend: it would stage every byte through the host unasked.
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
    """Whether a backend of this name can carry `device_type` tensors as this package uses it.

    torch lists gloo for cuda, too, but every byte would go through the host. Backends unknown here are
    trusted.
    """
    homes = {"nccl": "cuda", "xccl": "xpu", "gloo": "cpu"}
    return homes.get(backend, device_type) == device_type


def _visible_devices(device_type: str) -> tuple[Any, int]:
    """torch's module for this kind of device, and how many of them there are."""
    import torch

    try:
        api = torch.get_device_module(device_type)
        return api, int(api.device_count())
    except (RuntimeError, AttributeError, AssertionError):
        return None, 0
