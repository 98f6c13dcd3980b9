"""What users get wrong: a clear error with the numbers, the same on every rank, and nothing hangs."""

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.pipelines import flux_call, flux_pipeline, relative_error


def _message(error_type, function):
    """The text of the error that `function` raises, checked to be of ours and of the documented type."""
    from cocodiff import CocodiffError

    with pytest.raises(error_type) as caught:
        function()
    assert isinstance(caught.value, CocodiffError), caught.value
    return str(caught.value)


def _wrapping():
    import os

    import diffusers

    import cocodiff

    said = {}
    pipe = flux_pipeline(heads=2)
    said["heads"] = _message(ValueError, lambda: cocodiff.wrap(pipe, ulysses_degree=3))
    pipe = flux_pipeline()
    said["preset"] = _message(ValueError, lambda: cocodiff.wrap(pipe, cluster="auror"))
    levels = (cocodiff.Level("gpu", 2, 100.0, 1.0), cocodiff.Level("node", None, 10.0, 1.0))
    said["levels"] = _message(ValueError, lambda: cocodiff.wrap(pipe, cluster=cocodiff.Cluster("mine", levels)))
    said["degree"] = _message(ValueError, lambda: cocodiff.wrap(pipe, ulysses_degree=2))
    said["field"] = _message(ValueError, lambda: cocodiff.wrap(pipe, exchagne="flat"))
    said["choice"] = _message(ValueError, lambda: cocodiff.wrap(pipe, exchange="fast"))
    said["nothing"] = _message(ValueError, lambda: cocodiff.wrap(None))
    said["name"] = _message(ValueError, lambda: cocodiff.wrap("black-forest-labs/FLUX.1-dev"))
    said["unsupported"] = _message(ValueError, lambda: cocodiff.wrap(diffusers.DDPMPipeline))
    said["not wrapped"] = _message(ValueError, lambda: cocodiff.unwrap(pipe))
    rank = int(os.environ["RANK"])
    schedule = "v_first" if rank else "sequential"
    said["configs differ"] = _message(ValueError, lambda: cocodiff.wrap(pipe, schedule=schedule))
    other = flux_pipeline(seed=rank)
    said["weights differ"] = _message(ValueError, lambda: cocodiff.wrap(other))

    cocodiff.wrap(pipe)  # after all these refusals it still works
    assert cocodiff.wrap(pipe) is pipe
    said["again"] = _message(ValueError, lambda: cocodiff.wrap(pipe, exchange="flat"))
    pipe(**flux_call("text2image"))
    return said


def test_wrap_refuses_with_the_numbers():
    everyone = run_ranks(3, _wrapping)
    assert everyone[0] == everyone[1] == everyone[2]
    expected = {
        "heads": "2 attention heads cannot be shared among 3 ranks",
        "preset": "aurora",
        "levels": "3",
        "degree": "ulysses_degree 2 on 3 ranks",
        "field": "exchagne",
        "choice": "'fast'",
        "nothing": "takes a diffusers pipeline or its class, not None",
        "name": "FLUX.1-dev': load it first",
        "unsupported": "FluxKontextPipeline",
        "not wrapped": "not wrapped",
        "configs differ": "schedule: 'sequential' on rank 0; 'v_first' on ranks 1, 2",
        "weights differ": "weights",
        "again": "unwrap",
    }
    for name, words in expected.items():
        assert words in everyone[0][name], everyone[0][name]


