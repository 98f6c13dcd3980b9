"""What transports of accelerators ask of torch.distributed, by a recorder in its place, and how groups are freed."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from cocodiff.exchange import connected
from cocodiff.exchange.connected import ConnectedMesh
from cocodiff.exchange.lanes import ThreadLane
from cocodiff.exchange.ring import Ring
from cocodiff.exchange.transport import CollectiveTransport, LocalTransport, PointToPointTransport, XcclTransport
from cocodiff.observe.bytes import ByteCounter
from cocodiff.parallel import mesh
from cocodiff.parallel.layout import Layout, digits, staged_plan, to_heads_traffic, to_sequence_traffic
from cocodiff.parallel.mesh import Axis, Degrees, Mesh
from cocodiff.topology import Cluster, Level

KINDS = pytest.mark.parametrize("kind", [CollectiveTransport, XcclTransport])


@pytest.fixture
def lane():
    made = ThreadLane("link")
    yield made
    made.close()


@pytest.fixture
def asked(monkeypatch):
    """What was asked of torch.distributed, in order. Nothing is delivered."""
    log = []

    def all_to_all_single(recv, send, recv_splits=None, send_splits=None, group=None):
        log.append(("all_to_all", send_splits, recv_splits, send.numel(), recv.numel()))

    def batch_isend_irecv(several):
        log.append(("batch", *((op.op.__name__, op.group_peer, op.tensor.numel()) for op in several)))
        return [SimpleNamespace(wait=lambda: log.append("waits")) for _ in several]

    def gather(out, send, group=None):
        log.append(("gather", send.shape, out.shape))

    monkeypatch.setattr(dist, "all_to_all_single", all_to_all_single)
    monkeypatch.setattr(dist, "batch_isend_irecv", batch_isend_irecv)
    monkeypatch.setattr(dist, "all_gather_single", gather, raising=False)
    monkeypatch.setattr(dist, "P2POp", lambda op, tensor, group, group_peer: SimpleNamespace(**locals()))
    return log


def transport(kind, lane, rank=0, size=4, ranks=None, group=None):
    """Over an axis of so many ranks (or these, in this order); `rank` is the place of this one."""
    size = len(ranks or range(size))
    level = Cluster("test", (Level("link", size, 1.0, 1.0),))
    return kind(Axis(ranks or tuple(range(size)), rank, level, group or SimpleNamespace()), lane, ByteCounter())


def ask(one, send_splits, recv_splits, **more):
    send = torch.zeros(sum(send_splits))
    one.all_to_all(send, send_splits, recv_splits, send.dtype, "x", **more).wait()


@KINDS
def test_equal_parts_go_without_splits(kind, lane, asked):
    ask(transport(kind, lane), [3] * 4, [3] * 4)
    ask(transport(kind, lane), [3] * 4, [3, 3, 3, 2])
    ask(transport(kind, lane), [3] * 4, [2] * 4)
    assert asked == [
        ("all_to_all", None, None, 12, 12),
        ("all_to_all", [3] * 4, [3, 3, 3, 2], 12, 11),
        ("all_to_all", [3] * 4, [2] * 4, 12, 8),
    ]


def test_without_splits_never_where_ranks_could_decide_otherwise(lane, asked):
    """Coded messages have any sizes, and so do the elements that stand in for empty parts."""
    one = transport(XcclTransport, lane)
    ask(one, [3] * 4, [3] * 4, exact_bytes=[12] * 4)
    ask(one, [0] * 4, [0] * 4)
    ask(one, [1, 0, 1, 1], [1] * 4)
    assert [entry[1:3] for entry in asked] == [([3] * 4, [3] * 4), ([1] * 4, [1] * 4), ([1] * 4, [1] * 4)]


@pytest.mark.parametrize("lengths", [(4, 4, 4, 4), (5, 4, 4, 4), (4, 4, 4, 0), (0, 0, 4, 4), (0, 0, 0, 0)])
@pytest.mark.parametrize("heads", [(2, 2, 2, 2), (3, 2, 2, 2), (1, 1, 1, 0)])
def test_all_ranks_decide_alike(lengths, heads, lane, asked):
    """In flat exchanges, and in each group of each stage of a staged one."""
    layout = Layout(lengths, heads)
    for traffic in (to_heads_traffic(layout, 1, 2), to_sequence_traffic(layout, 1, 2)):
        for rank in range(4):
            blocks = [[traffic.block(src, dst) for dst in range(4)] for src in range(4)]
            ask(transport(XcclTransport, lane, rank), blocks[rank], [row[rank] for row in blocks])
        flat = [entry[1] is None for entry in asked]
        assert len(set(flat)) == 1
        asked.clear()
        plans = [staged_plan(traffic, (2, 2), rank) for rank in range(4)]
        for stage in range(2):
            for rank, plan in enumerate(plans):
                one = transport(XcclTransport, lane, digits(rank, (2, 2))[plan[stage].level], 2)
                ask(one, plan[stage].send_splits, plan[stage].recv_splits)
            without = [entry[1] is None for entry in asked]
            groups = [(0, 1), (2, 3)] if plans[0][stage].level == 0 else [(0, 2), (1, 3)]
            assert all(without[first] == without[second] for first, second in groups)
            asked.clear()


@KINDS
def test_a_ring_sends_and_receives_in_one_batch(kind, lane, asked):
    """Of parts of 2, 0, 1 rows rank 1 has the second: first it passes that on, then what came from rank 0."""
    ring = Ring(transport(kind, lane, rank=1, size=3))
    own = lane.submit(lambda x: x, torch.zeros(0), "v")
    tickets = ring.start(own, [2, 0, 1], 4, torch.float32, "v")
    assert [ticket.wait().numel() for ticket in tickets] == [8, 4]
    assert asked == [
        ("batch", ("isend", 2, 1), ("irecv", 0, 8)),  # nothing goes as one element
        *["waits"] * 2,
        ("batch", ("isend", 2, 8), ("irecv", 0, 4)),
        *["waits"] * 2,
    ]


def test_a_pass_counts_what_it_sends(lane, asked):
    one = transport(CollectiveTransport, lane, rank=1, size=3)
    one.pass_on(torch.zeros(5), 5, 5, torch.float32, "k", exact_bytes=100).wait()
    assert one._counter.by_level(1) == [20]


@KINDS
def test_a_gather_is_one_buffer(kind, lane, asked):
    one = transport(kind, lane)
    assert one.all_gather(torch.zeros(3, 2).T, "gather").wait().shape == (4, 2, 3)
    assert one.all_gather(torch.tensor(1.0), "gather").wait().shape == (4,)
    assert asked == [("gather", (6,), (24,)), ("gather", (1,), (4,))]


ORDERED = (5, 2, 7, 3)  # ranks along an axis, whose group has them as 2, 3, 5, 7


class Delivering:
    """In place of a gloo group, or of torch.distributed's all-to-all: part i goes to, and comes from, rank i of it."""

    def __init__(self, monkeypatch):
        self.sent, self.received = {}, {}
        monkeypatch.setattr(dist, "all_to_all_single", self.all_to_all_single)

    def all_to_all_single(self, recv, send, recv_splits=None, send_splits=None, group=None):
        even = [len(send) // 4] * 4
        self.sent = {at: part.tolist() for at, part in enumerate(send.split(send_splits or even))}
        for at, part in enumerate(recv.split(recv_splits or even)):
            part.fill_(100 + at)

    def send(self, tensors, to, tag):
        self.sent[to] = tensors[0].tolist()
        return SimpleNamespace(wait=lambda: None)

    def recv(self, tensors, of, tag):
        tensors[0].fill_(100 + of)
        return SimpleNamespace(wait=lambda: None)


@pytest.mark.parametrize("kind", [CollectiveTransport, XcclTransport, PointToPointTransport])
@pytest.mark.parametrize("splits", [[2, 2, 2, 2], [1, 3, 0, 2]])
@pytest.mark.parametrize("given", [True, False])
def test_parts_go_to_the_ranks_at_the_places_of_an_axis(kind, splits, given, lane, monkeypatch):
    group = Delivering(monkeypatch)
    one = transport(kind, lane, rank=1, ranks=ORDERED, group=group)  # this is rank 2, the group's first
    out = torch.zeros(sum(splits)) if given else None
    send = torch.cat([torch.full((count,), float(place)) for place, count in enumerate(splits)])
    arrived = one.all_to_all(send, splits, splits, send.dtype, "x", out=out).wait()
    places = {0: 1, 1: 3, 2: 0, 3: 2}  # rank of the group -> place on the axis
    own = kind is PointToPointTransport  # stays here
    expected = {member: [place] * splits[place] for member, place in places.items() if not (own and member == 0)}
    for member, place in places.items():
        if splits[place] == 0:  # a message that is not sent, or an element in its place
            expected.pop(member), group.sent.pop(member, None)
    assert group.sent == expected
    members = [2, 0, 3, 1]
    assert arrived.tolist() == [
        1.0 if own and place == 1 else 100 + members[place] for place, count in enumerate(splits) for _ in range(count)
    ]
    assert arrived is out or not given


@KINDS
def test_a_pass_goes_to_the_rank_at_the_next_place(kind, lane, asked):
    transport(kind, lane, rank=1, ranks=ORDERED).pass_on(torch.zeros(5), 5, 4, torch.float32, "k").wait()
    assert asked[0] == ("batch", ("isend", 3, 5), ("irecv", 2, 4))


@KINDS
def test_a_gather_comes_in_the_order_of_the_axis(kind, lane, monkeypatch):
    def gather(out, send, group=None):
        out.copy_(torch.arange(4.0).repeat_interleave(2))

    monkeypatch.setattr(dist, "all_gather_single", gather, raising=False)
    one = transport(kind, lane, rank=1, ranks=ORDERED)
    assert one.all_gather(torch.zeros(2, 1), "gather").wait().tolist() == [[[at]] * 2 for at in (2.0, 0.0, 3.0, 1.0)]


def test_a_gather_is_counted_to_the_next_rank_of_the_group():
    """Ranks lie along the axis as 0, 3 | 1, 2, in two pairs: from 0 to 1 is outside a pair, from 1 to 2 is not."""
    pairs = Cluster("test", (Level("pair", 2, 1.0, 1.0), Level("node", 2, 1.0, 1.0)))
    for place, counted in ((0, [0, 12]), (2, [12, 0]), (3, [0, 12]), (1, [12, 0])):
        counter, lane = ByteCounter(), ThreadLane("link")
        LocalTransport(Axis((0, 3, 1, 2), place, pairs, None), lane, counter).all_gather(torch.zeros(1), "gather")
        assert counter.by_level(2) == counted
        lane.close()


def mesh_of_four(backend="nccl"):
    """Rank 0 of ring 2 x ulysses 2."""
    cluster = Cluster("test", (Level("node", 2, 1.0, 1.0), Level("rack", 2, 1.0, 1.0)))

    def axis(ranks, group, sizes):
        if group is not None:
            group = SimpleNamespace(name=group, rank=lambda: 0, size=lambda: len(ranks))
        return Axis(ranks, 0, cluster.with_sizes(sizes), group)

    everyone, level = axis((0, 1, 2, 3), "all", (2, 2)), axis((0, 1), "level", (2, 1))
    return Mesh(
        Degrees(1, 2, 2), cluster, cfg=axis((0,), None, (1, 1)), ring=axis((0, 2), "ring", (1, 2)),
        ulysses=axis((0, 1), "ulysses", (2, 1)), sequence=everyone, everyone=everyone,
        level_groups={0: level}, host_group="host", backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("device", "local", "checked"),
    [("xpu", False, ["everyone", "ulysses", "ring", "level node"]), ("cuda", False, []), ("xpu", True, [])],
)
def test_xpu_s_groups_are_checked_each_once_when_a_mesh_is_connected(device, local, checked, monkeypatch):
    found = []
    monkeypatch.setattr(connected, "check_delivery", lambda named, host_group: found.extend([*named, host_group]))
    lane = SimpleNamespace(device=torch.device(device))

    def make(axis, lane, counter):
        kind = XcclTransport if axis.group is not None and not local else LocalTransport
        return kind(axis, lane, counter)

    ConnectedMesh.connect(mesh_of_four(), lambda level: lane, ByteCounter(), make)
    assert found == [*checked, *["host"] * bool(checked)]


@pytest.mark.parametrize(
    ("backend", "together", "freed"),
    [
        ("gloo", False, ["all", "ulysses", "ring", "level"]),
        ("nccl", False, []),
        ("nccl", True, ["all", "ulysses", "ring", "level"]),
        ("xccl", True, []),
    ],
)
def test_groups_are_freed_once_and_nccl_s_by_all_ranks_together(backend, together, freed, monkeypatch):
    log = []
    monkeypatch.setattr(dist, "destroy_process_group", log.append)
    monkeypatch.setattr(mesh, "is_alive", lambda group: False)
    mesh_of_four(backend).close(together)
    assert log == []  # the script has ended all groups itself
    monkeypatch.setattr(mesh, "is_alive", lambda group: True)
    mesh_of_four(backend).close(together)
    assert [group.name for group in log] == freed
