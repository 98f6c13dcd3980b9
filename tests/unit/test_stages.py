"""Stages of every class of block: torch.compile takes each one whole, and gets what eager execution gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cocodiff.compat import is_plain_linear
from cocodiff.errors import ConfigError
from cocodiff.models import FAMILIES
from cocodiff.models.fused import FusedPart, fused_parts
from cocodiff.models.joint import make_layer
from cocodiff.models.sd3.layers import JOINT, SECOND
from cocodiff.models.stages import BlockSpec
from cocodiff.parallel.tokens import Tokens
from tests.families import family_pipeline
from tests.pipelines import flux_pipeline

PIPELINES = {"flux2": "flux2 text2image", "sd3": "sd35 text2image", "qwen": "qwen edit", "wan": "wan ti2v"}
BLOCKS = [(family.name, name, 0, spec) for family in FAMILIES for name, spec in family.blocks.items()]
BLOCKS += [("sd3", "transformer_blocks", -1, JOINT), ("sd3", "transformer_blocks", 0, SECOND)]
BATCH, TEXT, IMAGE = 2, 5, 8


def _block(family: str, attribute: str, index: int = 0) -> Any:
    pipe = flux_pipeline() if family == "flux" else family_pipeline(PIPELINES[family])
    return getattr(pipe.transformer, attribute)[index]


def _arguments(family: str, spec: BlockSpec, width: int) -> dict[str, Any]:
    """What a block's stages read of its arguments, each token with its own timestep where the family knows that."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    found: dict[str, Any] = {
        "temb": rand(BATCH, width),
        "temb_mod_img": rand(BATCH, 6 * width),
        "temb_mod_txt": rand(BATCH, 6 * width),
        "temb_mod": rand(BATCH, 3 * width),
    }
    if family == "qwen":
        index = torch.arange(IMAGE).expand(BATCH, IMAGE) % 2
        found |= {"temb": rand(2 * BATCH, width), "modulate_index": index}
    if family == "wan":
        angles = rand(1, IMAGE, 1, 12), rand(1, IMAGE, 1, 12)
        found |= {
            "temb": rand(BATCH, IMAGE, 6, width),
            "encoder_hidden_states": rand(BATCH, TEXT, width),
            "rotary_emb": angles,
        }
    return {name: value for name, value in found.items() if name in spec.arguments}


def _compiled(stage: Callable[..., Any], *arguments: Any) -> Any:
    """What a stage gives; AssertionError where torch.compile breaks it or gets something else."""
    expected = stage(*arguments)
    torch.testing.assert_close(torch.compile(stage, backend="eager", fullgraph=True)(*arguments), expected)
    return expected


@pytest.mark.parametrize(("family", "attribute", "index", "spec"), BLOCKS)
@torch.no_grad()
def test_torch_compile_takes_every_stage_whole(family, attribute, index, spec):
    torch.compiler.reset()
    block = _block(family, attribute, index)
    attn = getattr(block, spec.attention)
    arguments = _arguments(family, spec, attn.inner_dim)
    lengths = [TEXT, IMAGE] if len(spec.streams) > 1 else [IMAGE]
    for stream, rows in zip(spec.streams, lengths, strict=True):
        mods = _compiled(stream.modulation, block, arguments)
        assert all(mod.shape[1] in (1, rows) for mod in mods)
        x = torch.randn(BATCH, rows, attn.inner_dim, generator=torch.Generator().manual_seed(1))
        normed = _compiled(stream.modulate, block, mods, x)
        projections = stream.projections(attn)
        for label in "qkv":
            heads = projections[label](normed).unflatten(-1, (attn.heads, -1))
            if label != "v":
                _compiled(stream.norm, attn, label, heads)
        attended = heads.flatten(2)
        if spec.parallel_branch is not None:
            branch = projections["mlp"](normed) if "mlp" in projections else normed
            attended = torch.cat([attended, _compiled(spec.parallel_branch, block, mods, branch)], dim=2)
        context = [arguments[name] for name in spec.context]
        assert _compiled(stream.finish, block, mods, x, attended, *context).shape == x.shape


