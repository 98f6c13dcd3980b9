"""The cluster as data: its levels and links, presets, and detection from the hosts of the ranks."""

from cocodiff.topology.cluster import Cluster, Level
from cocodiff.topology.detect import load_cluster
from cocodiff.topology.measured import Measured
from cocodiff.topology.presets import PRESETS

__all__ = ["PRESETS", "Cluster", "Level", "Measured", "load_cluster"]
