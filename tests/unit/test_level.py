"""Levels of a cluster: links of single parts, and links on the way of outer messages."""

from __future__ import annotations

import pytest

from cocodiff.errors import ConfigError
from cocodiff.topology import Cluster, Level


def test_links_of_single_parts():
    level = Level("node", 4, 1.0, 1.0, part_gbs=[[2, 0.5]])
    cluster = Cluster("c", (Level("gpu", 2, 9.0, 1.0), level))
    assert Cluster.from_json(cluster.to_json()) == cluster and hash(cluster) == hash(
        Cluster.from_json(cluster.to_json())
    )
    assert cluster.resolve(8).levels[1].part_gbs == ((2, 0.5),)
    assert cluster.with_sizes((2, 2)).levels[1].part_gbs == ()
    with pytest.raises(ConfigError, match="has 2 parts on 4 ranks, numbered from 0, and part_gbs names 2"):
        Cluster("c", (Level("gpu", 2, 9.0, 1.0), Level("node", None, 1.0, 1.0, part_gbs=((2, 0.5),)))).resolve(4)
    for wrong, words in (
        ([[2]], "pairs"),
        ([[-1, 1.0]], "whole numbers"),
        ([[0, 1], [0, 2]], "each once"),
        ([[0, 0]], "positive"),
    ):
        with pytest.raises(ConfigError, match=words):
            Level("node", 4, 1.0, 1.0, part_gbs=wrong)
