"""Real launchers and real failures: every rank joins, agrees, and ends."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
# From the failure of one rank to the end of the last.
DEADLINE_SECONDS = 30.0
LAUNCHER_VARIABLES = (
    "PMI",
    "PALS",
    "OMPI",
    "MPI_",
    "SLURM",
    "MASTER_",
    "TORCHELASTIC",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
)

needs_mpi = [
    pytest.mark.mpi,
    pytest.mark.skipif(shutil.which("mpiexec") is None, reason="mpiexec is missing: pip install mpich"),
]
LAUNCHERS = {
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ],
    "mpiexec": ["mpiexec", "-n", "2"],
}
HEAD = """
    import os, sys, time
    import torch, torch.distributed as dist
    from cocodiff.launch import Guard, choose_backend, discover, join, local_device
    ranks = discover(os.environ)
    device = local_device("cpu", ranks)
    join(ranks, choose_backend(device.type)[0], device, timeout_seconds=120)
    store = dist.distributed_c10d._get_default_store()
    guard = Guard(store, ranks.rank, ranks.world_size, grace_seconds=3.0)

    def total():
        x = torch.tensor([ranks.rank + 1.0])
        dist.all_reduce(x, group=dist.group.WORLD)
        return int(x)

    def say(*words):
        os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # one write, so that ranks do not mix lines
