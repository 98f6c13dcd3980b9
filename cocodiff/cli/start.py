"""Starting local ranks, and saying which rank speaks."""

from __future__ import annotations

import os
import subprocess
import sys

from cocodiff.errors import CocodiffError


def rank_words() -> str:
    """ " (rank 3)" where this process is one of several."""
    from cocodiff.launch import discover

    try:
        ranks = discover(os.environ)
    except CocodiffError:
        return ""
    return f" (rank {ranks.rank})" if ranks.world_size > 1 else ""


def start_ranks(ranks: int) -> int:
    """This very command on local ranks of torchrun, which ends all of them when one fails."""
    arguments = sys.argv[1:]
    position = next(i for i, argument in enumerate(arguments) if argument.split("=")[0] == "--ranks")
    del arguments[position : position + (1 if "=" in arguments[position] else 2)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)), **os.environ}
    return subprocess.run([*launcher, "-m", "cocodiff.cli", *arguments], env=environment).returncode
