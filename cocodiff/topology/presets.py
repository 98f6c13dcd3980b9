"""Clusters known by name, from public documentation.

Latencies are ASSUMED everywhere: measure them before trusting a close call.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from cocodiff.topology.cluster import Cluster, Level

# 12 ranks (tiles) a node. Tile to tile in one GPU 185 GB/s one way, Xe-Link 15 GB/s one way, and 8 NICs of
# about 25 GB/s, which 12 ranks share. The node level is slow by word, not by the quarter rule: its paper
# figure is no less than Xe-Link's, but a measured flat all-to-all falls from 16.1 GB/s inside one node to
# 2.41 GB/s over two.
_AURORA = Cluster(
    name="aurora",
    levels=(
        Level("tile", 2, bandwidth_gbs=185.0, latency_us=5.0),
        Level("gpu", 6, bandwidth_gbs=15.0, latency_us=10.0, slow=False),  # inside a node all stays exact
        Level("node", None, bandwidth_gbs=200.0 / 12, latency_us=15.0, slow=True),
    ),
    # CoCoDiff (arXiv 2604.14561), one node, all-to-all of 48 MB a rank: 6.0 ms staged against 25.5 ms flat.
    flat_efficiency=6.0 / 25.5,
)

# 4 A100 joined pairwise by 4 NVLink3 of 25 GB/s one way: 12 links, 300 GB/s a GPU. 2 Slingshot NICs of 25
# GB/s for 4 ranks.
_POLARIS = Cluster(
    name="polaris",
    levels=(
        Level("gpu", 4, bandwidth_gbs=300.0, latency_us=5.0),
        Level("node", None, bandwidth_gbs=2 * 25.0 / 4, latency_us=15.0),
    ),
)

# 8 H100 behind NVSwitch, 18 NVLink4 of 25 GB/s one way: 450 GB/s a GPU. One NIC of 400 Gbit/s, 50 GB/s, for
# each.
_DGX_H100 = Cluster(
    name="dgx-h100",
    levels=(
        Level("gpu", 8, bandwidth_gbs=450.0, latency_us=5.0),
        Level("node", None, bandwidth_gbs=50.0, latency_us=10.0),
    ),
)

# Devices of one machine taken as equal, with an ASSUMED bandwidth: one level leaves nothing to stage, so it
# decides little.
_SINGLE_NODE = Cluster(
    name="single-node",
    levels=(Level("device", None, bandwidth_gbs=25.0, latency_us=10.0),),
)

PRESETS: Mapping[str, Cluster] = MappingProxyType(
    {cluster.name: cluster for cluster in (_AURORA, _POLARIS, _DGX_H100, _SINGLE_NODE)}
)
"""The clusters known by name, not resolved; read-only. Sources stand beside each."""
