"""Placed meshes on real ranks: every spreading and order draws what one rank draws, and a wrong map is seen."""

import dataclasses
import json
import sys

from tests.distributed.draws import LIMIT
from tests.distributed.helpers import degrees
from tests.distributed.ranks import run_ranks
from tests.distributed.test_selective import budget
from tests.pipelines import flux_call, flux_pipeline, relative_error

SIZES = (2, 2)
DEFAULT, SWAPPED = ((1, 1), (1, 2), (2, 1)), ((1, 1), (2, 1), (1, 2))  # cfg, ring, ulysses by level
HALVES, SWAPPED_HALVES = ((1, 2), (1, 1), (2, 1)), ((2, 1), (1, 1), (1, 2))
ALL_ULYSSES = ((1, 1), (1, 1), (2, 2))
PLACED = [  # the axes by level, the order of the ranks, exchange
    (DEFAULT, None, "staged"),
    (SWAPPED, None, "staged"),
    (SWAPPED_HALVES, None, "flat"),
    (HALVES, (2, 3, 1, 0), "staged"),  # a half is 1, 0
    (DEFAULT, (0, 3, 1, 2), "staged"),  # the ring of ranks 2 and 3 is 3, 2
    (SWAPPED, (0, 3, 1, 2), "flat"),
    (ALL_ULYSSES, (0, 3, 1, 2), "staged"),
]
HEADS, HEAD_DIM = 7, 12  # not the same number of heads on every rank
STEPS = 12  # of a coded run


def _pipeline():
    return flux_pipeline(heads=HEADS, double=1, single=1)


def _call(coded=False):
    return flux_call("text2image") | (
        dict(num_inference_steps=STEPS, true_cfg_scale=1.0) if coded else dict(num_inference_steps=2)
    )


def _references(*coded):
    return [_pipeline()(**_call(one)).images for one in coded]


def _cluster():
    from cocodiff import Cluster, Level

    return Cluster("test", (Level("gpu", SIZES[0], 1e-2, 1e-6), Level("node", SIZES[1], 1e-4, 1e-6, slow=True)))


def _wrapped(axes, order, **options):
    """A wrapped pipeline whose plan has a placement, as a planner would return it."""
    import cocodiff
    from cocodiff.parallel.placement import Placement
    from cocodiff.planner import plan_run

    placement = Placement(*axes, order)
    module = sys.modules["cocodiff.wrap"]  # the name in the package is that of the function
    module.plan_run = lambda *given: dataclasses.replace(plan_run(*given), placement=placement)
    try:
        return cocodiff.wrap(_pipeline(), cluster=_cluster(), **degrees(placement.degrees), **options)
    finally:
        module.plan_run = plan_run


def _drawn(expected, expected_coded):
    """By what was placed: the error, and which tensors crossed each level; then coded transmission and the controls."""
    import cocodiff
    from cocodiff.exchange.transport import GroupTransport

    found = {}
    for axes, order, exchange in PLACED:
        pipe = _wrapped(axes, order, exchange=exchange)
        error = relative_error(pipe(**_call()).images, expected)
        moved = pipe.cocodiff.report()["bytes"]
        found[axes, order, exchange] = error, {level: sorted(set(moved[level]) & set("qkvo")) for level in moved}
        if axes == ALL_ULYSSES:
            collectives = _collectives(pipe.cocodiff.session, pipe.cocodiff.mesh.ulysses)
        cocodiff.unwrap(pipe)
    coded, made = _coded(expected_coded), GroupTransport.__init__

    def broken(transport, *given):
        made(transport, *given)
        transport.in_order = True

    GroupTransport.__init__ = broken
    error = relative_error(_wrapped(SWAPPED, None)(**_call()).images, expected)
    return found, collectives, coded, error


