"""The bench on real ranks: right results, honest counts, rows that say why a method does not run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("single", "diffusers", "ulysses", "exact")
namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")), reason="needs root, ip and tc"
)


def _bench(shape, names, cluster, trace=None):
    from cocodiff.bench.run import run_bench
    from cocodiff.launch.job import start_job
    from cocodiff.models.shapes import Shape

    job = start_job("cpu")
    result = run_bench(Shape(*shape), names, job, cluster, 1, 1, lambda text: None, trace and Path(trace))
    return job.rank, result


def test_methods_agree_and_bytes_are_those_of_theory(tmp_path):
    shape = ("small", "flux", 1, 2, 4, 16, 32, 64)
    results = dict(run_ranks(4, _bench, shape, METHODS, "auto", str(tmp_path / "trace")))
    methods = results[0]["methods"]
    assert all(row["relative_error"] < 1e-5 for row in methods.values())
    # Q, K, V and O of three layers: each rank keeps a quarter of what it holds. Gathered by a ring: three shards of 16
    # tokens; the rest compares six inputs.
    exchanged = 3 * 4 * (96 // 4) * 64 * 4 * 3 // 4
    gathered = 3 * (64 // 4) * 64 * 4 + 3 * 6 * 8
    for name in ("ulysses", "exact"):
        assert list(methods[name]["bytes"].values()) == [exchanged + gathered]
    assert methods["single"]["bytes"] is None and methods["diffusers"]["bytes"] is None
    assert results[0]["compute_seconds"] > 0 and methods["exact"]["limit_seconds"] > 0
    for name in ("ulysses", "exact"):
        assert len(list((tmp_path / "trace" / name).glob("trace-rank*.json"))) == 4


def test_a_method_that_cannot_run_says_why_and_the_others_go_on():
    for _, result in run_ranks(3, _bench, ("odd", "flux", 1, 1, 4, 8, 5, 11), METHODS, "auto"):
        rows = result["methods"]
        assert "must all divide by 3 ranks" in rows["diffusers"]["error"]
        assert rows["exact"]["relative_error"] < 1e-5 and rows["ulysses"]["relative_error"] < 1e-5


def test_on_one_rank_there_is_nothing_to_exchange():
    ((_, result),) = run_ranks(1, _bench, ("one", "flux", 1, 1, 2, 8, 4, 8), METHODS, "auto")
    assert result["cluster"] is None and "seconds_per_step" in result["methods"]["single"]
    assert all("one rank" in result["methods"][name]["error"] for name in METHODS[1:])


def _collectives(folder):
    from cocodiff.bench.collectives import collectives_table, run_collectives
    from cocodiff.launch.job import start_job
    from cocodiff.topology import Cluster, Level

    path = Path(folder) / f"shape-{os.environ['RANK']}.json"
    path.write_text(Cluster("test", (Level("gpu", 2, 1.0, 1.0), Level("node", 2, 1.0, 1.0))).to_json())
    job = start_job("cpu")
    result, measured = run_collectives(job, str(path), 16384, 1, 3.0, lambda text: None)
    return result, measured.to_json(), collectives_table(result, measured)


def test_collectives_are_timed_and_auto_believes_them(tmp_path):
    from cocodiff.topology import Cluster

    for result, text, table in run_ranks(4, _collectives, str(tmp_path)):
        cluster = Cluster.from_json(text)
        names = {row["exchange"] for row in result["rows"]}
        assert names == {"level gpu", "level node", "flat", "staged", "torch"}
        assert {row["bytes"] for row in result["rows"]} == {4096, 16384}
        row = next(row for row in result["rows"] if row["exchange"] == "flat")
        assert row["algbw_gbs"] == row["bytes"] / row["seconds"]["median"] / 1e9
        assert row["busbw_gbs"] == pytest.approx(row["algbw_gbs"] * 3 / 4)
        assert cluster.measured.ranks == 4 and cluster.seconds("flat", 4096) == row["seconds"]["median"]
        assert "| 4096 |" in table


def _run_emulated(*options, folder, arguments):
    result = folder / "result.json"
    command = [ROOT / "scripts" / "emulated_cluster", *options, "--", sys.executable, "-m", "cocodiff.cli", "bench"]
    run = subprocess.run([*command, *arguments, "--json", result], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(result.read_text()), run.stdout


SMALL = ("--shape", "flux-dev", "--scale", "1/64", "--layers", "1,1", "--repeat", "1", "--methods", "ulysses,exact")


@namespaces
def test_interfaces_count_what_we_count_and_the_link_is_as_wide_as_set(tmp_path):
    """What ranks of one node send each other does not touch the link, or the ratio would be 1.5."""
    options = ("--nodes", "2", "--ranks-per-node", "2", "--link", "200mbit")
    result, output = _run_emulated(*options, folder=tmp_path, arguments=SMALL)
    for row in result["methods"].values():
        assert 2 * row["bytes"]["host"] - row["counted_bytes"] > 0.4 * row["counted_bytes"], row  # inside a node
        assert 1.0 <= row["interface_bytes"] / row["counted_bytes"] < 1.03 + 0.05, row  # headers, acknowledgements
    assert 0.60 < result["cluster"]["goodput_gbs"]["node"] * 8e9 / 200e6 < 1.02  # below 0.9 only where cores are busy
    assert re.search(r"\| exact \| \d", output)
