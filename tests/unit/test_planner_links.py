"""Lines, rings and tori: loads of links worked out by hand, and against a router that walks every message."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pytest

from cocodiff.cli.plan import _cluster
from cocodiff.errors import ConfigError
from cocodiff.parallel.layout import digits
from cocodiff.parallel.mesh import Degrees
from cocodiff.parallel.placement import Placement
from cocodiff.planner.fabric import Fabric
from cocodiff.planner.links import Links
from cocodiff.planner.program import Send
from cocodiff.topology import Cluster, Level

GBS, US = 1.0, 1.0  # of every link here: a byte takes 1e-9 s


def _level(name, size, wiring, **more):
    return Level(name, size, GBS, US, wiring=wiring, **more)


def _torus(*dimensions):
    return Cluster("t", tuple(_level(f"d{at}", size, wiring) for at, (size, wiring) in enumerate(dimensions)))


def _flow(cluster, axis, bytes_to, degrees, pattern="all_to_all", placement=None):
    return Fabric(cluster, degrees, placement).flow(Send(axis, pattern, bytes_to, None, (), ""))


def _loads(cluster, *flow, **more):
    """Bytes on the links up and down, level by level; all links here have 1 GB/s."""
    seconds, found, start = _flow(cluster, *flow, **more).seconds * 1e9, [], 0
    for _ in cluster.levels:
        for _ in "up", "down":
            found.append(seconds[start : start + cluster.num_ranks].round(6).tolist())
            start += cluster.num_ranks
    return found


def test_an_exchange_on_a_line():
    up, down = _loads(_torus((4, "line")), "ulysses", (1,) * 4, Degrees(1, 1, 4))
    assert up == [3, 4, 3, 0] and down == [0, 3, 4, 3], "k ranks before a link send to 4 - k behind it"


def test_an_exchange_on_a_ring():
    up, down = _loads(_torus((4, "ring")), "ulysses", (1,) * 4, Degrees(1, 1, 4))
    assert up == down == [2] * 4, "1 from the next, and half of the 2 messages that are 2 hops long"
    up, down = _loads(_torus((5, "ring")), "ulysses", (1,) * 5, Degrees(1, 1, 5))
    assert up == down == [3] * 5, "1 hop for one and 2 for another, each way"


def test_a_ring_of_ranks_on_a_line_goes_back_all_the_way():
    up, down = _loads(_torus((4, "line")), "ring", (10,), Degrees(1, 4, 1), pattern="pass_on")
    assert up == [10, 10, 10, 0] and down == [0, 10, 10, 10]
    flow = _flow(_torus((4, "line")), "ring", (10,), Degrees(1, 4, 1), pattern="pass_on")
    assert flow.latency_seconds == pytest.approx(3e-6), "three hops"
    up, down = _loads(_torus((4, "ring")), "ring", (10,), Degrees(1, 4, 1), pattern="pass_on")
    assert up == [10] * 4 and down == [0] * 4


def test_a_torus_is_routed_in_the_order_of_its_dimensions():
    cluster = _torus((2, "line"), (2, "line"))
    assert all(sorted(loads) == [0, 0, 2, 2] for loads in _loads(cluster, "ulysses", (1,) * 4, Degrees(1, 1, 4)))
    sent = np.zeros(16)
    levels, latency = Links(cluster).send(sent, np.array([0]), np.array([3]), np.array([7.0]))
    # From (0, 0) up along x, then from (1, 0) up along y: links "x up of node 0" and "y up of node 1".
    assert np.flatnonzero(sent).tolist() == [0, 8 + 1] and levels == {1} and latency == pytest.approx(2e-6)


def test_placements_differ_on_a_line():
    """2 x 4: two rings of four ranks along the long side, or each over both."""
    cluster = _torus((2, "line"), (4, "line"))
    along, across = Placement((2, 1), (1, 1), (1, 4)), Placement((1, 2), (1, 1), (2, 2))
    busiest = [
        max(_flow(cluster, "ulysses", (1,) * 4, Degrees(2, 1, 4), placement=placed).seconds) * 1e9
        for placed in (along, across)
    ]
    assert busiest == pytest.approx([4, 2])


def _walked(cluster, messages):
    """Bytes of each link, by walking every message node by node; and the longest walk in seconds."""
    levels, sizes, loads, slowest = cluster.levels, cluster.sizes, {}, 0.0
    for here, peer, weight in messages:
        at, goal, took = list(digits(here, sizes)), digits(peer, sizes), 0.0
        outer = max(level for level in range(len(sizes)) if at[level] != goal[level])
        first = last = outer
        while first and levels[first - 1].wired and levels[outer].wired:
            first -= 1
        while last + 1 < len(sizes) and levels[last + 1].wired and levels[outer].wired:
            last += 1
        if not levels[outer].wired:
            for way, of in (("out", here), ("in", peer)):
                key = outer, way, digits(of, sizes)[outer:]
                loads[key] = loads.get(key, 0.0) + weight / np.prod(sizes[:outer], dtype=int)
            slowest = max(slowest, US * 1e-6)
            continue
        for level in range(first, last + 1):
            size, ways = sizes[level], []
            up, down = (goal[level] - at[level]) % size, (at[level] - goal[level]) % size
            if levels[level].wiring == "line":
                ways = [(1, 1.0)] if goal[level] > at[level] else [(-1, 1.0)]
            elif up == down:
                ways = [(1, 0.5), (-1, 0.5)]
            else:
                ways = [(1, 1.0)] if up < down else [(-1, 1.0)]
            hops = 0
            for sign, share in ways:
                node, hops = list(at), 0
                while node[level] != goal[level]:
                    key = level, sign, tuple(node[first:])
                    loads[key] = loads.get(key, 0.0) + weight * share
                    node[level] = (node[level] + sign) % size
                    hops += 1
            at[level], took = goal[level], took + hops * US * 1e-6
        slowest = max(slowest, took)
    return loads, slowest


@pytest.mark.parametrize("seed", range(12))
def test_loads_are_those_of_a_router_that_walks(seed):
    draw = random.Random(seed)
    cluster = _torus(
        *((draw.randint(1, 5), draw.choice(("line", "ring", "switch"))) for _ in range(draw.randint(1, 3)))
    )
    world = cluster.num_ranks
    messages = [
        (here, peer, draw.randint(1, 9))
        for here, peer in itertools.permutations(range(world), 2)
        if draw.random() < 0.7
    ]
    if not messages:
        return
    links = Links(cluster)
    sent = np.zeros(len(links.capacity))
    here, peer, weight = (np.array(column) for column in zip(*messages, strict=True))
    _, latency = links.send(sent, here, peer, weight.astype(float))
    walked, slowest = _walked(cluster, messages)
    assert sorted((sent / links.capacity * 1e9)[sent > 0].round(6)) == pytest.approx(sorted(walked.values()))
    assert latency == pytest.approx(slowest)


def test_nodes_of_several_ranks_share_their_links():
    cluster = Cluster("c", (Level("gpu", 2, 9.0, 1.0), _level("node", 3, "line")))
    flow = _flow(cluster, "ulysses", (1,) * 6, Degrees(1, 1, 6))
    assert max(flow.seconds) == pytest.approx(2 * 4 * 1e-9), "2 ranks send 4 others: all over one link"


def test_an_outer_switch_takes_what_leaves_a_torus():
    cluster = Cluster("c", (_level("x", 2, "line"), Level("pod", 2, 1.0, 10.0)))
    flow = _flow(cluster, "cfg", (1, 1), Degrees(2, 1, 2))
    assert flow.seconds[:8].max() == 0 and max(flow.seconds) == pytest.approx(1e-9)
    assert flow.latency_seconds == pytest.approx(10e-6)


def test_a_thousand_chips_take_seconds_at_most():
    cluster = _torus((8, "ring"), (8, "ring"), (16, "ring"))
    began = time.process_time()
    flow = _flow(cluster, "ulysses", (1,) * 1024, Degrees(1, 1, 1024))
    assert time.process_time() - began < 60
    # Along a ring of n, n/8 of a rank's messages cross each link of each direction, for each of its nodes.
    assert flow.seconds.max() == pytest.approx(1024 * 16 / 8 * 1e-9)


def test_wirings_of_levels():
    level = _level("x", 16, "ring")
    assert level.wired and level.of_size(8).wiring == "line" and level.of_size(16) == level
    assert _level("x", None, "ring").of_size(4).wiring == "ring", "of as many as the run has"
    cluster = Cluster("c", (_level("x", 4, "ring"), _level("y", 4, "ring")))
    assert Cluster.from_json(cluster.to_json()) == cluster
    assert [one.wiring for one in cluster.resolve(8).levels] == ["ring", "line"]
    assert [one.wiring for one in cluster.with_sizes((2, 4)).levels] == ["line", "ring"]
    assert Cluster.from_json(
        '{"name": "c", "levels": [{"name": "x", "size": 2, "bandwidth_gbs": 1.0, "latency_us": 1.0}]}'
    ).levels == (Level("x", 2, 1.0, 1.0),)
    for more, words in (
        ({"wiring": "tree"}, "wiring must be one of switch, line, ring, not 'tree'"),
        ({"wiring": "line", "on_the_way": True}, "are of a switch's links"),
        ({"wiring": "ring", "part_gbs": ((0, 1.0),)}, "are of a switch's links"),
    ):
        with pytest.raises(ConfigError, match=words):
            Level("x", 4, 1.0, 1.0, **more)


def test_slices_of_a_v5e_pod_by_their_sizes():
    for text, wirings in (("v5e:2x4", ["line"] * 2), ("v5e:8x16", ["line", "ring"]), ("v5e", ["ring"] * 2)):
        assert [level.wiring for level in _cluster(text)[0].levels] == wirings, text
    assert _cluster("v5e:2x4")[0].sizes == (2, 4) and _cluster("v5e:4")[0].sizes == (16, 4)
    assert _cluster("aurora:2x3x4")[0].sizes == (2, 3, 4)
    for text, words in (
        ("v5e:2x4x4", "give one size, of 'y', or one each of x, y"),
        ("v5e:32x4", "v5e has 16 of 'x', not 32"),
        ("v5e:0x4", "at least one x"),
    ):
        with pytest.raises(ConfigError, match=words):
            _cluster(text)


def test_a_level_may_have_its_own_share_that_flat_exchanges_reach():
    gpu, node = Level("gpu", 2, 1.0, 1.0), Level("node", 2, 1.0, 1.0, flat_efficiency=0.1)
    cluster = Cluster("c", (Level("tile", 2, 1.0, 1.0), gpu, node), flat_efficiency=0.5)
    assert Cluster.from_json(cluster.to_json()) == cluster
    for ulysses, share in ((2, 1.0), (4, 0.5), (8, 0.1)):
        assert _flow(cluster, "ulysses", (1,) * ulysses, Degrees(1, 8 // ulysses, ulysses)).efficiency == share
    inside, across = cluster.resolve(4).flat_seconds(4e9), cluster.flat_seconds(8e9)
    # Of 4 GB each 1 stays, 1 goes to the other tile and 2 to the other GPU; of 8 GB, 4 leave the node.
    assert inside == pytest.approx(2 / 0.5, rel=1e-4) and across == pytest.approx(4 / 0.1, rel=1e-4)
    with pytest.raises(ConfigError, match="flat_efficiency is a share of at most 1, not 1.5"):
        Level("x", 2, 1.0, 1.0, flat_efficiency=1.5)
