"""The bench without ranks: shapes, links, fits, files."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cocodiff.bench import results
from cocodiff.bench.collectives import fit, with_measurements
from cocodiff.bench.links import busiest_links, interface_bytes
from cocodiff.bench.models import build_inputs, build_transformer
from cocodiff.bench.run import run_bench
from cocodiff.bench.shapes import SHAPES, named_shape
from cocodiff.cli.files import check_folder
from cocodiff.errors import ConfigError
from cocodiff.models import FAMILIES
from cocodiff.models.shapes import Shape
from cocodiff.topology.detect import detect


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("scale", [1, 1 / 4, 1 / 16, 1 / 64])
def test_scaled_shapes_keep_their_proportions(name, scale):
    whole, small = SHAPES[name], SHAPES[name].scaled(scale)
    assert small.heads == whole.heads
    assert small.double * whole.single == small.single * whole.double
    assert small.width / whole.width == pytest.approx(scale**0.5, rel=0.2)
    assert small.image / whole.image == pytest.approx(scale**0.5, rel=0.05)
    assert small.text % 32 == small.image % 32 == 0


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_a_shape_runs_and_is_the_same_each_time(family):
    single = 1 if family.startswith("flux") else 0
    shape = Shape("tiny", family, 2, single, 2, 16, 3, 6, dual=1 if family == "sd3" else 0)
    inputs = build_inputs(shape, torch.device("cpu"))
    state = torch.get_rng_state()
    first, second = build_transformer(shape), build_transformer(shape)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        pictures = [model(**inputs).sample for model in (first, second)]
    assert torch.equal(*pictures) and pictures[0].isfinite().all()


@pytest.mark.parametrize("scale", [0, -1, 2])
def test_scales_that_cannot_be(scale):
    with pytest.raises(ConfigError, match="--scale"):
        SHAPES["flux-dev"].scaled(scale)


def test_unknown_shapes_name_the_known():
    with pytest.raises(ConfigError, match="flux-dev"):
        named_shape("flux")


def test_unknown_methods_name_the_known():
    job: Any = None  # nothing was started yet
    with pytest.raises(ConfigError, match="fastest: there are single, diffusers"):
        run_bench(SHAPES["flux-dev"], ("exact", "fastest"), job, "auto", 1, 1, print)


def test_inner_links_carry_what_goes_further():
    sent = [[0, 0, 5], [1, 2, 5], [0, 0, 0], [0, 0, 0]] * 2  # 2 tiles, 2 GPUs, 2 nodes
    assert busiest_links(sent, (2, 2, 2)) == [8, 12, 10]


def test_interfaces_but_the_loopback_are_counted(tmp_path):
    counters = tmp_path / "dev"
    line = "{}: 1 2 0 0 0 0 0 0 {} 4 0 0 0 0 0 0"
    counters.write_text(
        "\n".join(["head", "head", line.format("lo", 99), line.format("eth0", 30), line.format("e1", 4)])
    )
    assert interface_bytes(str(counters)) == 34
    assert interface_bytes(str(tmp_path / "none")) is None


def test_a_fit_of_noisy_points_stays_positive():
    alpha, beta = fit([(4096, 2e-3), (65536, 1e-3), (1048576, 3e-3)], 4)
    assert alpha > 0 and beta > 0


def _result(**changes):
    seconds = {"median": 2.0, "min": 1.9, "max": 2.2, "all": [2.0]}
    row = {
        "description": "x",
        "seconds_per_step": seconds,
        "communication_share": 0.5,
        "bytes": {"node": 10},
        "counted_bytes": 10_000_000,
        "interface_bytes": 10_100_000,
        "limit_seconds": 1.0,
        "ratio_to_limit": 2.0,
        "relative_error": 1e-7,
    }
    shape = SHAPES["flux-dev"].scaled(1 / 64)
    level = {"name": "node", "size": 2, "bandwidth_gbs": 1.0, "latency_us": 1.0, "slow": None}
    versions = {"torch": "2"}
    return {
        "schema": "cocodiff-bench/1",
        "environment": {"device": "cpu", "machine": "m", "ranks": 2, "backend": "gloo", "versions": versions},
        "cluster": {"name": "c", "levels": [level], "goodput_gbs": {"node": 0.0125}},
        "shape": shape.as_json(),
        "compute_seconds": 1.0,
        "methods": {"ulysses": row, "exact": row, "diffusers": {"description": "x", "error": "they must divide"}},
    } | changes


def test_the_table_gives_ratios_and_the_reason_of_a_method_that_does_not_run():
    text = results.table(_result())
    assert "| ulysses | 2.000 (1.900, 2.200) | 1.00x | 50% | 10.00 (10.10) | 1.000 s, 2.00 | 1e-07 |" in text
    assert "does not run: they must divide" in text
    assert "100 Mbit/s measured" in results.headline(_result())


def test_results_are_saved_beside_each_other(tmp_path):
    pytest.importorskip("matplotlib")
    check_folder(tmp_path / "new", "--save")
    first = results.save(_result(), tmp_path / "new", "cocodiff bench")
    second = results.save(_result(), tmp_path / "new", "cocodiff bench")
    assert len({*first, *second}) == 6 and all(path.stat().st_size for path in (*first, *second))
    assert json.loads(first[0].read_text())["schema"] == "cocodiff-bench/1"
    assert "    cocodiff bench" in first[1].read_text()


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="--save .*cannot write into"):
            check_folder(folder, "--save")
    with pytest.raises(ConfigError, match="cannot be written"):
        results.write(tmp_path / "none" / "x.json", "")


@pytest.mark.parametrize("network_gbs, slow", [(10.0, False), (0.1, True)])
def test_a_link_that_was_slow_for_want_of_figures_is_judged_by_those_measured(network_gbs, slow):
    detected, _ = detect(["a", "a", "b", "b"], "cpu")
    assert detected.slow == (False, True)
    rows = [
        {"exchange": name, "bytes": size, "seconds": {"median": 1e-5 + size / 2 / gbs / 1e9}}
        for name, gbs in (("level local", 5.0), ("level network", network_gbs), ("flat", 1.0), ("staged", 1.0))
        for size in (4096, 65536)
    ]
    mesh: Any = SimpleNamespace(cluster=detected, level_groups={0: None, 1: None}, ulysses=SimpleNamespace(size=4))
    assert with_measurements(mesh, rows, guessed=True).slow == (False, slow)
    assert with_measurements(mesh, rows, guessed=False).slow == (False, True)
