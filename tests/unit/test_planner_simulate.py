"""The simulator, on programs whose times can be worked out by hand; links, and who shares them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from cocodiff.parallel.mesh import Degrees
from cocodiff.parallel.placement import Placement
from cocodiff.planner import simulate as simulator
from cocodiff.planner.fabric import Fabric
from cocodiff.planner.program import Compute, Program, Send, Wait, Work
from cocodiff.planner.simulate import Transfer, simulate
from cocodiff.topology import Cluster, Level


@dataclass
class Fixed:
    """Work takes its FLOPs in seconds; a send takes its bytes in seconds, of the link named by its axis."""

    launch_seconds: float = 0.0
    latency: float = 0.0
    links: list = field(default_factory=lambda: ["a", "b"])

    def compute_seconds(self, work):
        return sum(one.flops * one.count for one in work)

    def transfer(self, send):
        seconds = [float(send.bytes_to[0]) if send.axis == link else 0.0 for link in self.links]
        return Transfer(self.latency, tuple(seconds))

    def level(self, send):
        return self.links.index(send.axis)


def compute(seconds):
    return Compute("x", (Work("matmul", seconds, 0.0),))


def send(seconds, axis="a", after=None):
    return Send(axis, "all_to_all", (seconds,), after, (), "v")


def took(steps, times=1, **costs):
    return simulate(Program(((tuple(steps), times),)), Fixed(**costs))


def test_what_hides_and_what_is_waited_for():
    assert took([compute(2), compute(3)]).total == 5
    timing = took([send(4), compute(3), Wait(1), compute(1)])
    assert timing.total == pytest.approx(5) and timing.waiting == {0: pytest.approx(1)} and timing.compute == 4
    assert took([send(2), compute(3), Wait(1)]).total == pytest.approx(3)
    assert took([compute(1), send(2)]).total == pytest.approx(3), "what is on a lane ends within the forward"


def test_a_lane_runs_one_at_a_time_and_two_links_at_once():
    assert took([send(2), send(3), Wait(1)]).total == pytest.approx(5)
    assert took([send(2), send(3, "b"), Wait(2), Wait(1)]).total == pytest.approx(3)
    assert took([send(2), send(3, "b", after=1), Wait(1)]).total == pytest.approx(5), "the second needs the first"


def test_latencies_of_one_lane_add_up():
    assert took([send(2), send(2), Wait(1)], latency=0.5).total == pytest.approx(2 * (0.5 + 2))


def test_axes_on_one_link_share_it():
    class OneLink(Fixed):
        def transfer(self, send):
            return Transfer(0.0, (float(send.bytes_to[0]),))

    steps = (send(2), send(1, "b"), Wait(1), Wait(2))
    timing = simulate(Program(((steps, 1),)), OneLink())
    assert timing.total == pytest.approx(3)  # the second ends after 2, when each has had half


def test_a_host_that_is_slower_than_its_device():
    timing = took([compute(0.1)] * 20, launch_seconds=1.0)
    assert timing.total == pytest.approx(20.1, abs=0.2) and timing.host == pytest.approx(18, abs=0.3)
    assert took([compute(2.0)] * 20, launch_seconds=1.0).total == pytest.approx(41)


def test_repetitions_that_are_left_out_count(monkeypatch):
    steps = [send(3), compute(2), send(2, "b"), Wait(2), compute(1), Wait(1)]
    few = took(steps, times=40)
    monkeypatch.setattr(simulator, "SETTLING", 100)
    all_of_them = took(steps, times=40)
    assert few.total == pytest.approx(all_of_them.total) and few.waiting == pytest.approx(all_of_them.waiting)


CLUSTER = Cluster("c", (Level("gpu", 2, 1.0, 1.0), Level("node", 2, 0.1, 10.0)))


def flow(axis, bytes_to, degrees, pattern="all_to_all", placement=None, cluster=CLUSTER):
    return Fabric(cluster, degrees, placement).flow(Send(axis, pattern, bytes_to, None, (), ""))


def test_flows_of_exchanges():
    one = flow("ulysses", (100, 100, 100, 100), Degrees(1, 1, 4))
    # Of a rank's three messages two leave the node, whose link is two ranks' share wide.
    assert max(one.seconds) == pytest.approx(2 * 2 * 100 / (2 * 0.1e9)) and one.sent_bytes == 300
    assert np.count_nonzero(np.isclose(one.seconds, max(one.seconds))) == 4, "both nodes, out and in"
    assert one.latency_seconds == pytest.approx(10e-6)
    inside = flow("ulysses", (100, 100), Degrees(1, 2, 2))
    assert max(inside.seconds) == pytest.approx(100 / 1e9)
    across = flow("ulysses", (100, 100), Degrees(1, 2, 2), placement=Placement((1, 1), (2, 1), (1, 2)))
    assert max(across.seconds) == pytest.approx(2 * 100 / 0.2e9)
    passed = flow("ring", (100,), Degrees(1, 4, 1), "pass_on")
    assert max(passed.seconds) == pytest.approx(100 / 0.2e9), "of four passes one leaves each node"
    slower = flow("ulysses", (100,) * 4, Degrees(1, 1, 4), cluster=Cluster("c", CLUSTER.levels, flat_efficiency=0.5))
    assert slower.efficiency == 0.5 and one.efficiency == inside.efficiency == 1.0
    assert max(slower.seconds) == max(one.seconds), "what bounds are made of"
    level = flow("level 1", (100, 100), Degrees(1, 1, 4))
    assert max(level.seconds) == pytest.approx(2 * 100 / 0.2e9) and np.count_nonzero(level.seconds) == 4


def test_a_part_with_a_worse_link_holds_all_back():
    levels = CLUSTER.levels[0], Level("node", 2, 0.1, 10.0, part_gbs=((1, 0.025),))
    even = flow("ulysses", (100,) * 4, Degrees(1, 1, 4))
    uneven = flow("ulysses", (100,) * 4, Degrees(1, 1, 4), cluster=Cluster("c", levels))
    assert max(uneven.seconds) == pytest.approx(4 * max(even.seconds))
    assert sum(uneven.seconds > max(even.seconds) * 1.1) == 2, "its way out and its way in"


def test_links_that_are_on_the_way_of_outer_messages():
    three = Level("node", 2, 1.0, 1.0), Level("rack", 2, 0.1, 1.0)
    way = Level("node", 2, 1.0, 1.0, on_the_way=True), three[1]
    over, through = (flow("cfg", (100, 100), Degrees(2, 1, 2), cluster=Cluster("c", levels)) for levels in (three, way))
    assert np.count_nonzero(over.seconds) == 4 and np.count_nonzero(through.seconds) == 12
    assert max(over.seconds) == max(through.seconds) == pytest.approx(2 * 100 / 0.2e9)