"""
QUICK = HEAD.replace("grace_seconds=3.0", "grace_seconds=1.0")


def clean_environ(**extra: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE") and not name.startswith(LAUNCHER_VARIABLES)
    }
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **extra}


def run_ranks(launcher: str, script: Path) -> tuple[list[int], str, float]:
    """See `run_processes`; a launcher has one exit code, ranks without one have theirs."""
    if launcher == "environment":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environs = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return run_processes([sys.executable, str(script)], environs)
    tail = [str(script)] if launcher == "torchrun" else [sys.executable, str(script)]
    return run_processes(LAUNCHERS[launcher] + tail, [{}])


def run_processes(command: list[str], environs: list[Mapping[str, str]]) -> tuple[list[int], str, float]:
    """Exit codes, all output, and the seconds since a rank said that it fails now (since the start if none did)."""
    start = time.monotonic()
    processes = [
        subprocess.Popen(
            command,
            env=clean_environ(**environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environ in environs
    ]
    try:
        outputs = [p.communicate(timeout=max(1.0, start + 120 - time.monotonic()))[0] for p in processes]
    finally:
        for process in processes:
            if process.poll() is None:  # launchers put ranks into sessions of their own
                family = psutil.Process(process.pid)
                for member in [*family.children(recursive=True), family]:
                    member.kill()
                process.wait()
    end, output = time.monotonic(), "".join(outputs)
    failure = re.search(r"failing at (\S+)", output)
    return [p.returncode for p in processes], output, end - (float(failure[1]) if failure else start)


@pytest.fixture
def write_script(tmp_path: Path):
    def write(body: str, head: str = HEAD) -> Path:
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(head) + textwrap.dedent(body))
        return path

    return write


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("mpiexec", marks=needs_mpi)])
def test_joins_and_survives_a_failure_that_all_ranks_catch(launcher, write_script):
    script = write_script("""
        for attempt in range(2):
            try:
                with guard.watch("generation"):
                    if attempt == 0:
                        raise ValueError("the same on every rank")
                    say("rank", ranks.rank, "of", ranks.world_size, ranks.launcher, "total", total())
            except ValueError:
                say("caught", ranks.rank)
        # Rank 0, whose store all ranks use, ends first. Longer than the grace: neither that nor the failure
        # above may end a healthy rank.
        with guard.watch("generation"):
            time.sleep(6.0 * ranks.rank)
        say("done", ranks.rank)
    """)
    codes, output, _ = run_ranks(launcher, script)
    assert set(codes) == {0}, output
    name = {"torchrun": "torchrun", "mpiexec": "pmi"}[launcher]
    for rank in range(2):
        assert f"caught {rank}" in output
        assert f"rank {rank} of 2 {name} total 3" in output
        assert f"done {rank}" in output
    assert "cocodiff: rank" not in output


@pytest.mark.parametrize(
    ("launcher", "failing", "waiting"),
    [
        ("torchrun", 1, "time.sleep(600)"),
        pytest.param("mpiexec", 0, "time.sleep(600)", marks=needs_mpi),
        pytest.param("mpiexec", 1, "total()", marks=needs_mpi),
        ("environment", 0, "time.sleep(600)"),
    ],
)
def test_one_failing_rank_ends_all(launcher, failing, waiting, write_script):
    script = write_script(f"""
        with guard.watch("loading"):
            total()
        with guard.watch("generation"):
            if ranks.rank == {failing}:
                say("failing at", time.monotonic())
                raise ValueError("seven apples")
            {waiting}
        say("not reached")
    """)
    codes, output, seconds = run_ranks(launcher, script)
    assert all(codes), output
    assert seconds < DEADLINE_SECONDS
    assert "ValueError: seven apples" in output
    assert "not reached" not in output
    if "sleep" in waiting and launcher != "torchrun":  # torchrun ends the others itself, at once
        assert f"rank {1 - failing} ends: it still waits 3 s after it heard: rank {failing} failed in" in output
        assert output.count("cocodiff: rank") == 1


def test_a_rank_that_never_enters_the_call_ends_all(write_script):
    script = write_script(
        """
        with guard.watch("loading"):
            total()
        if ranks.rank == 1:
            say("failing at", time.monotonic())
            raise ValueError("between two calls")
        with guard.watch("generation"):
            time.sleep(600)
    """,
        QUICK,
    )
    codes, output, seconds = run_ranks("environment", script)
    assert all(codes) and seconds < DEADLINE_SECONDS, output
    assert "rank 1 ended before this call" in output


def test_a_killed_rank_0_ends_all(write_script):
    script = write_script(
        """
        with guard.watch("generation"):
            total()
            time.sleep(1)  # both are past the collective
            if ranks.rank == 0:
                say("failing at", time.monotonic())
                os.kill(os.getpid(), 9)
            time.sleep(600)
    """,
        QUICK,
    )
    codes, output, seconds = run_ranks("environment", script)
    assert codes == [-9, 1] and seconds < DEADLINE_SECONDS, output
    assert "store is gone" in output


def test_ranks_that_choose_different_backends_all_say_so(write_script):
    head = HEAD.replace("choose_backend(device.type)[0]", '["gloo", "cpu:gloo"][ranks.rank]')
    codes, output, _ = run_ranks("environment", write_script("", head))
    assert codes == [1, 1], output
    said = "ranks chose different backends: gloo for cpu on ranks 0; cpu:gloo for cpu on ranks 1"
    assert output.count(f"MismatchError: {said}") == 2


def test_joins_again_after_the_group_was_destroyed(write_script):
    codes, output, _ = run_ranks(
        "environment",
        write_script("""
            say("total", total())
            dist.barrier(group=dist.group.WORLD)
            dist.destroy_process_group()
            join(ranks, "gloo", device, timeout_seconds=60)
            say("total", total())
            # A second guard on the same store starts clean, whatever the first one saw.
            for _ in range(2):
                other = Guard(dist.distributed_c10d._get_default_store(), ranks.rank, 2, grace_seconds=0.5)
                try:
                    with other.watch("generation"):
                        total()
                        raise ValueError
                except ValueError:
                    pass
                with other.watch("generation"):
                    time.sleep(1.5)
                other.close()
                other.close()
            say("done")
        """),
    )
    assert codes == [0, 0], output
    assert output.count("total 3") == 2 * 2 and output.count("done") == 2


@pytest.mark.mpi
def test_an_mpi_that_is_not_the_launchers_is_named_on_every_rank(write_script):
    pytest.importorskip("mpi4py", exc_type=ImportError)
    # Plain processes with a launcher's variables but no connection to it: their MPI starts alone.
    environs = [
        {"PMI_RANK": str(rank), "PMI_SIZE": "2", "MPI_LOCALRANKID": str(rank), "MPI_LOCALNRANKS": "2"}
        for rank in range(2)
    ]
    codes, output, _ = run_processes([sys.executable, str(write_script(""))], environs)
    assert codes == [1, 1], output
    for rank in range(2):
        assert f"started 2 ranks and calls this one {rank}, but MPI library" in output
    assert output.count("sees 0 of 1: mpiexec and mpi4py belong to different MPIs") == 2
    assert "MASTER_ADDR and MASTER_PORT" in output


def test_a_rank_on_its_own_joins_alone(write_script):
    codes, output, _ = run_processes(
        [
            sys.executable,
            str(
                write_script("""
        with guard.watch("generation"):
            say("alone", total(), ranks.launcher)
    """)
            ),
        ],
        [{}],
    )
    assert codes == [0] and "alone 1 none" in output, output
