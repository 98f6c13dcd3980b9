"""Selective transmission: both ends hold the same bits, bytes are those that were counted, and errors are found."""

import pytest

from tests.distributed.ranks import run_ranks
from tests.pipelines import flux_call, flux_pipeline, relative_error

STEPS = 12
NODES = {3: (1, 3), 4: (2, 2), 6: (2, 3)}  # ranks of a node, nodes


def budget(share, steps=STEPS):
    """The budget by which a run of so few steps sends this share: that of a short run grows."""
    from cocodiff.selective.schedule import SHORT_RUN

    return share * min(1.0, steps / SHORT_RUN)


def _cluster(inside, nodes, latency_us=1e-6, slow=True):
    from cocodiff import Cluster, Level

    node = Level("node", nodes, 1e-4, latency_us, slow=slow)
    return Cluster("test", (Level("gpu", inside, 1e-2, latency_us), node))


def _call(steps=STEPS, guided=False, **size):
    call = flux_call("text2image", **size) | {"num_inference_steps": steps}
    return call if guided else {name: x for name, x in call.items() if "negative" not in name and "cfg" not in name}


def _pipeline():
    return flux_pipeline(heads=7, double=1, single=1)  # not the same number of heads on every rank


CALLS = {"odd": dict(), "guided": dict(guided=True), "again, batch": dict(steps=10, text_len=13, batch=2)}


def _references():
    return {name: _pipeline()(**_call(**call)).images for name, call in CALLS.items()}


@pytest.fixture(scope="module")
def expected():
    return run_ranks(1, _references)[0]


FLAT, STAGED = dict(exchange="flat", ring_degree=1), dict(exchange="staged", ring_degree=1)
AROUND, HALVES = dict(exchange="staged", ring_degree=2), dict(exchange="flat", cfg_degree=2, ring_degree=1)
KINDS = {  # ranks -> settings, and the calls in a row
    3: [(FLAT, ("guided",)), (dict(ring_degree=3), ("odd", "again, batch"))],
    4: [(STAGED, ("odd", "again, batch")), (HALVES, ("guided",))],
    6: [(AROUND, ("odd",))],  # of three ranks on two nodes: both ways at once
}


def shared(report, level=None):
    """Of the bytes that attention sends through a level, without the gather at the end of a forward."""
    tensors = [one for label, one in report["bytes"][level or "node"].items() if label in "qkvo"]
    return sum(one["sent"] for one in tensors) / sum(one["exact"] for one in tensors)


def _held_bytes(pipe, name):
    """Of the rank that holds most, computed."""
    from cocodiff.selective.memory import held_bytes

    mesh, call = pipe.cocodiff.mesh, CALLS[name]
    streams = {"text": call.get("text_len", 7), "image": 9 * 7}
    branches = 1 + (call.get("guided", False) and mesh.degrees.cfg == 1)
    layers, slow = [(7, 12)] * 2, pipe.cocodiff.plan.coded_from
    return max(
        held_bytes(mesh.cluster, mesh.degrees, slow, rank, streams, layers, call.get("batch", 1), branches)
        for rank in range(mesh.everyone.size)
    )


def _held(ranks, expected):
    """`check` compares the copies of both ends on all ranks after each call."""
    import cocodiff
    from cocodiff import Selective
    from cocodiff.selective.schedule import share

    found = {}
    for index, (settings, calls) in enumerate(KINDS[ranks]):
        level = "gpu" if settings is HALVES else None  # each half is in one node
        selective = Selective(budget=budget(1 / 32 if index else 1 / 16), level=level, check=True)
        cluster = _cluster(*NODES[ranks], 10.0 if index else 1e-6)
        pieces = 1 if index else 2
        pipe = cocodiff.wrap(_pipeline(), cluster=cluster, transmission=selective, pieces=pieces, **settings)
        for name in calls:
            picture = pipe(**_call(**CALLS[name])).images
            report = pipe.cocodiff.report()
            slow = set(report["bytes"][level or "node"]) & set("qkvo")
            assert slow == set("kv" if settings.get("ring_degree", 1) > 1 and ranks != 6 else "qkvo"), slow
            steps = CALLS[name].get("steps", STEPS)
            spent = shared(report, level) / share(selective, steps)
            found[index, name] = spent, relative_error(picture, expected[name])
            assert len(report["residual_error"]["steps"]) == steps
            held = _held_bytes(pipe, name)
            tolerance = 0.1 if settings.get("exchange") == "staged" else 0  # stages swap rows among ranks of a node
            assert abs(report["held_bytes"] / held - 1) <= tolerance, (settings, report["held_bytes"], held)
        cocodiff.unwrap(pipe)
    return found


@pytest.mark.parametrize("ranks", sorted(NODES))
def test_both_ends_hold_the_same_bits(ranks, expected):
    everyone = run_ranks(ranks, _held, ranks, expected, timeout_seconds=400)
    assert all(found == everyone[0] for found in everyone)
    for key, (spent, error) in everyone[0].items():
        assert 0.9 < spent < 1.02 and error < 0.3, (key, spent, error)
