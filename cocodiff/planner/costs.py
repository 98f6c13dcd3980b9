"""What work and transfers take: a device's rates and a cluster's links, for one placed mesh. MODELLED."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cocodiff.parallel.mesh import Degrees
from cocodiff.parallel.placement import Placement
from cocodiff.planner.fabric import Fabric, telling
from cocodiff.planner.messages import play_messages
from cocodiff.planner.program import Program, Send, Work
from cocodiff.planner.rates import Rates
from cocodiff.planner.simulate import Timing, Transfer, simulate
from cocodiff.topology import Cluster


class MeshCosts:
    """The costs of one mesh, for either way to play a program.

    Args:
        cluster: with concrete sizes.
        itemsize: bytes of an element.
        placement: None for the default one.
    """

    def __init__(
        self, cluster: Cluster, rates: Rates, itemsize: int, degrees: Degrees, placement: Placement | None
    ) -> None:
        self._rates, self._itemsize = rates, itemsize
        self.launch_seconds, self.core_seconds_per_byte = rates.launch_us * 1e-6, rates.core_seconds_per_byte
        self.fabric = Fabric(cluster, degrees, placement)
        self.capacity: Sequence[float] = self.fabric.capacity.tolist()
        self.route = self.fabric.route
        self._links: Any = slice(None)

    def compute_seconds(self, work: Sequence[Work]) -> float:
        return self._rates.seconds(work, self._itemsize)

    def play(self, program: Program) -> Timing:
        """One forward: collectives of all ranks in step, or messages of single ones."""
        if self._rates.messages:
            return play_messages(program, self)
        flows = [self.fabric.flow(send) for send in {send for send, _ in program.sends()}]
        self._links = telling(flows) if flows else slice(0)  # those alone that can hold this program back
        return simulate(program, self)

    def groups(self, axis: str) -> Sequence[Sequence[int]]:
        return self.fabric.groups(axis).tolist()

    def level(self, send: Send) -> int:
        return self.fabric.level(send.axis)

    def transfer(self, send: Send) -> Transfer:
        flow = self.fabric.flow(send)
        links = (flow.seconds[self._links] / flow.efficiency).tolist()
        return Transfer(flow.latency_seconds, tuple(links) or (0.0,), self.compute_seconds(send.work))
