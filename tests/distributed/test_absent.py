"""A rank that does not come to a call, groups that the script makes or destroys itself, and where the store listens."""

import os

import pytest

from tests.distributed.ranks import run_programs, run_ranks, torchrun_variables

SHORT = {"COCODIFF_NOTICE_SECONDS": "1", "COCODIFF_ABSENT_SECONDS": "3"}


def _alone():
    """Rank 0 makes a call, and rank 1 waits for it in a barrier of its own."""
    import torch

    from cocodiff.launch.job import start_job

    job = start_job("cpu")
    with job.watched("loading"):
        pass
    if job.is_main:
        with job.watched("a call"):
            torch.distributed.barrier(group=job.host_group)
    torch.distributed.barrier(group=torch.distributed.group.WORLD)


def test_a_rank_that_calls_alone_says_whom_it_waits_for_and_ends():
    statuses, output = run_programs([environ | SHORT for environ in torchrun_variables(2)], _alone)
    assert statuses == [1, 1], output
    assert "cocodiff: rank 0: it has waited" in output and "in a call for rank 1, alive but outside of it" in output
    assert "cocodiff: rank 0 ends: it waited 3 s (COCODIFF_ABSENT_SECONDS) in vain for rank 1 to make a call" in output


def _spawned():
    """The device of a rank whose group the script has made, without a launcher's variables, and destroyed later."""
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist

    import cocodiff
    from cocodiff.errors import LaunchError
    from cocodiff.launch import backend, job
    from tests.pipelines import flux_call, flux_pipeline

    rank, place = int(os.environ["RANK"]), f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]

    pipe = cocodiff.wrap(flux_pipeline())
    pipe(**flux_call("text2image"))
    timeouts = [
        group._get_backend(torch.device("cpu")).options._timeout.days
        for group in (
            pipe.cocodiff.job.host_group,
            pipe.cocodiff.session.connect(pipe.cocodiff.plan).mesh.ulysses.group,
        )
    ]

    devices, real, check = [], backend._visible_devices, job.check_existing
    job.check_existing = lambda *args: None  # the group carries no xpu tensors, and need not
    for current in (0, 3 - rank):
        api = SimpleNamespace(
            set_device=lambda index: None, is_initialized=lambda: True, current_device=lambda now=current: now
        )
        backend._visible_devices = lambda kind, api=api: (api, 4)
        devices.append(job.start_job("xpu").device.index)
    job.local_device = lambda *args: torch.device("xpu", 2)
    with pytest.raises(LaunchError) as shared:
        job.start_job("xpu")
    backend._visible_devices, job.check_existing, job.local_device = real, check, backend.local_device

    dist.destroy_process_group()
    with pytest.raises(LaunchError) as destroyed:
        pipe(**flux_call("text2image"))
    cocodiff.unwrap(pipe)
    return devices, timeouts, str(shared.value), str(destroyed.value)


def test_a_group_of_the_script_without_a_launcher():
    for rank, (devices, timeouts, shared, destroyed) in enumerate(run_ranks(2, _spawned)):
        assert devices == [rank, 3 - rank], "by the ranks of this host; then those that the script made current"
        assert timeouts == [30, 30]
        assert "ranks share devices: ranks 0, 1 (xpu:2 of 4)" in shared
        assert "process groups were destroyed after cocodiff.wrap" in destroyed