def _collectives(session, axis):
    """What the transports of accelerators do not deliver, over gloo; and whether parts as the group has them do."""
    import torch

    from cocodiff.exchange.delivery import wrong_ways
    from cocodiff.exchange.transport import CollectiveTransport, XcclTransport

    found = []
    for kind in (CollectiveTransport, XcclTransport):
        one = kind(axis, session.lane(0), session.bytes)
        found.append(wrong_ways(one))
        one.in_order = True
        send, wanted = torch.arange(4) + 4 * axis.rank, torch.arange(4) * 4 + axis.rank
        found.append(torch.equal(one.all_to_all(send, [1] * 4, [1] * 4, send.dtype, "x").wait(), wanted))
    return found


def _coded(expected):
    """By what was placed: the error, the share of the bytes, and the copies that are held by those computed."""
    import cocodiff
    from cocodiff import Selective
    from cocodiff.selective.memory import held_bytes

    found = []
    for axes, order in ((DEFAULT, (0, 3, 1, 2)), (SWAPPED, (0, 3, 1, 2))):
        pipe = _wrapped(
            axes, order, exchange="flat", transmission=Selective(budget=budget(1 / 16, STEPS), check=True), pieces=1
        )
        error = relative_error(pipe(**_call(coded=True)).images, expected)
        report, mesh, plan = pipe.cocodiff.report(), pipe.cocodiff.mesh, pipe.cocodiff.plan
        streams, layers = {"text": 7, "image": 9 * 7}, [(HEADS, HEAD_DIM)] * 2
        held = [
            held_bytes(mesh.cluster, mesh.degrees, plan.coded_from, rank, streams, layers, placement=mesh.placement)
            for rank in range(4)
        ]
        found.append((error, report["share"]["node"], report["held_bytes"], max(held)))
        cocodiff.unwrap(pipe)
    return found


def test_every_placement_draws_what_one_rank_draws_and_a_wrong_map_is_seen():
    expected = run_ranks(1, _references, False, True)[0]
    for found, collectives, coded, broken in run_ranks(4, _drawn, *expected, timeout_seconds=400):
        for (axes, order, exchange), (error, sent) in found.items():
            assert error < LIMIT, (axes, order, exchange, error)
            kv, all_four = ["k", "v"], ["k", "o", "q", "v"]
            assert (
                sent
                == {
                    DEFAULT: {"gpu": all_four, "node": kv},
                    SWAPPED: {"gpu": kv, "node": all_four},
                    HALVES: {"gpu": all_four, "node": []},
                    SWAPPED_HALVES: {"gpu": [], "node": all_four},
                    ALL_ULYSSES: {"gpu": all_four, "node": all_four},
                }[axes]
            ), (axes, sent)
        assert collectives == [[], False] * 2
        for error, share, held, computed in coded:
            assert error < 0.3 and share < 0.5 and held == computed
        assert broken > 100 * LIMIT


def _planned(folder, expected):
    """A plan of a file: the error and the mesh; then ranks with different files."""
    import os

    import pytest

    import cocodiff
    from cocodiff.errors import MismatchError

    pipe = cocodiff.wrap(_pipeline(), cluster=_cluster(), plan=folder / "plan.json")
    error, mesh = relative_error(pipe(**_call()).images, expected), pipe.cocodiff.mesh
    cocodiff.unwrap(pipe)
    os.chdir(folder / os.environ["RANK"])  # one name, and what is in the file differs
    with pytest.raises(MismatchError) as told:
        cocodiff.wrap(_pipeline(), cluster=_cluster(), plan="plan.json")
    return error, str(mesh.placement), str(told.value)


def test_a_plan_file_places_the_ranks_and_must_be_the_same_on_all(tmp_path):
    plan = {"cfg_degree": 1, "ring_degree": 2, "ulysses_degree": 2, "exchange": "flat", "pieces": 2}
    placement = {"cfg": [1, 1], "ring": [2, 1], "ulysses": [1, 2], "order": [0, 3, 1, 2]}
    for place in (".", "0", "1", "2", "3"):
        plan["placement"] = None if place == "1" else placement
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "plan.json").write_text(json.dumps({"schema": "cocodiff-plan/1", "plans": [plan]}))
    (expected,) = run_ranks(1, _references, False)[0]
    for error, placed, told in run_ranks(4, _planned, tmp_path, expected):
        assert error < LIMIT and placed.endswith("in the order 0 3 1 2")
        assert "RunPlan" in told, told