def test_mods_of_one_token_are_cut_with_its_row():
    """Wan 2.2's timesteps: a piece of two rows gets their mods, not those of the first rows."""
    (family,) = (family for family in FAMILIES if family.name == "wan")
    spec, block = family.blocks["blocks"], _block("wan", "blocks")
    width = block.attn1.inner_dim
    arguments = _arguments("wan", spec, width)
    x = torch.randn(BATCH, IMAGE, width, generator=torch.Generator().manual_seed(1))
    tokens = Tokens.split({"video": IMAGE}, 1)
    outputs = []
    for pieces in ([slice(0, IMAGE)], [slice(0, 2), slice(2, IMAGE)]):
        layer: Any = make_layer(spec, tokens, block, arguments)
        for piece, rows in enumerate(pieces):
            layer.enter(piece, rows, (x[:, rows],))
        parts = [layer.finish(piece, x[:, rows], None)[0] for piece, rows in enumerate(pieces)]
        outputs.append([torch.cat(parts, dim=1), layer.query()])
    torch.testing.assert_close(*outputs)


def test_an_argument_that_no_spec_names_is_refused():
    spec = FAMILIES[0].blocks["transformer_blocks"]
    with pytest.raises(ConfigError, match="FluxTransformerBlock was called with new_argument"):
        make_layer(spec, Tokens.split({"text": 2, "image": 2}, 1), None, {"temb": None, "new_argument": 1})


def _hooked(linear: torch.nn.Linear) -> None:
    linear.register_forward_hook(lambda module, args, output: output + 1)


def _pre_hooked(linear: torch.nn.Linear) -> None:
    linear.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _replaced(linear: torch.nn.Linear) -> None:
    forward = linear.forward
    linear.forward = lambda x: forward(x) + 1  # type: ignore[method-assign]


def _accelerate(linear: torch.nn.Linear) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(linear, ModelHook())


@pytest.mark.parametrize("change", [None, _hooked, _pre_hooked, _replaced, _accelerate])
def test_a_matrix_to_which_something_was_added_is_called_whole(change):
    """The parts of a plain matrix are equal to the whole; one that was changed is not plain, so it is not cut."""
    linear = torch.nn.Linear(8, 12)
    x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    parts = fused_parts(linear, {"q": 4, "k": 4, "v": 2, "mlp": 2})
    with torch.no_grad():
        if change is None:
            assert is_plain_linear(linear)
            torch.testing.assert_close(torch.cat([part(x) for part in parts.values()], dim=-1), linear(x))
            return
        change(linear)
    part = parts["v"]
    assert isinstance(part, FusedPart) and part.rows == slice(8, 10)
    assert not is_plain_linear(linear)


@torch.no_grad()
def test_a_layer_uses_what_a_hook_adds_to_a_fused_matrix():
    """One call of the matrix for each piece serves Q, K, V and the parallel branch."""
    (family,) = (family for family in FAMILIES if family.name == "flux2")
    spec, block = family.blocks["single_transformer_blocks"], _block("flux2", "single_transformer_blocks")
    attn, calls = block.attn, []

    def double(module: Any, args: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return 2 * output

    x = torch.randn(BATCH, IMAGE, attn.inner_dim, generator=torch.Generator().manual_seed(1))
    arguments = _arguments("flux2", spec, attn.inner_dim)
    values = []
    for hooked in (False, True):
        handle = attn.to_qkv_mlp_proj.register_forward_hook(double) if hooked else None
        layer: Any = make_layer(spec, Tokens.split({"text": 3, "image": IMAGE - 3}, 1), block, arguments)
        for piece, rows in enumerate((slice(0, 3), slice(3, IMAGE))):
            layer.enter(piece, rows, (x[:, rows],))
        branch = layer.project(0, "mlp", [0, 1])
        values.append(torch.cat([layer.value(0), layer.value(1)], dim=1))
        layer.query()
        assert branch.shape[1] == IMAGE
        if handle is not None:
            handle.remove()
    torch.testing.assert_close(values[1], 2 * values[0])
    assert len(calls) == 2
