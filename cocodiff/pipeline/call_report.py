"""What a call sent, what it missed and what it held: the report of a wrapped pipeline, as JSON values."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from cocodiff.errors import CopiesDifferError
from cocodiff.launch.agree import gather_json
from cocodiff.selective.run import SelectiveCall
from cocodiff.state import CallState

LABELS = ("q", "k", "v", "o")


def call_report(call: CallState, before: tuple[Counter, Counter]) -> dict[str, Any]:
    """Report on a call that has just ended. Collective over all ranks.

    Args:
        before: what the byte counter had when it began: bytes sent, and those of an exact call.

    Returns:
        mesh: the degrees.
        transmission: `Selective`'s fields, the level `from_level` where it begins, `planned_share` of this call (short
            ones send more), and `coded_layers` of how many; None for exact, `reason` says why.
        bytes: level -> tensor -> `sent` and `exact`, what all ranks together sent, and would have sent.
        share: of the exact bytes, level by level.
        residual_error: relative, measured by those who sent, of all ranks together: `steps` (one number each, counted
            from 0 as everywhere), `layers`, `tensors` that were coded, and the `worst` of all, None if none was.
        held_bytes: memory of the copies, the most of any rank.
        guard: `step`, `error` of the worst rank and `rungs` raised, of each forward of this rank's branches; empty
            without `max_error`.
    """
    mesh, selective, group = call.mesh, call.selective, call.mesh.host_group
    levels = [level.name for level in mesh.cluster.levels]
    sent, exact = call.session.bytes.snapshot()
    mine = [[*key, sent[key] - before[0][key], count - before[1][key]] for key, count in exact.items()]
    moved: dict[str, dict[str, dict[str, int]]] = {level: {} for level in levels}
    for level, label, count, whole in [row for rows in gather_json(mine, group) for row in rows if row[3]]:
        total = moved[levels[level]].setdefault(label, {"sent": 0, "exact": 0})
        total["sent"], total["exact"] = total["sent"] + count, total["exact"] + whole
    result: dict[str, Any] = {
        "mesh": str(mesh.degrees),
        "transmission": None,
        "reason": None,
        "bytes": moved,
        "share": {
            level: sum(one["sent"] for one in tensors.values()) / sum(one["exact"] for one in tensors.values())
            for level, tensors in moved.items()
            if tensors
        },
    }
    if selective is None:
        asked = call.plan.selective
        result["reason"] = "asked for" if asked is None else "these ranks cross no level where it applies"
        return result
    if selective.settings.check:
        _check(selective, group)
        selective.free()
    held = torch.tensor(selective.held_bytes, device="cpu")
    dist.all_reduce(held, dist.ReduceOp.MAX, group=group)
    coded, layers = selective.coded
    assert call.plan.coded_from is not None
    result["transmission"] = asdict(selective.settings) | {
        "from_level": levels[call.plan.coded_from],
        "planned_share": selective.planned if coded else 1.0,
        "coded_layers": {"coded": coded, "of": layers},
    }
    result["held_bytes"] = int(held)
    result["guard"] = [dict(zip(("step", "error", "rungs"), entry, strict=True)) for entry in selective.guarded]
    result["residual_error"] = errors = _errors(selective, group)
    selective.judge(errors["steps"])
    return result


def _check(selective: SelectiveCall, group: dist.ProcessGroup) -> None:
    """Raise CopiesDifferError on all ranks unless both ends of every block hold the same bits."""
    everyone = gather_json([selective.copies.digests(end) for end in ("send", "receive")], group)
    sent = {name: digest for senders, _ in everyone for name, digest in senders.items()}
    wrong = {name for _, receivers in everyone for name, digest in receivers.items() if sent.get(name) != digest}
    if wrong:
        raise CopiesDifferError(
            f"{len(wrong)} of {len(sent)} held copies differ between sender and receiver, the first is {min(wrong)} "
            "(branch, layer, tensor, piece, ranks): what was drawn is wrong. Please report this; transmission='exact' "
            "does without copies."
        )


def _errors(selective: SelectiveCall, group: dist.ProcessGroup) -> dict[str, Any]:
    """Sum squared norms over all ranks, by step, layer and tensor, and take their ratios."""
    seen = [(step + 1, layer + 1) for step, layer, _ in selective.missed]
    sizes = torch.tensor([max((one[axis] for one in seen), default=0) for axis in (0, 1)], device="cpu")
    dist.all_reduce(sizes, dist.ReduceOp.MAX, group=group)  # a rank may have nothing that crosses
    sums = torch.zeros(*sizes.tolist(), len(LABELS), 2, dtype=torch.float64, device="cpu")
    if selective.missed:
        totals = torch.stack([torch.stack(several).sum(0) for several in selective.missed.values()]).double().cpu()
        for (step, layer, label), total in zip(selective.missed, totals, strict=True):
            sums[step, layer, LABELS.index(label)] += total
    dist.all_reduce(sums, group=group)

    def relative(*over: int) -> Any:
        missed, carried = (sums.sum(over) if over else sums).unbind(-1)
        return (missed / carried.clamp_min(1e-300)).sqrt()

    each, worst, coded = relative(), None, sums.sum((0, 1))[:, 1] > 0
    if bool(coded.any()):
        at = [int(index) for index in torch.unravel_index(each.argmax(), each.shape)]
        worst = {"error": float(each.max()), "step": at[0], "layer": at[1], "tensor": LABELS[at[2]]}
    return {
        "steps": relative(1, 2).tolist(),
        "layers": relative(0, 2).tolist(),
        "tensors": {
            label: error for label, error, yes in zip(LABELS, relative(0, 1).tolist(), coded, strict=True) if yes
        },
        "worst": worst,
    }
