"""Offloading uses each rank's own device. Modules stay on the CPU until they are called, so any device can be named."""

import pytest
import torch

from cocodiff.compat import offload_to
from tests.pipelines import flux_pipeline

OFFLOADS = pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])


def devices(pipe):
    """Where hooks will run the transformer's parts."""
    hooks = [vars(module).get("_hf_hook") for module in pipe.transformer.modules()]
    flat = [one for hook in hooks if hook is not None for one in getattr(hook, "hooks", (hook,))]
    return {str(one.execution_device) for one in flat if getattr(one, "execution_device", None) is not None}


@OFFLOADS
@pytest.mark.parametrize("index", [0, 1])
def test_offload_after_wrap_uses_the_rank_s_device(offload, index):
    pipe = flux_pipeline()
    offload_to(pipe, torch.device("cuda", index))
    getattr(pipe, offload)(device="cuda")  # a script names none, or the type alone
    assert devices(pipe) == {f"cuda:{index}"} and pipe._offload_device == torch.device("cuda", index)


@OFFLOADS
def test_offload_before_wrap_moves_to_the_rank_s_device(offload):
    pipe = flux_pipeline()
    getattr(pipe, offload)(device="cuda")
    assert devices(pipe) == {"cuda:0"}  # the control: what every rank would use
    hooked = list(pipe._all_hooks)
    offload_to(pipe, torch.device("cuda", 0))
    assert devices(pipe) == {"cuda:0"} and pipe._all_hooks == hooked  # nothing to do
    offload_to(pipe, torch.device("cuda", 3))
    assert devices(pipe) == {"cuda:3"} and bool(pipe._all_hooks) == (offload == "enable_model_cpu_offload")


def test_another_kind_of_device_is_left_as_it_is():
    pipe = flux_pipeline()
    pipe.enable_model_cpu_offload(device="cuda")
    offload_to(pipe, torch.device("xpu", 1))
    assert devices(pipe) == {"cuda:0"}


def test_a_pipeline_without_offload_gets_none():
    pipe = flux_pipeline()
    offload_to(pipe, torch.device("xpu", 2))
    assert devices(pipe) == set() and pipe._offload_gpu_id == 2
