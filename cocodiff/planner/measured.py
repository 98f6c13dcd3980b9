"""What `cocodiff plan --measure` found, as a file: links, the model's operators, the host. MEASURED, on one machine."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cocodiff.errors import ConfigError
from cocodiff.planner.plan_file import read_json
from cocodiff.planner.program import Work
from cocodiff.planner.rates import DEVICES, Rates
from cocodiff.topology import Cluster

SCHEMA = "cocodiff-measured/1"
SAME = ("device", "machine", "ranks", "hosts", "backend", "versions")  # of the environment, or the figures are foreign
_OWN = ("matmul_tflops", "attention_tflops", "memory_gbs", "operator_us", "launch_us", "core_seconds_per_byte")


@dataclass(frozen=True)
class Measurements:
    """Figures of one machine.

    Attributes:
        environment: the machine and versions, as `cocodiff bench` writes them.
        date: of the measurement, ISO 8601.
        cluster: with the links as they were.
        rates: of a rank's device, with single operators.
    """

    environment: Mapping[str, Any]
    date: str
    cluster: Cluster
    rates: Rates

    def as_json(self) -> dict[str, Any]:
        """JSON values, which `read_measurements` takes."""
        operators = [[work.kind, work.flops, work.bytes, seconds] for work, seconds in self.rates.measured.items()]
        return {
            "schema": SCHEMA,
            "environment": dict(self.environment),
            "date": self.date,
            "cluster": json.loads(self.cluster.to_json()),
            "rates": {"name": self.rates.name} | {name: getattr(self.rates, name) for name in _OWN},
            "operators": operators,
        }

    def check(self, environment: Mapping[str, Any]) -> None:
        """Raise ConfigError, with what differs, unless they were measured on such a machine."""
        differing = [
            f"{name}: {self.environment.get(name)} there, {environment.get(name)} here"
            for name in SAME
            if self.environment.get(name) != environment.get(name)
        ]
        if differing:
            raise ConfigError(
                f"these measurements of {self.date} are of another machine or other versions ({'; '.join(differing)}): "
                "measure again with cocodiff plan --measure FILE."
            )


def are_measurements(plan: str | os.PathLike[str]) -> bool:
    """Whether `plan=` names a file of `cocodiff plan --measure`. ConfigError if it names a file that cannot be read."""
    found = read_json(plan)
    return isinstance(found, dict) and found.get("schema") == SCHEMA


def read_measurements(path: str | os.PathLike[str]) -> Measurements:
    """Read a file of `cocodiff plan --measure`. ConfigError for one that cannot be read, or is something else."""
    where, found = f"measurements {os.fspath(path)!r}", read_json(path)
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ConfigError(f"{where} are none (schema {SCHEMA}): write some with cocodiff plan --measure FILE.")
    try:
        return measurements_of_json(found)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where} are damaged ({type(error).__name__}: {error}): measure again.") from error


def measurements_of_json(found: Mapping[str, Any]) -> Measurements:
    """What `Measurements.as_json` made. KeyError, TypeError or ValueError for anything else."""
    operators = {Work(kind, flops, size): float(seconds) for kind, flops, size, seconds in found["operators"]}
    own = {name: float(found["rates"][name]) for name in _OWN}
    base, date = DEVICES[found["rates"]["name"]], str(found["date"])
    rates = replace(base, **own, measured=operators, source=f"measured on {date}")  # type: ignore[arg-type]
    return Measurements(found["environment"], date, Cluster.from_json(json.dumps(found["cluster"])), rates)


def fitted_to_operators(rates: Rates, measured: Mapping[Work, float], itemsize: int) -> Rates:
    """Rates that long operators of each kind reach together, for operators that were not timed."""
    slower = rates.slower32 if itemsize > 2 else 1.0
    found: dict[str, float] = {}
    for kind, name in (("matmul", "matmul_tflops"), ("attention", "attention_tflops")):
        flops, seconds = _sums(measured, kind)
        if seconds > 0:
            found[name] = slower * flops / seconds / 1e12
    moved = {work: seconds for work, seconds in measured.items() if work.kind == "other"}
    if moved:
        largest = sorted(moved, key=lambda work: work.bytes)[-max(1, len(moved) // 4) :]
        found["memory_gbs"] = sum(work.bytes for work in largest) / sum(moved[work] for work in largest) / 1e9
    return dataclasses.replace(rates, **found, measured=dict(measured))  # type: ignore[arg-type]


def _sums(measured: Mapping[Work, float], kind: str) -> tuple[float, float]:
    some = {work: seconds for work, seconds in measured.items() if work.kind == kind}
    return sum(work.flops for work in some), sum(some.values())
