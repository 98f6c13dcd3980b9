"""A plan as a file: what `cocodiff plan --out` writes and `Config(plan=...)` reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cocodiff.errors import ConfigError
from cocodiff.parallel.mesh import Degrees
from cocodiff.parallel.placement import Placement
from cocodiff.plan import RunPlan
from cocodiff.topology import Cluster

SCHEMA = "cocodiff-plan/1"
_DEGREES = ("cfg_degree", "ring_degree", "ulysses_degree")


def plan_as_json(plan: RunPlan) -> dict[str, Any]:
    """The part of a plan that a file keeps."""
    placement = plan.placement
    return {
        **dict(zip(_DEGREES, plan.degrees.counts, strict=True)),
        "dp_degree": plan.dp_degree,
        "exchange": plan.exchange,
        "pieces": plan.pieces,
        "placement": None
        if placement is None
        else {"cfg": placement.cfg, "ring": placement.ring, "ulysses": placement.ulysses, "order": placement.order},
    }


def read_json(path: str | os.PathLike[str]) -> Any:
    """The JSON of a file that `plan=` names. ConfigError if it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"plan={os.fspath(path)!r} cannot be read: {error}") from error


def read_plan(path: str | os.PathLike[str], cluster: Cluster) -> RunPlan:
    """Read the first plan of a file.

    Args:
        cluster: of all ranks, with concrete sizes.

    Raises:
        ConfigError: the file cannot be read, is no plan, or is one for other ranks or another cluster.
    """
    where, found = f"plan={os.fspath(path)!r}", read_json(path)
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not found.get("plans"):
        raise ConfigError(f"{where} is no plan (schema {SCHEMA}): write one with cocodiff plan --out FILE.")
    try:
        plan = plan_of_json(found["plans"][0])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where} is damaged ({type(error).__name__}: {error}): write it anew.") from error
    if plan.dp_degree != 1:
        raise ConfigError(
            f"{where} is for {plan.dp_degree} groups of ranks that draw pictures of their own, which one run does not "
            f"do yet: start {plan.dp_degree} runs, each with a plan for its ranks."
        )
    ranks = plan.degrees.cfg * plan.degrees.ring * plan.degrees.ulysses
    if ranks != cluster.num_ranks:
        raise ConfigError(f"{where} is for {ranks} ranks, and these are {cluster.num_ranks}: plan for them.")
    if plan.placement is not None:
        plan.placement.check(cluster.sizes, plan.degrees.counts)
    return plan


def plan_of_json(found: dict[str, Any]) -> RunPlan:
    """What `plan_as_json` made. KeyError, TypeError or ValueError for anything else."""
    cfg, ring, ulysses = (found[name] for name in _DEGREES)
    if any(not isinstance(count, int) or isinstance(count, bool) or count < 1 for count in (cfg, ring, ulysses)):
        raise ValueError(f"degrees {cfg}, {ring}, {ulysses}")
    pieces, exchange, given, groups = found["pieces"], found["exchange"], found["placement"], found.get("dp_degree", 1)
    if not isinstance(pieces, int) or pieces < 1 or exchange not in ("flat", "staged") or not isinstance(groups, int):
        raise ValueError(f"exchange {exchange!r}, pieces {pieces!r}, dp_degree {groups!r}")
    placement = None
    if given is not None:
        order = None if given["order"] is None else tuple(given["order"])
        placement = Placement(tuple(given["cfg"]), tuple(given["ring"]), tuple(given["ulysses"]), order)
    degrees = Degrees(cfg, ring, ulysses, "as planned")
    return RunPlan(degrees, exchange=exchange, pieces=pieces, placement=placement, dp_degree=groups)
