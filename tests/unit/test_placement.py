"""Where the ranks of a mesh are in the cluster: numbers alone, and meshes whose groups are never made."""

import itertools
import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocodiff.errors import ConfigError
from cocodiff.parallel.layout import axis_sizes, level_groups, outer_difference
from cocodiff.parallel.mesh import Degrees, Mesh
from cocodiff.parallel.placement import (
    Placement,
    axis_groups,
    coordinates,
    default_placement,
    placements,
    spread_sizes,
)
from cocodiff.plan import RunPlan, layer_costs
from cocodiff.selective.memory import held_bytes
from cocodiff.state import Session
from cocodiff.topology import Cluster, Level

SIZES = [(1,), (4,), (6,), (2, 2), (2, 3), (3, 2), (2, 1, 4), (2, 2, 2), (2, 3, 2), (4, 6), (2, 6, 2)]


def meshes(ranks):
    """All degrees of so many ranks."""
    for cfg, ring in itertools.product((1, 2, 3), range(1, ranks + 1)):
        if ranks % (cfg * ring) == 0:
            yield cfg, ring, ranks // cfg // ring


def fits(sizes, degrees):
    """Whether no group of an axis begins or ends inside a part of a level."""
    cfg, ring, ulysses = degrees
    bounds = {1, ulysses, ring * ulysses, cfg * ring * ulysses, *itertools.accumulate(sizes, lambda a, b: a * b)}
    return all(larger % smaller == 0 for smaller, larger in itertools.pairwise(sorted(bounds)))


@pytest.mark.parametrize("sizes", SIZES)
def test_the_default_is_the_arithmetic_of_a_mesh_wherever_degrees_fit(sizes):
    seen = 0
    for degrees in meshes(math.prod(sizes)):
        placed = default_placement(sizes, degrees)
        assert (placed is not None) == fits(sizes, degrees), degrees
        if placed is None:
            continue
        seen += 1
        assert (placed.sizes, placed.degrees) == (sizes, degrees)
        assert axis_groups(degrees, placed) == axis_groups(degrees, None)
        assert spread_sizes(sizes, degrees, placed) == spread_sizes(sizes, degrees, None)
        for rank in range(math.prod(sizes)):
            assert coordinates(rank, degrees, placed) == coordinates(rank, degrees, None)
        assert next(placements(sizes, degrees)) == placed
    assert seen


def test_a_mesh_without_a_placement_is_ranks_at_even_distances():
    cfg, ring, ulysses = 2, 3, 2
    groups = axis_groups((cfg, ring, ulysses), None)
    for name, stride, size in (
        ("everyone", 1, 12),
        ("sequence", 1, 6),
        ("ulysses", 1, 2),
        ("ring", 2, 3),
        ("cfg", 6, 2),
    ):
        assert groups[name] == [
            tuple(range(start, start + stride * size, stride)) for start in range(12) if start // stride % size == 0
        ]
    assert spread_sizes((3, 4), (cfg, ring, ulysses), None) == {
        "everyone": (3, 4),
        "sequence": axis_sizes((3, 4), 1, 6),
        "ulysses": axis_sizes((3, 4), 1, 2),
        "ring": axis_sizes((3, 4), 2, 3),
        "cfg": axis_sizes((3, 4), 6, 2),
    }


@st.composite
def placed_meshes(draw):
    levels = draw(st.lists(st.tuples(*[st.integers(1, 3)] * 3), min_size=1, max_size=3))
    ranks = math.prod(math.prod(counts) for counts in levels)
    if ranks > 24:
        levels, ranks = levels[:1], math.prod(levels[0])  # up to 27
    order = draw(st.none() | st.permutations(range(ranks)).map(tuple))
    return Placement(*zip(*levels, strict=True), order)


@given(placed_meshes())
@settings(max_examples=60, deadline=None)
def test_every_slot_has_coordinates_of_its_own_and_comes_back_from_them(placed):
    ranks = math.prod(placed.sizes)
    every = [placed.coordinates(slot) for slot in range(ranks)]
    assert sorted(every) == list(itertools.product(*map(range, placed.degrees)))
    assert [placed.slot(*places) for places in every] == list(range(ranks))
    assert [places for rank in range(ranks) for places in [coordinates(rank, placed.degrees, placed)]] == [
        every[slot] for slot in placed.slots
    ]
    order = placed.order or tuple(range(ranks))
    assert [order[slot] for slot in placed.slots] == list(range(ranks))


