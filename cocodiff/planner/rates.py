"""How fast devices compute: ASSUMED for those known by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

from cocodiff.errors import ConfigError
from cocodiff.planner.program import Work


@dataclass(frozen=True)
class Rates:
    """One rank's device.

    Attributes:
        matmul_tflops, attention_tflops: what long operators reach in 16 bits; in 32 bits `slower32` times less.
        memory_gbs: of operators that are bound by memory, in 1e9 bytes a second.
        operator_us: an operator's own cost on the device, whatever its size.
        launch_us: the host's for one operator, where the device runs behind the host; 0 on a CPU, and where the host
            starts whole compiled steps.
        core_seconds_per_byte: of the rank's own cores, to send a byte; 0 where others move the bytes.
        messages: what is exchanged goes as messages between pairs of ranks (gloo), not in collectives.
        memory_gb: for weights and activations.
        source: where the figures are from.
        slower32: see above.
        measured: MEASURED seconds of single operators (`operators.py`), each of a count of 1; the rates stand in for
            others.
    """

    name: str
    matmul_tflops: float
    attention_tflops: float
    memory_gbs: float
    operator_us: float
    launch_us: float
    core_seconds_per_byte: float
    memory_gb: float
    source: str
    slower32: float = 2.0
    messages: bool = False
    measured: Mapping[Work, float] = field(default_factory=dict)

    def seconds(self, work: Sequence[Work], itemsize: int) -> float:
        """Of some operators, alone: each takes what its FLOPs or its bytes take, whichever is longer."""
        slower = self.slower32 if itemsize > 2 else 1.0
        rate = {"matmul": self.matmul_tflops * 1e12 / slower, "attention": self.attention_tflops * 1e12 / slower}
        total = 0.0
        for one in work:
            alone = self.measured.get(replace(one, count=1))
            if alone is None:
                by_memory = one.bytes / (self.memory_gbs * 1e9)
                by_compute = one.flops / rate[one.kind] if one.kind in rate else 0.0
                alone = max(by_memory, by_compute)
            total += one.count * (alone + self.operator_us * 1e-6)
        return total

    def fitted(self, work: Sequence[Work], itemsize: int, alone_seconds: float) -> Rates:
        """Rates by which some operators take what they took: those without a measurement by one factor, all by an
        operator's own cost (`operator_us`), where what was measured of each leaves time over.
        """
        plain = replace(self, operator_us=0.0)
        counts = sum(one.count for one in work)
        if self.measured:
            left = max(alone_seconds - plain.seconds(work, itemsize), 0.0)
            return replace(self, operator_us=left / counts * 1e6)
        faster = self.seconds(work, itemsize) / alone_seconds
        return replace(
            self,
            matmul_tflops=self.matmul_tflops * faster,
            attention_tflops=self.attention_tflops * faster,
            memory_gbs=self.memory_gbs * faster,
            operator_us=self.operator_us / faster,
        )


# ASSUMED: shares of data sheets that published runs reach. H100: 74 TFLOP a step of FLUX at 1024 px take 0.154 s
# compiled and 0.24 s eager on one (xDiT's documentation). The host's 8 us an operator: 0.52 ms for a block of 65.
_DEVICES = (
    Rates("h100", 560.0, 400.0, 2400.0, 2.0, 8.0, 0.0, 80.0, "assumed from data sheets and published single-GPU runs"),
    Rates("a100", 230.0, 170.0, 1300.0, 2.5, 8.0, 0.0, 40.0, "assumed from data sheets"),
    Rates("l20", 95.0, 80.0, 700.0, 2.5, 8.0, 0.0, 48.0, "assumed from data sheets"),
    Rates("max1550-tile", 180.0, 90.0, 900.0, 5.0, 12.0, 0.0, 64.0, "assumed from data sheets"),
    Rates("v5e", 140.0, 90.0, 650.0, 1.0, 0.0, 0.0, 16.0, "assumed from the data sheet: 197 TFLOPS, 819 GB/s"),
    Rates("cpu", 0.12, 0.06, 4.0, 6.0, 0.0, 4e-9, 16.0, "assumed of one core", messages=True),
)
DEVICES: Mapping[str, Rates] = MappingProxyType({rates.name: rates for rates in _DEVICES})

# The devices of the clusters known by name.
_OF_CLUSTER = {"aurora": "max1550-tile", "polaris": "a100", "dgx-h100": "h100", "v5e": "v5e"}


def rates_here(device: torch.device) -> Rates:
    """The rates of a device at hand, by its name; those of the slowest accelerator known for one that is not."""
    if device.type == "cpu":
        return DEVICES["cpu"]
    name = torch.get_device_module(device).get_device_name(device).lower()
    for word, known in (("h100", "h100"), ("h200", "h100"), ("a100", "a100"), ("l20", "l20"), ("max", "max1550-tile")):
        if word in name:
            return DEVICES[known]
    return replace(DEVICES["l20"], source=f"assumed to be like an l20's, since {name!r} is not known")


def rates_of(device: str | None, cluster_name: str) -> Rates:
    """The rates of a device, or of a cluster's, known by name. ConfigError if neither is."""
    name = device or _OF_CLUSTER.get(cluster_name, "")
    if name not in DEVICES:
        what = f"device {device!r}" if device else f"what computes in cluster {cluster_name!r}"
        raise ConfigError(f"{what} is not known: give --device one of {', '.join(DEVICES)}")
    return DEVICES[name]
