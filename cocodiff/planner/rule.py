"""The rule that chooses a mesh until the planner exists: the fewest bytes through the outermost level."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from cocodiff.config import Config, Selective
from cocodiff.errors import ConfigError
from cocodiff.parallel.layout import axis_sizes, digits, outermost
from cocodiff.parallel.mesh import Degrees
from cocodiff.plan import ModelFacts, RunPlan, layer_costs
from cocodiff.planner.measured import are_measurements
from cocodiff.planner.plan_file import read_plan
from cocodiff.selective.schedule import coded_from, names_level
from cocodiff.topology import Cluster


def plan_run(config: Config, cluster: Cluster, device_type: str, model: ModelFacts) -> RunPlan | None:
    """Choose the mesh of an exact run, or, where selective transmission applies and gains time, the mesh for that.

    None where `plan="auto"`, or measurements, leave that to each call.

    Args:
        cluster: of all ranks, with concrete sizes.

    Raises:
        ConfigError: with the numbers, where no mesh has the degrees that were given, or `config.plan` cannot be used.
    """
    if config.plan is not None and (config.plan == "auto" or are_measurements(config.plan)):
        return None
    if config.plan is not None:
        planned = read_plan(config.plan, cluster)
        choose_degrees(cluster, model.heads, *planned.degrees.counts)  # raises where the heads are too few
        return replace(planned, schedule=config.schedule)
    fused = device_type != "xpu"  # where parts have no fused kernel (`cocodiff.kernels.partial`), no ring is preferred
    choose = partial(
        choose_degrees, cluster, model.heads, config.cfg_degree, config.ring_degree, config.ulysses_degree,
        long=model.long and fused,
    )  # fmt: skip
    degrees, selective = choose(), Selective.of(config.transmission)
    plan = partial(RunPlan, exchange=config.exchange, schedule=config.schedule, pieces=config.pieces)
    if selective is None:
        return plan(degrees)
    level = coded_from(selective, cluster, outermost(cluster.sizes))
    if level is not None and fused:
        costs = layer_costs(cluster, degrees, config.exchange, device_type, model.width, model.itemsize)
        if names_level(selective, cluster, level) or costs.worth_coding:
            degrees = choose(selective=True)
    sequence = degrees.ring * degrees.ulysses
    crossed = outermost(axis_sizes(cluster.sizes, 1, sequence)) if sequence > 1 else -1
    level = coded_from(selective, cluster, crossed)
    always = level is not None and names_level(selective, cluster, level)
    return plan(degrees, selective=selective, coded_from=level, coded_always=always)


def choose_degrees(
    cluster: Cluster,
    heads: int,
    cfg: int | None = None,
    ring: int | None = None,
    ulysses: int | None = None,
    *,
    long: bool = False,
    selective: bool = False,
) -> Degrees:
    """The degrees that were given, and for those left out (None) one rule.

    cfg is 1. Of all ring x ulysses that the heads allow, the one that sends the fewest bytes through the outermost
    level that the ranks of a sequence cross; of equals (two nodes) ring for long sequences, ulysses for others.

    Args:
        cluster: with concrete sizes.
        heads: the fewest that an attention of the model has; ulysses cannot be larger.
        long: the family attends to so many tokens that keys and values hide under attention to those that are here.
        selective: transmission is. Keys and values alone are then better, for the same bytes, by so much (MEASURED,
            docs/selective.md) that they may be half as many again: rings over two and three nodes.

    Raises:
        ConfigError: with the numbers, where no mesh has these degrees.

    >>> from cocodiff.topology import Level
    >>> aurora = Cluster("a", (Level("tile", 2, 100, 1), Level("gpu", 6, 20, 1), Level("node", 8, 2, 1)))
    >>> str(choose_degrees(aurora, heads=24))
    'cfg 1 x ring 4 x ulysses 24'
    """
    ranks = cluster.num_ranks
    given = {"cfg_degree": cfg, "ring_degree": ring, "ulysses_degree": ulysses}
    said = " x ".join(f"{name} {degree}" for name, degree in given.items() if degree is not None)
    cfg = cfg or 1
    if cfg > 2:
        raise ConfigError(f"cfg_degree={cfg}: guidance has two branches, so 1 or 2.")
    possible = []
    for inner in range(1, ranks // cfg + 1):
        outer = ranks // cfg // inner
        if cfg * outer * inner == ranks and ring in (None, outer) and ulysses in (None, inner):
            possible.append((outer, inner))
    if not possible:
        raise ConfigError(
            f"{said} on {ranks} ranks: the degrees must multiply to the number of ranks. "
            "Leave one out, or start as many ranks as they make."
        )
    legal = [(outer, inner) for outer, inner in possible if inner <= heads]
    if not legal:
        raise ConfigError(
            f"{heads} attention heads cannot be shared among {min(inner for _, inner in possible)} ranks of the "
            f"ulysses axis: every rank needs one. Use ulysses_degree={heads} or less, with a ring_degree beyond."
        )
    level = outermost(axis_sizes(cluster.sizes, 1, ranks // cfg))
    prefer_ring = (long or selective) and level > 0
    weight = 2 / 3 if selective else 1.0

    def cost(pair: tuple[int, int]) -> tuple[float, int]:
        outer, inner = pair
        return outward_bytes(cluster, level, outer, inner, weight), -outer if prefer_ring else outer

    best = min(legal, key=cost)
    if len(legal) == 1:
        reason = "as given" if said else "no other degrees fit these ranks and heads"
    else:
        reason = f"the fewest bytes through the level {cluster.levels[level].name!r}"
    return Degrees(cfg, *best, reason)


def outward_bytes(cluster: Cluster, level: int, ring: int, ulysses: int, ring_weight: float = 1.0) -> float:
    """What a layer sends through a level, the outermost it crosses, as a multiple of one rank's shard of one tensor.

    Four tensors cross the ulysses axis, each to `ulysses` ranks in equal parts; K and V of every other part are passed
    on, whole, to the next rank of the ring axis. The mean of all ranks.

    Args:
        ring_weight: of a byte along the ring axis.
    """
    sizes, ranks, total = cluster.sizes, ring * ulysses, 0.0
    for rank in range(ranks):
        node = digits(rank, sizes)[level]
        first = rank - rank % ulysses
        away_ulysses = sum(digits(first + other, sizes)[level] != node for other in range(ulysses))
        away_ring = (ring - 1) * (digits((rank + ulysses) % ranks, sizes)[level] != node)
        total += 4 * away_ulysses / ulysses + 2 * away_ring * ring_weight
    return round(total / ranks, 6)
