"""How much memory held copies take, from the layout only."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from cocodiff.parallel.layout import Layout, outermost, split_sizes, to_heads_traffic, to_sequence_traffic
from cocodiff.parallel.mesh import Degrees
from cocodiff.parallel.placement import Placement, coordinates, spread_sizes
from cocodiff.parallel.tokens import Tokens
from cocodiff.selective.copies import COPY_BYTES, ENDS
from cocodiff.selective.crossing import blocks_of, crossed
from cocodiff.topology import Cluster


def held_bytes(
    cluster: Cluster,
    degrees: Degrees,
    slow: int,
    rank: int,
    streams: Mapping[str, int],
    layers: Sequence[tuple[int, int]],
    batch: int = 1,
    branches: int = 1,
    placement: Placement | None = None,
) -> int:
    """Bytes of copies that one rank holds, as a sender and as a receiver, once every layer has exchanged.

    Args:
        cluster: with concrete sizes.
        slow: the innermost level where transmission is selective; `rank` is that of the run.
        streams: tokens of each, in joint order.
        layers: heads and head_dim of each attention.
        branches: of guidance, each with its own copies, where they are calls of their own.
        placement: of the mesh, if it has one.

    >>> from cocodiff.topology import Level
    >>> two = Cluster("two", (Level("gpu", 2, 100, 1), Level("node", 2, 1, 1)))
    >>> held_bytes(two, Degrees(1, 2, 2), 1, 0, {"image": 64}, [(4, 8)])
    8192
    """
    ring, inner = degrees.ring, degrees.ulysses
    _, mine, place = coordinates(rank, degrees.counts, placement)
    seq_lens = Tokens.split(streams, ring * inner).joint
    spread = spread_sizes(cluster.sizes, degrees.counts, placement)
    sizes, around = spread["ulysses"], spread["ring"]
    elements = 0
    for heads, head_dim in layers:
        shares = split_sizes(heads, inner)
        layouts = [Layout(seq_lens[start : start + inner], shares) for start in range(0, ring * inner, inner)]
        if inner > 1 and outermost(sizes) >= slow:
            towards, back = (make(layouts[mine], batch, head_dim) for make in (to_heads_traffic, to_sequence_traffic))
            for traffic, tensors in ((towards, 3), (back, 1)):
                blocks = [block for end in ENDS for block in blocks_of(traffic, sizes, place, slow, False, end)]
                elements += tensors * sum(block.rows * block.width for block in blocks if block.coded)
        if ring > 1 and outermost(around) >= slow:
            parts = [sum(layout.seq_lens) * batch * shares[place] * head_dim for layout in layouts]
            ahead = (mine + 1) % ring
            for part in range(ring):
                arrives = part != mine and crossed(part, mine, around, slow)
                leaves = part != ahead and crossed(part, ahead, around, slow) and not crossed(part, mine, around, slow)
                elements += 2 * parts[part] * (arrives + leaves)  # K and V
    return elements * COPY_BYTES * branches


def free_bytes(device: torch.device) -> int | None:
    """Bytes of memory that a device has left; None where it does not say."""
    if device.type != "cpu":
        try:
            api = torch.get_device_module(device)  # what its allocator keeps for reuse is free, too
            return int(api.mem_get_info(device)[0] + api.memory_reserved(device) - api.memory_allocated(device))
        except Exception:  # not every backend has it
            return None
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
