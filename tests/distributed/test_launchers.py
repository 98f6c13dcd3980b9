"""A script under torchrun and mpiexec, from the outside: one run that succeeds and one that fails, each.

The one that succeeds under torchrun is `scripts/demo`, in test_generate.py. Under mpiexec the one that fails draws a
picture before. How ranks join and end in other cases is tested without launchers, in test_ending.py.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.distributed.ranks import without_launcher

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
MODULE = ["-m", "tests.distributed.app"]
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *MODULE],
    "mpiexec": ["mpiexec", "-n", "2", sys.executable, *MODULE],
}
HAS_MPI = shutil.which("mpiexec") is not None and importlib.util.find_spec("mpi4py") is not None


def mpi(test):
    missing = pytest.mark.skipif(not HAS_MPI, reason="needs mpiexec and mpi4py (pip install 'cocodiff[mpi]')")
    return pytest.mark.mpi(missing(test))


def _start(launcher, mode, folder):
    """Run app.py; exit status and output. Fails when it does not end by itself, or leaves a process behind."""
    command = [*LAUNCHERS[launcher], mode, str(folder)]
    environment = without_launcher(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        family = psutil.Process(process.pid)  # launchers put ranks into sessions of their own
        for member in [*family.children(recursive=True), family]:
            member.kill()
        raise AssertionError(f"{command} did not end:\n{process.communicate()[0]}") from None
    left = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or [])]
    _, alive = psutil.wait_procs(left, timeout=60)  # mpiexec may end before the ranks that it kills
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive), alive
    return process.returncode, output


@mpi
def test_ranks_of_mpiexec_end_well(tmp_path):
    status, output = _start("mpiexec", "plain", tmp_path)
    assert status == 0 and "cocodiff: rank" not in output, output
    assert {(tmp_path / str(rank)).read_text() for rank in range(2)} == {"2 pmi 2"}


@mpi
def test_under_mpiexec_a_script_draws_what_one_rank_draws_and_when_one_rank_fails_all_end(tmp_path):
    """The failed rank itself waits, in MPI_Finalize, for the other."""
    status, output = _start("mpiexec", "picture", tmp_path)
    for rank in range(2):
        world_size, found, error = (tmp_path / str(rank)).read_text().split()
        assert (int(world_size), found) == (2, "pmi") and float(error) < 1e-5
    assert status != 0 and "the disk of one rank is full" in output, output


def test_under_torchrun_when_one_rank_fails_all_end(tmp_path):
    """torchrun ends the others."""
    status, output = _start("torchrun", "fail", tmp_path)
    assert (tmp_path / "0").read_text() == "2 torchrun 2"
    assert status != 0 and "the disk of one rank is full" in output, output
