"""Several ranks with one voice: what fails on any rank ends all of them, and is said once."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from cocodiff.errors import CocodiffError, ConfigError

if TYPE_CHECKING:
    from cocodiff.launch.job import Job

# Rank 0 speaks first. The others wait this long for it, and speak only if it said nothing or other words.
_PATIENCE_SECONDS = 8.0
_KEY = "cocodiff/said"


def this_rank() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks, by the launcher's variables; (0, 1) if they are odd."""
    from cocodiff.launch import discover

    try:
        ranks = discover(os.environ)
    except CocodiffError:
        return 0, 1
    return ranks.rank, ranks.world_size


def say_once(text: str, patience_seconds: float = _PATIENCE_SECONDS) -> bool:
    """Print an error that ends the command, and return whether this rank did. Where ranks fail alike, rank 0 does.

    A rank that fails otherwise, or alone, prints its own after a little patience. Ranks that have not joined yet have
    no way to hear of rank 0: they give the launcher that time to end them.
    """
    rank, world_size = this_rank()
    store = _store() if world_size > 1 else None
    if rank == 0:
        print(f"cocodiff: {text}", file=sys.stderr, flush=True)
        if store is not None:
            _tell(store, text, world_size, patience_seconds)
        return True
    if store is None:
        time.sleep(patience_seconds)
    elif _heard(store, patience_seconds) == text:
        return False
    print(f"cocodiff (rank {rank}): {text}", file=sys.stderr, flush=True)
    return True


def _store() -> Any:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.PrefixStore(_KEY, dist.distributed_c10d._get_default_store())


def _tell(store: Any, text: str, world_size: int, patience_seconds: float) -> None:
    """Leave the words for the others, and wait until they have read them, since rank 0 may hold the store."""
    deadline = time.monotonic() + patience_seconds
    with suppress(Exception):
        store.set("text", text)
        while store.add("heard", 0) < world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.02)


def _heard(store: Any, patience_seconds: float) -> str | None:
    try:
        store.wait(["text"], timedelta(seconds=patience_seconds))
        text = store.get("text").decode()
        store.add("heard", 1)
        return text
    except Exception:  # rank 0 said nothing, or the store went with it
        return None


@contextmanager
def on_all_ranks(job: Job, what: str) -> Iterator[None]:
    """While inside, each rank works without collectives; an error that a user may meet on any becomes one on all.

    Args:
        what: names the work where a rank dies in it.

    Raises:
        ConfigError: the error of the first rank that has one.
    """
    from cocodiff.launch.agree import gather_json

    failure: CocodiffError | None = None
    with job.watched(what):
        try:
            yield
        except CocodiffError as error:
            failure = error
        everyone: list[str | None] = [None if failure is None else str(failure)]
        if job.host_group is not None:
            everyone = gather_json(everyone[0], job.host_group)
    if failure is not None and everyone[0] == str(failure):
        raise failure
    for rank, text in enumerate(everyone):
        if text is not None:
            raise ConfigError(text if rank == 0 else f"rank {rank}: {text}") from failure


def quiet_others(verbose: bool = False) -> None:
    """Let rank 0 alone show what diffusers, transformers and warnings say. To be called before they are imported.

    Args:
        verbose: show our own log at INFO on rank 0, and what others say there.
    """
    rank, _ = this_rank()
    if verbose and rank == 0:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("cocodiff").setLevel(logging.INFO)
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of parts that are not used here
    if rank:
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        logging.getLogger("cocodiff").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
