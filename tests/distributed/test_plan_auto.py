"""plan="auto": the planner chooses at the first call of a shape, alike on all ranks, and the picture is the same."""

import importlib

from tests.distributed.draws import LIMIT
from tests.distributed.ranks import run_ranks
from tests.pipelines import flux_call, flux_pipeline, relative_error

SIZES = ({}, {"height": 52, "width": 44})


def _call(**size):
    return flux_call("text2image", **size) | dict(num_inference_steps=2)


def _references():
    return [flux_pipeline(heads=4)(**_call(**size)).images for size in SIZES]


def _cluster():
    from cocodiff import Cluster, Level

    return Cluster("test", (Level("gpu", 2, 1.0, 1.0), Level("node", 2, 1e-3, 10.0)))


def _planned(expected):
    """Errors and plans by size, how often was planned, and what a call says where nothing can be planned."""
    import pytest

    import cocodiff
    from cocodiff.errors import ConfigError

    asked, module = [], importlib.import_module("cocodiff.planner.search")
    search = module.search

    def counted(task, keep):
        asked.append(task.cluster.num_ranks)
        return search(task, keep=keep)

    module.search = counted
    pipe = cocodiff.wrap(flux_pipeline(heads=4), cluster=_cluster(), plan="auto")
    before = pipe.cocodiff.plan, pipe.cocodiff.mesh
    errors, plans = [], []
    for _ in range(2):
        for size, images in zip(SIZES, expected, strict=True):
            errors.append(relative_error(pipe(**_call(**size)).images, images))
            plans.append((str(pipe.cocodiff.plan), pipe.cocodiff.mesh.degrees.counts))
    cocodiff.unwrap(pipe)

    def broken(task, keep):
        raise RuntimeError("no such operator")

    module.search = broken
    pipe = cocodiff.wrap(flux_pipeline(heads=4), cluster=_cluster(), plan="auto")
    with pytest.raises(ConfigError) as told:
        pipe(**_call())
    cocodiff.unwrap(pipe)
    module.search = search
    return before, errors, plans, len(asked), str(told.value)


def test_a_call_is_planned_once_for_its_shape_and_alike_everywhere():
    expected = run_ranks(1, _references)[0]
    found = run_ranks(4, _planned, expected)
    for rank, (before, errors, plans, asked, told) in enumerate(found):
        assert before == (None, None)
        assert max(errors) < LIMIT, errors
        assert plans == found[0][2] and plans[:2] == plans[2:], "what was planned once holds"
        assert (1, 1, 4) not in {degrees for _, degrees in plans}, "which would send most over the slow level"
        assert asked == (2 if rank == 0 else 0)
        assert "no such operator" in told and "leave plan out" in told
