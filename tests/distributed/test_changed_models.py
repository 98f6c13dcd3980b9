"""Models that were changed before or after wrap: the picture one rank draws, or a refusal on all ranks by name."""

import functools

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.families import family_call, family_pipeline
from tests.pipelines import flux_call, flux_pipeline, relative_error

LIMIT = 1e-5


def _sd3():
    return family_pipeline("sd3 text2image")


def _sd3_call():
    return family_call("sd3 text2image", height=36, width=28, text_len=7)


def _add_lora(transformer, target):
    from peft import LoraConfig

    transformer.add_adapter(LoraConfig(r=2, target_modules=[target], init_lora_weights=False), "style")
    for name, weight in transformer.named_parameters():
        if "lora" in name:
            weight.data.fill_(0.1)


def _unfuse(pipe):
    """diffusers leaves `fused_projections` set: the stale matrix must not be read, and the adapter not be lost."""
    pipe.transformer.fuse_qkv_projections()
    pipe.transformer.unfuse_qkv_projections()
    _add_lora(pipe.transformer, "to_q")


def _foreign_processor(pipe):
    from diffusers.models.transformers import transformer_flux

    class FluxAttnProcessor(transformer_flux.FluxAttnProcessor):  # of the same name
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    for block in pipe.transformer.transformer_blocks:
        block.attn.processor = FluxAttnProcessor()


def _foreign_positions(pipe):
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    class Scaled(FluxPosEmbed):
        def forward(self, ids):
            return super().forward(ids * 8 / ids.max().clamp(min=1))

    pipe.transformer.pos_embed = Scaled(10000, [4, 4, 4])


def _patched_norm(pipe):
    norm = pipe.transformer.transformer_blocks[0].norm1.norm
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)


def _patched_class(pipe):
    kind = type(pipe.transformer.transformer_blocks[0].ff)
    right = kind.forward

    @functools.wraps(right)  # it looks like diffusers' own by its name and module
    def forward(self, *args, **kwargs):
        return right(self, *args, **kwargs)

    kind.forward = forward
    return lambda: setattr(kind, "forward", right)


def _hooked(name):
    return lambda pipe: pipe.transformer.get_submodule(name).register_forward_hook(lambda *given: given[-1])


def _another_block(pipe):
    pipe.transformer.transformer_blocks[1] = flux_pipeline(seed=9).transformer.transformer_blocks[1]


def _one_block_less(pipe):
    del pipe.transformer.single_transformer_blocks[1]


REFUSED = {  # what is said, of changes before and after wrap
    "processor": (_foreign_processor, "FluxAttnProcessor"),
    "positions": (_foreign_positions, "pos_embed"),
    "norm": (_patched_norm, "norm1.norm"),
    "class": (_patched_class, "FeedForward"),
    "hook on a norm": (_hooked("transformer_blocks.0.norm1.linear"), "norm1.linear"),
    "hook on the embedder": (_hooked("context_embedder"), "context_embedder"),
    "hook on a feed-forward": (_hooked("transformer_blocks.1.ff"), "transformer_blocks.1.ff"),
}
REFUSED_AFTER = {"block": (_another_block, "blocks of the transformer"), "blocks": (_one_block_less, "3 now, 4 then")}


def _said(change, after):
    import cocodiff

    pipe, undo = flux_pipeline(), None
    try:
        if not after:
            undo = change(pipe)
        cocodiff.wrap(pipe)
        if after:
            undo = change(pipe)
        pipe(**flux_call("text2image"))
    except cocodiff.CocodiffError as error:
        return str(error)
    finally:
        if callable(undo):
            undo()
    return "nothing was refused"


def _refusals():
    said = {(name, after): _said(change, after) for name, (change, _) in REFUSED.items() for after in (False, True)}
    return said | {(name, True): _said(change, True) for name, (change, _) in REFUSED_AFTER.items()}


def test_what_is_not_diffusers_own_is_refused_by_name_on_all_ranks():
    words = {name: text for name, (_, text) in {**REFUSED, **REFUSED_AFTER}.items()}
    for said in run_ranks(2, _refusals):
        for (name, after), text in said.items():
            assert words[name] in text, (name, after, text)


