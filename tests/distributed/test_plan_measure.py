"""`cocodiff plan --measure` on two ranks, and what wrap makes of its file."""

import json
import os
import subprocess
import sys

from tests.distributed.draws import LIMIT
from tests.distributed.ranks import run_ranks, without_launcher
from tests.pipelines import flux_call, flux_pipeline, relative_error


def _call():
    return flux_call("text2image") | dict(num_inference_steps=1)


def _references():
    return flux_pipeline(heads=4)(**_call()).images


def _wrapped(folder, expected):
    """The error and the plan by the measured file; then what is said of a file of another machine."""
    import pytest

    import cocodiff
    from cocodiff.errors import ConfigError

    pipe = cocodiff.wrap(flux_pipeline(heads=4), plan=folder / "measured.json")
    error, degrees = relative_error(pipe(**_call()).images, expected), pipe.cocodiff.plan.degrees.counts
    cocodiff.unwrap(pipe)
    pipe = cocodiff.wrap(flux_pipeline(heads=4), plan=folder / "foreign.json")
    with pytest.raises(ConfigError) as told:
        pipe(**_call())
    return error, degrees, str(told.value)


def test_two_ranks_measure_and_wrap_plans_by_that(tmp_path):
    command = [sys.executable, "-m", "cocodiff.cli", "plan", "--model", "shape:flux-dev", "--scale", "1/1024"]
    command += ["--dtype", "fp32", "--device", "cpu", "--ranks", "2"]
    command += ["--measure", str(tmp_path / "measured.json"), "--out", str(tmp_path / "plan.json")]
    environment = without_launcher(os.environ) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr
    assert "MEASURED on 2 ranks" in done.stdout and "ring 2 x ulysses 1" in done.stdout, done.stdout
    found = json.loads((tmp_path / "measured.json").read_text())
    assert len(found["operators"]) > 20 and found["cluster"]["levels"][0]["latency_us"] > 0
    assert not json.loads((tmp_path / "plan.json").read_text())["modelled"]
    found["environment"]["machine"] = "another"
    (tmp_path / "foreign.json").write_text(json.dumps(found))
    expected = run_ranks(1, _references)[0]
    for error, degrees, told in run_ranks(2, _wrapped, tmp_path, expected):
        assert error < LIMIT and degrees[0] * degrees[1] * degrees[2] == 2
        assert "another there" in told and "measure again" in told
