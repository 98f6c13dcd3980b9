"""Exchanges on real ranks: element for element equal to slicing the whole, flat and staged, with poisoned buffers."""

import dataclasses

import pytest
import torch

from tests.distributed.ranks import run_ranks

# ranks -> level sizes to stage over
LEVELS = {1: [(1,)], 2: [(2,)], 3: [(3,)], 4: [(4,), (2, 2)], 6: [(2, 3), (3, 2)], 8: [(2, 2, 2)]}
CASES = [
    dict(heads=8, text=7, image=23, batch=1, head_dim=5),
    dict(heads=9, text=0, image=31, batch=2, head_dim=3),
    dict(heads=12, text=2, image=12, batch=3, head_dim=4),
]


def _session(sizes, transport=None, measured=None):
    """A session over all ranks, with the levels of `sizes`, and its mesh: one ulysses axis."""
    import torch.distributed as dist

    from cocodiff.config import Config
    from cocodiff.exchange.transport import make_transport
    from cocodiff.launch.job import start_job
    from cocodiff.parallel.mesh import Degrees
    from cocodiff.plan import RunPlan
    from cocodiff.state import Session
    from cocodiff.topology import Cluster, Level

    levels = tuple(Level(f"level {i}", size, 0.001, 1000.0) for i, size in enumerate(sizes))
    job, cluster = start_job("cpu"), Cluster("test", levels, measured=measured)
    plan = RunPlan(Degrees(1, 1, dist.get_world_size()))
    session = Session(job, Config(), cluster, lambda model: plan, transport or make_transport)
    return session, session.connect(plan)


def _check_exchanges(all_sizes):
    from cocodiff.exchange import to_heads, to_sequence
    from cocodiff.exchange.collectives import gather_rows
    from cocodiff.parallel.layout import Layout, split_sizes
    from cocodiff.parallel.tokens import Tokens

    # What a collective forgets to write must not look right: fresh memory is filled with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    wrong = []
    for sizes in all_sizes:
        _, connected = _session(sizes)
        rank, ranks = connected.ulysses.rank, connected.ulysses.size
        for number, case in enumerate(CASES):
            for dtype in (torch.float32, torch.bfloat16)[: 1 if number else 2]:
                torch.manual_seed(number)
                tokens = Tokens.split({"text": case["text"], "image": case["image"]}, ranks)
                layout = Layout(tokens.joint, split_sizes(case["heads"], ranks))
                whole = torch.randn(case["batch"], sum(tokens.joint), case["heads"], case["head_dim"]).to(dtype)
                shard = whole.split(list(layout.seq_lens), 1)[rank]
                for exchange in connected.exchanges.values():
                    pending = [to_heads(exchange, scale * shard, layout, rank, "x") for scale in (1, 2, 3)]
                    for scale, one in zip((1, 2, 3), pending, strict=True):
                        got = one.wait()
                        if not torch.equal(got, (scale * whole).split(list(layout.num_heads), 2)[rank]):
                            wrong.append((sizes, case, dtype, exchange.name, "to_heads"))
                        back = to_sequence(exchange, got, layout, rank, "x").wait()
                        if not torch.equal(back, (scale * shard).flatten(2)):
                            wrong.append((sizes, case, dtype, exchange.name, "to_sequence"))
                image = torch.randn(case["batch"], case["image"], 6).to(dtype)
                local = image[:, tokens.rows("image", rank)]
                if not torch.equal(gather_rows(local, tokens.streams["image"], connected.sequence), image):
                    wrong.append((sizes, case, dtype, "gather"))
    return wrong


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
def test_exchanges_deliver_exactly(ranks):
    for wrong in run_ranks(ranks, _check_exchanges, LEVELS[ranks]):
        assert wrong == []


