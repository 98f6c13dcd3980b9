"""What each mechanism is worth: all of `exact`, then each switched off alone, in turn within one run.

    scripts/emulated_cluster --nodes 2 --ranks-per-node 2 --link 150mbit -- python benchmarks/ablation.py [times [ring]]

With a ring degree the mechanisms are those of keys and values on their way between parts of the sequence.
Prints a Markdown table on rank 0. The switches are here alone: the package has none.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cocodiff.bench.methods import compute_method, make_method
from cocodiff.bench.models import build_transformer
from cocodiff.bench.run import _time
from cocodiff.bench.shapes import named_shape
from cocodiff.blocks import Blocks
from cocodiff.exchange.flat import AllToAll
from cocodiff.launch.job import start_job
from cocodiff.layer import Flight
from cocodiff.models.joint import ParallelLayer
from cocodiff.state import Engine


def k_and_v_together(flight: Flight, piece: int, inputs: Any) -> None:
    """In place of V first: K and V are both projected before either travels, K ahead."""
    flight.layer.enter(piece, flight.pieces[piece][0], inputs)
    key, value = flight.layer.key(piece), flight.layer.value(piece)
    flight.send("k", piece, key)
    flight.send("v", piece, value)


def mlp_at_the_end(layer: ParallelLayer, piece: int, attended: Tensor, beside: None) -> Any:
    """In place of the MLP under the exchanges: it runs when the output has arrived, on the rows of a piece."""
    rows: Any = SimpleNamespace(normed_all=lambda: layer.normed[piece][0])
    return FINISH(layer, piece, attended, layer._mlp(rows))


FINISH = ParallelLayer.finish


@contextlib.contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def variants(engine: Any) -> dict[str, Callable[[], Any]]:
    plan = engine.plan
    whole = (engine, "plan", lambda *size: (plan(*size)[0], 1, plan(*size)[2]))
    staged = (engine, "plan", lambda *size: (engine.staged, *plan(*size)[1:]))
    blocking = (AllToAll, "begin", lambda work, send: None)
    gloo = (AllToAll, "__call__", gloo_all_to_all)
    late_mlp = (ParallelLayer, "beside", lambda layer: None), (ParallelLayer, "finish", mlp_at_the_end)
    return {
        "exact": contextlib.nullcontext,
        "without V first": lambda: replaced((Flight, "enter", k_and_v_together)),
        "without pieces (nor anything ahead)": lambda: replaced(whole),
        "without going ahead into the next layer": lambda: replaced((Blocks, "_next", lambda *_: None)),
        "without the MLP under exchanges": lambda: replaced(*late_mlp),
        "staged for flat": lambda: replaced(staged),
        "with gloo's own all-to-all, one at a time": lambda: replaced(blocking, gloo),
    }


def ring_variants(engine: Any) -> dict[str, Callable[[], Any]]:
    at_the_end = (Engine, "output_stays_inside", property(lambda engine: False))
    keys = Flight._keys
    at_once = (Flight, "_keys", lambda flight: iter(list(keys(flight))))
    plan = engine.plan
    return {
        "exact": contextlib.nullcontext,
        "without attending to what is here first": lambda: replaced(at_once),
        "without finishing a piece as soon as it is attended": lambda: replaced(at_the_end),
        "without pieces": lambda: replaced((engine, "plan", lambda *size: (plan(*size)[0], 1, plan(*size)[2]))),
    }


def gloo_all_to_all(work: AllToAll, send: Tensor) -> Tensor:
    recv = work._make_recv(send)
    dist.all_to_all_single(recv, send, work._recv_splits, work._send_splits, group=work._group)
    return recv


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    job, cluster = start_job(None), os.environ.get("EMULATED_CLUSTER", "auto")
    shape = named_shape("flux-dev").scaled(1 / 16)
    model = build_transformer(shape)
    ring = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    exact = make_method("exact", model, shape, job, cluster, {"ring_degree": ring})
    whole = make_method("exact", model, shape, job, cluster, {"ring_degree": 1})
    ulysses = make_method("ulysses", model, shape, job, cluster)
    compute = compute_method(model, shape, job, cluster)
    assert exact.engine is not None
    switches = variants(exact.engine) if ring == 1 else ring_variants(exact.engine)
    runs: dict[str, tuple[Any, Callable[[], Any]]] = {name: (exact, v) for name, v in switches.items()}
    if ring > 1:
        runs["exact without a ring"] = (whole, contextlib.nullcontext)
    runs |= {"ulysses": (ulysses, contextlib.nullcontext), "compute": (compute, contextlib.nullcontext)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    outputs: dict[str, Tensor] = {}
    for index in range(repeats + 1):
        order = list(runs)[index % len(runs) :] + list(runs)[: index % len(runs)]
        for name in order:
            method, variant = runs[name]
            with variant(), torch.no_grad():
                taken, output = _time(method, 1, job)
            if index and output is not None:  # the first warms up
                seconds[name].append(taken)
                outputs[name] = output
    if job.is_main:
        exact_seconds = statistics.median(seconds["exact"])
        print("| variant | seconds a step (least, most) | times exact | differs from exact by |\n|---|---|---|---|")
        for name, times in seconds.items():
            away = (outputs[name] - outputs["exact"]).norm() / outputs["exact"].norm()
            shown = "" if name == "compute" else f"{away.item():.0e}"
            middle = statistics.median(times)
            print(
                f"| {name} | {middle:.3f} ({min(times):.3f}, {max(times):.3f}) "
                f"| {middle / exact_seconds:.2f} | {shown} |"
            )


if __name__ == "__main__":
    main()
