"""cfg x ring x ulysses: what is special to each axis, and controls that break it.

That every mesh draws what one rank draws is in the covering set of `draws.py`, which test_pipeline.py and
test_families.py draw.
"""

import logging

from tests.distributed.draws import ALL, LIMIT, build, draw
from tests.distributed.helpers import degrees
from tests.distributed.ranks import run_ranks
from tests.pipelines import flux_call, flux_pipeline, relative_error

NAMES = ("flux text2image", "sd35 text2image", "qwen text2image", "wan t2v")


def _two_heads(wrap):
    import cocodiff

    pipe = flux_pipeline(heads=2)
    if wrap:
        cocodiff.wrap(pipe)
    latents = draw(pipe, "flux text2image", "odd")
    return latents, str(pipe.cocodiff.plan.degrees) if wrap else ""


def test_ranks_may_be_twice_the_heads():
    expected, _ = run_ranks(1, _two_heads, False)[0]
    for latents, found in run_ranks(4, _two_heads, True):
        assert found == "cfg 1 x ring 2 x ulysses 2" and relative_error(latents, expected) < LIMIT


def _forwards(references):
    """By pipeline: the error with cfg_degree 2, and how often its first transformer ran here."""
    import cocodiff
    from cocodiff.pipeline.forward import ShardedForward

    found, ran, on_shards = {}, [], ShardedForward.on_shards
    ShardedForward.on_shards = lambda forward, *given: ran.append(forward) or on_shards(forward, *given)
    for name in ALL:
        pipe = cocodiff.wrap(build(name), cfg_degree=2)
        latents = draw(pipe, name, "odd")
        first = pipe.cocodiff.forwards["transformer"]
        found[name] = relative_error(latents, references(name, "odd")), ran.count(first)
    return found


def test_each_half_runs_one_branch_of_every_pipeline_that_has_two(references):
    """Two steps: a rank that ran both branches would have run its transformer four times (wan22's first: twice)."""
    for found in run_ranks(2, _forwards, references.prepare((name, "odd") for name in ALL)):
        for name, (error, ran) in found.items():
            assert error < LIMIT, (name, error)
            assert ran == (1 if name.startswith("wan22") else 2), (name, ran)


def _broken(references):
    """By what is broken on purpose: the error of a pipeline on a mesh with a ring and two halves."""
    import cocodiff
    from cocodiff import layer
    from cocodiff.layer import LayerInFlight
    from cocodiff.pipeline import cfg_parallel

    key_mask, swap = LayerInFlight.key_mask, cfg_parallel.swap
    broken = {  # the pipeline, owner and name of what is broken, what stands there instead
        "a part is dropped": ("sd35 text2image", layer, "merge_partial", lambda one, other: one),
        "parts are averaged": (
            "wan t2v", layer, "merge_partial", lambda one, other: ((one[0] + other[0]) / 2, one[1]),
        ),
        "the mask of other parts is dropped": (
            "qwen text2image", LayerInFlight, "key_mask",
            lambda self, distance, *pieces: None if distance else key_mask(self, 0),
        ),
        "branches are swapped": ("flux text2image", cfg_parallel, "swap", lambda *given: swap(*given).flip(0)),
    }  # fmt: skip
    errors = {}
    for what, (name, owner, label, instead) in broken.items():
        right = getattr(owner, label)
        setattr(owner, label, instead)
        pipe = cocodiff.wrap(build(name), **degrees((2, 2, 1)))
        errors[what] = relative_error(draw(pipe, name, "batch"), references(name, "batch"))
        setattr(owner, label, right)
    return errors


def test_control_what_breaks_an_axis_is_seen(references):
    for errors in run_ranks(4, _broken, references.prepare((name, "batch") for name in NAMES)):
        assert len(errors) == 4 and min(errors.values()) > 100 * LIMIT, errors


def _guidance():
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
    expected = flux_pipeline()(**call | {"generator": flux_call("text2image")["generator"]}).images
    pipe = cocodiff.wrap(flux_pipeline(), cfg_degree=2)
    for _ in range(2):
        latents = pipe(**call | {"generator": flux_call("text2image")["generator"]}).images
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
    return relative_error(latents, expected), said, refused


def test_without_guidance_halves_do_the_same_and_unpaired_calls_are_errors():
    everyone = run_ranks(2, _guidance)
    for rank, (error, said, refused) in enumerate(everyone):
        assert error < LIMIT and len(said) == (rank == 0) and len(refused) == 2, (error, said, refused)


def _second_branch_differs():
    """Rank 3 encodes the negative prompt otherwise: only its half computes from it, yet every rank must hear of it."""
    import os

    import cocodiff

    pipe = cocodiff.wrap(flux_pipeline(), **degrees((2, 1, 2)))
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
    for given in (dict(cfg_degree=3), dict(ring_degree=3), dict(cfg_degree=2, ulysses_degree=4), dict(ring_degree=0)):
        try:
            cocodiff.wrap(flux_pipeline(), **given)
        except ValueError as error:
            said[str(given)] = str(error)
    pipe = cocodiff.wrap(flux_pipeline(), ring_degree=2)
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