def _right():
    """Changes that cocodiff follows; each with how far it moves the picture, so that following is seen."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend

    import cocodiff

    found, plain = {}, _sd3()(**_sd3_call()).images
    alone = _sd3()
    _unfuse(alone)
    expected = alone(**_sd3_call()).images
    pipe = _sd3()
    _unfuse(pipe)
    found["unfused"] = relative_error(cocodiff.wrap(pipe)(**_sd3_call()).images, expected)
    moved = relative_error(plain, expected)

    flux = flux_pipeline()
    flux.transformer.register_forward_hook(lambda module, args, output: (2 * output[0],))  # it sees whole pictures
    expected = flux(**flux_call("text2image")).images
    found["hook on the transformer"] = relative_error(cocodiff.wrap(flux)(**flux_call("text2image")).images, expected)

    name = AttentionBackendName("_native_math")
    native = _AttentionBackendRegistry._backends[name]
    _AttentionBackendRegistry._backends[name] = lambda **given: 0.9 * native(**given)
    with attention_backend("_native_math"):  # for all models, as the environment variable sets it
        found["SD3 asks no back end"] = relative_error(cocodiff.wrap(_sd3())(**_sd3_call()).images, plain)
        expected = flux_pipeline()(**flux_call("text2image")).images
        pipe = cocodiff.wrap(flux_pipeline())
        found["FLUX asks it"] = relative_error(pipe(**flux_call("text2image")).images, expected)
        with pytest.raises(cocodiff.errors.ConfigError, match="log-sum-exps"):
            cocodiff.wrap(flux_pipeline(), ring_degree=2)
    return found, moved


def test_what_can_be_followed_is_right():
    for found, moved in run_ranks(2, _right):
        assert max(found.values()) < LIMIT, found
        assert moved > 1e-3, moved


def _differing():
    """What is not the same on both ranks, as deep as it may be."""
    import os

    import cocodiff

    rank, said = int(os.environ["RANK"]), {}

    def message(action):
        with pytest.raises(cocodiff.errors.MismatchError) as caught:
            action()
        return str(caught.value)

    pipe = flux_pipeline()
    pipe.transformer.transformer_blocks[1].ff.net[2].weight.data[-1, -1] += rank  # one element, the last
    said["weights of transformer"] = message(lambda: cocodiff.wrap(pipe))
    pipe = flux_pipeline()
    next(reversed([*pipe.vae.parameters()])).data.view(-1)[-1] += rank
    said["weights of vae"] = message(lambda: cocodiff.wrap(pipe))
    pipe = cocodiff.wrap(flux_pipeline())
    pipe.scheduler.register_to_config(shift=3.0 + rank)
    said["configuration of the scheduler"] = message(lambda: pipe(**flux_call("text2image")))
    pipe = cocodiff.wrap(flux_pipeline())

    def last(pipe, step, time, tensors):
        return {"latents": tensors["latents"] + rank} if step == 2 else {}

    said["returned differs"] = message(lambda: pipe(**flux_call("text2image"), callback_on_step_end=last))
    other = flux_pipeline("img2img")
    other.transformer = pipe.transformer  # wrapped as another pipeline's
    call = flux_call("img2img") | {"generator": torch.Generator().manual_seed(rank)}
    said["cocodiff.wrap(that)"] = message(lambda: other(**call))
    return said


def test_ranks_that_differ_are_told_where():
    for said in run_ranks(2, _differing):
        for words, text in said.items():
            assert words in text, (words, text)


def _rounded(far):
    """An encoder whose outputs differ between ranks, by the last bits or by more."""
    import os

    import cocodiff

    pipe = flux_pipeline()
    right, rank = type(pipe).encode_prompt, int(os.environ["RANK"])

    def encode(**given):
        embeds, pooled, ids = right(pipe, **given)
        return embeds * (1 + far * rank), pooled * (1 + far * rank), ids

    pipe.encode_prompt = encode
    cocodiff.wrap(pipe)
    try:
        return pipe(**flux_call("text2image")).images
    except cocodiff.errors.MismatchError as error:
        return str(error)


def test_the_last_bits_of_an_encoder_do_not_matter():
    expected = flux_pipeline()(**flux_call("text2image")).images
    one, other = run_ranks(2, _rounded, 3e-7)
    assert torch.equal(one, other) and relative_error(one, expected) < LIMIT  # both draw what rank 0 encoded
    assert all("not the same on all ranks" in said for said in run_ranks(2, _rounded, 3e-2))


def _broken_pictures():
    import logging

    import cocodiff

    records = []
    logging.getLogger("cocodiff").addHandler(handler := logging.Handler())
    handler.emit = lambda record: records.append(record.getMessage())

    def overflow(pipe, step, time, tensors):
        return {"latents": tensors["latents"] * (float("inf") if step == 1 else 1)}

    pipe = cocodiff.wrap(flux_pipeline())
    for _ in range(2):
        pipe(**flux_call("text2image"), callback_on_step_end=overflow)
    dark = cocodiff.wrap(flux_pipeline())
    dark(**flux_call("text2image"), callback_on_step_end=lambda p, s, t, given: {"latents": 0 * given["latents"]})
    return [text for text in records if "finite" in text or "black" in text]


def test_broken_pictures_are_said_once():
    said, nothing = run_ranks(2, _broken_pictures)
    assert nothing == [] and len(said) == 2, said  # on rank 0 alone
    assert "at step 1 of 3" in said[0] and "black" in said[1], said
