"""Run one function on several ranks, each a process of its own, and hear of every rank's failure.

The ranks fork from a server that has imported torch and diffusers once, so a launch costs a fraction of a second; one
launch should still carry many checks. A rank is started as torchrun would start it (RANK, WORLD_SIZE, ...).
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

PRELOAD = ["torch", "diffusers", "transformers", "cocodiff", "tests.distributed.preload"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(rank: int, world_size: int, port: int, results: Any, function: Callable, args: bytes) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank, True, pickle.dumps(function(*pickle.loads(args)))))  # by value, not by shared memory
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        os._exit(0)  # process groups are left to the system: their teardown is not what is tested


def run_ranks(world_size: int, function: Callable, *args: Any, timeout_seconds: float = 240) -> list[Any]:
    """`function(*args)` on every rank; the list of what each returned. Fails with the tracebacks of *all* ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results, port = context.Queue(), free_port()
    processes = [
        context.Process(
            target=_rank_main, args=(rank, world_size, port, results, function, pickle.dumps(args)), daemon=True
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    outcomes: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(outcomes) < world_size and time.monotonic() < deadline:
        try:
            rank, good, value = results.get(timeout=0.5)
            outcomes[rank] = (good, value)
        except Exception:
            if all(process.exitcode is not None for process in processes) and results.empty():
                break
        if any(not good for good, _ in outcomes.values()):  # one has failed: the others get a little time to tell why
            deadline = min(deadline, time.monotonic() + 20)
    for process in processes:
        process.kill() if len(outcomes) < world_size else process.join(10)
    failures = [f"--- rank {rank} ---\n{outcomes[rank][1]}" for rank in sorted(outcomes) if not outcomes[rank][0]]
    failures += [f"--- rank {rank} --- gave no answer" for rank in range(world_size) if rank not in outcomes]
    if failures:
        raise AssertionError(f"{len(failures)} of {world_size} ranks failed\n" + "\n".join(failures))
    return [pickle.loads(outcomes[rank][1]) for rank in range(world_size)]
