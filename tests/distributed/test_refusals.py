"""What cannot work on shards is refused with the reason, whether it was done before or after wrapping."""

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.families import TEXT_WIDTH, family_pipeline
from tests.pipelines import flux_call, flux_pipeline


def _refusals():
    from diffusers import FirstBlockCacheConfig

    import cocodiff

    def refused(change, before):
        pipe = flux_pipeline()
        if before:
            change(pipe)
        with pytest.raises(cocodiff.CocodiffError) as caught:
            cocodiff.wrap(pipe)
            change(pipe)
            pipe(**flux_call("text2image"))
        return str(caught.value)

    def compile_blocks(pipe):
        pipe.transformer.compile_repeated_blocks()

    def quantise(pipe):
        pipe.transformer.hf_quantizer = object()

    def broadcast(pipe):
        from diffusers import PyramidAttentionBroadcastConfig
        from diffusers.hooks import apply_pyramid_attention_broadcast

        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        )
        apply_pyramid_attention_broadcast(pipe.transformer, config)

    def compile_one(pipe):
        pipe.transformer.transformer_blocks[0] = torch.compile(pipe.transformer.transformer_blocks[0])

    changes = {
        "attention broadcast": broadcast,
        "one block compiled": compile_one,
        "hook": lambda pipe: pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *args: None),
        "step cache": lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1)),
        "compiled": lambda pipe: pipe.transformer.compile(),
        "blocks compiled": compile_blocks,
        "quantised": quantise,
    }
    said = {(name, before): refused(change, before) for name, change in changes.items() for before in (True, False)}

    def replace(pipe):
        pipe.transformer = torch.compile(pipe.transformer)

    said["compiled copy", False] = refused(replace, False)
    pipe = cocodiff.wrap(flux_pipeline())
    with pytest.raises(cocodiff.CocodiffError) as caught:
        pipe(**flux_call("text2image"), joint_attention_kwargs={"ip_adapter_image_embeds": [torch.ones(1)]})
    said["ip-adapter", False] = str(caught.value)
    with pytest.raises(cocodiff.CocodiffError) as caught:
        pipe(**flux_call("text2image"), joint_attention_kwargs={"attention_mask": torch.ones(1, 1)})
    said["mask for processors", False] = str(caught.value)
    pipe = cocodiff.wrap(family_pipeline("qwen text2image"))
    inputs = dict(hidden_states=torch.ones(1, 16, 16), encoder_hidden_states=torch.ones(1, 4, TEXT_WIDTH))
    inputs |= dict(timestep=torch.tensor([0.5]), img_shapes=[[(1, 4, 4)]])
    with pytest.raises(cocodiff.CocodiffError) as caught, torch.no_grad():
        pipe.transformer(**inputs, encoder_hidden_states_mask=torch.ones(1, 4, 4))
    said["square mask", False] = str(caught.value)
    return said


def test_what_cannot_work_is_refused_with_the_reason():
    everyone = run_ranks(2, _refusals)
    words = {
        "step cache": "hang",
        "attention broadcast": "pyramid",
        "one block compiled": "compile",
        "hook": "tokens",
        "compiled": "compile",
        "blocks compiled": "compile",
        "quantised": "tensor",
    }
    words |= {"compiled copy": "replaced", "ip-adapter": "IP-Adapter", "mask for processors": "attention_mask"}
    words |= {"square mask": "(1, 4, 4) is not (batch, text tokens)"}
    for said in everyone:
        assert said == everyone[0]
        for (name, _), text in said.items():
            assert words[name] in text, (name, text)
