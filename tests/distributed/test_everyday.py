"""What users combine with a pipeline works, added before or after wrapping. Nothing is silently local."""

import pytest
import torch

from tests.distributed.draws import build, draw
from tests.distributed.ranks import run_ranks
from tests.pipelines import controlnet_pipeline, flux_call, flux_pipeline, relative_error

LIMIT = 1e-5


def _add_lora(pipe, *targets):
    from peft import LoraConfig

    targets = list(targets or ("to_q", "to_k", "to_v", "to_out.0", "add_v_proj", "proj_mlp", "proj_out"))
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "style")
    generator = torch.Generator().manual_seed(5)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora" in name:
            parameter.data.normal_(std=0.2, generator=generator)


def _add_lora_to_one_matrix(pipe):
    """FLUX.2's single blocks make Q, K, V and the MLP's input with one matrix, of which cocodiff takes rows apart."""
    _add_lora(pipe, "to_qkv_mlp_proj")


def _fuse(pipe):
    pipe.transformer.fuse_qkv_projections()


def _offload(pipe):
    from accelerate import cpu_offload

    for part in (pipe.transformer, pipe.vae):
        cpu_offload(part, execution_device=torch.device("cpu"))


def _group_offload(pipe):
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    apply_group_offloading(pipe.transformer, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def _backend(pipe):
    pipe.transformer.set_attention_backend("_native_math")


ADDITIONS = {
    "lora": _add_lora,
    "lora on one matrix": _add_lora_to_one_matrix,
    "fused": _fuse,
    "offload": _offload,
    "group offload": _group_offload,
    "backend": _backend,
}


def _with(name):
    """Errors with an addition made before, and after, wrapping; and how far it moves the picture by itself."""
    import cocodiff

    add = ADDITIONS[name]
    pipeline = "flux2 text2image" if name == "lora on one matrix" else "flux text2image"

    def drawn(pipe):
        return draw(pipe, pipeline, "odd")

    expected = build(pipeline)
    plain = drawn(expected)
    add(expected)
    reference = drawn(expected)
    before = build(pipeline)
    add(before)
    cocodiff.wrap(before, pieces=4)
    after = cocodiff.wrap(build(pipeline), pieces=4)
    add(after)
    errors = [relative_error(drawn(pipe), reference) for pipe in (before, after)]
    return errors, relative_error(plain, reference)


@pytest.mark.parametrize("name", ADDITIONS)
def test_additions_before_and_after_wrapping(name):
    for errors, moved in run_ranks(2, _with, name):
        assert max(errors) < LIMIT, errors
        if name == "lora":
            assert moved > 0.01  # the control: without it the picture is another


def _scaled_and_in_inference_mode():
    """A LoRA's scale, inference mode and autocast reach every rank's part."""
    import cocodiff

    errors = []
    alone, together = flux_pipeline(), flux_pipeline()
    _add_lora(alone)
    cocodiff.wrap(together, pieces=4)  # lanes write into memory that compute has made in its mode
    _add_lora(together)
    scaled = dict(joint_attention_kwargs={"scale": 0.3})
    with torch.inference_mode():
        reference = alone(**flux_call("text2image"), **scaled).images
        errors.append(relative_error(together(**flux_call("text2image"), **scaled).images, reference))
    with torch.autocast("cpu", torch.bfloat16):
        reference = alone(**flux_call("text2image")).images
        errors.append(relative_error(together(**flux_call("text2image")).images, reference) / 1e3)  # bfloat16
    return errors


def test_lora_scale_inference_mode_and_autocast():
    for errors in run_ranks(2, _scaled_and_in_inference_mode):
        assert max(errors) < LIMIT, errors


def _hook_taken_off_between_calls():
    """What enable_model_cpu_offload does around every call: its hook goes and comes, our forward must stay."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    import cocodiff

    pipe = flux_pipeline()
    alone = pipe(**flux_call("text2image")).images
    add_hook_to_module(pipe.transformer, ModelHook())
    cocodiff.wrap(pipe)
    errors = [relative_error(pipe(**flux_call("text2image")).images, alone)]
    remove_hook_from_module(pipe.transformer)
    errors.append(relative_error(pipe(**flux_call("text2image")).images, alone))
    add_hook_to_module(pipe.transformer, ModelHook())
    errors.append(relative_error(pipe(**flux_call("text2image")).images, alone))
    cocodiff.unwrap(pipe)
    assert torch.equal(pipe(**flux_call("text2image")).images, alone)
    return errors


def test_offload_hooks_that_come_and_go():
    for errors in run_ranks(2, _hook_taken_off_between_calls):
        assert max(errors) < LIMIT, errors


def _backend_calls():
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    import cocodiff

    name, calls = AttentionBackendName("_native_math"), []
    function = _AttentionBackendRegistry._backends[name]
    _AttentionBackendRegistry._backends[name] = lambda **kwargs: (calls.append(1), function(**kwargs))[1]
    pipe = cocodiff.wrap(flux_pipeline())
    pipe.transformer.set_attention_backend("_native_math")
    pipe(**flux_call("text2image"))
    return len(calls)


def test_the_attention_backend_is_honoured():
    assert all(calls >= 2 * 3 * 4 for calls in run_ranks(2, _backend_calls))  # two branches, three steps, four layers


def _shared_transformer():
    """from_pipe: two wrapped pipelines over one transformer, and the class form of wrap."""
    import diffusers

    import cocodiff

    alone = flux_pipeline("img2img")(**flux_call("img2img")).images
    pipe = cocodiff.wrap(flux_pipeline())
    both = cocodiff.wrap(diffusers.FluxImg2ImgPipeline).from_pipe(pipe)
    errors = [relative_error(both(**flux_call("img2img")).images, alone)]
    text = pipe(**flux_call("text2image")).images
    cocodiff.unwrap(pipe)
    errors.append(relative_error(both(**flux_call("img2img")).images, alone))
    cocodiff.unwrap(both)
    assert "forward" not in vars(pipe.transformer)
    assert torch.equal(both(**flux_call("img2img")).images, alone)
    assert relative_error(pipe(**flux_call("text2image")).images, text) < LIMIT
    parts = {name: part for name, part in flux_pipeline().components.items()}
    made = cocodiff.wrap(diffusers.FluxPipeline, schedule="sequential")(**parts)
    errors.append(relative_error(made(**flux_call("text2image")).images, text))
    assert made.cocodiff.config.schedule == "sequential"
    return errors


def test_pipelines_that_share_a_transformer_and_the_class_form():
    for errors in run_ranks(2, _shared_transformer):
        assert max(errors) < LIMIT, errors


def _controlled():
    import cocodiff
    from cocodiff.layer import LayerInFlight

    pipe, call = controlnet_pipeline(), flux_call("text2image")
    call = {name: value for name, value in call.items() if "negative" not in name and name != "true_cfg_scale"}
    image = torch.rand(1, 3, 36, 28, generator=torch.Generator().manual_seed(3))
    call |= dict(control_image=image, controlnet_conditioning_scale=1.0)
    uncontrolled = pipe(**{**call, "controlnet_conditioning_scale": 0.0}).images
    pipe = controlnet_pipeline()
    alone = pipe(**{**call, "generator": torch.Generator().manual_seed(1)}).images
    cocodiff.wrap(pipe, pieces=4)
    dropped, drop = [], LayerInFlight.drop
    LayerInFlight.drop = lambda flight: dropped.append(1) or drop(flight)
    together = pipe(**{**call, "generator": torch.Generator().manual_seed(1)}).images
    return relative_error(together, alone), relative_error(uncontrolled, alone), len(dropped)


def test_controlnet():
    """What it adds between blocks makes them drop what went ahead: once in each forward, then nothing goes ahead."""
    for error, moved, dropped in run_ranks(3, _controlled):
        assert error < LIMIT and moved > 0.01, (error, moved)
        assert dropped == 3, dropped  # steps


def _saved_and_loaded(folder):
    import diffusers

    import cocodiff

    none = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = cocodiff.wrap(diffusers.FluxPipeline).from_pretrained(folder, **none)
    latents = pipe(**flux_call("text2image")).images
    if pipe.cocodiff.is_main:
        pipe.save_pretrained(folder + "-again")  # a wrapped pipeline saves as what it was
        loaded = diffusers.FluxPipeline.from_pretrained(folder + "-again", **none)
        assert relative_error(loaded(**flux_call("text2image")).images, latents) < LIMIT
    return type(pipe).__name__, pipe.cocodiff.world_size, latents


def test_from_pretrained_of_the_class_form(tmp_path):
    pipe = flux_pipeline()
    pipe.save_pretrained(tmp_path)
    wanted = pipe(**flux_call("text2image")).images
    for name, ranks, latents in run_ranks(2, _saved_and_loaded, str(tmp_path)):
        assert (name, ranks) == ("FluxPipeline", 2)
        assert relative_error(latents, wanted) < LIMIT


def _progress(capture):
    import contextlib
    import io

    import cocodiff

    pipe = flux_pipeline()
    pipe.set_progress_bar_config(disable=False)
    cocodiff.wrap(pipe)
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        pipe(**flux_call("text2image"))
    assert pipe._progress_bar_config == {"disable": False}
    return bool(printed.getvalue()), pipe.cocodiff.is_main


def test_progress_bars_on_rank_zero_only():
    for shown, is_main in run_ranks(2, _progress, None):
        assert shown == is_main
