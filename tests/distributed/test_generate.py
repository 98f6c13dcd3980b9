"""`cocodiff generate` and `cocodiff doctor`, as processes of their own."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.distributed.ranks import run_programs, torchrun_variables, without_launcher
from tests.house import ROOT

ENVIRONMENT = without_launcher(os.environ) | {"OMP_NUM_THREADS": "1"}
PROMPT = ("generate", "--prompt", "a red circle above a blue square", "--steps", "2")


def _cocodiff(*everyone):
    """The command line with the arguments of this rank, the last ones for those that have none of their own."""
    from cocodiff import cli

    sys.argv = ["cocodiff", *everyone[min(int(os.environ.get("RANK", 0)), len(everyone) - 1)]]
    cli.main()


def _without_a_name():
    """What runs a command on a host whose name does not resolve, where this user may rename a host."""
    rename = ["unshare", "--uts", "sh", "-c", 'hostname nowhere.invalid && exec "$@"', "-"]
    allowed = os.geteuid() == 0 and shutil.which("unshare") is not None
    return rename if allowed and subprocess.run([*rename, "true"], capture_output=True).returncode == 0 else []


def test_the_demo_starts_local_ranks_and_compares_with_one(tmp_path):
    """scripts/demo in a folder where this interpreter stands for .venv, on two ranks and with two steps."""
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    read = "".join((tmp_path / name).read_text() for name in ("pyproject.toml", "setup.py"))
    key = subprocess.run(["cksum"], input=read, capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / ".venv" / ".installed-demo").write_text(f"{key} {tmp_path}\n")
    done = subprocess.run(
        [*_without_a_name(), "scripts/demo", "--steps", "2", "--ranks", "2"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "demo.png").stat().st_size > 500, done.stdout + done.stderr
    assert "installing" not in done.stdout and "drawn by 2 ranks on cpu" in done.stdout, done.stdout
    assert float(done.stdout.split("against one rank")[1].split("relative error ")[1].split()[0]) < 1e-5, done.stdout
    assert all(word in done.stderr for word in ("loading tiny", "triangle, white, yellow", "loaded in"))
    assert done.stderr.count("loading tiny") == 1 and re.search(r"each further [\d.]+, decode", done.stdout)


def test_local_ranks_end_with_the_process_that_started_them(tmp_path):
    """Ranks of `cocodiff bench collectives`, which start sooner than those of a pipeline."""
    command = [sys.executable, "-m", "cocodiff", "bench", "collectives", "--ranks", "2", "--repeat", "100"]
    command += ["--largest", str(2**32), "--patience", "1000", "--out", str(tmp_path / "cluster.json")]
    with open(tmp_path / "said", "w") as said:
        started = subprocess.Popen(command, env=ENVIRONMENT, stdout=said, stderr=said)
    while "bytes a rank" not in (tmp_path / "said").read_text():
        assert started.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.1)
    ranks = psutil.Process(started.pid).children(recursive=True)
    assert len(ranks) == 2
    started.terminate()
    assert started.wait(100) == 128 + 15
    _, alive = psutil.wait_procs(ranks, 30)
    assert not alive and "Traceback" not in (tmp_path / "said").read_text()


def test_generate_writes_a_report_on_one_rank_too(tmp_path):
    out, report = tmp_path / "out.png", tmp_path / "reports" / "report.json"
    arguments = (*PROMPT, "--transmission", "fast", "--report", str(report), "--out", str(out))
    statuses, output = run_programs([{}], _cocodiff, arguments)
    assert statuses == [0] and out.exists(), output
    assert json.loads(report.read_text())["reason"] == "one rank sends nothing"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--out", "none/out.png"), "there is no folder none"),
        (("--height", "65"), "--height 65: this model draws px in a multiple of 4"),
    ],
)
def test_what_ranks_of_a_launcher_refuse_is_one_line(arguments, words):
    statuses, output = run_programs(torchrun_variables(2), _cocodiff, (*PROMPT, *arguments))
    said = [line for line in output.splitlines() if line.startswith("cocodiff")]
    assert statuses == [2, 2] and len(said) == 1 and words in said[0] and "Traceback" not in output, output


def test_a_model_that_one_rank_lacks_ends_all(tmp_path):
    here, there = (*PROMPT, "--out", str(tmp_path / "out.png")), (*PROMPT, "--model", "/nowhere/at/all")
    statuses, output = run_programs(torchrun_variables(2), _cocodiff, here, there)
    said = [line for line in output.splitlines() if line.startswith("cocodiff")]
    assert statuses == [2, 2] and len(said) == 1, output
    assert "cocodiff: rank 1: --model /nowhere/at/all: " in said[0], output
    assert not (tmp_path / "out.png").exists()


def test_a_picture_that_only_rank_0_has_reaches_all(tmp_path):
    """Inpainting on two ranks: rank 1 is given names of files that are not there."""
    Image.new("RGB", (64, 64), "white").save(tmp_path / "image.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    files = ("--image", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png"))
    elsewhere = ("--image", "elsewhere.png", "--mask", "elsewhere-mask.png")
    rank_0 = (*PROMPT, *files, "--out", str(tmp_path / "out.png"))
    statuses, output = run_programs(torchrun_variables(2), _cocodiff, rank_0, (*PROMPT, *elsewhere))
    assert statuses == [0, 0] and (tmp_path / "out.png").exists(), output


def test_doctor_speaks_json():
    statuses, output = run_programs([{}], _cocodiff, ("doctor", "--json"))
    findings = json.loads(output)
    assert statuses == [0] and findings["versions"]["torch"] and findings["launcher"]["ranks"] == 1
    assert "FluxPipeline" in findings["pipelines"]
