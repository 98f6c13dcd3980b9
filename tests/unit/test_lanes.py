"""Stream lanes against a recorder that stands in for an accelerator: who waits for whom, and what stays alive."""

import gc
import threading
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from cocodiff.blocks import BlockRow, RowForward, _versions
from cocodiff.config import Config
from cocodiff.exchange.lanes import StreamLane, ThreadLane, share_one_lane
from cocodiff.exchange.ulysses import Pending
from cocodiff.layer import LayerInFlight
from cocodiff.state import Session
from cocodiff.topology import Cluster, Level

DEVICE = torch.device("cpu")


class Accelerator:
    """Streams that only write down what they were asked, in order."""

    def __init__(self):
        self.log, self.made, self.priorities = [], 0, []
        self.current = self._stream("compute")

    def _stream(self, name):
        stream = SimpleNamespace(name=name)
        stream.wait_stream = lambda other: self.log.append((name, "waits for stream", other.name))
        stream.wait_event = lambda event: self.log.append((name, "waits for event", event))

        def record_event():
            event = f"{name} {sum(entry[1] == 'records' for entry in self.log)}"
            self.log.append((name, "records", event))
            return event

        stream.record_event = record_event
        return stream

    def Stream(self, device, priority=0):
        self.made += 1
        self.priorities.append(priority)
        return self._stream(f"lane {self.made - 1}")

    def current_stream(self, device):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def work(self, label):
        def run(x):
            self.log.append((self.current.name, "runs", label))
            return x + 1

        return run


@pytest.fixture
def accelerator(monkeypatch):
    fake = Accelerator()
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    return fake


def test_the_lane_waits_for_the_producer_and_the_consumer_for_the_lane(accelerator):
    lane = StreamLane("link", DEVICE)
    accelerator.log.clear()
    ticket = lane.submit(accelerator.work("send"), torch.ones(1), "v")
    assert accelerator.log == [
        ("lane 0", "waits for stream", "compute"),
        ("lane 0", "runs", "send"),
        ("lane 0", "records", "lane 0 0"),
    ]
    accelerator.log.clear()
    assert ticket.wait().item() == 2.0
    assert accelerator.log == [("compute", "waits for event", "lane 0 0")]


def test_the_next_lane_waits_for_the_stage_before_it_and_for_compute(accelerator):
    inner, outer = StreamLane("inner", DEVICE), StreamLane("outer", DEVICE)
    first = inner.submit(accelerator.work("stage 1"), torch.ones(1), "v")
    accelerator.log.clear()
    second = outer.submit(accelerator.work("stage 2"), first, "v")
    kinds = [entry[1:] if entry[1] != "records" else entry[1:2] for entry in accelerator.log]
    assert kinds == [
        ("waits for stream", "compute"),  # so that memory it is given is no longer being read
        ("waits for event", "lane 0 0"),  # the stage before, under the outer lane's stream
        ("runs", "stage 2"),
        ("records",),
    ]
    assert all(entry[0] != "compute" for entry in accelerator.log)  # compute itself waits for nothing yet
    assert second.wait().item() == 3.0


def test_what_lanes_read_lives_until_compute_has_waited(accelerator):
    inner, outer = StreamLane("inner", DEVICE), StreamLane("outer", DEVICE)
    send = torch.ones(4)
    alive = weakref.ref(send)
    first = inner.submit(lambda x: x + 1, send, "v")
    middle = weakref.ref(first.wait())
    second = outer.submit(lambda x: x.sum(), first, "v")  # the outer lane waits for the inner one: nothing may go yet
    del send, first
    gc.collect()
    assert alive() is not None and middle() is not None
    second.wait()
    del second
    gc.collect()
    assert alive() is None and middle() is None


def test_lanes_go_before_compute(accelerator):
    StreamLane("link", DEVICE)
    assert accelerator.priorities == [-1]


def in_flight(*tickets):
    """A layer whose exchanges these are, and nothing else."""
    layer = LayerInFlight.__new__(LayerInFlight)
    layer.pending = {("v", 0): [Pending(ticket, lambda x: x) for ticket in tickets]}
    return layer


def handed_on(*tickets):
    """A forward that has handed a layer with these exchanges on to block 1, with one tensor; and that tensor."""
    forward, x = RowForward([], {}, state=None), torch.ones(1)
    assert forward._handed is None
    forward._handed = handed(1, [x], in_flight(*tickets))
    return forward, x


def handed(index, arguments, layer):
    """What `RowForward` keeps of a layer that it has handed on."""
    return index, arguments, _versions(arguments), layer


def dropped_by_other_arguments(forward, x):
    assert forward._take(1, [x.clone()]) is None


def dropped_by_another_block(forward, x):
    assert forward._take(2, [x]) is None


def dropped_by_the_end(forward, x):
    forward.end()


DROPPED = pytest.mark.parametrize(
    "drop", [dropped_by_other_arguments, dropped_by_another_block, dropped_by_the_end], ids=lambda one: one.__name__
)


