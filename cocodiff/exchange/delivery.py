"""Whether a backend delivers what is sent: a known pattern over every group, before anything is drawn.

oneCCL's all-to-all with splits has given wrong data without an error (oneCCL#190, torch-xpu-ops#3021).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from cocodiff.errors import LaunchError
from cocodiff.exchange.transport import Transport
from cocodiff.launch.agree import gather_json

UNIT = 4099  # elements: 16 KiB and a little, so that parts begin at odd places


def check_delivery(transports: Mapping[str, Transport], host_group: dist.ProcessGroup) -> None:
    """Send a known pattern over each transport, in every way that exchanges use. Collective over all ranks.

    Args:
        transports: by the name of what they serve, the same names in the same order on all ranks.
        host_group: all ranks, on the CPU.

    Raises:
        LaunchError: the same on every rank, where anything else arrived anywhere.
    """
    wrong = [f"{way} over {name}" for name, transport in transports.items() for way in wrong_ways(transport)]
    found: dict[str, list[int]] = {}
    for rank, several in enumerate(gather_json(wrong, host_group)):
        for what in several:
            found.setdefault(what, []).append(rank)
    if found:
        details = "; ".join(f"{what} (on {len(ranks)} ranks, first {ranks[0]})" for what, ranks in found.items())
        raise LaunchError(
            f"this backend delivered other data than was sent: {details}. Pictures would be wrong without an error. "
            "oneCCL is known for it: set CCL_ALLTOALLV=naive (or direct) on all ranks before they start, or use a "
            "newer oneCCL."
        )


def wrong_ways(transport: Transport) -> list[str]:
    """What did not deliver a known pattern, of all that a transport does. Collective over its ranks."""
    rank, size, device, ranks = transport.rank, transport.size, transport.lane.device, range(transport.size)

    def part(source: int, destination: int, count: int) -> Tensor:
        first = (source * size + destination) * 2 * UNIT
        return torch.arange(first, first + count, dtype=torch.int64, device=device).to(torch.int32)

    def all_to_all(counts: list[list[int]]) -> bool:
        sent = torch.cat([part(rank, peer, counts[rank][peer]) for peer in ranks])
        wanted = torch.cat([part(peer, rank, counts[peer][rank]) for peer in ranks])
        arriving = [counts[peer][rank] for peer in ranks]
        return torch.equal(transport.all_to_all(sent, counts[rank], arriving, sent.dtype, "check").wait(), wanted)

    def pass_on() -> bool:
        counts, behind = [UNIT * (1 + one % 2) for one in ranks], (rank - 1) % size
        arrived = transport.pass_on(part(rank, 0, counts[rank]), counts[rank], counts[behind], torch.int32, "check")
        return torch.equal(arrived.wait(), part(behind, 0, counts[behind]))

    ways = {
        "an all-to-all of equal parts": all_to_all([[UNIT] * size] * size),
        "an all-to-all of uneven parts": all_to_all([[(src + 2 * dst) % 3 * UNIT for dst in ranks] for src in ranks]),
        "a pass to the next rank": pass_on(),
        "a gather": torch.equal(
            transport.all_gather(part(rank, 0, UNIT), "check").wait(),
            torch.stack([part(peer, 0, UNIT) for peer in ranks]),
        ),
    }
    return [way for way, right in ways.items() if not right]
