"""What breaks selective transmission is seen; what cannot be is refused; what looks like real ranks is like them."""

import contextlib
import logging
import os

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.test_selective import STEPS, _call, _cluster, _pipeline, budget, shared
from tests.families import family_call, family_pipeline
from tests.pipelines import controlnet_pipeline, relative_error


def _said(error, action):
    with pytest.raises(error) as info:
        action()
    return str(info.value)


@contextlib.contextmanager
def _missed_update(rank):
    """One receiver forgets to take what it got, once."""
    from cocodiff.selective.copies import Held

    right, count = Held.update, [0]

    def wrong(self, rows, new, before, time):
        count[0] += 1
        if os.environ["RANK"] != str(rank) or count[0] != 20:
            right(self, rows, new, before, time)

    Held.update = wrong
    yield
    Held.update = right


@contextlib.contextmanager
def _wrong_index(rank):
    """One receiver puts rows where they do not belong."""
    from cocodiff.selective import residual

    right = residual.without_masks

    def wrong(parcel, payload):
        chosen, rows = right(parcel, payload)
        return (chosen.roll(1) if os.environ["RANK"] == str(rank) else chosen), rows

    residual.without_masks = wrong
    yield
    residual.without_masks = right


def _exact():
    return _pipeline()(**_call()).images


def _checks():
    import torch

    import cocodiff
    from cocodiff import Selective
    from cocodiff.errors import CopiesDifferError

    found, cluster = {}, _cluster(2, 2)

    def wrapped(**settings):
        return cocodiff.wrap(_pipeline(), cluster=cluster, **settings)

    pipe = wrapped(transmission=Selective(budget=budget(1 / 32), check=True))
    assert str(pipe.cocodiff.mesh).startswith("cfg 1 x ring 2 x ulysses 2"), "keys and values alone at two nodes"
    for name, control in {"missed update": _missed_update(3), "wrong index": _wrong_index(1)}.items():
        with control:
            found[name] = _said(CopiesDifferError, lambda: pipe(**_call()))
    pipe(**_call())  # and all is well again
    cocodiff.unwrap(pipe)

    pipe = wrapped(transmission=Selective(budget=1))
    exactly = wrapped()
    assert pipe.cocodiff.plan.coded_from is None
    assert torch.equal(pipe(**_call(3)).images, exactly(**_call(3)).images)
    assert exactly.cocodiff.report()["share"]["node"] == 1
    return found


def test_both_ends_are_compared():
    everyone = run_ranks(4, _checks, timeout_seconds=300)
    assert all(found == everyone[0] for found in everyone)
    assert len(everyone[0]) == 2
    assert all("differ between sender and receiver" in said for said in everyone[0].values()), everyone[0]


def _bounds(exact):
    import cocodiff
    from cocodiff import Selective

    found, cluster = {}, _cluster(1, 2)

    def wrapped(**settings):
        return cocodiff.wrap(_pipeline(), cluster=cluster, **settings)

    for ring in (1, 2):
        eight = wrapped(transmission=Selective(budget=1 / 2), ring_degree=ring)  # no coding has more
        found["8 bits", ring] = relative_error(eight(**_call()).images, exact)

    guarded = wrapped(transmission=Selective(budget=budget(1 / 32), max_error=0.05))
    free = wrapped(transmission=Selective(budget=budget(1 / 32)))
    errors = [relative_error(one(**_call()).images, exact) for one in (guarded, free)]
    guard = guarded.cocodiff.report()["guard"]
    assert errors[0] < errors[1] / 2 and free.cocodiff.report()["guard"] == []
    rungs = [one["rungs"] for one in guard]
    assert [one["step"] for one in guard] == list(range(STEPS)) and rungs[-1] > 0 and rungs == sorted(rungs), guard
    over = [step for step, one in enumerate(guard) if one["error"] > 0.05]
    assert all(rungs[step] > max(rungs[:step], default=0) for step in over if max(rungs[:step], default=0) < 6), guard
    found["guard"] = guard

    for most in (1 / 2, 1 / 4):
        rows = wrapped(transmission=Selective.v_major(budget(most), check=True), ring_degree=1)
        found["v_major", most] = relative_error(rows(**_call()).images, exact)
        share = shared(rows.cocodiff.report())
        assert share < most * 1.02, share
    return found


def test_errors_are_bounded():
    everyone = run_ranks(2, _bounds, run_ranks(1, _exact)[0])
    assert everyone[0] == everyone[1]
    found = everyone[0]
    assert max(found["8 bits", 1], found["8 bits", 2]) < 2e-3, found
    assert found["v_major", 1 / 2] < found["v_major", 1 / 4] < 0.5, found


