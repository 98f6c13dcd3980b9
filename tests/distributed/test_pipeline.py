"""Whole FLUX pipelines on N ranks against one: the promise of the README, and controls that break it on purpose."""

import itertools

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.pipelines import TASKS, clusters, flux_call, flux_pipeline, recorded_pieces, relative_error

LIMIT = 1e-5  # relative latent error in float32, after a whole run
CALLS = {  # odd sizes and prompts; a batch; fewer text tokens than ranks
    "odd": dict(height=36, width=28, text_len=7),
    "batch": dict(height=28, width=44, text_len=13, batch=2),
    "short": dict(height=20, width=28, text_len=1),
}


def references():
    """What one rank draws without cocodiff."""
    found = {}
    for task in TASKS:
        pipe = flux_pipeline(task)
        for name, call in CALLS.items():
            found[task, name] = pipe(**flux_call(task, **call)).images
    return found


@pytest.fixture(scope="module")
def expected():
    return run_ranks(1, references)[0]


def _errors(ranks, expected):
    import cocodiff
    from cocodiff import plan as costs

    costs.ROWS_PER_PIECE = 2  # up to four pieces also of small pictures
    errors = {}
    for task in TASKS:
        variants = list(itertools.product(clusters(ranks), ("flat", "staged"), ("v_first", "sequential")))
        variants = [v for v in variants if (v[2] == "v_first") or v[0][0].endswith("whole")]  # sequential has no pieces
        if task != "text2image":  # every combination once, then two more per pipeline
            variants = [variants[len(errors) % len(variants)], variants[(len(errors) + 5) % len(variants)]]
        for (name, cluster), exchange, schedule in variants:
            pipe = cocodiff.wrap(flux_pipeline(task), exchange=exchange, schedule=schedule, cluster=cluster)
            counts = recorded_pieces(pipe.cocodiff.engine)
            call = list(CALLS)[len(errors) % len(CALLS)]
            latents = pipe(**flux_call(task, **CALLS[call])).images
            errors[task, name, schedule, exchange, call] = relative_error(latents, expected[task, call])
            assert (max(counts) > 1) == name.endswith("pieces"), (name, counts)
            cocodiff.unwrap(pipe)
    return errors


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
def test_every_pipeline_exchange_and_schedule_draws_what_one_rank_draws(ranks, expected):
    for errors in run_ranks(ranks, _errors, ranks, expected):
        assert len(errors) >= 14
        assert max(errors.values()) < LIMIT, {key: error for key, error in errors.items() if error >= LIMIT}


def _tiny_calls():
    """The trained pipeline: (name, task, call). Sizes other than its own only need to agree, not to be beautiful."""
    from PIL import Image

    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 64, 32))
    grey = Image.new("RGB", (64, 64), (120, 130, 140))
    common = dict(num_inference_steps=2, output_type="latent", prompt="a red circle above a blue square")
    return [
        ("text2image", common),
        (
            "text2image",
            common | dict(height=44, width=76, max_sequence_length=7, true_cfg_scale=3.0, negative_prompt=""),
        ),
        ("inpaint", common | dict(image=grey, mask_image=half, strength=1.0)),
        ("img2img", common | dict(image=grey, strength=1.0)),
    ]


def _draw_tiny():
    import cocodiff

    latents = []
    for task, call in _tiny_calls():
        pipe = cocodiff.tiny_pipeline(task=task)
        pipe.set_progress_bar_config(disable=True)
        cocodiff.wrap(pipe)
        latents.append(pipe(**call, generator=torch.Generator().manual_seed(3)).images)
    return latents


def test_the_tiny_pipeline_on_many_ranks():
    alone = run_ranks(1, _draw_tiny)[0]
    for ranks in (2, 3, 4, 6, 8):
        for latents in run_ranks(ranks, _draw_tiny):
            errors = [relative_error(one, other) for one, other in zip(latents, alone, strict=True)]
            assert max(errors) < LIMIT, (ranks, errors)


def _wrap_and_unwrap(expected):
    import cocodiff

    def parts(pipe):
        named = dict(pipe.transformer.named_modules())
        forwards = {name: vars(module).get("forward") for name, module in named.items()}
        processors = {name: getattr(module, "processor", None) for name, module in named.items()}
        return type(pipe), "cocodiff" in vars(pipe), forwards, processors

    for task in TASKS:
        pipe = flux_pipeline(task)
        before = parts(pipe)
        assert cocodiff.wrap(pipe) is pipe and cocodiff.wrap(pipe) is pipe  # the second time changes nothing
        pipe(**flux_call(task, **CALLS["odd"]))
        assert cocodiff.unwrap(pipe) is pipe
        assert parts(pipe) == before
        assert torch.equal(pipe(**flux_call(task, **CALLS["odd"])).images, expected[task, "odd"])
        with pytest.raises(ValueError, match="not wrapped"):
            cocodiff.unwrap(pipe)
    return True


@pytest.mark.parametrize("ranks", [1, 2])
def test_unwrap_leaves_nothing_behind_and_pictures_are_bit_identical(ranks, expected):
    assert all(run_ranks(ranks, _wrap_and_unwrap, expected))


def _one_rank_wrapped(expected):
    import cocodiff

    for task in TASKS:
        pipe = cocodiff.wrap(flux_pipeline(task))
        assert torch.equal(pipe(**flux_call(task, **CALLS["odd"])).images, expected[task, "odd"])
        assert pipe.cocodiff.is_main and pipe.cocodiff.world_size == 1
    return True


def test_on_one_rank_wrap_changes_nothing(expected):
    assert run_ranks(1, _one_rank_wrapped, expected) == [True]


def _broken(what, expected):
    """The error of a pipeline in which one thing is wrong on purpose."""
    import cocodiff
    from cocodiff.models import joint

    pipe = cocodiff.wrap(flux_pipeline(), exchange="flat")
    engine, call = pipe.cocodiff.engine, CALLS["odd"]
    if what == "one exchange is a local copy":
        original = engine.flat.start

        def start(send, traffic, label, out=None):
            if label == "k":
                shape = sum(traffic.block(src, engine.rank) for src in engine.flat.order)
                return engine.lane(engine.mesh.ulysses).submit(
                    lambda x: torch.zeros(shape).copy_(x.repeat(2)[:shape]), send, label
                )
            return original(send, traffic, label, out)

        engine.flat.start = start
    if what == "one rank's rotation is off by a token" and engine.rank == 1:
        rotate = joint.rotate_pairs
        joint.rotate_pairs = lambda x, cos, sin: rotate(x, cos.roll(1, 0), sin.roll(1, 0))
    if what == "the gather swaps two shards":
        gather = engine.gather
        engine.gather = lambda x, stream: gather(x, stream).flip(1)
    return relative_error(pipe(**flux_call("text2image", **call)).images, expected["text2image", "odd"])


@pytest.mark.parametrize(
    "what",
    ["one exchange is a local copy", "one rank's rotation is off by a token", "the gather swaps two shards"],
)
def test_controls_a_broken_run_is_seen(what, expected):
    assert all(100 * LIMIT < error < float("inf") for error in run_ranks(2, _broken, what, expected))


def test_control_of_the_controls(expected):
    assert max(run_ranks(2, _broken, "nothing", expected)) < LIMIT
