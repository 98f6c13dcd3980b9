"""Whole pictures and clips on many ranks, compared with one rank: which ones are drawn, and the drawing.

A `Draw` is a pipeline, the way in which it is run on how many ranks, and one call. The suite draws a covering set
(`drawn(ranks)`): every two choices meet in some draw, except that a pipeline meets the axes of a mesh and a short
prompt through its family, and that a mesh of more than four ranks is drawn through its kind. A draw costs as much as
it has ranks: what few ranks show is drawn on few.
`python -m tests.table` draws the full products (`full_pipelines`, `full_meshes`).
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.covering import covering
from tests.distributed.helpers import degrees, recorded_layer_plans
from tests.distributed.ranks import run_ranks
from tests.families import PIPELINES, family_call, family_pipeline
from tests.pipelines import TASKS, flux_call, flux_pipeline, relative_error

LIMIT = 1e-5  # relative error of the latents in float32, after a whole run
FLUX = tuple(f"flux {task}" for task in TASKS)
ALL = (*FLUX, *PIPELINES)
RANKS = (2, 3, 4, 6, 8)
Mesh = tuple[int, int, int]
MESHES: dict[int, list[Mesh]] = {  # ranks -> cfg, ring, ulysses
    ranks: [
        (cfg, ring, ranks // cfg // ring)
        for cfg, ring in itertools.product((1, 2), range(1, ranks + 1))
        if ranks % (cfg * ring) == 0
    ]
    for ranks in RANKS
}
# ranks -> level sizes, innermost first; the last has three levels where the number allows
LEVELS: dict[int, list[tuple[int, ...]]] = {
    2: [(2,)],
    3: [(3,)],
    4: [(2, 2)],
    6: [(2, 3), (3, 2)],
    8: [(4, 2), (2, 2, 2)],
}
CALLS = {  # odd sizes and prompts; a batch; fewer text tokens than ranks
    "odd": dict(height=36, width=28, text_len=7),
    "batch": dict(height=28, width=44, text_len=13, batch=2),
    "short": dict(height=20, width=28, text_len=1),
}
VIDEO_CALLS = {"odd": dict(height=48, width=80, text_len=7), "batch": dict(height=32, width=48, text_len=13, batch=2)}


class Draw(NamedTuple):
    """One pipeline, wrapped in one way, called once.

    Attributes:
        mesh: cfg, ring and ulysses degree; None leaves them to the rule.
        sizes: ranks of each level of the cluster, innermost first.
        pieces: rows are cut, as far as there are enough.
    """

    pipeline: str
    mesh: Mesh | None
    sizes: tuple[int, ...]
    exchange: str
    schedule: str
    pieces: bool
    call: str

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes)


def calls(pipeline: str) -> dict[str, dict[str, int]]:
    return VIDEO_CALLS if pipeline.startswith("wan") else CALLS


def build(pipeline: str) -> Any:
    if pipeline in FLUX:
        return flux_pipeline(pipeline.removeprefix("flux "))
    return family_pipeline(pipeline)


def draw(pipe: Any, pipeline: str, call: str, full: bool = False) -> Tensor:
    """The latents."""
    result = pipe(**arguments(pipeline, call, full))
    return result.frames if pipeline.startswith("wan") else result.images


def arguments(pipeline: str, call: str, full: bool = False) -> dict[str, Any]:
    """Of one call. Two steps, so that what the first leaves behind meets the second; with `full`, three or four."""
    size = calls(pipeline)[call]
    if pipeline in FLUX:
        given = flux_call(pipeline.removeprefix("flux "), **size)
    else:
        given = family_call(pipeline, **size)
    if not full:  # with a strength, the last two of three
        given |= dict(strength=0.6, num_inference_steps=3) if "strength" in given else {"num_inference_steps": 2}
    return given


class References:
    """What one rank draws without cocodiff: drawn once, when first asked for, and kept in files that ranks read."""

    def __init__(self, folder: Path, full: bool = False) -> None:
        self.folder, self.full = folder, full
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, pipeline: str, call: str) -> Tensor:
        return load_file(self._path(pipeline, call))["latents"]

    def prepare(self, wanted: Iterable[tuple[str, str]]) -> References:
        """Draw what is not there yet, in a process like those of the ranks; self."""
        missing = [key for key in dict.fromkeys(wanted) if not self._path(*key).exists()]
        if missing:
            run_ranks(1, self._draw, missing)
        return self

    def _path(self, pipeline: str, call: str) -> Path:
        return self.folder / f"{pipeline}, {call}.safetensors"

    def _draw(self, wanted: Sequence[tuple[str, str]]) -> None:
        built = functools.cache(build)
        for pipeline, call in wanted:
            latents = draw(built(pipeline), pipeline, call, self.full)
            partial = self._path(pipeline, call).with_suffix(f".{os.getpid()}")  # another worker may look for it now
            save_file({"latents": latents.contiguous()}, partial)
            partial.rename(self._path(pipeline, call))


def kind(row: dict[str, Any]) -> str:
    """What a mesh does, whatever its size: a ring of three passes on what it has received, one of two does not."""
    if row["mesh"] is None:
        return "chosen"
    cfg, ring, ulysses = row["mesh"]
    return f"cfg {cfg} x ring {min(ring, 3)} x ulysses {min(ulysses, 2)}"


def _degree(axis: int, row: dict[str, Any]) -> int:
    """Of one axis of the mesh: 1, 2 or more; 0 where the rule chooses it."""
    return min(row["mesh"][axis], 3) if row["mesh"] is not None else 0


def _allowed(row: dict[str, Any]) -> bool:
    ranks = math.prod(row["sizes"])
    if row["mesh"] is not None and math.prod(row["mesh"]) != ranks:
        return False
    if row["pieces"] and row["schedule"] == "sequential":  # which cuts nothing
        return False
    if row["exchange"] == "staged" and row["mesh"] is not None and row["mesh"][2] == 1:  # which stages nothing
        return False
    return row["call"] in calls(row["pipeline"])


@functools.cache
def _covering() -> tuple[Draw, ...]:
    dimensions = {
        "pipeline": ALL,
        "mesh": [None, *itertools.chain(*MESHES.values())],
        "sizes": list(itertools.chain(*LEVELS.values())),
        "exchange": ("flat", "staged"),
        "schedule": ("v_first", "sequential"),
        "pieces": (True, False),
        "call": tuple(CALLS),
    }
    derived = {
        "more than two ranks": lambda row: math.prod(row["sizes"]) > 2,
        "family": lambda row: row["pipeline"].split()[0],
        "kind": kind,
        "mesh of few ranks": lambda row: row["mesh"] if row["mesh"] and math.prod(row["mesh"]) <= 4 else None,
        "several axes": lambda row: row["mesh"] is not None and sum(degree > 1 for degree in row["mesh"]) > 1,
        "batch": lambda row: row["call"] == "batch",
    }
    derived |= {axis: functools.partial(_degree, index) for index, axis in enumerate(("cfg", "ring", "ulysses"))}
    met = {  # by what is not listed here: everything
        "pipeline": {"exchange", "schedule", "pieces", "batch", "more than two ranks"},
        "family": {"exchange", "schedule", "pieces", "call", "cfg", "ring", "ulysses", "several axes"},
        "mesh": set(),
        "mesh of few ranks": {"kind"},
        "sizes": {"exchange"},
    }
    apart = [frozenset((one, other)) for one in met for other in {*dimensions, *derived} - met[one] - {one}]
    return tuple(
        Draw(**row) for row in covering(dimensions, _allowed, derived, apart, cost=lambda row: math.prod(row["sizes"]))
    )


def drawn(ranks: int, pipelines: Iterable[str] = ALL) -> list[Draw]:
    """The draws of the covering set on so many ranks."""
    return [one for one in _covering() if one.ranks == ranks and one.pipeline in pipelines]


def full_pipelines(ranks: int) -> list[Draw]:
    """Every pipeline and call on the mesh that the rule chooses, in all ways in turn."""
    ways = itertools.cycle(_ways(ranks))
    return [Draw(pipeline, None, *next(ways), call) for pipeline in ALL for call in calls(pipeline)]


def full_meshes(ranks: int, pipelines: Sequence[str]) -> list[Draw]:
    """Every mesh, in all ways in turn, and two calls of some pipelines."""
    ways = itertools.cycle(_ways(ranks))
    return [
        Draw(pipeline, mesh, *next(ways), call)
        for pipeline, mesh, call in itertools.product(pipelines, MESHES[ranks], ("odd", "batch"))
    ]


def _ways(ranks: int) -> list[tuple[tuple[int, ...], str, str, bool]]:
    orders = (("v_first", True), ("v_first", False), ("sequential", False))
    return [
        (sizes, exchange, *order)
        for sizes, exchange, order in itertools.product(LEVELS[ranks], ("flat", "staged"), orders)
    ]


def errors(draws: Sequence[Draw], references: References) -> dict[Draw, float]:
    """Relative error of each draw, on every rank. Checks that rows were cut where they may be, and nowhere else."""
    import cocodiff

    built = functools.cache(build)  # unwrapping leaves nothing behind, so that a pipeline can be wrapped again
    found = {}
    for one in draws:
        cluster = cocodiff.Cluster(
            "test", tuple(cocodiff.Level(f"level {i}", n, 1, 1) for i, n in enumerate(one.sizes))
        )
        options = dict(exchange=one.exchange, schedule=one.schedule, pieces=4 if one.pieces else 1)
        with recorded_layer_plans() as plans:
            pipe = cocodiff.wrap(built(one.pipeline), cluster=cluster, **degrees(one.mesh), **options)
            latents = draw(pipe, one.pipeline, one.call, references.full)
        found[one] = relative_error(latents, references(one.pipeline, one.call))
        assert one.mesh is None or str(pipe.cocodiff.plan.degrees) == "cfg {} x ring {} x ulysses {}".format(*one.mesh)
        most = 4 if one.pieces else 1
        assert plans and all(plan.pieces == min(most, fewest) for plan, fewest in plans), (one, plans)
        cocodiff.unwrap(pipe)
    return found


def check(draws: Sequence[Draw], references: References) -> None:
    """Draw all of one number of ranks and assert that every rank has what one rank draws."""
    references.prepare((one.pipeline, one.call) for one in draws)
    for found in run_ranks(draws[0].ranks, errors, draws, references, timeout_seconds=400):
        assert len(found) == len(draws)
        assert max(found.values()) < LIMIT, {one: error for one, error in found.items() if error >= LIMIT}
