"""Whole pipelines of every other family on N ranks against one, and controls that break each on purpose."""

import itertools

import pytest

from tests.distributed.ranks import run_ranks
from tests.families import PIPELINES, family_call, family_pipeline
from tests.pipelines import clusters, recorded_pieces, relative_error

LIMIT = 1e-5  # relative latent error in float32, after a whole run
CALLS = {  # odd sizes and prompts; a batch; fewer text tokens than ranks
    "odd": dict(height=36, width=28, text_len=7),
    "batch": dict(height=28, width=44, text_len=13, batch=2),
    "short": dict(height=20, width=28, text_len=1),
}
VIDEO = {"odd": dict(height=48, width=80, text_len=7), "batch": dict(height=32, width=48, text_len=13, batch=2)}


def _calls(name):
    return VIDEO if name.startswith("wan") else CALLS


def _draw(pipe, name, call):
    result = pipe(**family_call(name, **_calls(name)[call]))
    return result.frames if name.startswith("wan") else result.images


def _references():
    """What one rank draws without cocodiff."""
    return {(name, call): _draw(family_pipeline(name), name, call) for name in PIPELINES for call in _calls(name)}


@pytest.fixture(scope="module")
def expected():
    return run_ranks(1, _references)[0]


def _errors(ranks, expected):
    import cocodiff
    from cocodiff import plan as costs

    costs.ROWS_PER_PIECE = 2  # up to four pieces also of small pictures
    variants = itertools.cycle(itertools.product(clusters(ranks), ("flat", "staged")))
    errors, cut = {}, 0
    for place, name in enumerate(PIPELINES):
        for index, call in enumerate(_calls(name)):
            if ranks < 8 and index == ranks % 3 and not name.startswith("wan"):  # each call on most numbers of ranks
                continue
            if ranks == 8 and index != place % len(_calls(name)):  # one call each: four ranks to a core are slow
                continue
            (kind, cluster), exchange = next(variants)
            pipe = cocodiff.wrap(family_pipeline(name), exchange=exchange, cluster=cluster)
            counts = recorded_pieces(pipe.cocodiff.engine)
            errors[name, call, kind, exchange] = relative_error(_draw(pipe, name, call), expected[name, call])
            assert max(counts) == 1 or kind.endswith("pieces"), (name, kind, counts)
            cut += max(counts) > 1
            cocodiff.unwrap(pipe)
    assert cut >= len(errors) / 4  # where every rank has two tokens or more
    return errors


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
def test_every_family_draws_what_one_rank_draws(ranks, expected):
    for errors in run_ranks(ranks, _errors, ranks, expected):
        assert {name for name, *_ in errors} == set(PIPELINES)
        assert max(errors.values()) < LIMIT, {key: error for key, error in errors.items() if error >= LIMIT}


def _textbook(expected):
    import cocodiff

    errors = {}
    for name in PIPELINES:
        pipe = cocodiff.wrap(family_pipeline(name), schedule="sequential")
        errors[name] = relative_error(_draw(pipe, name, "odd"), expected[name, "odd"])
    return errors


def test_the_textbook_order_draws_the_same(expected):
    for errors in run_ranks(2, _textbook, expected):
        assert max(errors.values()) < LIMIT, errors


def _broken(expected):
    """The keys of one exchange stay where they are."""
    import cocodiff

    errors = {}
    for name in PIPELINES:
        pipe = cocodiff.wrap(family_pipeline(name), exchange="flat")
        engine = pipe.cocodiff.engine
        start = engine.flat.start

        def local(send, traffic, label, out=None, engine=engine, start=start):
            if label == "k":
                numel = sum(traffic.block(source, engine.rank) for source in engine.flat.order)
                return engine.lane(engine.mesh.ulysses).submit(lambda x: x.repeat(2)[:numel].clone(), send, label)
            return start(send, traffic, label, out)

        engine.flat.start = local
        errors[name] = relative_error(_draw(pipe, name, "odd"), expected[name, "odd"])
    return errors


def test_control_a_broken_exchange_is_seen_in_every_family(expected):
    for errors in run_ranks(2, _broken, expected):
        assert min(errors.values()) > 100 * LIMIT, errors


def _broken_part(name, expected):
    import cocodiff
    from cocodiff.models.sd3 import layers as sd3
    from cocodiff.parallel.tokens import Tokens
    from cocodiff.pipeline import forward as door

    pipe = cocodiff.wrap(family_pipeline(name))
    if name == "qwen text2image":  # the mask does not follow the order of the exchange
        Tokens.exchanged = lambda tokens, whole, rows: whole
    elif name == "sd35 text2image":  # the second attention adds nothing
        second = sd3.DualLayer.parallel_branch

        def nothing(layer, state):
            added = second(layer, state)
            return None if added is None else 0 * added

        sd3.DualLayer.parallel_branch = nothing
    elif name == "wan ti2v":  # every rank gets the timesteps of the first tokens: nothing else is cut at Wan's door
        shard = door._shard
        door._shard = lambda value, rows, *more: shard(value, slice(0, rows.stop - rows.start), *more)
    return relative_error(_draw(pipe, name, "batch"), expected[name, "batch"])


@pytest.mark.parametrize("name", ["qwen text2image", "sd35 text2image", "wan ti2v"])
def test_control_what_is_special_to_a_family_matters(name, expected):
    assert min(run_ranks(2, _broken_part, name, expected)) > 100 * LIMIT


def _tiny(wrap):
    import torch

    import cocodiff

    drawn = {}
    for family in ("flux2", "sd3", "qwen", "wan"):
        pipe = cocodiff.tiny_pipeline(family)
        pipe.set_progress_bar_config(disable=True)
        if wrap:
            cocodiff.wrap(pipe)
        more = dict(num_frames=5) if family == "wan" else {}
        result = pipe(
            prompt="a red circle", height=64, width=64, num_inference_steps=2, output_type="np",
            generator=torch.Generator().manual_seed(3), **more,
        )  # fmt: skip
        drawn[family] = torch.from_numpy(result.frames if family == "wan" else result.images)
    return drawn


def test_tiny_pipelines_from_a_prompt_to_pixels():
    alone = run_ranks(1, _tiny, False)[0]
    for drawn in run_ranks(3, _tiny, True):
        errors = {family: relative_error(pixels, alone[family]) for family, pixels in drawn.items()}
        assert max(errors.values()) < LIMIT, errors
    assert all(pixels.std() > 0.01 for pixels in alone.values())


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