@pytest.mark.parametrize("sizes", SIZES)
def test_every_spreading_is_found_once(sizes):
    for degrees in meshes(math.prod(sizes)):
        found = list(placements(sizes, degrees))
        assert len(set(found)) == len(found) and all((one.sizes, one.degrees) == (sizes, degrees) for one in found)
        each = [
            [(c, r, size // c // r) for c, r in itertools.product(range(1, size + 1), repeat=2) if size % (c * r) == 0]
            for size in sizes
        ]
        every = (zip(*levels, strict=True) for levels in itertools.product(*each))
        assert set(found) == {
            one for one in itertools.starmap(Placement, every) if one.degrees == degrees
        }  # fmt: skip


def cluster(*sizes):
    return Cluster("test", tuple(Level(f"level {i}", size, 10.0**-i, 10.0**i) for i, size in enumerate(sizes)))


def create(rank, sizes, degrees, placement=None):
    """The mesh of one rank; a group is a list of its ranks, in the order in which they were given."""
    host = SimpleNamespace(rank=lambda: rank, size=lambda: math.prod(sizes))
    return Mesh.arrange(cluster(*sizes), Degrees(*degrees), "gloo", host, placement, lambda name, ranks: list(ranks))


AXES = ("everyone", "sequence", "ulysses", "ring", "cfg")


@given(placed_meshes())
@settings(max_examples=40, deadline=None)
def test_all_ranks_see_one_mesh_and_count_each_link_at_its_level(placed):
    ranks, slots = math.prod(placed.sizes), placed.slots
    every = [create(rank, placed.sizes, placed.degrees, placed) for rank in range(ranks)]
    for rank, mesh in enumerate(every):
        cfg, ring, ulysses = places = placed.coordinates(slots[rank])
        assert (mesh.cfg.rank, mesh.ring.rank, mesh.ulysses.rank) == places
        assert mesh.sequence.rank == ring * mesh.ulysses.size + ulysses and mesh.everyone.rank == rank
        for name in AXES:
            axis = getattr(mesh, name)
            assert axis.ranks[axis.rank] == rank and math.prod(axis.cluster.sizes) == axis.size
            for place, other in enumerate(axis.ranks):
                assert getattr(every[other], name).ranks == axis.ranks, "all of a group make the same one"
                crossed = None if other == rank else outer_difference(slots[rank], slots[other], placed.sizes)
                assert axis.levels[place] == crossed
                assert sorted(axis.ranks)[axis.members[place]] == other
        for level, axis in mesh.level_groups.items():
            sizes = mesh.ulysses.cluster.sizes
            members = next(group for group in level_groups(sizes, level) if mesh.ulysses.rank in group)
            assert axis.ranks == tuple(mesh.ulysses.ranks[member] for member in members)
            assert {at for at in axis.levels if at is not None} == {level}


@pytest.mark.parametrize(("sizes", "degrees"), [((2, 2), (1, 2, 2)), ((3, 2), (1, 3, 2)), ((2, 3), (2, 1, 3))])
def test_without_a_placement_levels_are_counted_along_the_axis(sizes, degrees):
    """Also where the degrees do not fit the levels: then all of an axis counts at one level."""
    for rank in range(math.prod(sizes)):
        mesh = create(rank, sizes, degrees)
        for axis in (mesh.ulysses, mesh.ring, mesh.cfg, mesh.sequence, mesh.everyone):
            assert axis.levels == tuple(
                None if place == axis.rank else outer_difference(axis.rank, place, axis.cluster.sizes)
                for place in range(axis.size)
            )
            assert axis.members == tuple(range(axis.size)), "the order in which torch.distributed sorts them"


def test_axes_of_the_same_ranks_in_another_order_do_not_share_a_group():
    """Two transports would number their messages alike."""
    mesh = create(0, (2, 2), (1, 2, 2), Placement((1, 1), (2, 1), (1, 2)))
    assert mesh.sequence.ranks == (0, 2, 1, 3) and mesh.everyone.ranks == (0, 1, 2, 3)
    assert mesh.sequence.group is not mesh.everyone.group
    usual = create(0, (2, 2), (1, 2, 2))
    assert usual.sequence.group is usual.everyone.group and "placed" not in str(usual)
    assert "ring 2.1 x ulysses 1.2" in str(mesh)


@pytest.mark.parametrize(
    ("placed", "words"),
    [
        (lambda: Placement((1,), (2, 1), (1, 2)), "one whole number"),
        (lambda: Placement((1, 1), (2, 0), (1, 2)), "one whole number"),
        (lambda: Placement((1, 1), (2, 1), (1, 2), (0, 1, 2, 2)), "from 0 to 3 once.*4 entries, 3 of them different"),
        (lambda: Placement((1, 1), (2, 1), (1, 2), (0, 1, 2)), "from 0 to 3 once.*3 entries"),
        (lambda: Placement((1, 1), (2, 2), (1, 2)), "levels of 2 x 4 parts.*cluster has 2 x 2"),
        (lambda: Placement((1,), (2,), (2,)), "levels of 4 parts.*cluster has 2 x 2"),
        (lambda: Placement((2, 1), (1, 1), (1, 2)), "makes cfg 2 x ring 1 x ulysses 2.*is cfg 1 x ring 2 x ulysses 2"),
    ],
)
def test_what_cannot_be_placed_is_refused_with_the_numbers(placed, words):
    with pytest.raises(ConfigError, match=words):
        create(0, (2, 2), (1, 2, 2), placed())


def test_plans_ask_the_placement_which_levels_an_axis_crosses():
    two, degrees = cluster(2, 2), Degrees(1, 2, 2)
    swapped = Placement((1, 1), (2, 1), (1, 2))
    usual, placed = (
        layer_costs(two, degrees, "flat", "cpu", 64, 4, placement=one) for one in (None, swapped)
    )  # fmt: skip
    assert usual == layer_costs(two, degrees, "flat", "cpu", 64, 4, placement=default_placement((2, 2), (1, 2, 2)))
    assert usual.tensor < placed.tensor and usual.ring > placed.ring
    assert hash(RunPlan(degrees, placement=swapped)) != hash(RunPlan(degrees))


def test_held_copies_follow_the_placement():
    """Keys and values alone cross the nodes, or all four tensors do; another order changes which rank holds them."""
    two, degrees, streams, layers = cluster(2, 2), Degrees(1, 2, 2), {"image": 62}, [(3, 8)]

    def held(placement):
        return [held_bytes(two, degrees, 1, rank, streams, layers, placement=placement) for rank in range(4)]

    usual = held(None)
    assert usual == held(default_placement((2, 2), (1, 2, 2))) and len(set(usual)) > 1
    ordered = held(Placement((1, 1), (1, 2), (2, 1), (2, 0, 3, 1)))
    assert [ordered[rank] for rank in (2, 0, 3, 1)] == usual and ordered != usual
    assert held(Placement((1, 1), (2, 1), (1, 2))) not in (usual, ordered)


def test_a_session_keeps_a_mesh_for_each_placement(monkeypatch):
    made = []

    def connect(mesh, lane, counter, make):
        made.append(mesh)
        return SimpleNamespace(mesh=mesh)

    monkeypatch.setattr("cocodiff.state.Mesh.create", lambda *given: given[1:])
    monkeypatch.setattr("cocodiff.state.ConnectedMesh.connect", connect)
    session = Session(SimpleNamespace(backend="gloo", host_group="host"), None, None, None)
    degrees, placed = Degrees(1, 2, 2), Placement((1, 1), (2, 1), (1, 2))
    for plan in (RunPlan(degrees), RunPlan(degrees, placement=placed), RunPlan(degrees), RunPlan(degrees, "flat")):
        session.connect(plan)
    assert made == [(degrees, "gloo", "host", None), (degrees, "gloo", "host", placed)]
    session.close.detach()
