"""What one rank does is read from the code that runs: the bytes, FLOPs and order of a real run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cocodiff.models import FAMILIES, family_named
from cocodiff.models.shapes import Shape
from cocodiff.parallel.mesh import Degrees
from cocodiff.parallel.placement import Placement
from cocodiff.plan import RunPlan
from cocodiff.planner.functions import Known
from cocodiff.planner.program import Compute, Program, Send, Wait
from cocodiff.planner.trace import Thinned, trace
from cocodiff.planner.wanted import meta_transformer
from cocodiff.topology import Cluster, Level

TWO_BY_TWO = Cluster("c", (Level("gpu", 2, 1.0, 1.0), Level("node", 2, 0.1, 10.0)))
ONE = Cluster("one", (Level("gpu", 1, 1.0, 1.0),))


def _small(family: str) -> Shape:
    shape = next(shape for one in FAMILIES if one.name == family for shape in one.part("shapes").SHAPES)
    return replace(shape, heads=4, head_dim=32, text=16, image=64, double=5, single=5 if shape.single else 0, dual=0)


def _traced(shape: Shape, cluster: Cluster, plan: RunPlan) -> Program:
    family = family_named(shape.family)
    given = family.part("shapes").RECIPE.inputs(shape, lambda *sizes: torch.empty(sizes, device="meta"))
    return _trace(meta_transformer(shape).eval(), family, given, cluster, plan, Known())


def _trace(transformer, family, *more):
    return trace(transformer, Thinned.of(transformer, family), family, *more)


def _plan(cfg: int, ring: int, ulysses: int, **more: object) -> RunPlan:
    return RunPlan(Degrees(cfg, ring, ulysses), **{"exchange": "flat", "pieces": 1, **more})


def _flops(program: Program) -> float:
    return sum(work.flops * work.count for work in program.work())


@pytest.mark.parametrize("family", [one.name for one in FAMILIES])
def test_every_family_is_read_and_its_ranks_share_the_work(family):
    shape = _small(family)
    whole = _traced(shape, ONE, _plan(1, 1, 1))
    shared = _traced(shape, TWO_BY_TWO, _plan(1, 1, 4))
    assert 1.0 <= 4 * _flops(shared) / _flops(whole) < 1.2  # text of Wan, modulation and time are on every rank
    assert shared.weight_bytes == whole.weight_bytes > 0
    assert 0 < shared.kept_bytes < whole.kept_bytes


def test_bytes_are_those_of_theory():
    shape = _small("flux")
    program = _traced(shape, TWO_BY_TWO, _plan(1, 1, 4))
    tokens, layers = shape.text + shape.image, shape.double + shape.single
    sent = {label: sum(sum(s.bytes_to[1:]) * n for s, n in program.sends() if s.label == label) for label in "vkqo"}
    assert set(sent.values()) == {layers * tokens // 4 * shape.width // 4 * 3 * 4}


def test_blocks_between_stand_for_all_of_their_kind():
    short, long = (_traced(replace(_small("flux"), double=double), TWO_BY_TWO, _plan(1, 1, 4)) for double in (5, 9))
    more = sum(n for s, n in long.sends() if s.label == "v") - sum(n for s, n in short.sends() if s.label == "v")
    assert more == 4
    assert max(times for _, times in long.parts) == 7 and len(list(long.steps())) > len(list(short.steps()))


@pytest.mark.parametrize(("schedule", "order"), [("v_first", "vkqo"), ("sequential", "qkvo")])
def test_the_order_is_that_of_the_code(schedule, order):
    program = _traced(_small("qwen"), TWO_BY_TWO, _plan(1, 1, 4, schedule=schedule))
    steps = [step for step in program.steps() if not isinstance(step, Compute)]
    assert "".join(step.label for step in steps if isinstance(step, Send))[:4] == order
    first = next(index for index, step in enumerate(steps) if isinstance(step, Wait))
    assert first == (3 if schedule == "v_first" else 1), "V, K and Q are under way before anything is waited for"


def test_pieces_go_ahead_into_the_next_layer():
    program = _traced(_small("flux"), TWO_BY_TWO, _plan(1, 1, 4, pieces=2))
    labels = [step.label for step in program.parts[2][0] if isinstance(step, Send)]
    assert labels == ["q", "q", "o", "o", "v", "k", "v", "k"]  # of a block between: V and K are the next one's


def test_axes_stages_and_what_follows_what():
    staged = _traced(_small("flux"), TWO_BY_TWO, _plan(1, 1, 4, exchange="staged"))
    v = [step for step in staged.parts[2][0] if isinstance(step, Send) and step.label == "v"]
    assert [(one.axis, one.after) for one in v] == [("level 0", None), ("level 1", 1)]
    assert all(len(one.bytes_to) == 2 for one in v)
    ring = _traced(_small("flux"), TWO_BY_TWO, _plan(1, 2, 2))
    passed = [step for step in ring.parts[2][0] if isinstance(step, Send) and step.axis == "ring"]
    assert [(one.label, one.pattern, one.after) for one in passed] == [("v", "pass_on", 1), ("k", "pass_on", 1)]
    halves = _traced(_small("flux"), TWO_BY_TWO, _plan(2, 1, 2))
    assert any(send.axis == "cfg" for send, _ in halves.sends()) and not any(s.axis == "cfg" for s, _ in ring.sends())
    placed = _plan(1, 1, 4, exchange="staged", placement=Placement((1, 1), (1, 1), (2, 2)))
    assert _traced(_small("flux"), TWO_BY_TWO, placed) == staged


def test_the_transformer_is_left_as_it_was():
    shape, family = _small("flux"), family_named("flux")
    given = family.part("shapes").RECIPE.inputs(shape, lambda *sizes: torch.empty(sizes, device="meta"))
    transformer = meta_transformer(shape).eval()
    blocks, forward = transformer.transformer_blocks, transformer.forward
    first = _trace(transformer, family, given, TWO_BY_TWO, _plan(1, 1, 4), known := Known())
    assert transformer.transformer_blocks is blocks and len(blocks) == 5 and transformer.forward == forward
    assert _trace(transformer, family, given, TWO_BY_TWO, _plan(1, 1, 4), known) == first, "operators seen before count"
