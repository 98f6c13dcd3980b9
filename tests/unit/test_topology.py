"""The cluster as data: resolving sizes, JSON and modelled times."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cocodiff.errors import ConfigError
from cocodiff.topology import PRESETS, Cluster, Level


def make_cluster(*sizes: int | None, gbs: tuple[float, ...] | None = None, flat_efficiency: float = 1.0) -> Cluster:
    gbs = gbs or tuple(100.0 / 4**index for index in range(len(sizes)))
    levels = tuple(Level(f"l{i}", size, gbs[i], 1.0 + i) for i, size in enumerate(sizes))
    return Cluster("test", levels, flat_efficiency)


# A loaded machine is no reason to fail.
calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
positive = st.floats(min_value=1e-3, max_value=1e6, allow_nan=False)


@st.composite
def clusters(draw: st.DrawFn, open_outermost: bool | None = None) -> Cluster:
    count = draw(st.integers(1, 4))
    sizes: list[int | None] = draw(st.lists(st.integers(1, 8), min_size=count, max_size=count))
    if open_outermost is None:
        open_outermost = draw(st.booleans())
    if open_outermost:
        sizes[-1] = None
    names = draw(st.lists(st.text(min_size=1, max_size=6), min_size=count, max_size=count, unique=True))
    levels = tuple(
        Level(name, size, draw(positive), draw(positive), draw(st.sampled_from([None, True, False])))
        for name, size in zip(names, sizes, strict=True)
    )
    return Cluster(draw(st.text(min_size=1)), levels, draw(st.floats(min_value=1e-3, max_value=1.0)))


def resolve_or_none(cluster: Cluster, num_ranks: int) -> Cluster | None:
    try:
        return cluster.resolve(num_ranks)
    except ConfigError:
        return None


@pytest.mark.parametrize(
    ("sizes", "num_ranks", "resolved"),
    [
        ((2, 6, None), 12, (2, 6, 1)),
        ((2, 6, None), 48, (2, 6, 4)),
        ((2, 6, None), 8, (2, 4, 1)),
        ((2, 6, None), 2, (2, 1, 1)),
        ((2, 6, None), 1, (1, 1, 1)),
        ((2, 6, 2), 24, (2, 6, 2)),
        ((8, 4), 3, (3, 1)),
        ((None,), 7, (7,)),
        ((4,), 3, (3,)),
    ],
)
def test_resolve_fills_from_inside(sizes, num_ranks, resolved):
    cluster = make_cluster(*sizes).resolve(num_ranks)
    assert cluster.sizes == resolved
    assert cluster.num_ranks == num_ranks


def test_resolve_leaves_everything_but_sizes_alone():
    cluster = PRESETS["aurora"]
    resolved = cluster.resolve(24)
    assert resolved.name == cluster.name
    assert resolved.flat_efficiency == cluster.flat_efficiency
    assert [dataclasses.replace(level, size=None) for level in resolved.levels] == [
        dataclasses.replace(level, size=None) for level in cluster.levels
    ]


def test_resolve_names_numbers_when_a_level_does_not_divide():
    with pytest.raises(ConfigError) as caught:
        make_cluster(2, 6, None).resolve(18)
    message = str(caught.value)
    assert "'test'" in message and "'l1'" in message and " 6 " in message and "18 ranks" in message
    assert "12 and 24" in message


def test_resolve_beyond_the_outermost_level():
    with pytest.raises(ConfigError, match="nearest rank count that fits is 24"):
        make_cluster(2, 6, 2).resolve(25)
    with pytest.raises(ConfigError, match="levels 2 x 6 x 2 hold 24 ranks, this run has 48"):
        make_cluster(2, 6, 2).resolve(48)


@pytest.mark.parametrize("num_ranks", [0, -1, True, 2.0])
def test_resolve_refuses_what_is_no_rank_count(num_ranks):
    with pytest.raises(ConfigError, match="at least 1"):
        make_cluster(None).resolve(num_ranks)


@calm
@given(clusters(), st.integers(1, 600))
def test_resolved_sizes_multiply_to_the_ranks(cluster, num_ranks):
    resolved = resolve_or_none(cluster, num_ranks)
    if resolved is None:
        return
    assert math.prod(resolved.sizes) == num_ranks == resolved.num_ranks
    for before, after in zip(cluster.levels, resolved.levels, strict=True):
        assert before.size is None or after.size <= before.size
    assert resolved.resolve(num_ranks) == resolved


@calm
@given(clusters(), st.integers(1, 600))
def test_resolve_shrinks_at_one_level_only(cluster, num_ranks):
    resolved = resolve_or_none(cluster, num_ranks)
    if resolved is None:
        return
    concrete = [(b.size, a.size) for b, a in zip(cluster.levels, resolved.levels, strict=True) if b.size is not None]
    shrunk = [index for index, (before, after) in enumerate(concrete) if after < before]
    if shrunk:
        assert all(after == 1 for _, after in concrete[shrunk[0] + 1 :])


@calm
@given(clusters(open_outermost=True), st.integers(1, 200))
def test_suggested_rank_counts_are_legal_and_nearest(cluster, num_ranks):
    try:
        cluster.resolve(num_ranks)
    except ConfigError as error:
        numbers = str(error).rpartition(" are ")[2]
        below, above = (int(number) for number in numbers.split(" and "))
        assert below < num_ranks < above
        legal = [n for n in range(below, above + 1) if resolve_or_none(cluster, n) is not None]
        assert legal == [below, above]


def test_open_sizes_ask_for_resolve():
    cluster = make_cluster(2, None)
    for use in (lambda: cluster.sizes, lambda: cluster.num_ranks, lambda: cluster.flat_seconds(1e6)):
        with pytest.raises(ConfigError, match=r"resolve\(num_ranks\)"):
            use()


def test_slow_is_under_a_quarter_of_the_level_inside_unless_said():
    assert make_cluster(2, 2, gbs=(100.0, 24.9)).slow == (False, True)
    assert make_cluster(2, 2, gbs=(100.0, 25.0)).slow == (False, False)
    said = Cluster("said", (Level("a", 2, 10.0, 1.0, slow=True), Level("b", None, 1.0, 1.0, slow=False)))
    assert said.slow == (True, False)
    assert make_cluster(None).slow == (False,)


@calm
@given(clusters())
def test_json_round_trip(cluster):
    assert Cluster.from_json(cluster.to_json()) == cluster


def cluster_dict() -> dict:
    return json.loads(make_cluster(2, None).to_json())


def test_json_defaults_and_whole_numbers():
    data = cluster_dict()
    del data["flat_efficiency"], data["levels"][0]["slow"]
    data["levels"][0]["bandwidth_gbs"] = 7
    cluster = Cluster.from_json(json.dumps(data))
    assert cluster.flat_efficiency == 1.0
    assert cluster.levels[0].slow is None
    assert cluster.levels[0].bandwidth_gbs == 7


@pytest.mark.parametrize("key", ["name", "size", "bandwidth_gbs", "latency_us"])
def test_json_missing_level_key(key):
    data = cluster_dict()
    del data["levels"][1][key]
    with pytest.raises(ConfigError, match=rf"levels\[1\].*'{key}' is missing"):
        Cluster.from_json(json.dumps(data))


@pytest.mark.parametrize("key", ["name", "levels"])
def test_json_missing_cluster_key(key):
    data = cluster_dict()
    del data[key]
    with pytest.raises(ConfigError, match=f"'{key}' is missing"):
        Cluster.from_json(json.dumps(data))


def test_json_unknown_keys():
    with pytest.raises(ConfigError, match="'color' is unknown"):
        Cluster.from_json(json.dumps({**cluster_dict(), "color": "blue"}))
    data = cluster_dict()
    data["levels"][0]["bandwidth"] = 3
    with pytest.raises(ConfigError, match="'bandwidth' is unknown"):
        Cluster.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 3),
        ("name", ""),
        ("size", 0),
        ("size", -2),
        ("size", 2.0),
        ("size", True),
        ("size", None),
        ("bandwidth_gbs", 0),
        ("bandwidth_gbs", -1.0),
        ("bandwidth_gbs", "15"),
        ("bandwidth_gbs", True),
        ("bandwidth_gbs", float("nan")),
        ("bandwidth_gbs", float("inf")),
        ("bandwidth_gbs", 10**400),
        ("latency_us", 0),
        ("latency_us", None),
        ("slow", 1),
        ("slow", "yes"),
    ],
)
def test_json_wrong_level_values_name_the_key(key, value):
    data = cluster_dict()
    data["levels"][0][key] = value
    with pytest.raises(ConfigError, match=key):
        Cluster.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("key", "value"),
    [("name", None), ("levels", []), ("levels", {}), ("flat_efficiency", 0), ("flat_efficiency", 1.5)],
)
def test_json_wrong_cluster_values_name_the_key(key, value):
    with pytest.raises(ConfigError, match=key):
        Cluster.from_json(json.dumps({**cluster_dict(), key: value}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"name": "a", "name": "b", "levels": []}',
        '{"levels": [3], "name": "a"}',
        "[" * 100_000,
    ],
)
def test_json_that_is_no_cluster(text):
    with pytest.raises(ConfigError):
        Cluster.from_json(text)


def test_levels_are_a_tuple_with_different_names():
    with pytest.raises(ConfigError, match="different names"):
        Cluster("twice", (Level("a", 2, 1.0, 1.0), Level("a", 2, 1.0, 1.0)))
    with pytest.raises(ConfigError, match="tuple of Level"):
        Cluster("list", [Level("a", 2, 1.0, 1.0)])  # type: ignore[arg-type]


@calm
@given(clusters(), st.integers(2, 600), st.floats(1.0, 1e9), st.floats(1.1, 10.0))
def test_modelled_times_are_positive_and_grow_with_bytes(cluster, num_ranks, nbytes, factor):
    resolved = resolve_or_none(cluster, num_ranks)
    assume(resolved is not None)
    for seconds in (resolved.flat_seconds, resolved.staged_seconds):
        assert 0 < seconds(0) <= seconds(nbytes) <= seconds(nbytes * factor)


@calm
@given(clusters(open_outermost=True))
def test_one_rank_takes_no_time(cluster):
    alone = cluster.resolve(1)
    assert alone.flat_seconds(1e6) == alone.staged_seconds(1e6) == 0


@calm
@given(st.integers(1, 64), positive, positive, st.floats(0.0, 1e9))
def test_one_level_makes_flat_and_staged_equal(size, gbs, latency_us, nbytes):
    cluster = Cluster("one", (Level("a", None, gbs, latency_us),), flat_efficiency=0.3).resolve(size)
    assert cluster.flat_seconds(nbytes) == pytest.approx(cluster.staged_seconds(nbytes))


def test_modelled_times_by_hand():
    cluster = make_cluster(2, 3, gbs=(10.0, 2.0), flat_efficiency=0.5)
    # flat: 1 peer behind l0 (1 us each), 4 behind l1 (2 us each); staged: 1 message, then 2 messages.
    assert cluster.flat_seconds(6e6) == pytest.approx(4e6 / (2e9 * 0.5) + 1e-6 + 4 * 2e-6)
    assert cluster.staged_seconds(6e6) == pytest.approx((1e-6 + 3e6 / 10e9) + 2 * (2e-6 + 2e6 / 2e9))


def test_aurora_on_one_node_prefers_stages():
    aurora = PRESETS["aurora"].resolve(12)
    assert aurora.sizes == (2, 6, 1)
    assert aurora.staged_seconds(48e6) < aurora.flat_seconds(48e6)
