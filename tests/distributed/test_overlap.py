"""Overlap is shown by the order of events in a real run, never by time.

Exchanges are slowed by gates: a stretch of compute may not begin before the exchange that should span it has begun, and
that exchange may not end before the compute has ended. Under a schedule that overlaps, every gate opens. Under one that
does not, gates open only because patience ends, and the recorded order shows it.
"""

import threading
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.pipelines import flux_call, flux_pipeline

# How long a gate waits. Under the schedule that overlaps every gate opens, however busy the machine is; under the other
# one none does, so that patience is all it costs.
PATIENCE_SECONDS = {"v_first": 60.0, "sequential": 0.5}
# What lies under what, in two single blocks: (exchange, occurrence) spans (compute, occurrence) .. (the same).
# In two pieces, the first output lies under the second attention, and the last under V of the next block, whose first
# piece is the third V.
COMMON = {("v", 0): (("k", 0), ("q", 0)), ("q", 0): (("parallel", 0), ("parallel", 0))}
SPANS = {
    "v_first": COMMON | {("o", 0): (("attend", 1), ("attend", 1)), ("o", 1): (("finish", 0), ("v", 2))},
    "sequential": COMMON | {("o", 0): (("attend", 0), ("finish", 0)), ("o", 1): (("finish", 0), ("v", 1))},
}


class Gates:
    """Events by (label, occurrence), for exchanges that have begun and for compute that has ended."""

    def __init__(self, schedule):
        self.spans, self.patience = SPANS[schedule], PATIENCE_SECONDS[schedule]
        spans = self.spans
        self.seen = {"exchange": Counter(), "compute": Counter()}
        self.begun = {exchange: threading.Event() for exchange in spans}
        self.ended = {last: threading.Event() for _, last in spans.values()}

    def occurrence(self, kind, label):
        self.seen[kind][label] += 1
        return label, self.seen[kind][label] - 1

    def exchange(self, label, work):
        def gated(x):
            key = self.occurrence("exchange", label)
            if key in self.spans:
                self.begun[key].set()
                self.ended[self.spans[key][1]].wait(self.patience)
            return work(x)

        return gated

    @contextmanager
    def compute(self, label, span):
        key = self.occurrence("compute", label)
        for exchange, (first, _) in self.spans.items():
            if key == first:
                self.begun[exchange].wait(self.patience)
        with span(label):
            yield
        if key in self.ended:
            self.ended[key].set()


def _record(schedule):
    """The marks of one forward of a transformer of two single blocks, on this rank."""
    import cocodiff

    level = cocodiff.Level("slow", 2, 1e-6, 1e-6)
    pipe, cluster = flux_pipeline(double=0, single=2), cocodiff.Cluster("test", (level,))
    cocodiff.wrap(pipe, schedule=schedule, exchange="flat", cluster=cluster, pieces=2)
    session, gates = pipe.cocodiff.session, Gates(schedule)
    lane = session.lane(0)
    span, submit = session.span, lane.submit
    session.span = lambda label: gates.compute(label, span)
    lane.submit = lambda work, source, label: submit(gates.exchange(label, work), source, label)

    call = flux_call("text2image", height=20, width=20)
    with session.recording() as timeline:
        pipe(**{**call, "num_inference_steps": 1, "true_cfg_scale": 1.0})
    return [(mark.kind, mark.lane, mark.label) for mark in timeline.marks]


def _spanned(marks, spans):
    """For each of SPANS: whether the exchange began before, and ended after, the compute it should lie over."""

    def at(kind, lane, label, occurrence):
        found = [i for i, mark in enumerate(marks) if mark == (kind, lane, label)]
        return found[occurrence] if occurrence < len(found) else None

    result = {}
    for exchange, (first, last) in spans.items():
        order = [
            at("begin", "slow", *exchange),
            at("begin", "compute", *first),
            at("end", "compute", *last),
            at("end", "slow", *exchange),
        ]
        result[exchange] = None not in order and order == sorted(order)
    return result


def _made(marks):
    """The first three projections, in the order in which they are made."""
    return [label for kind, lane, label in marks if (kind, lane) == ("begin", "compute") and label in ("q", "k", "v")][
        :3
    ]


def test_v_first_overlaps():
    for marks in run_ranks(2, _record, "v_first"):
        assert all(_spanned(marks, SPANS["v_first"]).values()), marks
        assert _made(marks)[0] == "v"


def test_sequential_does_not():
    for marks in run_ranks(2, _record, "sequential"):
        assert not any(_spanned(marks, SPANS["sequential"]).values()), marks
        assert _made(marks) == ["q", "k", "v"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_lane_keeps_order_and_delivers_errors(fails):
    from cocodiff.exchange.lanes import ThreadLane

    lane, seen = ThreadLane("lane"), []

    def work(x):
        seen.append(x.item())
        if fails and x.item() == 1:
            raise ValueError("on purpose")
        return x + 1

    tickets = [lane.submit(work, torch.tensor(float(i)), "work") for i in range(3)]
    if fails:
        with pytest.raises(ValueError, match="on purpose"):
            tickets[1].wait()
    assert [tickets[i].wait().item() for i in (0, 2)] == [1.0, 3.0]
    assert seen == [0.0, 1.0, 2.0]
    chained = lane.submit(work, lane.submit(work, torch.tensor(5.0), "first"), "second")
    assert chained.wait().item() == 7.0
    lane.close()
