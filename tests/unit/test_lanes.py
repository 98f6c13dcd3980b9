"""Stream lanes against a recorder that stands in for an accelerator: who waits for whom, and what stays alive."""

import gc
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from cocodiff.exchange.lanes import StreamLane

DEVICE = torch.device("cpu")


class Accelerator:
    """Streams that only write down what they were asked, in order."""

    def __init__(self):
        self.log, self.made = [], 0
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

    def Stream(self, device):
        self.made += 1
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