def _calling():
    import os

    import cocodiff

    rank, said = int(os.environ["RANK"]), {}
    pipe = cocodiff.wrap(flux_pipeline())
    call = flux_call("text2image")
    different = {
        "prompt": dict(prompt_embeds=call["prompt_embeds"] + rank),
        "size": dict(height=36 + 4 * rank),
        "steps": dict(num_inference_steps=3 + rank),
        "seed": dict(generator=torch.Generator().manual_seed(rank)),
        "only one gives it": dict(guidance_scale=3.0) if rank == 1 else {},
    }
    for name, change in different.items():
        said[name] = _message(ValueError, lambda change=change: pipe(**{**flux_call("text2image"), **change}))

    def nudge(pipe, step, timestep, kwargs):
        return {"latents": kwargs["latents"] + (1e-3 if rank == 1 and step == 0 else 0.0)}

    call = flux_call("text2image")
    said["callback"] = _message(ValueError, lambda: pipe(**call, callback_on_step_end=nudge))

    generator_free = {k: v for k, v in flux_call("text2image").items() if k != "generator"}
    torch.manual_seed(1000 + rank)  # without a generator every rank must still start from rank 0's noise
    latents = pipe(**generator_free).images
    torch.manual_seed(1000)
    alone = cocodiff.unwrap(pipe)(**generator_free).images
    said["noise"] = [relative_error(latents, alone), latents.sum().item()]

    cocodiff.wrap(pipe)
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    pipe.transformer.transformer_blocks[1].attn.set_processor(FluxAttnProcessor())
    said["processor"] = _message(RuntimeError, lambda: pipe(**flux_call("text2image")))
    cocodiff.unwrap(pipe)

    cocodiff.wrap(pipe)
    ours = pipe.transformer
    pipe.transformer = flux_pipeline().transformer
    said["transformer"] = _message(RuntimeError, lambda: pipe(**flux_call("text2image")))
    pipe.transformer = ours
    del ours.forward  # what removing an older hook does
    said["forward"] = _message(RuntimeError, lambda: pipe(**flux_call("text2image")))
    return said


def test_calls_that_differ_or_were_tampered_with():
    everyone = run_ranks(2, _calling)
    noise = [said.pop("noise") for said in everyone]
    assert max(error for error, _ in noise) < 1e-5 and noise[0][1] == noise[1][1]
    assert everyone[0] == everyone[1]
    expected = {
        "prompt": "prompt_embeds: tensor (1, 7, 24) float32",
        "size": "height: 36 on rank 0; 40 on rank 1",
        "steps": "num_inference_steps: 3 on rank 0; 4 on rank 1",
        "seed": "generator: generator with seed 0",
        "only one gives it": "guidance_scale: 3.5 on rank 0; 3.0 on rank 1",
        "callback": "first in its call 2 of 6",
        "processor": "FluxAttnProcessor",
        "transformer": "replaced",
        "forward": "wrap",
    }
    for name, words in expected.items():
        assert words in everyone[0][name], everyone[0][name]


def _out_of_step():
    """Ranks that fail at different places within a call, catch it, and call again; LoRA on one rank; two threads."""
    import os
    import threading

    import cocodiff
    from cocodiff.models.joint import ParallelLayer

    rank, said = int(os.environ["RANK"]), {}
    pipe = cocodiff.wrap(flux_pipeline())
    pipe.cocodiff.job.guard.close()  # it would end ranks that hang, which is another test
    fails = "key" if rank == 0 else "query"  # one has sent its keys by then, and the other has not
    right = getattr(ParallelLayer, fails)
    setattr(ParallelLayer, fails, _out_of_memory)
    with pytest.raises(MemoryError):
        pipe(**flux_call("text2image"))
    setattr(ParallelLayer, fails, right)
    said["out of step"] = _message(ValueError, lambda: pipe(**flux_call("text2image")))

    other = cocodiff.wrap(flux_pipeline())
    if rank == 1:
        from peft import LoraConfig

        other.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False), "style")
    said["lora"] = _message(ValueError, lambda: other(**flux_call("text2image")))

    busy = cocodiff.wrap(flux_pipeline())
    inside = {}

    def nested(pipe, step, timestep, kwargs):
        thread = threading.Thread(target=lambda: inside.update(said=_message(RuntimeError, call_again)))
        thread.start()
        thread.join()
        return kwargs

    def call_again():
        busy.cocodiff.forwards["transformer"].in_call(None).__enter__()

    busy(**flux_call("text2image"), callback_on_step_end=nested)
    said["two at once"] = inside["said"]
    return said


def _out_of_memory(*_):
    raise MemoryError("on purpose")


