"""Does an all-to-all use both directions of a link at once? gloo's own against receives posted before sends.

    scripts/emulated_cluster --nodes 2 --ranks-per-node 2 --link 100mbit -- python benchmarks/gloo_duplex.py

Each rank exchanges 2 and 8 MB with the rank of the same number on the other node. Rank 0 prints Mbit/s of a node's
link in one direction, for each of ten repetitions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from cocodiff.exchange.lanes import make_lane
from cocodiff.exchange.transport import CollectiveTransport, PointToPointTransport
from cocodiff.observe.bytes import ByteCounter
from cocodiff.parallel.mesh import Axis
from cocodiff.topology import Cluster, Level


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
    pair, lane = pairs[rank % half], make_lane("link", torch.device("cpu"))
    link = Cluster("pair", (Level("link", 2, 1.0, 1.0),))
    axis = Axis((rank % half, rank % half + half), pair.rank(), link, pair)
    ways = {
        "gloo's all_to_all": CollectiveTransport(axis, lane, ByteCounter()),
        "receives first": PointToPointTransport(axis, lane, ByteCounter()),
    }
    for size in sizes_bytes:
        rates: dict[str, list[float]] = {}
        splits = [0, 0]
        splits[1 - pair.rank()] = size // 4
        send = torch.ones(sum(splits))
        for _ in range(repeats):
            for name, transport in ways.items():
                dist.barrier(world)
                began = time.perf_counter()
                transport.all_to_all(send, splits, splits, send.dtype, name).wait()
                dist.barrier(world)
                rates.setdefault(name, []).append(half * size * 8e-6 / (time.perf_counter() - began))
        if rank == 0:
            for name, found in rates.items():
                print(f"| {size / 1e6:g} MB | {name} | {' '.join(f'{rate:.0f}' for rate in sorted(found))} |")
    lane.close()
    dist.barrier(world)
    dist.destroy_process_group()


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
