"""What each mechanism is worth: `exact` as it is, then without one mechanism, in turn within one run.

    scripts/emulated_cluster --nodes 2 --ranks-per-node 2 --link 150mbit -- python benchmarks/ablation.py 5 1

The arguments are the timings of each variant and the ring degree. With a ring the mechanisms are those of keys and
values that travel between parts of the sequence. Rank 0 prints a Markdown table. A mechanism that no setting switches
off is replaced here while its variant runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cocodiff.bench.methods import Method, compute_method, make_method, our_method
from cocodiff.bench.models import build_transformer
from cocodiff.bench.run import time_steps
from cocodiff.bench.shapes import named_shape
from cocodiff.blocks import RowForward
from cocodiff.config import Config
from cocodiff.exchange.connected import TransportMaker
from cocodiff.exchange.lanes import Lane
from cocodiff.exchange.transport import CollectiveTransport, Transport, make_transport
from cocodiff.launch.job import start_job
from cocodiff.layer import LayerInFlight
from cocodiff.models.joint import ParallelLayer
from cocodiff.models.shapes import Shape
from cocodiff.observe.bytes import ByteCounter
from cocodiff.parallel.mesh import Axis
from cocodiff.state import ForwardState


@dataclass(frozen=True)
class Variant:
    """A method, and what is replaced while it runs."""

    method: Method
    replaced: Callable[[], AbstractContextManager[None]] = nullcontext


@contextmanager
def replaced(*changes: tuple[type, str, Any]) -> Iterator[None]:
    """While inside, give attributes of classes other values."""
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def enter_with_keys_first(in_flight: LayerInFlight, piece: int, inputs: Any) -> None:
    """Replaces `LayerInFlight.enter`: both K and V are projected before either travels, and K travels first."""
    in_flight.layer.enter(piece, in_flight.pieces[piece][0], inputs)
    key, value = in_flight.layer.key(piece), in_flight.layer.value(piece)
    in_flight.send("k", piece, key)
    in_flight.send("v", piece, value)


def without_parallel_branch() -> AbstractContextManager[None]:
    """Run the MLP of a single block after the exchanges, on the rows of each piece when its output has arrived."""
    branch, finish = ParallelLayer.parallel_branch, ParallelLayer.finish

    def finish_with_branch(layer: ParallelLayer, piece: int, attended: Tensor, parallel: None) -> tuple[Tensor, ...]:
        pieces, layer.pieces = layer.pieces, {piece: layer.pieces[piece]}
        own = branch(layer, None)
        layer.pieces = pieces
        return finish(layer, piece, attended, own)

    return replaced(
        (ParallelLayer, "parallel_branch", lambda layer, state: None), (ParallelLayer, "finish", finish_with_branch)
    )


def all_keys_first() -> AbstractContextManager[None]:
    """Let attention wait for the keys and values of all parts before it starts."""
    keys = LayerInFlight._keys
    return replaced((LayerInFlight, "_keys", lambda in_flight: iter(list(keys(in_flight)))))


def gloo_all_to_all(axis: Axis, lane: Lane, counter: ByteCounter) -> Transport:
    """Make a transport that uses gloo's own all-to-all."""
    return (make_transport if axis.group is None else CollectiveTransport)(axis, lane, counter)


def ulysses_variants(make: Callable[..., Method]) -> dict[str, Variant]:
    """The variants without a ring; `make` takes settings of `Config` and a transport."""
    exact = make()
    return {
        "exact": Variant(exact),
        "without V first": Variant(exact, lambda: replaced((LayerInFlight, "enter", enter_with_keys_first))),
        "without pieces (nor anything ahead)": Variant(make(pieces=1)),
        "without going ahead into the next layer": Variant(
            exact, lambda: replaced((RowForward, "_next", lambda *_: None))
        ),
        "without the MLP under exchanges": Variant(exact, without_parallel_branch),
        "staged for flat": Variant(make(exchange="staged")),
        "with gloo's own all-to-all, one at a time": Variant(make(transport=gloo_all_to_all)),
    }


def ring_variants(make: Callable[..., Method], ring_degree: int) -> dict[str, Variant]:
    """The variants with a ring; the last one has none."""
    exact = make(ring_degree=ring_degree)
    output_outside = (ForwardState, "output_stays_inside", property(lambda state: False))
    return {
        "exact": Variant(exact),
        "without attending to what is here first": Variant(exact, all_keys_first),
        "without finishing a piece as soon as it is attended": Variant(exact, lambda: replaced(output_outside)),
        "without pieces": Variant(make(ring_degree=ring_degree, pieces=1)),
        "exact without a ring": Variant(make(ring_degree=1)),
    }


def main(repeats: int = 5, ring_degree: int = 1, *, shape: Shape | None = None, pieces: int | None = None) -> None:
    """Time all variants in turn and print the table on rank 0. Collective.

    Args:
        repeats: timings of each variant, after one that warms up.
        shape: the model; None means FLUX.1 with 1/16 of its tokens x width.
        pieces: of `exact`; None lets the cost model decide.
    """
    job, cluster = start_job(None), os.environ.get("EMULATED_CLUSTER", "auto")
    shape = shape or named_shape("flux-dev").scaled(1 / 16)
    model = build_transformer(shape)

    def make(transport: TransportMaker = make_transport, **settings: Any) -> Method:
        config = Config(**{"cluster": cluster, "ring_degree": 1, "pieces": pieces, **settings})
        return our_method("exact", config, model, shape, job, transport=transport)

    variants = ulysses_variants(make) if ring_degree == 1 else ring_variants(make, ring_degree)
    variants["ulysses"] = Variant(make_method("ulysses", model, shape, job, cluster))
    variants["compute"] = Variant(compute_method(model, shape, job, cluster))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    outputs: dict[str, Tensor] = {}
    for index in range(repeats + 1):
        names = list(variants)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            with variants[name].replaced(), torch.no_grad():
                taken, output = time_steps(variants[name].method, 1, job)
            if index and output is not None:  # the first warms up
                seconds[name].append(taken)
                outputs[name] = output
    if job.is_main:
        print_table(seconds, outputs)


def print_table(seconds: dict[str, list[float]], outputs: dict[str, Tensor]) -> None:
    """Print a row for each variant: its times, the ratio to `exact`, and the relative difference of its output."""
    exact_seconds, exact = statistics.median(seconds["exact"]), outputs["exact"]
    print("| variant | seconds a step (least, most) | times exact | differs from exact by |\n|---|---|---|---|")
    for name, times in seconds.items():
        difference = ((outputs[name] - exact).norm() / exact.norm()).item()
        shown = "" if name == "compute" else f"{difference:.0e}"
        median, spread = statistics.median(times), f"{min(times):.3f}, {max(times):.3f}"
        print(f"| {name} | {median:.3f} ({spread}) | {median / exact_seconds:.2f} | {shown} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", type=int, nargs="*", help="timings of each variant, and the ring degree")
    main(*parser.parse_args().numbers)
