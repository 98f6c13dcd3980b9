"""The cluster as data: levels, links, presets, and what the ranks' hosts show."""

from cocodiff.topology.cluster import Cluster, Level
from cocodiff.topology.detect import load_cluster
from cocodiff.topology.measured import Measured
from cocodiff.topology.presets import PRESETS

__all__ = ["PRESETS", "Cluster", "Level", "Measured", "load_cluster"]
