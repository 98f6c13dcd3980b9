"""A mesh with what moves bytes over it: a transport for every axis, and the exchanges over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cocodiff.exchange.delivery import check_delivery
from cocodiff.exchange.flat import FlatExchange
from cocodiff.exchange.lanes import Lane
from cocodiff.exchange.ring import Ring
from cocodiff.exchange.staged import StagedExchange
from cocodiff.exchange.transport import GroupTransport, Transport
from cocodiff.exchange.ulysses import Exchange
from cocodiff.observe.bytes import ByteCounter
from cocodiff.parallel.mesh import Axis, Mesh

TransportMaker = Callable[[Axis, Lane, ByteCounter], Transport]


@dataclass(frozen=True)
class ConnectedMesh:
    """A mesh, a transport for each of its axes, and the exchanges.

    Attributes:
        everyone, sequence, ulysses, ring, cfg: the transports of the axes of the same names.
        levels: level of the cluster -> the transport among the ranks that differ in that level only.
        exchanges: by name, "flat" and "staged", over the ulysses axis.
        around: the ring's exchange; None where the ring axis has one rank.
    """

    mesh: Mesh
    everyone: Transport
    sequence: Transport
    ulysses: Transport
    ring: Transport
    cfg: Transport
    levels: Mapping[int, Transport]
    exchanges: Mapping[str, Exchange]
    around: Ring | None

    @classmethod
    def connect(
        cls, mesh: Mesh, lane: Callable[[int], Lane], counter: ByteCounter, make: TransportMaker
    ) -> ConnectedMesh:
        """Make all transports. `lane` gives the lane of a level of the cluster. Collective over all ranks.

        Raises:
            LaunchError: on XPUs, whose backend has been wrong without an error, where a pattern does not arrive.
        """

        made: dict[tuple[int, ...], Transport] = {}  # axes of the same ranks share a group, and so its transport

        def of(axis: Axis) -> Transport:
            if axis.ranks not in made:
                made[axis.ranks] = make(axis, lane(axis.level), counter)
            return made[axis.ranks]

        levels = {level: make(axis, lane(level), counter) for level, axis in mesh.level_groups.items()}
        axes = {name: of(getattr(mesh, name)) for name in ("everyone", "sequence", "ulysses", "ring", "cfg")}
        unchecked: dict[str, Transport] = {}
        for name, one in (axes | {f"level {mesh.cluster.levels[at].name}": one for at, one in levels.items()}).items():
            if isinstance(one, GroupTransport) and one.lane.device.type == "xpu" and one not in unchecked.values():
                unchecked[name] = one
        if unchecked:
            check_delivery(unchecked, mesh.host_group)
        exchanges: dict[str, Exchange] = {"flat": FlatExchange(axes["ulysses"])}
        if levels:
            exchanges["staged"] = StagedExchange(mesh.ulysses.cluster.sizes, mesh.ulysses.rank, levels)
        around = Ring(axes["ring"]) if mesh.ring.size > 1 else None
        return cls(mesh, **axes, levels=levels, exchanges=exchanges, around=around)
