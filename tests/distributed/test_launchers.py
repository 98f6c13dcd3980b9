"""The same script under torchrun and mpiexec, from the outside: pictures, and the end of every rank when one fails."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"],
    "mpiexec": ["mpiexec", "-n"],
}


def _start(launcher, ranks, mode, folder, seconds=120):
    """Run app.py; exit status, output, seconds; no process of it may be left."""
    if launcher == "mpiexec" and (shutil.which("mpiexec") is None or not _has("mpi4py")):
        pytest.skip("needs mpiexec and mpi4py (pip install 'cocodiff[mpi]')")
    program = (
        ["-m", "tests.distributed.app"] if launcher == "torchrun" else [sys.executable, "-m", "tests.distributed.app"]
    )
    command = [*LAUNCHERS[launcher], str(ranks), *program, mode, str(folder)]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        raise AssertionError(f"{command} still ran after {seconds} s:\n{process.communicate()[0]}") from None
    left = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or [])]
    assert not left, left
    return process.returncode, output, time.monotonic() - began


def _has(module):
    import importlib.util

    return importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("launcher, ranks", [("torchrun", 2), ("mpiexec", 3)])
def test_one_script_under_both_launchers(launcher, ranks, tmp_path):
    status, output, _ = _start(launcher, ranks, "draw", tmp_path)
    assert status == 0, output
    for rank in range(ranks):
        world_size, _, error = (tmp_path / str(rank)).read_text().split()
        assert int(world_size) == ranks and float(error) < 1e-5


def test_an_existing_process_group_is_left_alone(tmp_path):
    status, output, _ = _start("torchrun", 2, "existing", tmp_path)
    assert status == 0, output


ENDINGS = {
    "fail": "the disk of one rank is full",
    "differ": "guidance_scale: 1.0 on rank 0; 2.0 on rank 1",
    "interrupt": "rank 0 left a call of FluxPipeline",
}


@pytest.mark.parametrize(
    "launcher, mode", [("torchrun", "fail"), ("mpiexec", "fail"), ("mpiexec", "differ"), ("mpiexec", "interrupt")]
)
def test_when_one_rank_fails_or_goes_its_own_way_all_end(launcher, mode, tmp_path):
    status, output, seconds = _start(launcher, 2, mode, tmp_path)
    assert status != 0 and seconds < 60 and ENDINGS[mode] in output, (seconds, output)


def test_a_model_that_one_rank_lacks_ends_all_under_mpiexec(tmp_path):
    if shutil.which("mpiexec") is None or not _has("mpi4py"):
        pytest.skip("needs mpiexec and mpi4py (pip install 'cocodiff[mpi]')")
    program = [sys.executable, "-m", "cocodiff.cli", "generate", "--prompt", "x", "--steps", "1"]
    here, there = [*program, "--model", "tiny"], [*program, "--model", str(tmp_path / "nowhere")]
    command = ["mpiexec", "-n", "1", *here, "--out", str(tmp_path / "out.png"), ":", "-n", "1", *there]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and "nowhere" in done.stderr, done.stdout + done.stderr


def test_generate_draws_on_local_ranks_and_refuses_a_model_that_is_not_there(tmp_path):
    command = [sys.executable, "-m", "cocodiff.cli", "generate", "--prompt", "a red circle above a blue square"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out.png"
    done = subprocess.run(
        [*command, "--steps", "2", "--ranks", "2", "--out", str(out), "--compare"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and out.stat().st_size > 500, done.stderr
    assert "drawn by 2 rank(s)" in done.stdout and "against one rank" in done.stdout
    relative = float(done.stdout.split("relative error ")[1])
    assert relative < 1e-5, done.stdout
    report = tmp_path / "reports" / "report.json"
    coded = ["--transmission", "fast", "--steps", "2", "--report", str(report)]
    alone = subprocess.run(
        [*command, *coded, "--out", str(out.with_stem("alone"))],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert alone.returncode == 0 and out.with_stem("alone").exists(), alone.stderr
    assert json.loads(report.read_text())["reason"] == "one rank sends nothing"
    wrong = subprocess.run(
        [*command, "--ranks", "2", "--transmission", "balancd"], env=environment, capture_output=True, text=True
    )
    assert wrong.returncode == 2 and "balancd" in wrong.stderr and len(wrong.stderr.splitlines()) < 4, wrong.stderr
    done = subprocess.run(
        [*command, "--model", str(tmp_path / "nowhere")], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr


def test_doctor_speaks_json():
    done = subprocess.run(
        [sys.executable, "-m", "cocodiff.cli", "doctor", "--json"], capture_output=True, text=True, timeout=60
    )
    findings = json.loads(done.stdout)
    assert (
        findings["versions"]["torch"] and findings["launcher"]["ranks"] == 1 and "FluxPipeline" in findings["pipelines"]
    )
