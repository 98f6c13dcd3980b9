"""Covering sets hold every pair that may be, and the one that the suite draws holds what it is meant to hold."""

from itertools import chain
from itertools import product as together

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.covering import covering, pairs, product
from tests.distributed.draws import ALL, LEVELS, MESHES, RANKS, drawn, kind

DIMENSIONS = {"ranks": (2, 3, 4), "exchange": ("flat", "staged"), "schedule": ("first", "last"), "pieces": (1, 4)}


def _allowed(row):
    return row["pieces"] == 1 or row["schedule"] == "first"


def _missing(rows, dimensions, allowed):
    return set().union(*map(pairs, product(dimensions, allowed))) - set().union(*map(pairs, rows))


def test_every_pair_that_may_be_is_covered_by_few_rows_that_may_be():
    rows = covering(DIMENSIONS, _allowed)
    assert not _missing(rows, DIMENSIONS, _allowed)
    assert all(map(_allowed, rows)) and len(rows) < len(product(DIMENSIONS, _allowed)) / 2
    assert rows == covering(DIMENSIONS, _allowed)


def test_control_no_row_can_be_left_out_unnoticed():
    rows = covering(DIMENSIONS, _allowed)
    for index in range(len(rows)):
        assert _missing(rows[:index] + rows[index + 1 :], DIMENSIONS, _allowed)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(2, 7))
def test_every_pair_of_any_dimensions(sizes, modulus):
    dimensions = {f"dimension {i}": tuple(range(size)) for i, size in enumerate(sizes)}

    def allowed(row):
        return sum(row.values()) % modulus != 1

    assert not _missing(covering(dimensions, allowed), dimensions, allowed)


def test_derived_dimensions_are_covered_and_dimensions_can_be_kept_apart():
    apart = [frozenset(("ranks", "pieces"))]
    rows = covering(DIMENSIONS, _allowed, {"even": lambda row: row["ranks"] % 2 == 0}, apart)
    assert {(row["ranks"] % 2 == 0, row["pieces"]) for row in rows} == {(True, 1), (True, 4), (False, 1), (False, 4)}
    assert {(row["ranks"], row["exchange"]) for row in rows} == {(r, e) for r in (2, 3, 4) for e in ("flat", "staged")}


def test_what_cheap_rows_hold_is_taken_from_them():
    apart = [frozenset(("ranks", other)) for other in ("schedule", "pieces")]
    rows = covering(DIMENSIONS, _allowed, apart=apart, cost=lambda row: row["ranks"])
    assert [row["ranks"] for row in rows].count(4) == 2, "each exchange once, and all else on fewer"


def test_the_suite_draws_every_pipeline_mesh_and_call_often_enough():
    draws = [one for ranks in RANKS for one in drawn(ranks)]
    assert sum(one.ranks for one in draws) <= 220
    assert {(one.pipeline, one.ranks == 2) for one in draws} == {(name, two) for name in ALL for two in (True, False)}
    for family in {name.split()[0] for name in ALL}:
        meshes = [one.mesh for one in draws if one.pipeline.split()[0] == family and one.mesh is not None]
        cfg, ring, ulysses = map(set, zip(*meshes, strict=True))
        assert cfg == {1, 2} and min(max(ring), max(ulysses)) >= 3, (family, meshes)
        assert any(sum(degree > 1 for degree in mesh) > 1 for mesh in meshes), (family, meshes)
    assert {one.mesh for one in draws} >= {mesh for ranks in (2, 3, 4) for mesh in MESHES[ranks]}
    kinds = {kind(dict(mesh=mesh)) for meshes in MESHES.values() for mesh in meshes}
    assert {kind(dict(mesh=one.mesh)) for one in draws} == kinds | {"chosen"}
    assert {(one.sizes, one.exchange) for one in draws} == set(together(chain(*LEVELS.values()), ("flat", "staged")))
    for name in ALL:
        mine = [one for one in draws if one.pipeline == name]
        assert {one.exchange for one in mine} == {"flat", "staged"}
        assert {one.schedule for one in mine} == {"v_first", "sequential"}
        assert {one.pieces for one in mine} == {True, False}
        assert {one.call == "batch" for one in mine} == {True, False}
