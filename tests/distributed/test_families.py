"""Whole pipelines of every other family on N ranks against one, and controls that break each on purpose."""

import pytest

from tests.distributed.draws import LIMIT, RANKS, build, check, draw, drawn
from tests.distributed.helpers import leave_out_exchange
from tests.distributed.ranks import run_ranks
from tests.families import PIPELINES, family_pipeline
from tests.pipelines import relative_error


@pytest.mark.parametrize("ranks", RANKS)
def test_every_family_draws_what_one_rank_draws(ranks, references):
    check(drawn(ranks, PIPELINES), references)


ONE_OF_EACH = {name.split()[0]: name for name in PIPELINES}.values()  # the last one of each family


def _broken(references):
    """The keys of one exchange stay where they are."""
    import cocodiff

    errors = {}
    for name in ONE_OF_EACH:
        pipe = cocodiff.wrap(build(name), exchange="flat")
        leave_out_exchange(pipe, "k")
        errors[name] = relative_error(draw(pipe, name, "odd"), references(name, "odd"))
    return errors


def test_control_a_broken_exchange_is_seen_in_every_family(references):
    references.prepare((name, "odd") for name in ONE_OF_EACH)
    for errors in run_ranks(2, _broken, references):
        assert min(errors.values()) > 100 * LIMIT, errors


def _broken_parts(references):
    """By pipeline of a family with something special: its error when that is broken."""
    import cocodiff
    from cocodiff.models.sd3 import layers as sd3
    from cocodiff.parallel.tokens import Tokens
    from cocodiff.pipeline import forward

    second, shard = sd3.DualLayer.parallel_branch, forward._shard

    def nothing(layer, state):
        added = second(layer, state)
        return None if added is None else 0 * added

    errors = {}
    for name, owner, label, instead in (
        # the mask does not follow the order of the exchange
        ("qwen text2image", Tokens, "exchanged", lambda tokens, whole, rows: whole),
        # the second attention adds nothing
        ("sd35 text2image", sd3.DualLayer, "parallel_branch", nothing),
        # every rank gets the timesteps of the first tokens: nothing else of Wan's is cut before it runs
        (
            "wan ti2v", forward, "_shard",
            lambda value, rows, *more: shard(value, slice(0, rows.stop - rows.start), *more),
        ),
    ):  # fmt: skip
        pipe, right = cocodiff.wrap(build(name)), getattr(owner, label)
        setattr(owner, label, instead)
        errors[name] = relative_error(draw(pipe, name, "batch"), references(name, "batch"))
        setattr(owner, label, right)
    return errors


def test_control_what_is_special_to_a_family_matters(references):
    references.prepare((name, "batch") for name in ("qwen text2image", "sd35 text2image", "wan ti2v"))
    for errors in run_ranks(2, _broken_parts, references):
        assert len(errors) == 3 and min(errors.values()) > 100 * LIMIT, errors


def _tiny(wrap):
    import torch

    import cocodiff

    found = {}
    for family in ("flux2", "sd3", "qwen", "wan"):
        pipe = cocodiff.tiny_pipeline(family)
        pipe.set_progress_bar_config(disable=True)
        if wrap:
            cocodiff.wrap(pipe)
        more = dict(num_frames=5) if family == "wan" else {}
        result = pipe(
            prompt="a red circle", height=48, width=32, num_inference_steps=2, output_type="np",
            generator=torch.Generator().manual_seed(3), **more,
        )  # fmt: skip
        found[family] = torch.from_numpy(result.frames if family == "wan" else result.images)
    return found


def test_tiny_pipelines_from_a_prompt_to_pixels():
    one_rank = run_ranks(1, _tiny, False)[0]
    for found in run_ranks(2, _tiny, True):
        errors = {family: relative_error(pixels, one_rank[family]) for family, pixels in found.items()}
        assert max(errors.values()) < LIMIT, errors
    assert all(pixels.std() > 0.01 for pixels in one_rank.values())


def _second_transformer_refused():
    import cocodiff
    from cocodiff.errors import ConfigError

    class Fork:
        def __call__(self, *args, **kwargs):
            raise AssertionError("never called")

    pipe = family_pipeline("wan22 t2v")
    attn = pipe.transformer_2.blocks[1].attn1
    known, attn.processor = attn.processor, Fork()
    try:
        cocodiff.wrap(pipe)
    except ConfigError as error:
        said = str(error)
    attn.processor = known
    untouched = all("forward" not in vars(module) for module in pipe.transformer.modules())
    cocodiff.unwrap(cocodiff.wrap(pipe))  # nothing is left that would be in the way
    return said, untouched


def test_what_is_not_known_is_refused_on_every_rank_and_leaves_nothing_behind():
    for said, untouched in run_ranks(2, _second_transformer_refused):
        assert "Fork" in said and "adding-a-model" in said and untouched
