"""Clusters known by name, with figures from public documentation.

All latencies are ASSUMED: measure them before you trust a small difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from cocodiff.topology.cluster import Cluster, Level

# 12 ranks (tiles) a node. In one direction, 185 GB/s between the tiles of a GPU and 15 GB/s over Xe-Link; 12 ranks
# share 8 NICs of about 25 GB/s. `slow` is set on the node level because its bandwidth on paper is no less than
# Xe-Link's, while a MEASURED flat all-to-all falls from 16.1 GB/s inside one node to 2.41 GB/s over two.
_AURORA = Cluster(
    name="aurora",
    levels=(
        Level("tile", 2, bandwidth_gbs=185.0, latency_us=5.0),
        Level("gpu", 6, bandwidth_gbs=15.0, latency_us=10.0, slow=False),  # inside a node all stays exact
        # MEASURED, 4 MiB a rank on two nodes: half of it leaves a node, which the NICs could carry in 0.126 ms; at a
        # bus bandwidth of 2.41 GB/s it took 1.67 ms.
        Level("node", None, bandwidth_gbs=200.0 / 12, latency_us=15.0, slow=True, flat_efficiency=0.126 / 1.67),
    ),
    # MEASURED by CoCoDiff (arXiv 2604.14561), one node, all-to-all of 48 MB a rank: 6.0 ms staged, 25.5 ms flat.
    flat_efficiency=6.0 / 25.5,
)

# 4 A100, each pair joined by 4 NVLink3 of 25 GB/s in one direction: 12 links, 300 GB/s a GPU. 4 ranks share 2
# Slingshot NICs of 25 GB/s.
_POLARIS = Cluster(
    name="polaris",
    levels=(
        Level("gpu", 4, bandwidth_gbs=300.0, latency_us=5.0),
        Level("node", None, bandwidth_gbs=2 * 25.0 / 4, latency_us=15.0),
    ),
)

# 8 H100 behind NVSwitch with 18 NVLink4 of 25 GB/s in one direction: 450 GB/s a GPU. Each has a NIC of 400 Gbit/s,
# 50 GB/s.
_DGX_H100 = Cluster(
    name="dgx-h100",
    levels=(
        Level("gpu", 8, bandwidth_gbs=450.0, latency_us=5.0),
        Level("node", None, bandwidth_gbs=50.0, latency_us=10.0),
    ),
)

# Devices of one machine with equal links of an ASSUMED bandwidth, which decides little, since one level has one stage.
_SINGLE_NODE = Cluster(
    name="single-node",
    levels=(Level("device", None, bandwidth_gbs=25.0, latency_us=10.0),),
)

# A TPU v5e pod of 16 x 16 chips, a level for each dimension of its torus. A chip has 4 links of 400 Gbit/s, 50 GB/s, in
# one direction on paper (cloud.google.com/tpu/docs/v5e); 45 GB/s and 1 us a hop are what "How to Scale Your Model"
# (jax-ml.github.io/scaling-book) reckons with. It also says that dimensions of fewer than 16 chips do not wrap around:
# of slices such as 2x4, lines are left (`Level.of_size`).
_V5E = Cluster(
    name="v5e",
    levels=tuple(Level(name, 16, bandwidth_gbs=45.0, latency_us=1.0, wiring="ring") for name in ("x", "y")),
)

PRESETS: Mapping[str, Cluster] = MappingProxyType(
    {cluster.name: cluster for cluster in (_AURORA, _POLARIS, _DGX_H100, _SINGLE_NODE, _V5E)}
)
"""The clusters by name, read-only and not resolved. The comment above each gives the source of its figures."""
