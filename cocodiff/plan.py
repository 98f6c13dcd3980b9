"""What a layer's exchanges take against its compute, MODELLED, and what follows: which exchange, coded or not, how cut.

From layouts and the cluster's figures alone, so identical on all ranks and in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cocodiff.exchange import split_sizes
from cocodiff.parallel.layout import axis_sizes
from cocodiff.parallel.mesh import Degrees, outermost
from cocodiff.topology import Cluster

MAX_PIECES = 4
ROWS_PER_PIECE = 128  # up to two pieces may be smaller, of half as many; MEASURED: 36 rows cost more than they hide
LATENCIES_PER_PIECE = 20  # the exchange of a piece takes at least this many times its latency, and so many seconds;
# MEASURED on a CPU whose ranks share cores: pieces of 4 ms took 1.2 times as long as none, those of 9 ms gained.
LEAST_PIECE_SECONDS = {"cpu": 5e-3}
# Cutting makes matrix products smaller: MEASURED 6 to 9 % of the compute on a CPU, more than it hides unless a layer's
# exchanges take at least this share of its compute, which is MODELLED from what a rank is assumed to do in a second.
WORTH_CUTTING = 0.5
ASSUMED_TFLOPS = {"cpu": 0.03, "cuda": 300.0, "xpu": 100.0}
NOMINAL_TOKENS = 4096 + 512  # when meshes are chosen, sizes are not known yet: FLUX at 1024 x 1024 px


@dataclass(frozen=True)
class Costs:
    """Of one layer, seconds on one rank.

    Attributes:
        exchange: "flat" or "staged".
        tensor: one tensor's, over the ulysses axis; `ring`: over the ring axis.
        latency: of the slower axis, and `exchanges`: all that it carries.
    """

    compute: float
    exchange: str
    tensor: float
    ring: float
    latency: float
    exchanges: float

    @property
    def worth_coding(self) -> bool:
        """Whether exact exchanges take so long that they cannot hide under the compute.

        MEASURED on CPUs whose ranks share cores, where exchanges take so much of the compute by this model: 0.24,
        coding made a step 1.2 times as long (not kept); 0.89, 0.95 times; 4, a third (benchmarks/results/selective).
        """
        return self.exchanges > self.compute


def layer_costs(
    cluster: Cluster,
    degrees: Degrees,
    exchange: str,
    device_type: str,
    width: int,
    itemsize: int,
    seq_lens: Sequence[int] | None = None,
    share: float = 1.0,
) -> Costs:
    """Of one layer.

    Args:
        cluster: of all ranks, with concrete sizes.
        exchange: "flat", "staged" or "auto", the faster of the two.
        seq_lens: tokens of every rank of a sequence; NOMINAL_TOKENS in all, if they are not known yet.
        width: heads x head_dim, elements of `itemsize` bytes.
        share: of the bytes of an exact exchange.
    """
    seq_lens = seq_lens or split_sizes(NOMINAL_TOKENS, degrees.ring * degrees.ulysses)
    rows = sum(seq_lens) / len(seq_lens)
    ulysses = cluster.with_sizes(axis_sizes(cluster.sizes, 1, degrees.ulysses))
    flops = rows * width * (24 * width + 4 * sum(seq_lens))  # projections and an MLP four times as wide; attention
    compute = flops / (ASSUMED_TFLOPS.get(device_type, 100.0) * 1e12)
    tensor_bytes = rows * width * itemsize * share
    seconds = {name: ulysses.seconds(name, tensor_bytes) for name in ("flat", "staged")}
    if exchange == "auto":
        exchange = "staged" if seconds["staged"] < seconds["flat"] else "flat"
    link = cluster.levels[outermost(axis_sizes(cluster.sizes, degrees.ulysses, degrees.ring))]
    ring = (degrees.ring - 1) * (link.latency_us * 1e-6 + tensor_bytes / (link.bandwidth_gbs * 1e9))
    exchanges, latency = max((4 * seconds[exchange], ulysses.seconds(exchange, 0)), (2 * ring, link.latency_us * 1e-6))
    return Costs(compute, exchange, seconds[exchange], ring, latency, exchanges)


def pieces(costs: Costs, fewest_rows: int, device_type: str) -> int:
    """Into how many a layer's rows are cut, so that the exchange of one hides under the compute of another.

    Args:
        fewest_rows: of any rank.
    """
    if costs.exchanges < WORTH_CUTTING * costs.compute:
        return 1
    least_seconds = max(LATENCIES_PER_PIECE * costs.latency, LEAST_PIECE_SECONDS.get(device_type, 1e-4))
    wanted = int(max(costs.tensor, costs.ring) / least_seconds)
    most = 1 if fewest_rows < ROWS_PER_PIECE else max(2, fewest_rows // ROWS_PER_PIECE)
    return max(1, min(wanted, MAX_PIECES, most))
