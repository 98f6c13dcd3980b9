"""Decisions as data: how a pipeline runs (`RunPlan`), and how one layer's tensors travel (`LayerPlan`).

Both follow from what all ranks know alike: settings, sizes and the cluster's figures. The costs here are MODELLED.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

from cocodiff.config import Selective
from cocodiff.parallel.layout import outermost, split_sizes
from cocodiff.parallel.mesh import Degrees, Mesh
from cocodiff.parallel.placement import Placement, spread_sizes
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
class ModelFacts:
    """What a plan needs to know of a transformer: what its attention layers are like.

    Attributes:
        heads: the fewest that a layer has.
        width: heads x head_dim, elements of `itemsize` bytes.
        long: it usually attends to so many tokens that attention outweighs the rest of a layer.
    """

    heads: int
    width: int
    itemsize: int
    long: bool = False


@dataclass(frozen=True)
class RunPlan:
    """How a wrapped pipeline runs; the same on all ranks.

    Attributes:
        degrees: ranks along each axis of the mesh.
        exchange: "flat", "staged", or "auto", which `plan_layer` decides for each layer.
        schedule: "v_first" or "sequential".
        pieces: into how many a layer's rows are cut; None lets `plan_layer` decide.
        selective: what crosses slow links; None for an exact run.
        coded_from: the innermost level where transmission is selective; None where these ranks cross none.
        coded_always: the user named the level, or the cluster calls it slow: all is coded there, whatever the figures
            say. Else a layer is coded where that gains time.
        placement: which rank of the mesh is where in the cluster; None for the mesh's own order. `coded_from` is that
            of the sequence as it is placed.
        dp_degree: groups of ranks that draw pictures of their own, each with such a mesh; planned for, not carried out
            yet.
    """

    degrees: Degrees
    exchange: str = "auto"
    schedule: str = "v_first"
    pieces: int | None = None
    selective: Selective | None = None
    coded_from: int | None = None
    coded_always: bool = False
    placement: Placement | None = None
    dp_degree: int = 1

    def kv_only(self, mesh: Mesh) -> bool:
        """Whether keys and values are all that crosses the levels where transmission is selective."""
        return self.coded_from is not None and (mesh.ulysses.size == 1 or mesh.ulysses.level < self.coded_from)


@dataclass(frozen=True)
class LayerPlan:
    """How one attention layer's tensors travel: by which exchange, in how many pieces, coded on slow links or not."""

    exchange: str
    pieces: int
    coded: bool


@dataclass(frozen=True)
class LayerCosts:
    """MODELLED seconds of one layer on one rank.

    Attributes:
        exchange: "flat" or "staged".
        tensor: of the exchange of one tensor over the ulysses axis; `ring`: over the ring axis.
        latency: of the slower axis, and `exchanges`: of all that it carries.
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


@lru_cache(maxsize=1024)
def plan_layer(
    plan: RunPlan,
    cluster: Cluster,
    device_type: str,
    seq_lens: tuple[int, ...],
    width: int,
    itemsize: int,
    coded_share: float | None,
) -> LayerPlan:
    """Decide how one layer of a forward runs.

    Args:
        cluster: of all ranks, with concrete sizes.
        seq_lens: tokens of every rank of a sequence.
        width: heads x head_dim, elements of `itemsize` bytes.
        coded_share: of an exact exchange's bytes, what coding sends over slow links; None where nothing can be coded.
    """
    of_share = partial(
        layer_costs, cluster, plan.degrees, plan.exchange, device_type, width, itemsize, seq_lens,
        placement=plan.placement,
    )  # fmt: skip
    costs = of_share()
    coded = coded_share is not None and (plan.coded_always or costs.worth_coding)
    if coded:
        assert coded_share is not None
        costs = of_share(share=coded_share)
    fewest = min(seq_lens)
    pieces = _pieces(costs, fewest, device_type) if plan.pieces is None else max(1, min(plan.pieces, fewest))
    return LayerPlan(costs.exchange if plan.degrees.ulysses > 1 else "flat", pieces, coded)


def layer_costs(
    cluster: Cluster,
    degrees: Degrees,
    exchange: str,
    device_type: str,
    width: int,
    itemsize: int,
    seq_lens: tuple[int, ...] | None = None,
    share: float = 1.0,
    placement: Placement | None = None,
) -> LayerCosts:
    """Model one layer.

    Args:
        exchange: "flat", "staged" or "auto", the faster of the two.
        seq_lens: tokens of every rank of a sequence; NOMINAL_TOKENS in all, if they are not known yet.
        share: of the bytes of an exact exchange.
    """
    seq_lens = seq_lens or split_sizes(NOMINAL_TOKENS, degrees.ring * degrees.ulysses)
    rows = sum(seq_lens) / len(seq_lens)
    sizes = spread_sizes(cluster.sizes, degrees.counts, placement)
    ulysses = cluster.with_sizes(sizes["ulysses"])
    flops = rows * width * (24 * width + 4 * sum(seq_lens))  # projections and an MLP four times as wide; attention
    compute = flops / (ASSUMED_TFLOPS.get(device_type, 100.0) * 1e12)
    tensor_bytes = rows * width * itemsize * share
    seconds = {name: ulysses.seconds(name, tensor_bytes) for name in ("flat", "staged")}
    if exchange == "auto":
        exchange = "staged" if seconds["staged"] < seconds["flat"] else "flat"
    link = cluster.levels[outermost(sizes["ring"])]
    ring = (degrees.ring - 1) * (link.latency_us * 1e-6 + tensor_bytes / (link.bandwidth_gbs * 1e9))
    exchanges, latency = max((4 * seconds[exchange], ulysses.seconds(exchange, 0)), (2 * ring, link.latency_us * 1e-6))
    return LayerCosts(compute, exchange, seconds[exchange], ring, latency, exchanges)


def _pieces(costs: LayerCosts, fewest_rows: int, device_type: str) -> int:
    """Into how many a layer's rows are cut, so that the exchange of one hides under the compute of another."""
    if costs.exchanges < WORTH_CUTTING * costs.compute:
        return 1
    least_seconds = max(LATENCIES_PER_PIECE * costs.latency, LEAST_PIECE_SECONDS.get(device_type, 1e-4))
    wanted = int(max(costs.tensor, costs.ring) / least_seconds)
    most = 1 if fewest_rows < ROWS_PER_PIECE else max(2, fewest_rows // ROWS_PER_PIECE)
    return max(1, min(wanted, MAX_PIECES, most))
