"""Messages of single ranks, on programs whose times can be worked out by hand."""

import pytest

from cocodiff.planner import messages
from cocodiff.planner.messages import play_messages
from cocodiff.planner.program import Compute, Program, Send, Wait, Work


class Hosts:
    """Two hosts of `inside` ranks; a link out of each and one into each, of 1 byte a second; all else takes no time."""

    def __init__(self, inside, axes, latency=0.0, cores=0.0):
        self.inside, self.axes, self.latency, self.core_seconds_per_byte = inside, axes, latency, cores
        self.capacity = [1.0] * 4 + [1e9]

    def compute_seconds(self, work):
        return sum(one.flops * one.count for one in work)

    def level(self, send):
        return int(send.axis != "alone")

    def groups(self, axis):
        return [list(range(2 * self.inside))] if axis == "everyone" else self.axes[axis]

    def route(self, here, peer):
        one, other = here // self.inside, peer // self.inside
        return ((4,), 0.0) if one == other else ((one, 2 + other), self.latency)


@pytest.fixture(autouse=True)
def no_jitter(monkeypatch):
    monkeypatch.setattr(messages, "JITTER", 0.0)


PAIRS = {"ring": [[0, 2], [1, 3]]}


def send(count, axis="ring", after=None, pattern="all_to_all"):
    return Send(axis, pattern, (count, count), after, (), "v")


def compute(seconds):
    return Compute("x", (Work("matmul", seconds, 0.0),))


def played(steps, hosts, times=1):
    return play_messages(Program(((tuple(steps), times),)), hosts)


def test_one_rank_a_host_takes_its_bytes_and_the_words_before_them():
    alone = Hosts(1, {"ring": [[0, 1]]}, latency=0.25)
    timing = played([send(4), Wait(1)], alone)
    assert timing.total == pytest.approx(0.25 + 4 + 0.25), "a word that the receiver waits, then the bytes"
    assert timing.waiting == {1: pytest.approx(4.5)}
    assert played([send(4), compute(3), Wait(1), compute(1)], alone).total == pytest.approx(4.5 + 1)


def test_ranks_that_share_a_link_fall_out_of_step():
    together = [send(4), Wait(1), compute(4)]
    timing = played(together, Hosts(2, PAIRS))
    assert timing.total == pytest.approx(8 + 4) and sum(timing.waiting.values()) == pytest.approx(8)
    # From then on the link is never idle: the second sends while the first computes.
    assert played(together, Hosts(2, PAIRS), times=5).total == pytest.approx(5 * 8 + 4)


def test_a_message_queues_behind_what_its_host_sent_before():
    both = {"ring": [[0, 2], [1, 3]], "ulysses": [[0, 1], [2, 3]]}
    assert played([send(4), send(4), Wait(1)], Hosts(1, {"ring": [[0, 1]]})).total == pytest.approx(8)
    inside = played([send(1000, "ulysses"), Wait(1)], Hosts(2, both))
    assert inside.total == pytest.approx(0, abs=1e-3), "ranks of one host do not use its link"


def test_what_is_passed_on_waits_for_what_arrives():
    hosts = Hosts(1, {"ring": [[0, 1]]})
    chained = [send(4, pattern="pass_on"), send(4, pattern="pass_on", after=1), Wait(1)]
    assert played(chained, hosts).total == pytest.approx(8)


def test_sending_takes_the_ranks_own_time_and_repetitions_that_are_left_out_count(monkeypatch):
    timing = played([send(4), compute(1), Wait(1)], Hosts(1, {"ring": [[0, 1]]}, cores=0.5))
    assert timing.shared == pytest.approx(2) and timing.total == pytest.approx(2 + 4)
    steps = [send(3), compute(2), send(2), Wait(2), compute(1), Wait(1)]
    few = played(steps, Hosts(2, PAIRS), times=40)
    monkeypatch.setattr(messages, "SETTLING", 100)
    every = played(steps, Hosts(2, PAIRS), times=40)
    assert few.total == pytest.approx(every.total, rel=0.02) and few.compute == pytest.approx(every.compute)
