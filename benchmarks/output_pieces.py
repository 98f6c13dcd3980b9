"""How should the output's exchange be cut: by query rows, by head groups, or not at all?

    scripts/emulated_cluster --nodes 2 --ranks-per-node 1 --link 100mbit -- python benchmarks/output_pieces.py

One FLUX transformer with random weights, every way in turn within one run; seconds a forward (median, least, most) and
the ratio to uncut outputs. The head groups are written here alone: the package cuts by rows.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import diffusers
import torch
from torch import nn

import cocodiff
from cocodiff import attention as heart
from cocodiff.exchange import Layout, split_sizes, to_heads, to_sequence
from cocodiff.launch.job import start_job

TEXT, IMAGE, HEADS, HEAD_DIM, REPEATS = 64, 2048, 8, 64, 7


def by_head_groups(engine: Any, layer: heart.Layer) -> list[Any]:
    """V first as in the package, but the output returns in two groups of heads: all rows must wait for the last."""
    rank, layout = engine.rank, engine.layout(layer.num_heads)
    value_pending = to_heads(engine.flat, layer.value(), layout, rank, "v")
    key_pending = to_heads(engine.flat, layer.key(), layout, rank, "k")
    query_pending = to_heads(engine.flat, layer.query(), layout, rank, "q")
    halves = [rows for rows, _ in layout.pieces(rank, 2)]
    beside = [layer.beside(halves[0])]
    key, value, query = key_pending.wait(), value_pending.wait(), query_pending.wait()
    groups = [
        Layout(layout.seq_lens, heads) for heads in zip(*(split_sizes(n, 2) for n in layout.num_heads), strict=True)
    ]
    pending, start = [], 0
    for group in groups:
        heads = slice(start, start + group.num_heads[rank])
        output = layer.attend(query[:, :, heads], key[:, :, heads], value[:, :, heads])
        pending.append(to_sequence(engine.flat, output, group, rank, "o"))
        start = heads.stop
    beside.append(layer.beside(halves[1]))
    parts = [
        one.wait().unflatten(2, (-1, HEAD_DIM)).split(list(group.num_heads), 2)
        for one, group in zip(pending, groups, strict=True)
    ]
    attended = torch.cat([half for rank_parts in zip(*parts, strict=True) for half in rank_parts], dim=2).flatten(2)
    together = None if beside[0] is None else torch.cat([part for part in beside if part is not None], dim=1)
    return [layer.finish(slice(0, layout.seq_lens[rank]), attended, together)]


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=256,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
    )


def main() -> None:
    torch.set_num_threads(1)
    job = start_job(None)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), transformer=transformer(), **parts
    )
    cocodiff.wrap(pipe, exchange="flat")
    engine, v_first = pipe.cocodiff.engine, heart._v_first
    inputs = dict(
        hidden_states=torch.randn(1, IMAGE, 64, generator=torch.Generator().manual_seed(1)),
        encoder_hidden_states=torch.ones(1, TEXT, 256),
        pooled_projections=torch.ones(1, 64),
        timestep=torch.tensor([0.5]),
        img_ids=torch.randn(IMAGE, 3, generator=torch.Generator().manual_seed(2)),
        txt_ids=torch.zeros(TEXT, 3),
    )
    ways = {"uncut": 1, "2 pieces of rows": 2, "4 pieces of rows": 4, "2 head groups": None, "sequential": 0}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    outputs = {}
    for repeat in range(REPEATS + 1):
        for name, pieces in ways.items():
            heart._v_first = {None: by_head_groups, 0: heart._sequential}.get(pieces, v_first)
            engine.plan = lambda layout, width, pieces=pieces: (engine.flat, pieces or 1)
            torch.distributed.barrier(job.host_group)
            began = time.perf_counter()
            with torch.no_grad():
                outputs[name] = pipe.transformer(**inputs).sample
            torch.distributed.barrier(job.host_group)
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - began)
    if job.is_main:
        base = statistics.median(seconds["uncut"])
        for name, taken in seconds.items():
            away = ((outputs[name] - outputs["uncut"]).norm() / outputs["uncut"].norm()).item()
            ratios = [one / other for one, other in zip(taken, seconds["uncut"], strict=True)]
            print(
                f"{name:18} {statistics.median(taken):6.2f} s ({min(taken):.2f} to {max(taken):.2f}), "
                f"{statistics.median(ratios):.3f} of uncut ({base:.2f} s), differs by {away:.0e}"
            )


if __name__ == "__main__":
    main()
