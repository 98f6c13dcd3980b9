"""The same script under torchrun and mpiexec, from the outside: one run that succeeds and one that fails, each.

How ranks end in other cases is tested without launchers, in test_ending.py.
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
needs_mpi = [
    pytest.mark.mpi,
    pytest.mark.skipif(not HAS_MPI, reason="needs mpiexec and mpi4py (pip install 'cocodiff[mpi]')"),
]


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
    assert not left, left
    return process.returncode, output


@pytest.mark.parametrize(
    "launcher, mode", [("torchrun", "existing group"), pytest.param("mpiexec", "draw", marks=needs_mpi)]
)
def test_one_script_under_both_launchers(launcher, mode, tmp_path):
    status, output = _start(launcher, mode, tmp_path)
    assert status == 0 and "cocodiff: rank" not in output, output
    name = {"torchrun": "torchrun", "mpiexec": "pmi"}[launcher]
    for rank in range(2):
        world_size, found, error = (tmp_path / str(rank)).read_text().split()
        assert (int(world_size), found) == (2, name) and float(error) < 1e-5


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("mpiexec", marks=needs_mpi)])
def test_when_one_rank_fails_all_end(launcher, tmp_path):
    status, output = _start(launcher, "fail", tmp_path)
    assert status != 0 and "the disk of one rank is full" in output, output
    if launcher == "mpiexec":  # the failed rank waits in MPI_Finalize for the other; torchrun ends the others itself
        assert "rank 0 ends: it still waits 1 s after it heard: rank 1 failed in" in output
        assert output.count("cocodiff: rank") == 1
