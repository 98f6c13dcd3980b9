"""bfloat16 against one rank, beside diffusers' own context parallelism on the same inputs."""

import statistics

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.pipelines import flux_call, flux_pipeline, relative_error

INPUTS = 16


def _call(seed):
    """Sizes that divide, since diffusers' context parallelism needs that."""
    call = flux_call("text2image", height=32, width=32, text_len=8, seed=seed)
    return {**call, "num_inference_steps": 2, "true_cfg_scale": 1.0}


def _errors(schedule):
    from diffusers import ContextParallelConfig

    import cocodiff

    ranks = int(__import__("os").environ["WORLD_SIZE"])
    pipe = flux_pipeline(dtype=torch.bfloat16)
    alone = [pipe(**_call(seed)).images for seed in range(INPUTS)]
    level = cocodiff.Level("link", ranks, 1.0, 1e-6)
    cocodiff.wrap(pipe, schedule=schedule, cluster=cocodiff.Cluster("test", (level,)))
    ours = [relative_error(pipe(**_call(seed)).images, alone[seed]) for seed in range(INPUTS)]
    cocodiff.unwrap(pipe)

    torch.accelerator.device_count = lambda: 1  # it divides by it, and a CPU has none
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
    theirs = [relative_error(pipe(**_call(seed)).images, alone[seed]) for seed in range(INPUTS)]
    return statistics.median(ours), statistics.median(theirs)


@pytest.mark.parametrize("ranks, schedule", [(2, "v_first"), (4, "v_first"), (2, "sequential")])
def test_no_further_from_one_rank_than_diffusers(ranks, schedule):
    for ours, theirs in run_ranks(ranks, _errors, schedule):
        assert 0 < theirs and ours <= 1.25 * theirs, (ours, theirs)
