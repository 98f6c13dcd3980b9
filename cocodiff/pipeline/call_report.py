"""What a run sent, what it missed and what it held: the report of a wrapped pipeline, as JSON values."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from cocodiff.config import Selective
from cocodiff.errors import CocodiffError
from cocodiff.launch.agree import gather_json
from cocodiff.selective.copies import ENDS
from cocodiff.state import Engine

LABELS = ("q", "k", "v", "o")


class CopiesDiffer(CocodiffError):
    """Sender and receiver of a slow link did not hold the same: what was drawn is wrong."""


def account(engine: Engine, before: tuple[Counter, Counter]) -> dict[str, Any]:
    """Of the run that has just ended. Collective over all ranks.

    Args:
        before: what the tally had when it began: bytes sent, and those of an exact run.

    Returns:
        mesh: the degrees.
        transmission: `Selective`'s fields, the level `from_level` where it begins, `planned_share` of this run (short
            ones send more), and `coded_layers` of how many; None for exact, `reason` says why.
        bytes: level -> tensor -> `sent` and `exact`, what all ranks together sent, and would have sent.
        share: of the exact bytes, level by level.
        residual_error: relative, measured by those who sent, of all ranks together: `steps` (one number each, counted
            from 0 as everywhere), `layers`, `tensors` that were coded, and the `worst` of all, None if none was.
        held_bytes: memory of the copies, the most of any rank.
        guard: `step`, `error` of the worst rank and `rungs` raised, of each forward of this rank's branches; empty
            without `max_error`.
    """
    mesh, selection, group = engine.mesh, engine.selection, engine.mesh.host_group
    levels = [level.name for level in mesh.cluster.levels]
    sent, exact = engine.tally.snapshot()
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
    if selection is None:
        asked = Selective.of(engine.config.transmission)
        result["reason"] = "asked for" if asked is None else "these ranks cross no level where it applies"
        return result
    if selection.settings.check:
        _check(engine)
        selection.free()
    held = torch.tensor(selection.held_bytes, device="cpu")
    dist.all_reduce(held, dist.ReduceOp.MAX, group=group)
    coded, layers = selection.coded
    assert engine.links is not None
    result["transmission"] = asdict(selection.settings) | {
        "from_level": levels[engine.links.level],
        "planned_share": selection.planned if coded else 1.0,
        "coded_layers": {"coded": coded, "of": layers},
    }
    result["held_bytes"] = int(held)
    result["guard"] = [dict(zip(("step", "error", "rungs"), entry, strict=True)) for entry in selection.guarded]
    result["residual_error"] = errors = _errors(engine)
    selection.judge(errors["steps"])
    return result


def _check(engine: Engine) -> None:
    """CopiesDiffer on all ranks unless both ends of every block hold the same bits."""
    selection = engine.selection
    assert selection is not None
    everyone = gather_json([selection.copies.digests(end) for end in ENDS], engine.mesh.host_group)
    sent = {name: digest for senders, _ in everyone for name, digest in senders.items()}
    wrong = {name for _, receivers in everyone for name, digest in receivers.items() if sent.get(name) != digest}
    if wrong:
        raise CopiesDiffer(
            f"{len(wrong)} of {len(sent)} held copies differ between sender and receiver, the first is {min(wrong)} "
            "(branch, layer, tensor, piece, ranks): what was drawn is wrong. Please report this; transmission='exact' "
            "does without copies."
        )


def _errors(engine: Engine) -> dict[str, Any]:
    """Sums over all ranks of squared norms, by step, layer and tensor, and their ratios."""
    selection, group = engine.selection, engine.mesh.host_group
    assert selection is not None
    seen = [(step + 1, layer + 1) for step, layer, _ in selection.missed]
    sizes = torch.tensor([max((one[axis] for one in seen), default=0) for axis in (0, 1)], device="cpu")
    dist.all_reduce(sizes, dist.ReduceOp.MAX, group=group)  # a rank may have nothing that crosses
    sums = torch.zeros(*sizes.tolist(), len(LABELS), 2, dtype=torch.float64, device="cpu")
    if selection.missed:
        totals = torch.stack([torch.stack(several).sum(0) for several in selection.missed.values()]).double().cpu()
        for (step, layer, label), total in zip(selection.missed, totals, strict=True):
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
