"""What several test modules do with a wrapped pipeline: degrees as options, recorded plans, one exchange left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def degrees(mesh: tuple[int, int, int] | None) -> dict[str, int]:
    """The options of `cocodiff.wrap` for a mesh; none for None."""
    return {} if mesh is None else dict(zip(("cfg_degree", "ring_degree", "ulysses_degree"), mesh, strict=True))


@contextmanager
def recorded_layer_plans() -> Iterator[list[tuple[Any, int]]]:
    """While inside, a list that grows by every `LayerPlan` that is made here and the fewest rows of any rank."""
    from cocodiff import state

    plans, plan_layer = [], state.plan_layer

    def recording(run_plan: Any, cluster: Any, device_type: str, seq_lens: tuple[int, ...], *more: Any) -> Any:
        plan = plan_layer(run_plan, cluster, device_type, seq_lens, *more)
        plans.append((plan, min(seq_lens)))
        return plan

    state.plan_layer = recording
    try:
        yield plans
    finally:
        state.plan_layer = plan_layer


def leave_out_exchange(pipe: Any, label: str) -> None:
    """Break a wrapped pipeline on purpose: of the flat exchange, what is sent under `label` stays where it is."""
    from cocodiff.exchange.flat import FlatExchange
    from cocodiff.exchange.transport import LocalTransport

    session = pipe.cocodiff.session
    connected = session.connect(pipe.cocodiff.plan)
    transport, flat = connected.ulysses, connected.exchanges["flat"]
    local = FlatExchange(LocalTransport(transport.axis, transport.lane, session.bytes))
    start = flat.start
    flat.start = lambda send, traffic, name, out=None: (local.start if name == label else start)(
        send, traffic, name, out
    )
