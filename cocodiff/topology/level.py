"""One level of a cluster: equal units, the link that joins them, and single links that are not like the others."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from cocodiff.errors import ConfigError

WIRINGS = ("switch", "line", "ring")


@dataclass(frozen=True)
class Level:
    """One level of a cluster and the link that joins its parts.

    `bandwidth_gbs` is that of one rank in one direction, in 1e9 bytes per second; `latency_us` is that of one message,
    in microseconds. `size` None (only on the outermost level of a cluster) follows from the number of ranks.
    `slow` None lets `Cluster.slow` decide. `part_gbs` holds pairs of a part's number, counted from 0 over the whole
    cluster, and the bandwidth of one rank in it, where that is another. `on_the_way` says that messages through outer
    levels cross this link, too, as those of a node behind a rack's switch do. `cocodiff plan` heeds both. Raises
    `ConfigError` for impossible values.
    """

    name: str
    size: int | None
    bandwidth_gbs: float
    latency_us: float
    slow: bool | None = None
    part_gbs: tuple[tuple[int, float], ...] = ()
    on_the_way: bool = False
    wiring: str = "switch"
    flat_efficiency: float | None = None

    def __post_init__(self) -> None:
        where = f"level {self.name!r}"
        check_label(self.name, "level")
        if self.size is not None and (not is_int(self.size) or self.size < 1):
            raise ConfigError(f"{where}: size must be a positive whole number or null, not {self.size!r}")
        check_positive(self.bandwidth_gbs, "bandwidth_gbs", where)
        check_positive(self.latency_us, "latency_us", where)
        if self.slow is not None and not isinstance(self.slow, bool):
            raise ConfigError(f"{where}: slow must be true, false or null, not {self.slow!r}")
        if not isinstance(self.on_the_way, bool):
            raise ConfigError(f"{where}: on_the_way must be true or false, not {self.on_the_way!r}")
        try:
            pairs = tuple((part, gbs) for part, gbs in self.part_gbs)
        except (TypeError, ValueError):
            raise ConfigError(f"{where}: part_gbs must hold pairs [part, GB/s], not {self.part_gbs!r}") from None
        parts = [part for part, _ in pairs]
        if any(not is_int(part) or part < 0 for part in parts) or len(set(parts)) < len(parts):
            raise ConfigError(f"{where}: part_gbs must name parts by whole numbers from 0, each once, not {parts}")
        for part, gbs in pairs:
            check_positive(gbs, f"part_gbs of part {part}", where)
        object.__setattr__(self, "part_gbs", pairs)
        if self.flat_efficiency is not None:
            check_share(self.flat_efficiency, "flat_efficiency", where)
        if self.wiring not in WIRINGS:
            raise ConfigError(f"{where}: wiring must be one of {', '.join(WIRINGS)}, not {self.wiring!r}")
        if self.wired and (pairs or self.on_the_way):
            raise ConfigError(
                f"{where}: part_gbs and on_the_way are of a switch's links, and its wiring is {self.wiring}"
            )

    @property
    def wired(self) -> bool:
        """Whether its parts are joined by direct links to their neighbours."""
        return self.wiring != "switch"

    def of_size(self, size: int) -> Level:
        """This level with another size, which is concrete. Some of a ring's parts make a line.

        >>> Level("x", 16, 45.0, 1.0, wiring="ring").of_size(4).wiring
        'line'
        """
        part_of_ring = self.wiring == "ring" and self.size is not None and size < self.size
        return replace(self, size=size, wiring="line" if part_of_ring else self.wiring)


def is_int(value: object) -> bool:
    """Return whether a value is a whole number, which a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_label(name: object, what: str) -> None:
    """Raise `ConfigError` unless a name is a text that is not empty."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"the name of a {what} must be a non-empty text, not {name!r}")


def check_positive(value: object, key: str, where: str) -> None:
    """Raise `ConfigError` unless a value is a positive, finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # The upper limit also refuses integers that no float can hold.
    if not is_number or not 0 < value <= sys.float_info.max:  # type: ignore[operator]
        raise ConfigError(f"{where}: {key} must be a positive, finite number, not {value!r}")


def check_share(value: object, key: str, where: str) -> None:
    """Raise `ConfigError` unless a value is positive and at most 1."""
    check_positive(value, key, where)
    if value > 1:  # type: ignore[operator]
        raise ConfigError(f"{where}: {key} is a share of at most 1, not {value}")