def test_ranks_out_of_step_one_sided_adapters_and_two_calls_at_once():
    everyone = run_ranks(2, _out_of_step)
    words = {"out of step": "unwrap and wrap again", "lora": "weights of transformer: ", "two at once": "one at a time"}
    for said in everyone:
        for name, text in words.items():
            assert text in said[name], said


def _unwrap_while_a_lane_waits():
    """Rank 0 alone starts an exchange: its lane waits for ever. Then both unwrap, wrap again and draw."""
    import torch.distributed as dist

    import cocodiff

    pipe = cocodiff.wrap(flux_pipeline())
    if dist.get_rank() == 0:
        group = pipe.cocodiff.mesh.everyone.group
        pipe.cocodiff.session.lane(pipe.cocodiff.mesh.ulysses.level).submit(
            lambda x: dist.all_reduce(x, group=group) and x, torch.ones(1), "alone"
        )
    call = flux_call("text2image")
    refused = _message(ValueError, lambda: pipe(**call))
    return refused, cocodiff.wrap(cocodiff.unwrap(pipe))(**call).images


def test_unwrapping_does_not_wait_for_what_never_comes():
    for refused, images in run_ranks(2, _unwrap_while_a_lane_waits):
        assert "unwrap and wrap again" in refused
        assert relative_error(images, flux_pipeline()(**flux_call("text2image")).images) < 1e-5


def _clusters_of_one_name(folder):
    """A cluster file that reads differently on two ranks."""
    import os
    from pathlib import Path

    import cocodiff

    rank = int(os.environ["RANK"])
    os.chdir(Path(folder) / str(rank % 2))
    return _message(ValueError, lambda: cocodiff.wrap(flux_pipeline(), cluster="cluster.json"))


def test_cluster_files_that_differ_between_ranks(tmp_path):
    from cocodiff import Cluster, Level

    for name, sizes in (("0", (2, 2)), ("1", (4, 1))):
        (tmp_path / name).mkdir()
        levels = tuple(Level(f"level {i}", size, 1.0, 1.0) for i, size in enumerate(sizes))
        (tmp_path / name / "cluster.json").write_text(Cluster("mine", levels).to_json())
    for said in run_ranks(4, _clusters_of_one_name, str(tmp_path)):
        assert "cluster.levels[0].size: 2 on ranks 0, 2; 4 on ranks 1, 3" in said and "cluster.name" not in said, said


def _direct_call():
    """The transformer called outside its pipeline: right if all ranks give the same, an error if not."""
    import os

    import cocodiff

    rank = int(os.environ["RANK"])
    pipe = flux_pipeline()
    call = dict(
        encoder_hidden_states=torch.ones(1, 5, 24),
        pooled_projections=torch.ones(1, 20),
        timestep=torch.tensor([0.5]),
        img_ids=torch.arange(33.0).view(11, 3),
        txt_ids=torch.zeros(5, 3),
    )
    states = torch.linspace(-1, 1, 11 * 16).view(1, 11, 16)
    with torch.no_grad():
        alone = pipe.transformer(states, **call).sample
        cocodiff.wrap(pipe)
        together = pipe.transformer(states, **call)  # positional, and an output dataclass
        said = _message(ValueError, lambda: pipe.transformer(states + rank, **call))
        as_tuple = pipe.transformer(hidden_states=states, return_dict=False, **call)
    graded = _message(RuntimeError, lambda: pipe.transformer(states, **call))
    few = _message(ValueError, lambda: _few_tokens(pipe, states, call))
    assert torch.equal(as_tuple[0], together.sample)
    return (together.sample - alone).abs().max().item(), said, graded, few


def _few_tokens(pipe, states, call):
    with torch.no_grad():
        call = {**call, "encoder_hidden_states": torch.ones(1, 0, 24), "txt_ids": torch.zeros(0, 3)}
        pipe.transformer(states[:, :1], **{**call, "img_ids": torch.zeros(1, 3)})


def test_the_transformer_called_by_itself():
    for error, said, graded, few in run_ranks(2, _direct_call):
        assert error < 1e-5
        assert "hidden_states: tensor (1, 11, 16)" in said and "no_grad" in graded
        assert "0 text + 1 image tokens cannot be shared among 2 ranks" in few
