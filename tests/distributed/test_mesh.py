"""cfg x ring x ulysses, in all ways to make so many ranks, against one rank; and controls that break each axis."""

import itertools
import logging

import pytest

from tests.distributed.ranks import run_ranks
from tests.families import PIPELINES, family_call, family_pipeline
from tests.pipelines import TASKS, clusters, flux_call, flux_pipeline, in_pieces, recorded_pieces, relative_error

LIMIT = 1e-5
NAMES = ("flux text2image", "sd35 text2image", "qwen text2image", "wan t2v")
MESHES = {  # ranks -> cfg, ring, ulysses
    ranks: [
        (cfg, ring, ranks // cfg // ring)
        for cfg, ring in itertools.product((1, 2), range(1, ranks + 1))
        if ranks % (cfg * ring) == 0
    ]
    for ranks in (2, 3, 4, 6, 8)
}
SIZES = {"odd": dict(height=36, width=28, text_len=7), "batch": dict(height=28, width=44, text_len=13, batch=2)}
VIDEO = {"odd": dict(height=48, width=80, text_len=7), "batch": dict(height=32, width=48, text_len=13, batch=2)}


def _pipeline(name, heads=8):
    return flux_pipeline(heads=heads) if name.startswith("flux ") else family_pipeline(name)


def _draw(pipe, name, size):
    if name.startswith("flux "):
        return pipe(**flux_call("text2image", **SIZES[size])).images
    result = pipe(**family_call(name, **(VIDEO if name.startswith("wan") else SIZES)[size]))
    return result.frames if name.startswith("wan") else result.images


def _references():
    return {(name, size): _draw(_pipeline(name), name, size) for name in NAMES for size in SIZES}


@pytest.fixture(scope="module")
def expected():
    return run_ranks(1, _references)[0]


def _degrees(cfg, ring, ulysses):
    return dict(cfg_degree=cfg, ring_degree=ring, ulysses_degree=ulysses)


def _errors(ranks, expected):
    import cocodiff
    from cocodiff import plan as costs

    costs.ROWS_PER_PIECE = 2
    variants = itertools.cycle(itertools.product(clusters(ranks), ("flat", "staged")))
    errors, cut = {}, 0
    for name in NAMES:
        for index, mesh in enumerate(MESHES[ranks]):
            size = list(SIZES)[index % 2]
            (kind, cluster), exchange = next(variants)
            schedule = "sequential" if index == 4 else "v_first"
            pipe = cocodiff.wrap(
                _pipeline(name), cluster=cluster, exchange=exchange, schedule=schedule, **_degrees(*mesh)
            )
            assert str(pipe.cocodiff.mesh).startswith("cfg {} x ring {} x ulysses {}".format(*mesh))
            counts = recorded_pieces(pipe.cocodiff.engine)
            errors[name, size, mesh, kind, exchange] = relative_error(_draw(pipe, name, size), expected[name, size])
            cut += max(counts, default=1) > 1 and mesh[1] > 1
            cocodiff.unwrap(pipe)
    assert cut or ranks == 2
    return errors


@pytest.mark.parametrize("ranks", sorted(MESHES))
def test_every_mesh_draws_what_one_rank_draws(ranks, expected):
    for errors in run_ranks(ranks, _errors, ranks, expected, timeout_seconds=400):
        assert len(errors) == len(NAMES) * len(MESHES[ranks])
        assert max(errors.values()) < LIMIT, {key: error for key, error in errors.items() if error >= LIMIT}


def _more_ranks_than_heads(expected):
    import cocodiff

    pipe = cocodiff.wrap(_pipeline(NAMES[0], heads=4))
    return str(pipe.cocodiff.mesh.degrees), relative_error(_draw(pipe, NAMES[0], "odd"), expected)


def _four_heads():
    return _draw(_pipeline(NAMES[0], heads=4), NAMES[0], "odd")


def test_ranks_may_be_twice_the_heads():
    expected = run_ranks(1, _four_heads)[0]
    for degrees, error in run_ranks(8, _more_ranks_than_heads, expected):
        assert degrees == "cfg 1 x ring 2 x ulysses 4" and error < LIMIT


def _all_alone():
    names = [f"flux {task}" for task in TASKS] + list(PIPELINES)
    return {name: _any_pipeline(name, lambda pipe: pipe)[0] for name in names}


def _any_pipeline(name, wrap):
    """What is drawn, and how often its first transformer was run here."""
    task = name.removeprefix("flux ")
    pipe = wrap(flux_pipeline(task) if name.startswith("flux ") else family_pipeline(name))
    ran = []
    pipe.transformer.proj_out.register_forward_hook(lambda *_: ran.append(1))
    if name.startswith("flux "):
        return pipe(**flux_call(task, **SIZES["odd"])).images, len(ran)
    sizes = VIDEO if name.startswith("wan") else SIZES
    result = pipe(**family_call(name, **sizes["odd"]))
    return result.frames if name.startswith("wan") else result.images, len(ran)


def _branches(expected):
    import cocodiff

    found = {}
    for name, alone in expected.items():
        drawn, ran = _any_pipeline(name, lambda pipe: cocodiff.wrap(pipe, cfg_degree=2))
        _, ran_by_all = _any_pipeline(name, cocodiff.wrap)
        found[name] = relative_error(drawn, alone), ran, ran_by_all
    return found


# These have two calls a step here; SD3 has one, of which each half runs half of the batch; the others no guidance.
TWO_CALLS = ("flux text2image", "flux kontext", "flux2 klein", "qwen", "wan")


def test_branches_of_every_pipeline_that_has_them():
    expected = run_ranks(1, _all_alone)[0]
    for found in run_ranks(2, _branches, expected):
        for name, (error, ran, ran_by_all) in found.items():
            assert error < LIMIT, (name, error)
            assert ran * (2 if name.startswith(TWO_CALLS) else 1) == ran_by_all > 0, (name, ran, ran_by_all)


BROKEN = ("a part is dropped", "parts are averaged", "the mask of other parts is dropped", "branches are swapped")


def _broken(what, expected):
    import cocodiff
    from cocodiff import layer as flight
    from cocodiff.layer import Flight
    from cocodiff.state import Engine

    errors = {}
    if what == "a part is dropped":
        flight.merge_partial = lambda one, other: one
    elif what == "parts are averaged":
        flight.merge_partial = lambda one, other: ((one[0] + other[0]) / 2, one[1])
    elif what == "the mask of other parts is dropped":
        key_mask = Flight.key_mask
        Flight.key_mask = lambda self, distance, *pieces: None if distance else key_mask(self, 0)
    elif what == "branches are swapped":
        swap = Engine.swap
        Engine.swap = lambda self, x: swap(self, x).flip(0)
    for name in ("qwen text2image",) if "mask" in what else NAMES:
        pipe = cocodiff.wrap(_pipeline(name), **_degrees(2, 2, 1))
        errors[name] = relative_error(_draw(pipe, name, "batch"), expected[name, "batch"])
        cocodiff.unwrap(pipe)
    return errors


@pytest.mark.parametrize("what", BROKEN)
def test_control_what_breaks_an_axis_is_seen(what, expected):
    for errors in run_ranks(4, _broken, what, expected):
        assert min(errors.values()) > 100 * LIMIT, errors


def _guidance(caplog=None):
    """Without guidance halves do the same; a pipeline that calls otherwise than its family says is told."""
    import dataclasses

    import cocodiff
    from cocodiff.errors import MismatchError, PatchError
    from cocodiff.models import family_of
    from cocodiff.pipeline import call as attachment

    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("cocodiff").addHandler(handler)
    call = flux_call("text2image") | {"true_cfg_scale": 1.0}
    alone = flux_pipeline()(**call | {"generator": flux_call("text2image")["generator"]}).images
    pipe = cocodiff.wrap(flux_pipeline(), cfg_degree=2)
    for _ in range(2):
        drawn = pipe(**call | {"generator": flux_call("text2image")["generator"]}).images
    said = [message for message in heard if "no guidance" in message]
    attachment.family_of = lambda cls: dataclasses.replace(family_of(cls), guided=lambda pipe, call: True)
    refused = []
    for steps in (3, 4):  # the last call has no other to wait for; every call has one, of the wrong step
        try:
            pipe(**call | {"num_inference_steps": steps})
        except (PatchError, MismatchError) as error:
            refused.append(str(error))
            cocodiff.unwrap(pipe)
            cocodiff.wrap(pipe, cfg_degree=2)
    return relative_error(drawn, alone), said, refused


def test_without_guidance_halves_do_the_same_and_unpaired_calls_are_errors():
    everyone = run_ranks(2, _guidance)
    for rank, (error, said, refused) in enumerate(everyone):
        assert error < LIMIT and len(said) == (rank == 0) and len(refused) == 2, (error, said, refused)


def _second_branch_differs():
    """Rank 3 encodes the negative prompt otherwise: only its half computes from it, yet every rank must hear of it."""
    import os

    import cocodiff

    pipe = cocodiff.wrap(flux_pipeline(), **_degrees(2, 1, 2))
    encode, encoded = pipe.encode_prompt, []

    def encode_otherwise(*args, **kwargs):
        embeds, *rest = encode(*args, **kwargs)
        encoded.append(1)
        return (embeds * 1.01 if os.environ["RANK"] == "3" and len(encoded) == 2 else embeds, *rest)

    pipe.encode_prompt = encode_otherwise
    try:
        pipe(**flux_call("text2image"))
    except cocodiff.CocodiffError as error:
        return str(error)
    return ""


def test_a_second_branch_that_differs_is_an_error_on_every_rank():
    assert all("not the same on all ranks" in said for said in run_ranks(4, _second_branch_differs))


def _bad_degrees():
    import cocodiff

    said = {}
    for degrees in (dict(cfg_degree=3), dict(ring_degree=3), dict(cfg_degree=2, ulysses_degree=4), dict(ring_degree=0)):
        try:
            cocodiff.wrap(flux_pipeline(), **degrees)
        except ValueError as error:
            said[str(degrees)] = str(error)
    pipe = cocodiff.wrap(flux_pipeline(), ring_degree=2, cluster=in_pieces(4))
    pipe.transformer.set_attention_backend("_native_math")
    try:
        pipe(**flux_call("text2image"))
    except ValueError as error:
        said["backend"] = str(error)
    return said


def test_degrees_that_cannot_be_are_refused_with_the_numbers():
    for said in run_ranks(4, _bad_degrees):
        assert len(said) == 5, said
        assert "cfg_degree 2 x ulysses_degree 4 on 4 ranks" in said["{'cfg_degree': 2, 'ulysses_degree': 4}"]
        assert "log-sum-exp" in said["backend"]
