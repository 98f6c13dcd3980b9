"""Measured times of exchanges as part of a cluster."""

import dataclasses

import pytest

from cocodiff.errors import ConfigError
from cocodiff.topology import Cluster, Level, Measured

POINTS = ((1000.0, 1.0), (4000.0, 4.0), (64000.0, 16.0))


@pytest.mark.parametrize(
    "size, seconds", [(0, 1.0), (10, 1.0), (1000, 1.0), (2000, 2.0), (16000, 8.0), (640000, 160.0)]
)
def test_between_points_a_power_law_and_beyond_in_proportion(size, seconds):
    assert Measured(4, POINTS, POINTS).seconds("staged", size) == pytest.approx(seconds)


def test_a_cluster_keeps_it_in_json_and_believes_it_on_that_many_ranks():
    cluster = Cluster(
        "c", (Level("gpu", 2, 1.0, 1.0), Level("node", 2, 1.0, 1.0)), measured=Measured(4, POINTS, POINTS)
    )
    again = Cluster.from_json(cluster.to_json())
    assert again == cluster and again.resolve(4).seconds("flat", 2000) == 2.0
    fewer = cluster.resolve(2)
    assert fewer.seconds("flat", 2000) == fewer.flat_seconds(2000)
    assert dataclasses.replace(cluster, measured=None).seconds("staged", 2000) == cluster.staged_seconds(2000)


@pytest.mark.parametrize(
    "given",
    [
        dict(ranks=1, flat=POINTS, staged=POINTS),
        dict(ranks=4, flat=(), staged=POINTS),
        dict(ranks=4, flat=POINTS, staged=((1, 0.0),)),
        dict(ranks=4, flat=POINTS, staged=((2, 1.0), (1, 1.0))),
        dict(ranks=4, flat=POINTS, staged="none"),
        dict(ranks=4, flat=POINTS, staged=((1, float("nan")),)),
    ],
)
def test_points_that_cannot_be(given):
    with pytest.raises(ConfigError, match="measured"):
        Measured(**given)
