"""What several commands share: help texts, names of types, and the start of local ranks."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

from cocodiff.errors import ConfigError

DEVICE_HELP = "Device of every rank: cpu, cuda or xpu. If left out, the local accelerator, else the CPU."
CLUSTER_HELP = "Levels and links of the cluster: auto, the name of a preset, or a JSON file."
RANKS_HELP = "Start this many ranks on this machine. If left out, the ranks of the launcher are used."
MOST_RANKS = 1024  # of one machine: a wrong number should not start processes until the machine gives up

DTYPES: Mapping[str, str] = {
    **{name: "float32" for name in ("float32", "fp32", "float")},
    **{name: "bfloat16" for name in ("bfloat16", "bf16")},
    **{name: "float16" for name in ("float16", "fp16", "half")},
}


def dtype_named(text: str) -> str:
    """Return torch's name of a type of weights. ConfigError for a name that nobody uses.

    >>> dtype_named("bf16")
    'bfloat16'
    """
    if text not in DTYPES:
        raise ConfigError(f"--dtype {text} is not one of {', '.join(DTYPES)}.")
    return DTYPES[text]


def counted(ranks: int) -> str:
    """Return "1 rank" or "2 ranks"."""
    return f"{ranks} rank{'' if ranks == 1 else 's'}"


def start_ranks(ranks: int) -> int:
    """Run the command of this process on that many local ranks, and return the exit status.

    This process becomes torchrun, which ends all ranks when one fails or when it is told to end itself.

    Raises:
        ConfigError: this process is a rank of a launcher already.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from cocodiff.cli.together import this_rank

    if this_rank()[1] > 1:
        raise ConfigError(f"--ranks {ranks}: the launcher has started ranks already. Leave --ranks out.")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    loopbacks = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopbacks:  # else gloo, too, looks up the host's name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopbacks[0])
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say themselves what failed
    try:
        run(parse_args(torchrun_arguments(ranks, sys.argv[1:])))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        return _ended_by_signal(rank, -failure.exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def torchrun_arguments(ranks: int, command: Sequence[str]) -> list[str]:
    """Return torchrun's arguments for the same command without --ranks.

    The address is given since torchrun would look up the host's name, which need not resolve.
    """
    rest, position = list(command), 0
    while position < len(rest):
        if rest[position].split("=")[0] == "--ranks":
            del rest[position : position + (1 if "=" in rest[position] else 2)]
        else:
            position += 1
    local = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]
    return [*local, "-m", "cocodiff.cli", *rest]


def _ended_by_signal(rank: int, number: int) -> int:
    name = signal.Signals(number).name
    hint = ": the system may have run out of memory" if number == signal.SIGKILL else ""
    print(f"cocodiff: rank {rank} was ended by {name}{hint}.", file=sys.stderr)
    return 128 + number


def first_line(error: Exception) -> str:
    """The first line of an error of a library that says something, else its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def say(text: str) -> None:
    """Print a line of progress, which is no result, to standard error."""
    print(text, file=sys.stderr, flush=True)
