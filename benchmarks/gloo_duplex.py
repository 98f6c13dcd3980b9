"""Does an all-to-all use both directions of a link at once? gloo's own against receives posted before sends.

    scripts/emulated_cluster --nodes 2 --ranks-per-node 2 --link 100mbit -- python benchmarks/gloo_duplex.py

Each rank sends 2 and 8 MB to the rank of its number on the other node; Mbit/s of a node's link in one direction, for
every one of ten repetitions, on rank 0.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from cocodiff.exchange.flat import AllToAll


def main() -> None:
    dist.init_process_group("gloo")
    rank, half = dist.get_rank(), dist.get_world_size() // 2
    groups = [dist.new_group([pair, pair + half]) for pair in range(half)]
    group = groups[rank % half]
    for megabytes in (2, 8):
        splits = [0, 0]
        splits[1 - group.rank()] = megabytes * 250_000
        send, recv = torch.ones(sum(splits)), torch.empty(sum(splits))
        ways: dict[str, Any] = {
            "gloo's all_to_all": lambda s=send, r=recv, n=splits: dist.all_to_all_single(r, s, n, n, group=group),
            "receives first": lambda s=send, n=splits: AllToAll(n, n, group, tag=1)(s),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(10):
            for name, run in ways.items():
                dist.barrier()
                began = time.perf_counter()
                run()
                dist.barrier()
                rates[name].append(half * megabytes * 8 / (time.perf_counter() - began))
        if rank == 0:
            if megabytes == 2:
                print("| a rank sends | way | Mbit/s of a node's link in one direction, sorted |\n|---|---|---|")
            for name, found in rates.items():
                print(f"| {megabytes} MB | {name} | {' '.join(f'{rate:.0f}' for rate in sorted(found))} |")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
