"""Ranks find each other by a launcher's variables, join, agree, and end together, however one of them fails.

No test has a clock: a rank that waits does so without end, and `run_programs` fails when a process has to be killed.
"""

import os
import re
import threading
import time
from pathlib import Path

import pytest

from tests.distributed.ranks import free_port, run_programs, run_ranks, torchrun_variables
from tests.pipelines import flux_call, flux_pipeline, relative_error

GRACE_SECONDS = 1.0
# A guard that ended a healthy rank would do so within the grace and twice the second after which it looks again.
LONGER_THAN_THE_GRACE = GRACE_SECONDS + 2.5


def environs(launcher):
    """The variables that a launcher sets for two ranks of one host."""
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if launcher == "pals":
        return [
            master | {"PALS_RANKID": str(rank), "PALS_LOCAL_RANKID": str(rank), "WORLD_SIZE": "2"} for rank in range(2)
        ]
    if launcher == "slurm":
        step = master | {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
        return [step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    return torchrun_variables(2)


def _join(backend=None, grace_seconds=GRACE_SECONDS):
    import torch

    from cocodiff.launch import Guard, choose_backend, discover, join, local_device

    dist = torch.distributed
    ranks = discover(os.environ)
    device = local_device("cpu", ranks)
    join(ranks, backend or choose_backend(device.type)[0], device)
    return ranks, Guard(dist.distributed_c10d._get_default_store(), ranks.rank, ranks.world_size, grace_seconds)


def _total(ranks):
    import torch

    x = torch.tensor([ranks.rank + 1.0])
    torch.distributed.all_reduce(x, group=torch.distributed.group.WORLD)
    return int(x)


def _wait_for_ever():
    threading.Event().wait()


def _say(*words):
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def _healthy():
    ranks, guard = _join()
    for attempt in range(2):
        try:
            with guard.watch("generation"):
                if attempt == 0:
                    raise ValueError("the same on every rank")
                _say("rank", ranks.rank, "of", ranks.world_size, ranks.launcher, "total", _total(ranks))
        except ValueError:
            _say("caught", ranks.rank)


@pytest.mark.parametrize("launcher", ["torchrun", "pals", "slurm"])
def test_joins_by_a_launchers_variables_and_survives_a_failure_that_all_catch(launcher):
    statuses, output = run_programs(environs(launcher), _healthy)
    assert statuses == [0, 0], output
    for rank in range(2):
        assert f"caught {rank}" in output and f"rank {rank} of 2 {launcher} total 3" in output
    assert "cocodiff: rank" not in output


def _failing(failing, waiting):
    ranks, guard = _join()
    with guard.watch("loading"):
        _total(ranks)
    with guard.watch("generation"):
        if ranks.rank == failing:
            raise ValueError("seven apples")
        waiting(ranks)
    _say("not reached")


def _in_no_collective(ranks):
    _wait_for_ever()


@pytest.mark.parametrize(
    "launcher, failing, waiting",
    [("torchrun", 0, _in_no_collective), ("pals", 1, _in_no_collective), ("slurm", 1, _total)],
)
def test_one_failing_rank_ends_all(launcher, failing, waiting):
    statuses, output = run_programs(environs(launcher), _failing, failing, waiting)
    assert all(statuses) and "ValueError: seven apples" in output and "not reached" not in output, output
    if waiting is _in_no_collective:  # in a collective the broken connection may end the other rank first
        assert f"rank {1 - failing} ends: it still waits 1 s after it heard: rank {failing} failed in" in output
        assert output.count("cocodiff: rank") == 1


def _goes_on_within_the_grace():
    """Rank 1 reads of a failure again and again, and then fails alike."""
    ranks, guard = _join(grace_seconds=100.0)
    try:
        with guard.watch("generation"):
            _total(ranks)
            time.sleep(LONGER_THAN_THE_GRACE * ranks.rank)
            raise ValueError("the same on every rank")
    except ValueError:
        pass


def test_a_rank_may_go_on_for_as_long_as_the_grace():
    statuses, output = run_programs(environs("torchrun"), _goes_on_within_the_grace)
    assert statuses == [0, 0] and "cocodiff: rank" not in output, output


def _rank_0_ends_first():
    ranks, guard = _join()
    with guard.watch("generation"):
        _total(ranks)
        time.sleep(LONGER_THAN_THE_GRACE * ranks.rank)


def test_rank_0_whose_store_all_use_may_end_first():
    statuses, output = run_programs(environs("torchrun"), _rank_0_ends_first)
    assert statuses == [0, 0] and "cocodiff: rank" not in output, output


def _never_enters():
    ranks, guard = _join()
    with guard.watch("loading"):
        _total(ranks)
    if ranks.rank == 1:
        raise ValueError("between two calls")
    with guard.watch("generation"):
        _wait_for_ever()


def test_a_rank_that_never_enters_the_call_ends_all():
    statuses, output = run_programs(environs("torchrun"), _never_enters)
    assert statuses == [1, 1] and "rank 1 ended before this call" in output, output


def _killed():
    import torch

    ranks, guard = _join()
    store = torch.distributed.distributed_c10d._get_default_store()
    with guard.watch("generation"):
        _total(ranks)
        if ranks.rank == 0:
            store.get("rank 1 is past the collective")
            os.kill(os.getpid(), 9)
        store.set("rank 1 is past the collective", "")
        _wait_for_ever()


def test_a_killed_rank_0_ends_all():
    statuses, output = run_programs(environs("torchrun"), _killed)
    assert statuses == [-9, 1] and "store is gone" in output, output


def _leaves_a_call():
    """Rank 0 leaves its call in good order and goes on; rank 1 waits for it in the transformer."""
    import cocodiff

    pipe = cocodiff.wrap(flux_pipeline())
    job = pipe.cocodiff.job
    job.guard._grace_seconds = GRACE_SECONDS

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = job.rank == 0
        return kwargs

    pipe(**flux_call("text2image"), callback_on_step_end=stop)
    output_of_rank_1 = Path(os.environ["TEST_OUTPUTS"]) / "1"
    while "cocodiff: rank 1 ends" not in output_of_rank_1.read_text():
        time.sleep(0.05)


def test_a_rank_that_waits_for_one_that_left_its_call_ends():
    statuses, output = run_programs(environs("torchrun"), _leaves_a_call)
    assert statuses[1] == 1 and "rank 0 left a call of FluxPipeline" in output, output


def _different_backends():
    _join(["gloo", "cpu:gloo"][int(os.environ["RANK"])])


def test_ranks_that_choose_different_backends_all_say_so():
    statuses, output = run_programs(environs("torchrun"), _different_backends)
    assert statuses == [1, 1], output
    said = "ranks chose different backends: gloo for cpu on rank 0; cpu:gloo for cpu on rank 1"
    assert output.count(f"MismatchError: {said}") == 2


def _joins_again():
    import torch

    from cocodiff.launch import Guard, join

    dist = torch.distributed
    ranks, _ = _join()
    _say("total", _total(ranks))
    dist.barrier(group=dist.group.WORLD)
    dist.destroy_process_group()
    join(ranks, "gloo", torch.device("cpu"))
    _say("total", _total(ranks))
    for seconds in (0.0, LONGER_THAN_THE_GRACE):  # another guard on the same store, whatever the one before saw
        guard = Guard(dist.distributed_c10d._get_default_store(), ranks.rank, 2, GRACE_SECONDS)
        try:
            with guard.watch("generation"):
                _total(ranks)
                raise ValueError
        except ValueError:
            pass
        with guard.watch("generation"):
            time.sleep(seconds)
        guard.close()
        guard.close()


def test_joins_again_after_the_group_was_destroyed():
    statuses, output = run_programs(environs("torchrun"), _joins_again)
    assert statuses == [0, 0] and len(re.findall("total 3", output)) == 4, output


def _group_of_the_script():
    import torch

    import cocodiff

    torch.distributed.init_process_group("gloo")
    group, pipe = torch.distributed.group.WORLD, flux_pipeline()
    expected = pipe(**flux_call("text2image")).images
    error = relative_error(cocodiff.wrap(pipe)(**flux_call("text2image")).images, expected)
    cocodiff.unwrap(pipe)
    return error, torch.distributed.group.WORLD is group and torch.distributed.is_initialized()


def test_a_process_group_of_the_script_is_used_and_left_as_it_was():
    for error, is_there in run_ranks(2, _group_of_the_script):
        assert error < 1e-5 and is_there


@pytest.mark.mpi
def test_an_mpi_that_is_not_the_launchers_is_named_on_every_rank():
    pytest.importorskip("mpi4py", exc_type=ImportError)
    # Plain processes with a launcher's variables but no connection to it: each one's MPI has one rank.
    variables = [
        {"PMI_RANK": str(rank), "PMI_SIZE": "2", "MPI_LOCALRANKID": str(rank), "MPI_LOCALNRANKS": "2"}
        for rank in range(2)
    ]
    statuses, output = run_programs(variables, _join)
    assert statuses == [1, 1], output
    for rank in range(2):
        assert f"started 2 ranks and calls this one {rank}, but MPI library" in output
    assert output.count("sees 0 of 1: mpiexec and mpi4py belong to different MPIs") == 2
    assert "MASTER_ADDR and MASTER_PORT" in output


def _one_rank():
    ranks, guard = _join()
    with guard.watch("generation"):
        _say("one rank", _total(ranks), ranks.launcher)


def test_a_process_without_a_launcher_is_a_run_of_one_rank():
    statuses, output = run_programs([{}], _one_rank)
    assert statuses == [0] and "one rank 1 none" in output, output
