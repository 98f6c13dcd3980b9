"""Guidance is seen by what the pipeline does; what is no pair of calls on two halves is an error on all ranks."""

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.families import family_pipeline
from tests.pipelines import relative_error

LIMIT = 1e-5


def _classes():
    """Users' subclasses: all keywords passed on; guidance that only the inner call has; arguments by position."""
    import diffusers

    class Passing(diffusers.FluxPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    class Deciding(diffusers.FluxPipeline):
        def __call__(self, scale, call):
            return super().__call__(**call, true_cfg_scale=scale)

    return Passing, Deciding


def _subclasses():
    import cocodiff
    from cocodiff.pipeline.forward import ShardedForward
    from tests.pipelines import flux_call, flux_pipeline

    Passing, Deciding = _classes()
    errors, ran, on_shards = {}, [], ShardedForward.on_shards
    ShardedForward.on_shards = lambda forward, *given: ran.append(forward) or on_shards(forward, *given)
    expected = flux_pipeline()(**flux_call("text2image")).images
    for kind in (Passing, Deciding):
        pipe = cocodiff.wrap(kind(**flux_pipeline().components), cfg_degree=2)
        pipe.set_progress_bar_config(disable=True)
        call = flux_call("text2image")
        ran.clear()
        given = (call.pop("true_cfg_scale"), call) if kind is Deciding else ()
        images = (pipe(*given) if given else pipe(**call)).images
        errors[kind.__name__] = relative_error(images, expected), len(ran)
        assert type(pipe).__name__ == kind.__name__ and isinstance(pipe, kind)
        cocodiff.unwrap(pipe)
        assert type(pipe) is kind
    pipe = cocodiff.wrap(family_pipeline("wan t2v"))
    with pytest.raises(TypeError, match="WanPipeline.__call__: .*promt"):
        pipe(promt="a cat")
    return errors


def test_subclasses_of_users_are_guided_as_diffusers_call_is():
    for errors in run_ranks(2, _subclasses):
        for name, (error, ran) in errors.items():
            assert error < LIMIT and ran == 3, (name, error, ran)  # one branch of each of three steps


def _loop(calls, steps):
    """A user's own sampling loop: `calls` computes a step's prediction from the transformer, a text and a negative."""
    import diffusers

    class Own(diffusers.WanPipeline):
        @torch.no_grad()
        def __call__(self, text, negative, guidance_scale=2.0):
            x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
            self.scheduler.set_timesteps(steps)
            for time in self.scheduler.timesteps:
                run = lambda text: self.transformer(x, time.expand(1), text, return_dict=False)[0]  # noqa: B023, E731
                x = self.scheduler.step(calls(run, text, negative), time, x)[0]
            return x

    return Own


def _pairs(run, text, negative):
    first = run(text)[:, :, :]
    return first + 2.0 * (first - run(negative))


def _read_too_early(run, text, negative):
    first = 2.0 * run(text)
    return first - run(negative)


def _three(run, text, negative):
    return run(text) + run(2 * text) - run(negative)


def _one(run, text, negative):
    return run(text)


def _loops():
    import cocodiff

    texts = torch.randn(2, 1, 8, 48, generator=torch.Generator().manual_seed(1))
    said = {}
    for steps in (1, 3):
        for calls in (_pairs, _read_too_early, _three, _one):
            parts = cocodiff.tiny_pipeline("wan").components
            expected = _loop(calls, steps)(**parts)(*texts)
            pipe = cocodiff.wrap(_loop(calls, steps)(**cocodiff.tiny_pipeline("wan").components), cfg_degree=2)
            try:
                said[calls.__name__, steps] = relative_error(pipe(*texts), expected)
            except cocodiff.errors.PatchError as error:
                said[calls.__name__, steps] = str(error)
    return said


def test_what_is_no_pair_of_calls_is_the_same_error_on_all_ranks():
    everyone = run_ranks(2, _loops)
    assert everyone[0] == everyone[1]
    for (name, steps), said in everyone[0].items():
        if name == "_pairs":
            assert said < LIMIT, (name, steps, said)
        else:
            assert "expected two calls" in said and "cfg_degree=1" in said, (name, steps, said)


def _cut_off(degree):
    """Two pictures a prompt, and a callback that cuts guidance off: embeddings of one row beside latents of two."""
    from diffusers.callbacks import SD3CFGCutoffCallback

    import cocodiff

    pipe = cocodiff.tiny_pipeline("sd3")
    pipe.set_progress_bar_config(disable=True)
    if degree:
        cocodiff.wrap(pipe, cfg_degree=degree)
    return pipe(
        "a red circle",
        num_images_per_prompt=2, guidance_scale=4.0, num_inference_steps=5, output_type="latent",
        generator=torch.Generator().manual_seed(1), callback_on_step_end=SD3CFGCutoffCallback(cutoff_step_ratio=0.4),
    ).images  # fmt: skip


def test_rows_that_are_for_the_whole_batch_stay_whole():
    expected = run_ranks(1, _cut_off, 0)[0]
    for images in run_ranks(2, _cut_off, 2):
        assert relative_error(images, expected) < LIMIT
