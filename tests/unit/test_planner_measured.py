"""What `cocodiff plan --measure` found: timed operators, the file, and whose figures are refused."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from cocodiff.bench.shapes import named_shape
from cocodiff.errors import ConfigError
from cocodiff.parallel.mesh import Degrees
from cocodiff.plan import RunPlan
from cocodiff.planner.measured import Measurements, are_measurements, fitted_to_operators, read_measurements
from cocodiff.planner.operators import time_operators
from cocodiff.planner.program import Work
from cocodiff.planner.rates import DEVICES
from cocodiff.planner.wanted import Wanted, task
from cocodiff.topology import Cluster, Level

CLUSTER = Cluster("c", (Level("gpu", 2, 1.0, 5.0), Level("node", 2, 0.1, 9.0, part_gbs=((1, 0.05),))))
CPU = DEVICES["cpu"]
HERE = {
    "device": "cpu", "machine": "2 x a", "ranks": 4, "hosts": 2, "backend": "gloo", "versions": {"torch": "2"},
    "python": "3.11",
}  # fmt: skip
OPERATORS = {Work("matmul", 8e9, 1e6): 0.2, Work("attention", 4e9, 1e6): 0.4, Work("other", 0.0, 8e6): 0.002}


@pytest.mark.parametrize("ring", [1, 2])
def test_every_operator_of_a_trace_is_timed(ring):
    of = task(Wanted(named_shape("flux-dev").scaled(Fraction(1, 512)), 0, 0, None, 1), CLUSTER, CPU, None)
    program = of.trace(RunPlan(Degrees(1, ring, 4 // ring), exchange="flat", pieces=1))
    found = time_operators(of.known, torch.device("cpu"))
    work = {replace(one, count=1) for one in program.work()}
    timed = {one for one in work if one in found}
    assert {"matmul", "attention", "other"} <= {one.kind for one in timed} and len(timed) > 0.9 * len(work)
    assert all(seconds > 0 for seconds in found.values())
    rates = fitted_to_operators(CPU, found, 4)
    assert rates.seconds(tuple(program.work()), 4) != CPU.seconds(tuple(program.work()), 4)


def test_rates_are_what_operators_reach_and_what_was_timed_counts():
    rates = fitted_to_operators(CPU, OPERATORS, 4)
    assert rates.matmul_tflops == pytest.approx(2 * 8e9 / 0.2 / 1e12), "in 16 bits; in 32 half"
    assert rates.attention_tflops == pytest.approx(2 * 4e9 / 0.4 / 1e12) and rates.memory_gbs == pytest.approx(4.0)
    plain = replace(rates, operator_us=0.0)
    assert plain.seconds([Work("matmul", 8e9, 1e6, count=3)], 4) == pytest.approx(0.6)
    assert plain.seconds([Work("matmul", 16e9, 1.0)], 4) == pytest.approx(0.4), "by the rate, where none was timed"
    slower = rates.fitted([Work("matmul", 8e9, 1e6, count=2)], 4, alone_seconds=0.5)
    assert slower.operator_us == pytest.approx(0.05e6), "what is left of the step is each operator's own"


def test_a_file_is_read_back_and_foreign_or_damaged_ones_are_refused(tmp_path):
    rates = replace(fitted_to_operators(CPU, OPERATORS, 4), operator_us=7.0)
    one, file = Measurements(HERE, "2026-11-25", CLUSTER, rates), tmp_path / "m.json"
    file.write_text(json.dumps(one.as_json()))
    read = read_measurements(file)
    assert read.cluster == CLUSTER and read.environment == HERE and are_measurements(file)
    assert replace(read.rates, source="") == replace(rates, source="") and "2026-11-25" in read.rates.source
    read.check(HERE | {"python": "3.12"})
    for key, other in (("machine", "2 x b"), ("ranks", 8), ("versions", {"torch": "3"}), ("device", "cuda")):
        with pytest.raises(ConfigError, match=f"{key}: .* there, .* here.*measure again"):
            read.check(HERE | {key: other})
    for change, words in (({"operators": [[1]]}, "damaged"), ({"rates": {}}, "damaged"), ({"schema": "x"}, "are none")):
        file.write_text(json.dumps(one.as_json() | change))
        with pytest.raises(ConfigError, match=words):
            read_measurements(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_measurements(tmp_path / "none.json")
