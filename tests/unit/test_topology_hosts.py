"""Presets, what the ranks' hosts show, and which cluster a user's word means."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocodiff.errors import ConfigError
from cocodiff.topology import PRESETS, Cluster, Level, load_cluster
from cocodiff.topology.detect import detect


def test_presets():
    assert set(PRESETS) == {"aurora", "polaris", "dgx-h100", "single-node", "v5e"}
    assert PRESETS["aurora"].slow == (False, False, True)  # inside a node all stays exact
    assert PRESETS["polaris"].slow == (False, True)
    assert PRESETS["dgx-h100"].slow == (False, True)
    assert all(name == cluster.name for name, cluster in PRESETS.items())
    with pytest.raises(TypeError):
        PRESETS["mine"] = PRESETS["aurora"]  # type: ignore[index]


@pytest.mark.parametrize("device_type", ["cuda", "xpu", "cpu", "mps"])
def test_detect_one_host(device_type):
    cluster, why = detect(["a"] * 4, device_type)
    assert cluster.sizes == (4,) and cluster.slow == (False,)
    assert "host a" in why


@pytest.mark.parametrize("device_type", ["cuda", "xpu", "cpu"])
def test_detect_equal_blocks(device_type):
    cluster, why = detect(["a", "a", "b", "b", "c", "c"], device_type)
    assert [level.name for level in cluster.levels] == ["local", "network"]
    assert cluster.sizes == (2, 3) and cluster.slow == (False, True)
    assert "3 hosts run 2 ranks each" in why


def test_detect_one_rank_per_host():
    assert detect(["a", "b"], "cpu")[0].sizes == (1, 2)


@pytest.mark.parametrize(
    ("hosts", "fault"),
    [
        (["a", "a", "b"], r"uneven \(a 2, b 1\)"),
        (["a", "b", "a", "b"], "interleaved"),
        (["a", "b", "b", "a"], "interl"),
    ],
)
def test_detect_other_shapes_turn_staging_off(hosts, fault):
    cluster, why = detect(hosts, "cuda")
    assert cluster.sizes == (len(hosts),) and cluster.slow == (True,)
    assert "staging is off because ranks per node are" in why
    assert re.search(fault, why)


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_detected_levels_hold_every_rank_and_never_cross_a_host_inside(hosts):
    cluster, _ = load_cluster("auto", hosts, "cpu")
    assert cluster.num_ranks == len(hosts)
    if len(cluster.levels) == 2:
        local = cluster.sizes[0]
        assert all(len(set(hosts[start : start + local])) == 1 for start in range(0, len(hosts), local))


@pytest.mark.parametrize("hosts", [[], "abc"])
def test_hosts_are_a_list_of_names(hosts):
    with pytest.raises(ConfigError, match="one host per rank"):
        load_cluster("aurora", hosts, "xpu")


def test_load_preset_file_and_cluster(tmp_path: Path):
    hosts = ["a"] * 12
    preset, sentence = load_cluster("aurora", hosts, "xpu")
    assert preset == PRESETS["aurora"].resolve(12)
    assert sentence == "preset 'aurora': levels tile 2 x gpu 6 x node 1"
    path = tmp_path / "mine.json"
    path.write_text(PRESETS["aurora"].to_json())
    bare = tmp_path / "mine"
    bare.write_text(PRESETS["aurora"].to_json())
    for spec in (path, str(path), str(bare), PRESETS["aurora"]):
        assert load_cluster(spec, hosts, "xpu")[0] == preset


def test_load_errors(tmp_path: Path):
    with pytest.raises(ConfigError, match="aurora, dgx-h100, polaris, single-node, v5e"):
        load_cluster("auroro", ["a"], "xpu")
    with pytest.raises(ConfigError, match="unknown cluster ''"):
        load_cluster("", ["a"], "xpu")
    with pytest.raises(ConfigError, match="cannot read"):
        load_cluster(str(tmp_path / "none.json"), ["a"], "xpu")
    broken = tmp_path / "broken.json"
    broken.write_text('{"name": "x"}')
    with pytest.raises(ConfigError, match=r"broken\.json.*'levels' is missing"):
        load_cluster(broken, ["a"], "xpu")
    with pytest.raises(ConfigError, match="levels 3 x 1 hold 3 ranks, this run has 9"):
        load_cluster(Cluster("small", (Level("a", 3, 2.0, 1.0), Level("b", 1, 1.0, 1.0))), ["a"] * 9, "xpu")


@pytest.mark.parametrize(
    ("spec", "hosts", "doubt"),
    [
        ("aurora", ["x"] * 4 + ["y"] * 20, "levels inside a node hold 12 ranks but host x runs 4"),
        ("aurora", ["x"] * 4 + ["y"] * 4, "levels inside a node hold 8 ranks but host x runs 4"),
        ("polaris", ["x", "y"] * 4, "hold ranks 0 to 3 but these run on hosts x, y"),
        ("single-node", ["x"] * 2 + ["y"] * 2, "one level spans 2 hosts, so nothing is staged"),
    ],
)
def test_load_says_what_does_not_fit_the_hosts(spec, hosts, doubt):
    cluster, sentence = load_cluster(spec, hosts, "cuda")
    assert cluster.num_ranks == len(hosts)
    assert "; but " in sentence and doubt in sentence


def test_load_has_no_doubt_when_hosts_fit():
    for spec, hosts in [
        ("aurora", ["x"] * 12 + ["y"] * 12),
        ("single-node", ["x", "y"]),
        ("polaris", ["x"] * 3),
    ]:
        assert "but" not in load_cluster(spec, hosts, "cuda")[1]
