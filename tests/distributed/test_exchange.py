"""Exchanges on real ranks: element for element equal to slicing the whole, flat and staged, with poisoned buffers."""

import dataclasses
import itertools

import pytest
import torch

from tests.distributed.ranks import run_ranks

# ranks -> level sizes to stage over
LEVELS = {1: [(1,)], 2: [(2,)], 3: [(3,)], 4: [(4,), (2, 2)], 6: [(2, 3), (3, 2)], 8: [(2, 2, 2), (4, 2)]}
CASES = [
    dict(heads=8, text=7, image=23, batch=1, head_dim=5),
    dict(heads=9, text=0, image=31, batch=2, head_dim=3),
    dict(heads=12, text=2, image=12, batch=3, head_dim=4),
]


def _engine(sizes, exchange="auto", schedule="v_first"):
    import torch.distributed as dist

    from cocodiff.config import Config
    from cocodiff.parallel.mesh import Degrees, Mesh
    from cocodiff.state import Engine
    from cocodiff.topology import Cluster, Level

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    levels = tuple(Level(f"level {i}", size, 0.001, 1000.0) for i, size in enumerate(sizes))
    host = dist.new_group(backend="gloo")
    mesh = Mesh.create(Cluster("test", levels), Degrees(1, 1, host.size()), "gloo", host)
    return Engine(Config(exchange=exchange, schedule=schedule), mesh, torch.device("cpu"))


def _check_exchanges(all_sizes):
    from cocodiff.exchange import Layout, split_sizes, to_heads, to_sequence
    from cocodiff.parallel.tokens import Tokens

    # What a collective forgets to write must not look right: fresh memory is filled with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    wrong = []
    for sizes in all_sizes:
        engine = _engine(sizes)
        rank, ranks = engine.rank, engine.mesh.ulysses.size
        for number, case in enumerate(CASES):
            for dtype in (torch.float32, torch.bfloat16):
                torch.manual_seed(number)
                tokens = Tokens.split({"text": case["text"], "image": case["image"]}, ranks)
                layout = Layout(tokens.joint, split_sizes(case["heads"], ranks))
                whole = torch.randn(case["batch"], sum(tokens.joint), case["heads"], case["head_dim"]).to(dtype)
                shard = whole.split(list(layout.seq_lens), 1)[rank]
                for exchange in (engine.flat, engine.staged) if ranks > 1 else ():
                    pending = [to_heads(exchange, scale * shard, layout, rank, "x") for scale in (1, 2, 3)]
                    for scale, one in zip((1, 2, 3), pending, strict=True):
                        got = one.wait()
                        if not torch.equal(got, (scale * whole).split(list(layout.num_heads), 2)[rank]):
                            wrong.append((sizes, case, dtype, exchange.name, "to_heads"))
                        back = to_sequence(exchange, got, layout, rank, "x").wait()
                        if not torch.equal(back, (scale * shard).flatten(2)):
                            wrong.append((sizes, case, dtype, exchange.name, "to_sequence"))
                    with engine.sharded(tokens):
                        image = torch.randn(case["batch"], case["image"], 6).to(dtype)
                        local = image[:, tokens.rows("image", rank)]
                        if not torch.equal(engine.gather(local, "image"), image):
                            wrong.append((sizes, case, dtype, "gather"))
    return wrong


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
def test_exchanges_deliver_exactly(ranks):
    for wrong in run_ranks(ranks, _check_exchanges, LEVELS[ranks]):
        assert wrong == []


def _local_copy_instead_of_exchange():
    """The negative control: a rank that copies its own block into every place must be noticed."""
    from cocodiff.exchange import Layout, to_heads

    engine = _engine((2, 2))
    layout = Layout((3, 3, 3, 3), (2, 2, 2, 2))
    engine.flat.start = lambda send, traffic, label, out=None: engine.lane(engine.mesh.ulysses).submit(
        lambda x: x.clone(), send, label
    )
    torch.manual_seed(0)
    whole = torch.randn(1, 12, 8, 2)
    got = to_heads(engine.flat, whole.split(3, 1)[engine.rank], layout, engine.rank, "x").wait()
    return torch.equal(got, whole.split(2, 2)[engine.rank])


def test_a_local_copy_is_not_an_exchange():
    assert run_ranks(4, _local_copy_instead_of_exchange) == [False] * 4


def _plans():
    """Every rank's choice of exchange and pieces, for several sizes."""
    engine = _engine((2, 2))
    from cocodiff.exchange import Layout

    return [
        engine.plan([Layout((n,) * 4, (2,) * 4)], width, 4) for n, width in itertools.product((4, 4096), (16, 2048))
    ]


def _plan_names():
    return [(exchange.name, pieces) for exchange, pieces, _ in _plans()]


def _measured_choices():
    """What auto takes by measured times, and that those of another number of ranks do not count."""
    from cocodiff.exchange import Layout
    from cocodiff.topology import Measured

    engine, names = _engine((2, 2)), []
    for ranks, faster in ((4, "flat"), (4, "staged"), (8, "flat")):
        times = {"flat": ((1, 2.0),), "staged": ((1, 2.0),)} | {faster: ((1, 1.0),)}
        cluster = dataclasses.replace(engine.mesh.cluster, measured=Measured(ranks, **times))
        axis = dataclasses.replace(engine.mesh.ulysses, cluster=cluster)
        engine.mesh = dataclasses.replace(engine.mesh, cluster=cluster, ulysses=axis)
        names.append(engine.plan([Layout((4,) * 4, (2,) * 4)], 16, 4)[0].name)
    return names


def test_auto_believes_what_was_measured():
    modelled = run_ranks(4, _plan_names)[0][0][0]
    assert run_ranks(4, _measured_choices) == [["flat", "staged", modelled]] * 4


def test_all_ranks_choose_alike_and_large_messages_go_in_pieces():
    choices = run_ranks(4, _plan_names)
    assert all(choice == choices[0] for choice in choices)
    assert choices[0][0][1] == 1 and choices[0][-1][1] > 1


def _with_and_without_gaps():
    """Splits with empty parts, as they are and with an element in place of each (what XPU needs)."""
    import torch
    import torch.distributed as dist

    from cocodiff.exchange.flat import AllToAll

    _engine((3,))
    rank, group = dist.get_rank(), dist.new_group()
    splits = [[0, 2, 0], [3, 0, 1], [0, 0, 4]]  # from, to
    send = torch.arange(sum(splits[rank])) + 10 * rank
    recv_splits = [row[rank] for row in splits]
    work = [AllToAll(splits[rank], recv_splits, group, tag) for tag in (1, 2)]
    return work[0](send).tolist(), work[1]._without_gaps(send, send.new_empty(sum(recv_splits))).tolist()


def test_empty_parts_can_be_filled():
    expected = [[10, 11, 12], [0, 1], [13, 20, 21, 22, 23]]
    assert run_ranks(3, _with_and_without_gaps) == [(one, one) for one in expected]
