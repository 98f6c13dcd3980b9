"""Nothing of a pipeline outlives it, whether it was unwrapped, dropped, or failed in a call; one call at a time."""

import gc
import threading
import weakref

import pytest

from tests.distributed.ranks import run_ranks
from tests.pipelines import flux_call, flux_pipeline, relative_error


def _dropped():
    import psutil
    import torch.distributed as dist

    import cocodiff

    process, held = psutil.Process(), []
    for _ in range(5):
        pipe = cocodiff.wrap(flux_pipeline())
        pipe(**flux_call("text2image"))
        weights = weakref.ref(pipe.transformer.transformer_blocks[0].ff.net[2].weight)
        del pipe
        gc.collect()
        held.append((process.num_threads(), process.num_fds(), len(dist.distributed_c10d._world.pg_map)))
        assert weights() is None
    return held


def test_pipelines_that_are_dropped_leave_nothing():
    for held in run_ranks(2, _dropped):
        # The first one joins, and that stays. What was closed may take a moment to go: less than one a round counts.
        assert all(last - second < 3 for second, last in zip(held[1], held[-1], strict=True)), held


def _freed_at_once():
    """Copies of a selective call may fill a device: they must not wait for the collector of cycles."""
    import cocodiff
    from cocodiff.selective.run import SelectiveCall

    made, make = [], SelectiveCall.__init__

    def recording(self, *args):
        made.append(weakref.ref(self))
        make(self, *args)

    SelectiveCall.__init__ = recording
    cluster = cocodiff.Cluster("test", (cocodiff.Level("node", 2, 1e-4, 1e-6, slow=True),))
    pipe = cocodiff.wrap(flux_pipeline(), cluster=cluster, transmission="balanced")
    gc.collect()
    gc.disable()
    pipe(**flux_call("text2image") | {"num_inference_steps": 8})
    gc.enable()
    return [one() is None for one in made]


def test_what_a_call_held_is_freed_with_it():
    assert run_ranks(2, _freed_at_once) == [[True], [True]]


def _failed():
    import cocodiff

    def full(*_):
        raise OSError("disk full")

    pipe = cocodiff.wrap(flux_pipeline())
    with pytest.raises(OSError, match="disk full"):
        pipe(**flux_call("text2image"), callback_on_step_end=full)
    images = pipe(**flux_call("text2image")).images  # and all is well again
    with pytest.raises(OSError, match="disk full"):
        pipe(**flux_call("text2image"), callback_on_step_end=full)
    weights = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    return images, weights() is None


def test_a_call_that_failed_keeps_nothing():
    expected = flux_pipeline()(**flux_call("text2image")).images
    for images, freed in run_ranks(2, _failed):
        assert freed and relative_error(images, expected) < 1e-5


def _two_threads():
    """The second call comes while the first is at a step: it is refused before it sends anything."""
    import cocodiff

    pipe, said = cocodiff.wrap(flux_pipeline()), []

    def again():
        try:
            pipe(**flux_call("text2image"))
        except cocodiff.errors.UsageError as error:
            said.append(str(error))

    def nested(pipe, step, time, tensors):
        thread = threading.Thread(target=again)
        thread.start()
        thread.join()
        return {}

    images = pipe(**flux_call("text2image"), callback_on_step_end=nested).images
    return images, said, relative_error(pipe(**flux_call("text2image")).images, images)


def test_a_second_call_at_the_same_time_is_refused():
    for _, said, again in run_ranks(2, _two_threads):
        assert len(said) == 3 and all("one call at a time" in text for text in said)
        assert again < 1e-6


def _without_a_transformer():
    import cocodiff

    parts = cocodiff.tiny_pipeline("flux").components | dict(transformer=None, vae=None)
    import diffusers

    pipe = cocodiff.wrap(diffusers.FluxPipeline(**parts))
    embeds, pooled, _ = pipe.encode_prompt(prompt="a red circle", prompt_2=None, max_sequence_length=16)
    assert pipe.cocodiff.plan is None and pipe.cocodiff.world_size == 2
    cocodiff.unwrap(pipe)
    return embeds, pooled


def test_a_pipeline_without_a_transformer_encodes():
    (one, _), (other, _) = run_ranks(2, _without_a_transformer)
    assert relative_error(one, other) == 0
