"""The tables that two papers and others published, MODELLED by the planner, beside what they say. Nothing is measured.

python -m benchmarks.papers > benchmarks/results/planner/papers.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from unittest import mock

import numpy as np

from benchmarks.modelled import (
    MOST_RING,
    all_ulysses,
    asked,
    everywhere,
    placement_effect,
    plain,
    refined,
    spearman,
    table,
)  # fmt: skip
from benchmarks.published import FUSED, h100
from cocodiff.parallel.mesh import Degrees
from cocodiff.planner import trace as tracing
from cocodiff.planner.fabric import Fabric
from cocodiff.planner.program import Send
from cocodiff.planner.rates import DEVICES
from cocodiff.planner.search import Task
from cocodiff.topology import PRESETS

V5E, AURORA = PRESETS["v5e"], PRESETS["aurora"]
SLICES = ((2, 2), (2, 4), (4, 4))
VIDEOS = tuple((height, width, frames) for height, width in ((480, 832), (720, 1280)) for frames in (21, 41, 81))
SCHEDULES = {"sequential": "nothing is sent ahead", "v_first": "as cocodiff runs"}
PICTURES, PIXELS, NODES = ("flux-dev", "qwen-image", "sd35-large", "flux2-dev"), (768, 1536, 2304), (1, 2, 4, 8)
SEARCHED = 1536  # pixels for which the best plan is searched, too: a search takes longer than all else


def aoizora(
    models: Sequence[str] = ("wan-1.3b", "wan-14b"),
    slices: Sequence[tuple[int, int]] = SLICES,
    videos: Sequence[tuple[int, int, int]] = VIDEOS,
    ranked: tuple[int, int] = SLICES[-1],
) -> Iterator[str]:
    """Wan 2.1 with guidance on slices of TPU v5e; of the larger model the longest videos alone."""
    longest = max(frames for _, _, frames in videos)
    tasks = {
        f"{model.removeprefix('wan-')}, {sizes[0]}x{sizes[1]}, {video[0]}p x {video[2]}": _clip(model, sizes, video)
        for model in models
        for sizes in slices
        for video in videos
        if model == models[0] or video[2] == longest
    }
    for schedule, words in SCHEDULES.items():
        yield f"\n### Schedule {schedule}: {words}\n"
        compared = [_compared(of, schedule) for of in tasks.values()]
        yield from table(
            ("Wan 2.1", "best plan", "a step", "all-Ulysses", "all-ring", "without a cfg axis", "in natural order",
             "best in natural order", "placement, most"),
            ([name, *cells] for name, (cells, _, _, _) in zip(tasks, compared, strict=True)),
        )  # fmt: skip
        baseline, natural, effect = (max(column) for column in list(zip(*compared, strict=True))[1:])
        yield (
            f"\nAt most {baseline:.2f} times the best plan for a baseline (the paper: up to 1.42); {effect - 1:.1%}"
            f" between the best "
            f"and the worst placement of one mesh (up to 16.6 %); {natural - 1:.1%} without the placement stage "
            f"(2.7 to 82 %)."
        )
    yield "\n### Few blocks for all\n"
    head = ("schedule", "a model of one block", "of two blocks", "ours: three blocks stand for all")
    yield from table(head, (proxies(models[0], ranked, videos[0], schedule) for schedule in SCHEDULES))
    yield (
        "\nSpearman of all meshes and placements with what all blocks say, largest slice, shortest video (the "
        "paper, of placements: one block at most "
        "0.371, two blocks 0.817 to 0.985)."
    )


def _clip(model: str, sizes: tuple[int, int], video: tuple[int, int, int], blocks: int | None = None) -> Task:
    return asked(model, *video, V5E.with_sizes(sizes), DEVICES["v5e"], blocks)


def _compared(of: Task, schedule: str) -> tuple[list[str], float, float, float]:
    """The cells of a row; the worse baseline, the natural order, and the worst placement, over the best."""
    placed = everywhere(of, schedule)
    (degrees, placement), best = min(placed.items(), key=lambda one: one[1])
    ulysses = plain(of, all_ulysses(of), schedule=schedule)
    ring = plain(of, Degrees(1, of.cluster.num_ranks, 1), schedule=schedule)
    without_cfg = min(seconds for (mesh, _), seconds in placed.items() if mesh.cfg == 1)
    natural = min(seconds for (_, where), seconds in placed.items() if where is None)
    effect = placement_effect(placed)
    times = [f"{one / best:.2f}" for one in (ulysses, ring, without_cfg, placed[degrees, None], natural)]
    name = f"{degrees}" if placement is None else f"{placement}"
    return [name, f"{best:.3f} s", *times, f"{effect - 1:.1%}"], max(ulysses, ring) / best, natural / best, effect


def proxies(model: str, sizes: tuple[int, int], video: tuple[int, int, int], schedule: str) -> list[str]:
    """How well plans are ranked by models of one and two blocks, and by three blocks that stand for all."""
    with mock.patch.object(tracing, "KEPT", 10**6):
        reference = list(everywhere(_clip(model, sizes, video), schedule).values())
    few = [list(everywhere(_clip(model, sizes, video, blocks), schedule).values()) for blocks in (1, 2, None)]
    return [schedule, *(f"{spearman(one, reference):.3f}" for one in few)]


def cocodiff(
    models: Sequence[str] = PICTURES, pixels: Sequence[int] = PIXELS, nodes: Sequence[int] = NODES
) -> Iterator[str]:
    """Four picture models on Aurora."""
    rows, gains = [], []
    for model, size, count in ((model, size, count) for model in models for size in pixels for count in nodes):
        of = asked(model, size, size, None, AURORA.resolve(12 * count), DEVICES["max1550-tile"])
        free, mesh = replace(of, rates=replace(of.rates, launch_us=0.0)), all_ulysses(of)
        ways = (("flat", "sequential"), ("staged", "sequential"), ("staged", "v_first"))
        flat, staged, first = (plain(of, mesh, *way) for way in ways)
        free_flat, free_staged, free_first = (plain(free, mesh, *way) for way in ways)
        gains.append((flat / staged, staged / first, free_flat / free_staged, free_staged / free_first))
        cells = [model, f"{size}²", str(count), f"{mesh.ring} x {mesh.ulysses}", _ms(flat)]
        cells += [_ms(staged), f"{flat / staged:.2f}", _ms(first), f"{staged / first:.2f}"]
        cells += [f"{free_flat / free_staged:.2f}, {free_staged / free_first:.2f}"]
        if size == SEARCHED:
            found = refined(of, everywhere(of))
            plan = min(found, key=lambda one: found[one])
            where = "" if plan.placement is None else f" ({plan.placement})"
            cells += [
                f"{plan.degrees}{where}, {plan.exchange}, pieces {plan.pieces}",
                _ms(found[plan]),
                f"{flat / found[plan]:.2f}",
            ]
        rows.append([*cells, *["-"] * (13 - len(cells))])
    head = ("model", "pixels", "nodes", "ring x ulysses", "flat", "staged", "gain", "and V first", "gain")
    yield from table((*head, "both gains, host free", "best plan", "a step", "flat / best"), rows)
    stages, firsts, free_stages, free_firsts = np.array(gains).T
    yield (
        f"\nGain of staging {min(stages):.2f} to {max(stages):.2f}, mean {stages.mean():.2f} (the paper: 2.2 for "
        f"SD3.5 at 1536² on several nodes); "
        f"of V first on top {min(firsts):.2f} to {max(firsts):.2f}, mean {firsts.mean():.2f} (1.3). With a host "
        f"that costs nothing, "
        f"{min(free_stages):.2f} to {max(free_stages):.2f}, mean {free_stages.mean():.2f}, and "
        f"{min(free_firsts):.2f} to {max(free_firsts):.2f}, "
        f"mean {free_firsts.mean():.2f}."
    )
    yield "\n### One all-to-all on one node\n"
    rows = [all_to_all(*row) for row in ((48, 25.5, 6.0), (24, 18.0, 6.0), (6, 6.5, 6.0))]
    yield from table(("a rank", "flat", "paper", "staged", "paper", "flat / staged", "paper"), rows)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def all_to_all(megabytes: int, flat_ms: float, staged_ms: float) -> list[str]:
    """One exchange by itself on one node of Aurora, beside the paper's figures."""
    fabric = Fabric(AURORA.resolve(12), Degrees(1, 1, 12), None)

    def took(*axes: tuple[str, int]) -> float:
        sends = [Send(axis, "all_to_all", (megabytes * 10**6 // size,) * size, None, (), "") for axis, size in axes]
        flows = [fabric.flow(send) for send in sends]
        return 1e3 * sum(flow.latency_seconds + max(flow.seconds) / flow.efficiency for flow in flows)

    flat, staged = took(("ulysses", 12)), took(("level 0", 2), ("level 1", 6))
    cells = [f"{flat:.1f} ms", f"{flat_ms} ms", f"{staged:.1f} ms", f"{staged_ms} ms"]
    return [f"{megabytes} MB", *cells, f"{flat / staged:.1f}", f"{flat_ms / staged_ms:.1f}"]


def assumptions() -> Iterator[tuple[str, str, str]]:
    """Every one, in one table."""
    shares = {"v5e": (197, 819), "max1550-tile": (419, 1638), "h100": (989, 3350)}
    for name, (sheet_tflops, sheet_gbs) in shares.items():
        one = DEVICES[name]
        yield (
            f"`{name}`",
            f"{one.matmul_tflops:g} TFLOPS matmul, {one.attention_tflops:g} attention, {one.memory_gbs:g} GB/s, "
            f"{one.operator_us:g} us an operator, "
            f"host {one.launch_us:g} us",
            f"ASSUMED shares of {sheet_tflops} TFLOPS and {sheet_gbs} GB/s of data sheets",
        )
    for name in ("v5e", "aurora", "dgx-h100"):
        links = "; ".join(
            f"{one.name} {one.bandwidth_gbs:.3g} GB/s, {one.latency_us:g} us" for one in PRESETS[name].levels
        )
        yield f"links of `{name}`", links, "`cocodiff/topology/presets.py`, with sources; latencies ASSUMED"
    node = AURORA.levels[-1].flat_efficiency
    yield (
        "a flat all-to-all on Aurora reaches",
        f"{AURORA.flat_efficiency:.3f} of the links inside a node, {node:.3f} across nodes",
        "CoCoDiff's own 25.5 and 6.0 ms for 48 MB: no test of that row; and xccl's 2.41 GB/s, measured on two nodes",
    )
    yield "slices of v5e", "a mesh without wrap-around, routed along x, then y", "the scaling book; routing ASSUMED"
    yield "messages of an exchange", "all at once, links shared fairly", "ASSUMED of XLA, NCCL and XCCL"
    yield "operators", "those of eager diffusers and our code, nothing fused", "on a TPU, XLA fuses many"
    yield (
        "`compiled` on H100",
        f"host 0 us, {FUSED:g} of the bytes of operators bound by memory",
        "by one published row",
    )
    yield "other engines", "our plain Ulysses and rings, one after the other", "ASSUMED"
    yield "guidance", "two branches: Wan, Qwen-Image and SD3.5; one: FLUX.1, FLUX.2", "their pipelines"
    yield "task", "text to image or video, one of it; transformer alone, no VAE, no text encoder", "CoCoDiff inpaints"
    yield (
        "memory",
        "left out: 14B weights, 28 GB in bf16, do not fit a chip's 16 GB when each chip has all",
        "AoiZora shards",
    )
    yield "weights", "random, prompt embeddings narrow: no cost of the real ones' projection", "`shape:` of each model"


HEAD = f"""# The papers' tables, modelled

Written by `python -m benchmarks.papers > benchmarks/results/planner/papers.md`. **All of it is MODELLED**, by the model
of `cocodiff plan`. Figures of others stand beside it as they were published; their baselines are not known in detail.

A best plan is the best of every mesh, with rings of at most {MOST_RING}, and every placement of it, exchanged flat and
whole; of CoCoDiff's models then the best three of these with every exchange and number of pieces. A placement names
the ranks of each axis along each level, innermost first.
"""
NOTES = {
    "AoiZora": """Seconds of a step; the other columns are multiples of the best plan. "All-Ulysses" is as many ranks
as the heads allow (12 of the 1.3B model), the others in rings; where heads do not divide, some ranks have more. "In
natural order" is the best plan's mesh in the launcher's order of ranks; "best in natural order" is what a planner
without placements takes. "Placement, most": worst placement against best of one mesh, the mesh that has most to lose.
The paper's meshes also have tensor parallelism and sharded weights; ours have not.""",
    "CoCoDiff": """Plain Ulysses, exchanges one after the other, all ranks in one ulysses axis as far as the heads and
whole nodes allow, the others in rings; then staging and V first concern the inner axis alone. Selective transmission
is not modelled yet: the paper's 2.9 of V-Major has no column. "Host free": the same with a host that starts operators
in no time. Where those gains are larger, a step waits for the host, and a staged exchange has more operators to
start.""",
    "H100": """1024 x 1024 pixels. The published runs are of other engines, on other hosts and with other versions.""",
}

TELLS = {
    "AoiZora": """What it tells. The gain over all-Ulysses comes from the branches of guidance side by side, and on 8
chips from 12 heads that do not divide; on a 2x2 slice nothing matters. The same mesh placed badly loses about what
the paper says. A planner without placements would lose next to nothing here, since our natural order keeps the
ulysses axis on one dimension: the paper's 2.7 to 82 % depend on an order that we do not know. One block ranks plans
nearly as well as all do. The paper's 0.371 cannot come from the blocks, which are alike: perhaps from how a compiler
treats a short program, which a model of operators does not see.""",
    "CoCoDiff": f"""What it tells. SD3.5 at 1536² on two nodes is near the paper's ratios. It was not so while the
preset had one share for all flat exchanges, the {AURORA.flat_efficiency:.3f} of one node: staging then gained 1.11
there. xccl, measured on two nodes, reaches {AURORA.levels[-1].flat_efficiency:.3f} of what the NICs can carry, which
no test on one node shows. Small pictures on many ranks wait for the host, and staging loses: its operators are more.
With the assumed 12 us each the model is perhaps too hard on it; the paper shows no such loss. One exchange by itself:
the ratio at 48 MB is the preset's own constant. The paper's staged exchange takes 6.0 ms at every size, which no
bandwidth explains, and its flat one is far slower than what xccl reaches in public measurements on one node (4 MiB a
rank in 0.24 ms). Both cannot hold; the model lies between them, below the paper's times by 2 at 48 MB and by 4 to 16
at 6 MB.""",
    "H100": """What it tells. Published runs of one GPU differ by 1.3 among themselves: 50 steps in 9.30 s are 28 in
5.21, beside 6.27 and 6.71. Scaling is modelled too well: a collective costs more than the preset's 5 us, and eager
engines wait for their hosts longer than 8 us an operator would make them. Plans that differ in the number of
collectives or operators are therefore compared too mildly on H100; both figures want a measurement on the ranks at
hand.""",
}


def main(parts: dict[str, Iterable[str]] | None = None) -> None:
    """Print the page."""
    if parts is None:
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
        parts = {"AoiZora (arXiv 2606.17566)": aoizora(), "CoCoDiff (arXiv 2604.14561)": cocodiff(), "H100": h100()}
    print(HEAD)
    print("\n".join(table(("assumed", "value", "from"), assumptions())))
    for title, lines in parts.items():
        print(f"\n## {title}\n\n{NOTES[title.split()[0]]}\n")
        for line in lines:
            print(line, flush=True)
        print(f"\n{TELLS[title.split()[0]]}")


if __name__ == "__main__":
    main()
