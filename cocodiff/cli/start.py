"""What several commands share: help texts, the start of local ranks, and the words that name a rank."""

from __future__ import annotations

import os
import subprocess
import sys

from cocodiff.errors import CocodiffError

DEVICE_HELP = "Device of every rank: cpu, cuda or xpu. If left out, the local accelerator, else the CPU."
CLUSTER_HELP = "Levels and links of the cluster: auto, the name of a preset, or a JSON file."
RANKS_HELP = "Start this many ranks on this machine. If left out, the ranks of the launcher are used."


def rank_words() -> str:
    """Return " (rank 3)" if this process is rank 3 of several, and "" if it is the only one."""
    from cocodiff.launch import discover

    try:
        ranks = discover(os.environ)
    except CocodiffError:
        return ""
    return f" (rank {ranks.rank})" if ranks.world_size > 1 else ""


def start_ranks(ranks: int) -> int:
    """Run the command of this process on that many local ranks of torchrun, and return its exit status.

    torchrun ends all of them when one fails.
    """
    arguments = sys.argv[1:]
    position = next(i for i, argument in enumerate(arguments) if argument.split("=")[0] == "--ranks")
    del arguments[position : position + (1 if "=" in arguments[position] else 2)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)), **os.environ}
    return subprocess.run([*launcher, "-m", "cocodiff.cli", *arguments], env=environment).returncode
