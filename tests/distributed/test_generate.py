"""`cocodiff generate` and `cocodiff doctor`, as processes of their own."""

import json
import os
import subprocess
import sys

import pytest

from tests.distributed.ranks import run_programs, torchrun_variables, without_launcher

PROMPT = ("generate", "--prompt", "a red circle above a blue square", "--steps", "2")


def _cocodiff(*everyone):
    """The command line with the arguments of this rank, the last ones for those that have none of their own."""
    from cocodiff import cli

    sys.argv = ["cocodiff", *everyone[min(int(os.environ.get("RANK", 0)), len(everyone) - 1)]]
    cli.main()


def test_generate_starts_local_ranks_and_compares_with_one(tmp_path):
    out = tmp_path / "out.png"
    done = subprocess.run(
        [sys.executable, "-m", "cocodiff.cli", *PROMPT, "--ranks", "2", "--out", str(out), "--compare"],
        env=without_launcher(os.environ) | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0 and out.stat().st_size > 500, done.stderr
    assert "drawn by 2 rank(s)" in done.stdout and "against one rank" in done.stdout
    relative = float(done.stdout.split("relative error ")[1])
    assert relative < 1e-5, done.stdout


def test_generate_writes_a_report_on_one_rank_too(tmp_path):
    out, report = tmp_path / "out.png", tmp_path / "reports" / "report.json"
    arguments = (*PROMPT, "--transmission", "fast", "--report", str(report), "--out", str(out))
    statuses, output = run_programs([{}], _cocodiff, arguments)
    assert statuses == [0] and out.exists(), output
    assert json.loads(report.read_text())["reason"] == "one rank sends nothing"


@pytest.mark.parametrize(
    "arguments, words",
    [(("--ranks", "2", "--transmission", "balancd"), "balancd"), (("--model", "/nowhere/at/all"), "/nowhere/at/all")],
)
def test_a_wrong_argument_is_one_clear_line(arguments, words):
    statuses, output = run_programs([{}], _cocodiff, (*PROMPT, *arguments))
    assert statuses == [2] and words in output and len(output.splitlines()) < 4, output


def test_a_model_that_one_rank_lacks_ends_all(tmp_path):
    here, there = (*PROMPT, "--out", str(tmp_path / "out.png")), (*PROMPT, "--model", "/nowhere/at/all")
    statuses, output = run_programs(torchrun_variables(2), _cocodiff, here, there)
    assert all(statuses) and "cocodiff (rank 1): --model /nowhere/at/all: there is no such folder" in output, output
    assert not (tmp_path / "out.png").exists()


def test_doctor_speaks_json():
    statuses, output = run_programs([{}], _cocodiff, ("doctor", "--json"))
    findings = json.loads(output)
    assert statuses == [0] and findings["versions"]["torch"] and findings["launcher"]["ranks"] == 1
    assert "FluxPipeline" in findings["pipelines"]