@DROPPED
def test_what_was_handed_on_is_waited_for_before_it_is_freed_on_stream_lanes(drop, accelerator):
    lane = StreamLane("link", DEVICE)
    memory = torch.ones(4)  # compute's own, which the lane reads: free, it is compute's again at once
    alive = weakref.ref(memory)
    weakref.finalize(memory, accelerator.log.append, "freed")
    forward, x = handed_on(*(lane.submit(accelerator.work("send"), memory, "v") for _ in range(2)))
    accelerator.log.clear()
    del memory
    drop(forward, x)
    forward._handed = None
    gc.collect()
    assert alive() is None
    waits = [("compute", "waits for event", f"lane 0 {number}") for number in range(2)]
    assert accelerator.log == [*waits, "freed"]


@DROPPED
def test_what_was_handed_on_is_waited_for_on_thread_lanes(drop):
    lane, arrives, dropped = ThreadLane("link"), threading.Event(), threading.Event()
    order = []

    def slow(x):
        assert arrives.wait(60)
        order.append("arrived")
        return x

    forward, x = handed_on(lane.submit(slow, torch.ones(4), "v"))

    def run():
        drop(forward, x)
        order.append("dropped")
        dropped.set()

    threading.Thread(target=run, daemon=True).start()
    dropped.wait(0.1)  # a drop that does not wait has time to end
    arrives.set()
    assert dropped.wait(60) and order == ["arrived", "dropped"]
    lane.close()


def test_what_is_taken_is_not_dropped(accelerator):
    forward, x = handed_on(StreamLane("link", DEVICE).submit(accelerator.work("send"), torch.ones(4), "v"))
    layer = forward._handed[-1]
    accelerator.log.clear()
    assert forward._take(1, [x]) is layer and accelerator.log == []


def session_of(*lanes):
    session = Session(SimpleNamespace(device=DEVICE), Config(), None, None)
    session._lanes.update(enumerate(lanes))
    return session


def test_compute_waits_for_the_lanes_when_an_exception_passes(accelerator):
    """Whatever the exception's frames still hold is freed after that: no tensor in flight is given to compute."""
    inner, outer = StreamLane("inner", DEVICE), StreamLane("outer", DEVICE)
    state = SimpleNamespace(call=SimpleNamespace(session=session_of(inner, outer)))
    with pytest.raises(OSError, match="on purpose"), BlockRow({}).running(state):
        inner.submit(accelerator.work("send"), torch.ones(4), "v")
        accelerator.log.clear()
        raise OSError("on purpose")
    assert accelerator.log == [("compute", "waits for stream", "lane 0"), ("compute", "waits for stream", "lane 1")]


def test_a_forward_that_ends_well_waits_for_nothing_more(accelerator):
    lane = StreamLane("link", DEVICE)
    accelerator.log.clear()
    with BlockRow({}).running(SimpleNamespace(call=SimpleNamespace(session=session_of(lane)))):
        pass
    assert accelerator.log == []


def test_a_thread_lane_holds_what_it_works_on():
    """Nobody may have to wait for it after an exception: the ranks on the other side may never send."""
    lane, go, done = ThreadLane("link"), threading.Event(), threading.Event()
    send, out = torch.ones(4), torch.zeros(4)
    alive = [weakref.ref(send), weakref.ref(out)]

    class Work:
        def __init__(self, out):
            self.out = out

        def __call__(self, x):
            assert go.wait(60)
            found.append(self.out.copy_(x).sum().item())
            done.set()
            return self.out

    found = []
    ticket = lane.submit(Work(out), send, "v")
    session = session_of(lane)
    session.catch_up()  # does not wait
    del ticket, send, out
    gc.collect()
    assert all(one() is not None for one in alive)
    go.set()
    assert done.wait(60) and found == [4.0]
    session.close()


@pytest.mark.parametrize(
    ("device", "version", "variable", "one"),
    [
        ("cuda", (2, 26, 2), "1", False),
        ("cuda", (2, 26, 2, "rc1"), "1", False),
        ("cuda", (3, 0, 0), "1", False),
        ("cuda", (2, 26, 2), "0", True),
        ("cuda", (2, 26, 2), None, True),
        ("cuda", (2, 25, 1), "1", True),
        ("xpu", None, None, False),
        ("cpu", None, None, False),
    ],
)
def test_nccl_without_an_order_of_its_own_gets_one_lane(device, version, variable, one, monkeypatch):
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: version)
    monkeypatch.delenv("NCCL_LAUNCH_ORDER_IMPLICIT", raising=False)
    if variable is not None:
        monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", variable)
    assert share_one_lane(torch.device(device)) == one
    cluster = Cluster("test", tuple(Level(name, 2, 1.0, 1.0) for name in ("tile", "gpu", "node")))
    session = Session(SimpleNamespace(device=torch.device(device)), Config(), cluster, None)

    def lane(name, device):
        return SimpleNamespace(name=name, submitted=0, close=lambda: None)

    monkeypatch.setattr("cocodiff.state.make_lane", lane)
    lanes = [session.lane(level) for level in (1, 0, 2)]
    assert [one.name for one in lanes] == (["links"] * 3 if one else ["gpu", "tile", "node"])
    assert len({id(one) for one in lanes}) == (1 if one else 3)
    assert session.lane("encode") not in lanes
    assert session.unsettled == ({"0": 0} if one else {"1": 0, "0": 0, "2": 0})
