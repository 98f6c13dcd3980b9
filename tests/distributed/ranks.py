"""Run one function on several ranks, each in its own process, and report the failures of all ranks.

The ranks fork from a server that has imported torch and diffusers once, so a launch costs a fraction of a second.
`run_ranks` returns what the function returned. `run_programs` is for tests of how processes end: it returns exit
statuses and outputs, and takes the launcher's variables from the test. Ranks of `run_ranks` get those of torchrun.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PRELOAD = ["torch", "diffusers", "transformers", "cocodiff", "tests.distributed.preload"]
# Prefixes of what launchers leave in the environment.
LAUNCHER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC"),
    *("PMI", "PALS", "OMPI", "MPI_", "SLURM"),
)


def free_port() -> int:
    """A port that nobody listens on, and that no outgoing connection of this machine is given meanwhile.

    The system gives those from a range that ends or begins elsewhere (ip_local_port_range, 32768 and up by default).
    """
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what a launcher left in it."""
    return {name: value for name, value in environ.items() if not name.startswith(LAUNCHER_VARIABLES)}


def torchrun_variables(world_size: int) -> list[dict[str, str]]:
    """What torchrun sets for each rank of one host."""
    common = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def _enter(environ: Mapping[str, str]) -> None:
    kept = without_launcher(os.environ)
    os.environ.clear()
    os.environ.update({**kept, **environ})
    import torch

    torch.set_num_threads(1)


def _rank_main(rank: int, environ: Mapping[str, str], results: Any, function: Callable, args: bytes) -> None:
    try:
        _enter(environ)
        results.put((rank, True, pickle.dumps(function(*pickle.loads(args)))))  # by value, not by shared memory
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        os._exit(0)  # process groups are left to the system: their teardown is not what is tested


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_ranks(world_size: int, function: Callable, *args: Any, timeout_seconds: float = 240) -> list[Any]:
    """`function(*args)` on every rank; the list of what each returned. Fails with the tracebacks of *all* ranks."""
    context, packed = _context(), pickle.dumps(args)
    results = context.Queue()
    processes = [
        context.Process(target=_rank_main, args=(rank, environ, results, function, packed), daemon=True)
        for rank, environ in enumerate(torchrun_variables(world_size))
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


def _program_main(environ: Mapping[str, str], output: str, function: Callable, args: bytes) -> None:
    """Behaves as an interpreter does that runs a script: exit handlers run, and the status says whether it raised."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = open(file, "w", buffering=1)
    status = 0
    try:
        _enter(environ)
        function(*pickle.loads(args))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def run_programs(
    environs: Sequence[Mapping[str, str]], function: Callable, *args: Any, timeout_seconds: float = 120
) -> tuple[list[int], str]:
    """Call `function(*args)` in one process for each environment, and wait until all of them have ended by themselves.

    Returns their exit statuses (negative: the signal that ended a process) and everything that they printed. Fails,
    with what they printed, when one still runs after the timeout.
    """
    context, packed = _context(), pickle.dumps(args)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(index) for index in range(len(environs))]
        processes = []
        for environ, file in zip(environs, files, strict=True):
            file.touch()
            more = {**environ, "TEST_OUTPUTS": folder}
            processes.append(context.Process(target=_program_main, args=(more, str(file), function, packed)))
            processes[-1].start()
        deadline = time.monotonic() + timeout_seconds
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        running = [index for index, process in enumerate(processes) if process.exitcode is None]
        for index in running:
            processes[index].kill()
            processes[index].join()
        output = "".join(file.read_text(errors="replace") for file in files)
    assert not running, f"processes {running} still ran after {timeout_seconds} s:\n{output}"
    return [process.exitcode for process in processes], output
