"""What work and transfers take: a device's rates and a cluster's links, for one placed mesh. MODELLED."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from cocodiff.parallel.mesh import Degrees
from cocodiff.parallel.placement import Placement
from cocodiff.planner.fabric import Fabric, telling
from cocodiff.planner.program import Program, Send, Work
from cocodiff.planner.rates import Rates
from cocodiff.planner.simulate import Transfer
from cocodiff.topology import Cluster


class MeshCosts:
    """The `Costs` of one mesh.

    Args:
        cluster: with concrete sizes.
        itemsize: bytes of an element.
        placement: None for the default one.
    """

    def __init__(
        self, cluster: Cluster, rates: Rates, itemsize: int, degrees: Degrees, placement: Placement | None
    ) -> None:
        self._rates, self._itemsize = rates, itemsize
        # gloo's messages, which the ranks' own cores move; an accelerator's collectives take turns
        self.early = rates.core_seconds_per_byte > 0
        self.launch_seconds = rates.launch_us * 1e-6
        self.fabric = Fabric(cluster, degrees, placement, peers_in_turn=self.early)
        self._links: Any = slice(None)

    def compute_seconds(self, work: Sequence[Work]) -> float:
        return self._rates.seconds(work, self._itemsize)

    def for_program(self, program: Program) -> MeshCosts:
        """The same, with those links alone that can hold this program back."""
        made = copy.copy(self)
        flows = [self.fabric.flow(send) for send in {send for send, _ in program.sends()}]
        made._links = telling(flows) if flows else slice(0)
        return made

    def level(self, send: Send) -> int:
        return self.fabric.level(send.axis)

    def transfer(self, send: Send) -> Transfer:
        flow = self.fabric.flow(send)
        cores = flow.sent_bytes * self._rates.core_seconds_per_byte
        links = (flow.seconds[self._links] / flow.efficiency).tolist()
        return Transfer(flow.latency_seconds, (cores, *links), self.compute_seconds(send.work))