def _local_copy_instead_of_exchange():
    """The negative control: a rank that copies its own block into every place must be noticed."""
    from cocodiff.exchange import to_heads
    from cocodiff.exchange.transport import LocalTransport, make_transport
    from cocodiff.parallel.layout import Layout

    found = []
    for transport in (make_transport, LocalTransport):
        _, connected = _session((2, 2), transport)
        rank, layout = connected.ulysses.rank, Layout((3, 3, 3, 3), (2, 2, 2, 2))
        torch.manual_seed(0)
        whole = torch.randn(1, 12, 8, 2)
        got = to_heads(connected.exchanges["flat"], whole.split(3, 1)[rank], layout, rank, "x").wait()
        found.append(torch.equal(got, whole.split(2, 2)[rank]))
    return found


def test_a_local_copy_is_not_an_exchange():
    assert run_ranks(4, _local_copy_instead_of_exchange) == [[True, False]] * 4


def _counted():
    """Bytes that each exchange counts, and those of theory, by level."""
    from cocodiff.exchange import to_heads
    from cocodiff.parallel.layout import Layout

    session, connected = _session((2, 2))
    rank, layout = connected.ulysses.rank, Layout((3, 3, 3, 3), (2, 2, 2, 2))
    counted = {}
    for name, exchange in connected.exchanges.items():
        session.bytes.clear()
        to_heads(exchange, torch.ones(1, 3, 8, 2), layout, rank, "x").wait()
        counted[name] = session.bytes.by_level(2)
    return counted


def test_bytes_are_counted_by_the_link_they_cross():
    block = 3 * 2 * 2 * 4  # tokens x heads x head_dim x bytes, of one rank for one other
    expected = {"flat": [block, 2 * block], "staged": [2 * block, 2 * block]}
    assert run_ranks(4, _counted) == [expected] * 4


def _as_on_accelerators():
    """Splits with empty parts, as they are and with an element in place of each (what XPU needs), and a pattern."""
    import torch.distributed as dist

    from cocodiff.errors import LaunchError
    from cocodiff.exchange.delivery import check_delivery
    from cocodiff.exchange.transport import CollectiveTransport, XcclTransport

    class Broken(XcclTransport):
        """One rank gets what another should."""

        def _uneven(self, recv, send, recv_splits, send_splits):
            super()._uneven(recv, send, recv_splits, send_splits)
            if self.rank == 1:
                recv.copy_(recv.roll(1))

    session, connected = _session((3,))
    rank, host = dist.get_rank(), session.job.host_group
    axis = dataclasses.replace(connected.mesh.ulysses, group=dist.new_group())
    xccl, nccl, broken = (
        kind(axis, session.lane(0), session.bytes) for kind in (XcclTransport, CollectiveTransport, Broken)
    )
    check_delivery({"ours": connected.ulysses, "xccl": xccl, "nccl": nccl}, host)
    with pytest.raises(LaunchError) as caught:
        check_delivery({"good": xccl, "bad": broken}, host)
    splits = [[0, 2, 0], [3, 0, 1], [0, 0, 4]]  # from, to
    send = torch.arange(sum(splits[rank])) + 10 * rank
    recv_splits = [row[rank] for row in splits]
    arrived = [
        transport.all_to_all(send, splits[rank], recv_splits, send.dtype, "x").wait().tolist()
        for transport in (connected.ulysses, xccl)
    ]
    return arrived, str(caught.value)


def test_transports_of_accelerators_deliver_and_wrong_data_is_an_error_on_every_rank():
    expected = [[10, 11, 12], [0, 1], [13, 20, 21, 22, 23]]
    found = run_ranks(3, _as_on_accelerators)
    assert [arrived for arrived, _ in found] == [[one, one] for one in expected]
    assert len({said for _, said in found}) == 1
    assert "uneven parts over bad (on 1 ranks, first 1)" in found[0][1] and "CCL_ALLTOALLV=naive" in found[0][1]
    assert "good" not in found[0][1] and "equal parts" not in found[0][1]
