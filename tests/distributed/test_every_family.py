"""What is added to a model, and float16, in every family: as on one rank, and not without effect."""

import torch

from tests.distributed.draws import arguments, build, draw
from tests.distributed.ranks import run_ranks
from tests.pipelines import relative_error

NAMES = ("flux text2image", "flux2 text2image", "sd35 text2image", "qwen text2image", "wan t2v")
TARGETS = {
    "wan t2v": ["to_q", "to_v", "to_out.0", "ffn.net.2"],
    "flux2 text2image": ["to_qkv_mlp_proj", "to_q", "to_out.0"],
}
# Qwen-Image's module refuses to fuse, and diffusers' fused processor fails on SD3.5's second attention.
FUSED = ("flux text2image", "flux2 text2image", "sd3 text2image", "wan t2v")


def _add_lora(pipe, name):
    from peft import LoraConfig

    targets = TARGETS.get(name, ["to_q", "to_k", "to_v", "to_out.0", "add_v_proj", "to_add_out"])
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "style")
    generator = torch.Generator().manual_seed(5)
    for label, parameter in pipe.transformer.named_parameters():
        if "lora" in label:
            parameter.data.normal_(std=0.2, generator=generator)


def _fuse(pipe, name):
    pipe.transformer.fuse_qkv_projections()
    for module in pipe.transformer.modules():  # what is read, so that reading the old matrices would be seen
        for label in ("to_qkv", "to_kv", "to_added_qkv", "to_added_kv"):
            if isinstance(matrix := getattr(module, label, None), torch.nn.Linear):
                matrix.weight.data *= 1.1


def _halve(pipe, name):
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.float16)


def _drawn(pipe, name):
    given = arguments(name, "odd")
    half = {key: x.half() for key, x in given.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    result = pipe(**given | half)
    return result.frames if name.startswith("wan") else result.images


def _added():
    import cocodiff

    found = {}
    for name in (*NAMES, "sd3 text2image"):
        plain = draw(build(name), name, "odd")
        for change in (_add_lora, _fuse) if name in FUSED else (_add_lora,):
            alone, together = build(name), build(name)
            change(alone, name)
            change(together, name)
            cocodiff.wrap(together, pieces=4)
            expected = draw(alone, name, "odd")
            error = relative_error(draw(together, name, "odd"), expected)
            found[name, change.__name__] = error, relative_error(plain, expected)
    return found


def test_lora_and_fused_projections_in_every_family():
    for found in run_ranks(2, _added):
        for key, (error, moved) in found.items():
            assert error < 1e-5 and moved > 1e-3, (key, error, moved)


def _half():
    import cocodiff

    found = {}
    for name in NAMES:
        alone, together = build(name), build(name)
        _halve(alone, name)
        _halve(together, name)
        expected = _drawn(alone, name)
        cocodiff.wrap(together, ring_degree=2 if name.startswith(("sd35", "qwen")) else None)
        latents = _drawn(together, name)
        found[name] = str(latents.dtype), relative_error(latents.float(), expected.float())
    return found


def test_float16_in_every_family():
    """Sums are rounded in another order: a few times the precision of float16, 1e-3, over two steps."""
    for found in run_ranks(2, _half):
        for name, (dtype, error) in found.items():
            assert dtype == "torch.float16" and error < 2e-2, (name, dtype, error)
