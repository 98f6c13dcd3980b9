"""Ranks -> process groups. No other file knows group arithmetic.

Today there is one axis, `ulysses`, over all ranks. Each group is used by one lane alone, so that collectives of
different lanes never queue behind each other; the host group carries metadata on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from cocodiff.errors import ConfigError
from cocodiff.exchange.layout import level_groups
from cocodiff.topology import Cluster


@dataclass(frozen=True)
class Mesh:
    """The groups of one wrapped pipeline.

    Attributes:
        rank, world_size: this rank among the ranks of the `ulysses` axis.
        cluster: levels with concrete sizes, their product is `world_size`.
        flat_group: all ranks, for the flat exchange and the gather.
        level_groups: active level (size over one) -> the group of ranks that share all other digits.
        host_group: all ranks, gloo: JSON and random states.
    """

    rank: int
    world_size: int
    cluster: Cluster
    flat_group: dist.ProcessGroup
    level_groups: Mapping[int, dist.ProcessGroup]
    host_group: dist.ProcessGroup
    backend: str

    @classmethod
    def create(cls, cluster: Cluster, ulysses_degree: int | None, backend: str, host_group: dist.ProcessGroup) -> Mesh:
        """Make every group, in the same order on all ranks. Collective over the default group."""
        rank, world_size = host_group.rank(), host_group.size()
        if ulysses_degree not in (None, world_size):
            raise ConfigError(
                f"ulysses_degree={ulysses_degree} on {world_size} ranks: the degrees must multiply to the number of "
                f"ranks, and ulysses is the only axis yet. Leave it out, or start {ulysses_degree} ranks."
            )
        assert cluster.num_ranks == world_size, (cluster, world_size)
        ranks = list(range(world_size))
        flat_group = dist.new_group(ranks, backend=backend)
        mine: dict[int, dist.ProcessGroup] = {}
        for level, size in enumerate(cluster.sizes):
            if size == 1:
                continue
            for members in level_groups(cluster.sizes, level):
                group = dist.new_group(list(members), backend=backend)
                if rank in members:
                    mine[level] = group
        return cls(rank, world_size, cluster, flat_group, mine, host_group, backend)

    def close(self) -> None:
        """Free this mesh's own groups (not the host group). Collective."""
        if self.backend == "gloo":  # others free theirs at exit: destroying subgroups is known to crash some
            for group in (self.flat_group, *self.level_groups.values()):
                dist.destroy_process_group(group)
