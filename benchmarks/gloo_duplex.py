"""Does an all-to-all use both directions of a link at once? gloo's own against receives posted before sends.

    scripts/emulated_cluster --nodes 2 --ranks-per-node 2 --link 100mbit -- python benchmarks/gloo_duplex.py

Each rank exchanges 2 and 8 MB with the rank of the same number on the other node. Rank 0 prints Mbit/s of a node's
link in one direction, for each of ten repetitions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

from cocodiff.exchange.flat import AllToAll


def main(sizes_bytes: Sequence[int] = (2_000_000, 8_000_000), repeats: int = 10) -> None:
    """Print a Markdown table on rank 0; the number of ranks must be even. Makes the default group and ends it.

    Args:
        sizes_bytes: what a rank sends, for each row of the table; multiples of four, since elements are float32.
        repeats: timings of each way and size.
    """
    dist.init_process_group("gloo")
    world = dist.group.WORLD
    rank, half = dist.get_rank(world), dist.get_world_size(world) // 2
    pairs = [dist.new_group([first, first + half]) for first in range(half)]
    if rank == 0:
        print("| a rank sends | way | Mbit/s of a node's link in one direction, sorted |\n|---|---|---|")
    for size in sizes_bytes:
        rates: dict[str, list[float]] = {}
        runs = _ways(size, pairs[rank % half])
        for _ in range(repeats):
            for name, run in runs.items():
                dist.barrier(world)
                began = time.perf_counter()
                run()
                dist.barrier(world)
                rates.setdefault(name, []).append(half * size * 8e-6 / (time.perf_counter() - began))
        if rank == 0:
            for name, found in rates.items():
                print(f"| {size / 1e6:g} MB | {name} | {' '.join(f'{rate:.0f}' for rate in sorted(found))} |")
    dist.barrier(world)
    dist.destroy_process_group()


def _ways(size_bytes: int, pair: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    """The two implementations of an all-to-all in which the two ranks of `pair` exchange `size_bytes` each."""
    splits = [0, 0]
    splits[1 - pair.rank()] = size_bytes // 4
    send, recv = torch.ones(sum(splits)), torch.empty(sum(splits))
    return {
        "gloo's all_to_all": partial(dist.all_to_all_single, recv, send, splits, splits, group=pair),
        "receives first": lambda: AllToAll(splits, splits, pair, tag=1)(send),
    }


if __name__ == "__main__":
    main()
