"""Calls and wraps that fail alike on all ranks: what follows works, nothing is kept, and nobody stops listening."""

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.test_selective import _call, _cluster, _pipeline
from tests.pipelines import flux_pipeline


def _after_a_failed_call():
    """A callback fails on all ranks in a ring where only some ranks encode; then the same pipeline is called again."""
    import cocodiff

    pipe = cocodiff.wrap(_pipeline(), cluster=_cluster(2, 2), ring_degree=4, transmission="balanced")

    def fail(pipe, step, time, tensors):
        raise OSError("on purpose")

    with pytest.raises(OSError, match="on purpose"):
        pipe(**_call(), callback_on_step_end=fail)
    return pipe(**_call()).images.isfinite().all().item()


def test_after_a_call_that_failed_alike_everywhere_the_next_one_runs():
    assert run_ranks(4, _after_a_failed_call) == [True] * 4


def _held_by_an_exception():
    """Bytes of copies that live while an exception out of the transformer is being handled."""
    import cocodiff
    from cocodiff.pipeline import forward
    from cocodiff.selective.run import SelectiveCall

    calls, make = [], SelectiveCall.__init__

    def recording(self, *args):
        calls.append(self)
        make(self, *args)

    SelectiveCall.__init__ = recording
    pipe = cocodiff.wrap(_pipeline(), cluster=_cluster(1, 2), transmission="balanced")
    forwards, held = [], []

    def out_of_memory(*given):
        forwards.append(1)
        if len(forwards) == 8:
            held.append(calls[0].copies.held_bytes)
            raise MemoryError("on purpose")
        return gather(*given)

    gather, forward.gather_rows = forward.gather_rows, out_of_memory
    try:
        pipe(**_call())
    except MemoryError:
        held.append(calls[0].copies.held_bytes)
    return held


def test_a_failed_call_keeps_no_copies():
    for before, after in run_ranks(2, _held_by_an_exception):
        assert before > 0 and after == 0


def _refused():
    """Wraps that all ranks refuse, and whether a guard was closed while its rank was still inside the wrap."""
    import cocodiff
    from cocodiff.launch.guard import Guard

    inside, close = [], Guard.close

    def recording(guard):
        inside.append(guard._mail.sign.depth)
        close(guard)

    Guard.close = recording

    class Fork:
        def __call__(self, *args, **kwargs):
            raise AssertionError("never called")

    def foreign_processor(pipe):
        pipe.transformer.transformer_blocks[1].attn.processor = Fork()

    def foreign_backend(pipe):
        pipe.transformer.set_attention_backend("_native_math")

    said = []
    for change, settings in (
        (lambda pipe: None, dict(ulysses_degree=3)),
        (foreign_processor, {}),
        (foreign_backend, dict(ring_degree=2)),
    ):
        pipe = flux_pipeline()
        change(pipe)
        with pytest.raises(cocodiff.CocodiffError) as caught:
            cocodiff.wrap(pipe, **settings)
        said.append(str(caught.value))
        assert "forward" not in vars(pipe.transformer) and "cocodiff" not in vars(pipe)
    return said, inside


def test_a_refused_wrap_reports_before_it_stops_listening():
    for said, inside in run_ranks(2, _refused):
        assert inside == [0, 0, 0], "the guard reports what failed when the wrap is left, and is closed after that"
        for text, words in zip(said, ("ulysses_degree 3 on 2 ranks", "Fork", "log-sum-exp"), strict=True):
            assert words in text
