"""Plans are pure: from settings, sizes and the cluster's figures alone."""

import dataclasses

import pytest

from cocodiff import Cluster, Config, Level, Selective
from cocodiff.errors import ConfigError
from cocodiff.parallel.mesh import Degrees
from cocodiff.plan import LayerPlan, ModelFacts, RunPlan, plan_layer
from cocodiff.planner import plan_run
from cocodiff.topology import Measured

CLUSTER = Cluster("test", (Level("level 0", 2, 0.001, 1000.0), Level("level 1", 2, 0.001, 1000.0)))
PLAN = RunPlan(Degrees(1, 1, 4))


def _layer(plan=PLAN, cluster=CLUSTER, tokens=4, width=16, share=None):
    return plan_layer(plan, cluster, "cpu", (tokens,) * 4, width, 4, share)


def test_large_messages_go_in_pieces_and_small_ones_do_not():
    assert _layer().pieces == 1
    assert _layer(tokens=4096, width=2048).pieces > 1


def test_pieces_that_are_given_are_taken_as_far_as_there_are_rows():
    pinned = dataclasses.replace(PLAN, pieces=3)
    assert [_layer(pinned, tokens=tokens).pieces for tokens in (1, 2, 4, 4096)] == [1, 2, 3, 3]


def test_auto_believes_what_was_measured_on_as_many_ranks():
    modelled = _layer().exchange
    for ranks, faster in ((4, "flat"), (4, "staged"), (8, "flat"), (8, "staged")):
        times = {"flat": ((1, 2.0),), "staged": ((1, 2.0),)} | {faster: ((1, 1.0),)}
        cluster = dataclasses.replace(CLUSTER, measured=Measured(ranks, **times))
        assert _layer(cluster=cluster).exchange == (faster if ranks == 4 else modelled)


def test_one_rank_on_the_ulysses_axis_has_nothing_to_stage():
    assert _layer(RunPlan(Degrees(1, 4, 1), exchange="staged")).exchange == "flat"


def test_a_layer_is_coded_where_that_gains_or_was_asked_for():
    slow = Cluster("slow", (Level("gpu", 2, 1.0, 1.0), Level("node", 2, 1e-6, 1.0)))
    fast = Cluster("fast", (Level("gpu", 2, 1e6, 1e-3), Level("node", 2, 1e6, 1e-3)))
    always = dataclasses.replace(PLAN, coded_from=1, coded_always=True)
    gains = dataclasses.replace(PLAN, coded_from=1)
    assert not _layer(always, slow, 512, 512).coded, "nothing is coded in a forward that is exact"
    assert [_layer(always, one, 512, 512, 1 / 8).coded for one in (slow, fast)] == [True, True]
    assert [_layer(gains, one, 512, 512, 1 / 8).coded for one in (slow, fast)] == [True, False]


def test_a_run_plan_says_where_coding_begins():
    nodes = Cluster("nodes", (Level("gpu", 2, 1.0, 1.0), Level("node", 2, 1e-6, 1.0, slow=True)))
    model = ModelFacts(heads=8, width=512, itemsize=4)
    exact = plan_run(Config(), nodes, "cpu", model)
    assert exact == RunPlan(Degrees(1, 1, 4)) and exact.coded_from is None
    coded = plan_run(Config(transmission="balanced", pieces=2), nodes, "cpu", model)
    assert (coded.coded_from, coded.coded_always, coded.pieces) == (1, True, 2)
    assert coded.degrees == Degrees(1, 2, 2), "keys and values alone at two nodes"
    inside = plan_run(Config(transmission=Selective(), cfg_degree=2), nodes, "cpu", model)
    assert inside.coded_from is None, "each half is in one node"


def test_plans_are_data():
    assert hash(PLAN) == hash(RunPlan(Degrees(1, 1, 4))) and "ulysses" in repr(PLAN)
    assert _layer() is _layer(), "decided once for each shape"
    with pytest.raises(dataclasses.FrozenInstanceError):
        LayerPlan("flat", 1, False).pieces = 2


@pytest.mark.parametrize("pieces", [0, -1, 1.5, True])
def test_pieces_that_cannot_be_are_refused(pieces):
    with pytest.raises(ConfigError, match="pieces"):
        Config(pieces=pieces)
