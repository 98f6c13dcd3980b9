"""Whole FLUX pipelines on N ranks against one: the promise of the README, and controls that break it on purpose."""

import pytest
import torch

from tests.distributed.draws import FLUX, LIMIT, RANKS, build, check, draw, drawn
from tests.distributed.helpers import leave_out_exchange
from tests.distributed.ranks import run_ranks
from tests.pipelines import relative_error

TEXT2IMAGE = "flux text2image"


@pytest.mark.parametrize("ranks", RANKS)
def test_every_pipeline_draws_what_one_rank_draws(ranks, references):
    check(drawn(ranks, FLUX), references)


@pytest.fixture
def odd(references):
    return references.prepare((name, "odd") for name in FLUX)


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


def test_the_tiny_pipeline_draws_what_one_rank_draws():
    one_rank = run_ranks(1, _draw_tiny)[0]
    for latents in run_ranks(3, _draw_tiny):
        errors = [relative_error(one, other) for one, other in zip(latents, one_rank, strict=True)]
        assert max(errors) < LIMIT, errors


def _parts(pipe):
    named = dict(pipe.transformer.named_modules())
    forwards = {name: vars(module).get("forward") for name, module in named.items()}
    processors = {name: getattr(module, "processor", None) for name, module in named.items()}
    return type(pipe), "cocodiff" in vars(pipe), forwards, processors


def _wrap_and_unwrap(references):
    import cocodiff

    for name in FLUX:
        pipe = build(name)
        before = _parts(pipe)
        assert cocodiff.wrap(pipe) is pipe and cocodiff.wrap(pipe) is pipe  # the second time changes nothing
        latents = draw(pipe, name, "odd")
        if pipe.cocodiff.world_size == 1:
            assert pipe.cocodiff.is_main and torch.equal(latents, references(name, "odd"))
        assert cocodiff.unwrap(pipe) is pipe
        assert _parts(pipe) == before
        assert torch.equal(draw(pipe, name, "odd"), references(name, "odd"))
        with pytest.raises(ValueError, match="not wrapped"):
            cocodiff.unwrap(pipe)


def test_on_one_rank_wrap_changes_nothing(odd):
    run_ranks(1, _wrap_and_unwrap, odd)


def test_unwrap_leaves_nothing_behind_and_pictures_are_bit_identical(odd):
    run_ranks(2, _wrap_and_unwrap, odd)


def _broken(references):
    """By what is wrong on purpose: the error of a pipeline."""
    import cocodiff
    from cocodiff.models import joint
    from cocodiff.pipeline import forward

    def error(breaking):
        pipe = cocodiff.wrap(build(TEXT2IMAGE), exchange="flat")
        breaking(pipe)
        return relative_error(draw(pipe, TEXT2IMAGE, "odd"), references(TEXT2IMAGE, "odd"))

    rotate, gather = joint.rotate_pairs, forward.gather_rows

    def rotation(pipe):
        if pipe.cocodiff.rank == 1:
            joint.rotate_pairs = lambda x, cos, sin: rotate(x, cos.roll(1, 0), sin.roll(1, 0))

    def swapped(pipe):
        joint.rotate_pairs = rotate
        forward.gather_rows = lambda x, *where: gather(x, *where).flip(1)

    def nothing(pipe):
        forward.gather_rows = gather

    found = {"one exchange is a local copy": error(lambda pipe: leave_out_exchange(pipe, "k"))}
    found["one rank's rotation is off by a token"] = error(rotation)
    found["the gather swaps two shards"] = error(swapped)
    return found, error(nothing)


def test_controls_a_broken_run_is_seen(odd):
    for found, right in run_ranks(2, _broken, odd):
        assert len(found) == 3 and all(100 * LIMIT < error < float("inf") for error in found.values()), found
        assert right < LIMIT, "the control of the controls"