class _Skipping:
    """A step cache that leaves one block out at every third step."""

    def __init__(self, block):
        self.block, self.calls, self.forward = block, 0, block.forward

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls % 3 == 2:
            return kwargs["encoder_hidden_states"], kwargs["hidden_states"]
        return self.forward(*args, **kwargs)


def _edges():
    import diffusers
    import torch

    import cocodiff
    from cocodiff import Selective
    from cocodiff.errors import ConfigError, MismatchError

    rank, said, records = int(os.environ["RANK"]), {}, []
    logging.getLogger("cocodiff").addHandler(handler := logging.Handler())
    handler.emit = lambda record: records.append(record.getMessage())
    cluster, half = _cluster(1, 2), Selective(budget=budget(1 / 8), check=True)

    def wrapped(pipe=None, **settings):
        return cocodiff.wrap(pipe or _pipeline(), **{"cluster": cluster, **settings})

    said["preset"] = _said(ConfigError, lambda: wrapped(transmission="fastest"))
    said["level"] = _said(ConfigError, lambda: wrapped(transmission=Selective(level="rack")))
    said["sequential"] = _said(ConfigError, lambda: wrapped(transmission=Selective.v_major(), schedule="sequential"))
    different = Selective(budget=1 / 8 if rank else 1 / 4)
    said["settings"] = _said(MismatchError, lambda: wrapped(transmission=different))
    tight = wrapped(transmission=Selective(budget=1e-4))
    said["budget"] = _said(ConfigError, lambda: tight(**_call()))

    fast = wrapped(transmission="balanced", cluster=_cluster(1, 2, slow=False))
    assert fast.cocodiff.plan.coded_from is None and fast.cocodiff.mesh.degrees.ring == 1
    assert rank or sum("sends everything" in text for text in records) == 1, records

    pipe = wrapped(transmission=half)
    shapes = [
        pipe(**_call(steps, **size)).images.shape
        for steps, size in ((STEPS, {}), (STEPS + 1, dict(height=48)), (3, {}))
    ]
    assert shapes[0] == shapes[2] != shapes[1]
    assert rank or sum("one of 3 may send 0.5" in text for text in records) == 1, records
    exact = wrapped(transmission="exact", ring_degree=2)  # the mesh of the selective one
    assert torch.equal(pipe(**_call(1)).images, exact(**_call(1)).images), "too short a run to send less"
    report = pipe.cocodiff.report()
    assert report["held_bytes"] == 0 and report["transmission"]["coded_layers"]["coded"] == 0

    def interrupt(pipe, step, time, tensors):
        pipe._interrupt = step == 3
        return {}

    for selective in (half, Selective(budget=budget(1 / 8))):  # the first compares its copies after the call
        pipe = wrapped(transmission=selective)
        pipe(**_call(), callback_on_step_end=interrupt)
        report = pipe.cocodiff.report()
        assert report["held_bytes"] > 0 and len(report["residual_error"]["steps"]) == 4, report

    heun = family_pipeline("sd35 text2image")
    heun.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()

    def times_that_come_again():
        call = family_call("sd35 text2image", height=36, width=28, text_len=7)
        return heun(**call | {"num_inference_steps": 10}).images

    alone = times_that_come_again()
    pipe = wrapped(heun, transmission=half, ring_degree=2)
    error = relative_error(times_that_come_again(), alone)
    assert error < 0.2 and len(pipe.cocodiff.report()["residual_error"]["steps"]) == 19, error

    image = torch.rand(1, 3, 36, 28, generator=torch.Generator().manual_seed(3))
    control = dict(control_image=image, controlnet_conditioning_scale=1.0)
    alone = controlnet_pipeline()(**_call(), **control).images
    pipe = wrapped(controlnet_pipeline(), transmission=half, pieces=4)  # what goes ahead is dropped: it is added to
    assert relative_error(pipe(**_call(), **control).images, alone) < 0.2

    pipe = wrapped(transmission=half)
    block = pipe.transformer.transformer_blocks[0]
    block.forward = _Skipping(block)
    try:
        pipe(**_call())
    except RuntimeError as error:  # a replaced forward is refused
        said["skipped"] = str(error)
    return said


def test_what_cannot_be_is_refused_and_what_is_odd_works():
    everyone = run_ranks(2, _edges, timeout_seconds=300)
    assert everyone[0] == everyone[1]
    expected = {
        "preset": "not one of 'exact', 'high', 'balanced', 'fast'",
        "level": "cluster 'test' has the levels gpu, node",
        "sequential": "v_major chooses rows by V",
        "settings": 'transmission: "Selective(budget=0.25',
        "budget": "the first step takes a bit an element and a byte a row",
        "skipped": "replaced",
    }
    for name, words in expected.items():
        assert words in everyone[0][name], (name, everyone[0][name])
