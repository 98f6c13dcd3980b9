"""A cluster as data: its levels, innermost first, each with a size and a link.

A *level* groups units of the level inside it: the tiles of one GPU, the GPUs of one node, the nodes of one run.
Rank numbers run fastest through the innermost level, as launchers assign them. The JSON form (`Cluster.to_json`,
`Cluster.from_json`):

    {
      "name": "my-cluster",
      "flat_efficiency": 1.0,
      "levels": [
        {"name": "gpu", "size": 8, "bandwidth_gbs": 450.0, "latency_us": 3.0, "slow": null},
        {"name": "node", "size": null, "bandwidth_gbs": 50.0, "latency_us": 10.0, "slow": true}
      ]
    }

- `levels`: innermost first, at least one, with different names.
- `size`: how many units of the level inside make up this one. Only the outermost level may have null, which stands
  for as many as the run has.
- `bandwidth_gbs`: what one rank can send through this level in one direction, in 1e9 bytes per second.
- `latency_us`: the cost of one message through this level, in microseconds.
- `part_gbs` (optional, none): pairs of a part's number and what one rank in it can send instead, as
  `[[2, 0.5]]` for a node whose cable is worse. Parts are counted over the whole cluster, from 0, in rank order.
- `on_the_way` (optional, false): whether messages through outer levels cross this link, too.
- `wiring` (optional, "switch"): "line" or "ring" for a dimension of a mesh or torus, whose parts have direct links to
  the one before and the one after; then `bandwidth_gbs` is of one such link in one direction and `latency_us` of one
  hop. Lines and rings that follow each other are the dimensions of one mesh or torus, routed in their order along the
  shorter way. A part of a ring is a line.
- `slow` (optional, null): whether selective transmission sends fewer bytes through this level; null lets
  `Cluster.slow` decide.
- `flat_efficiency` (optional, 1.0): the share, measured and at most 1, of the slowest level's bandwidth that one flat
  all-to-all over several levels reaches. A level may have its own (optional, null), for exchanges whose outermost level
  it is.
- `measured` (optional, null): `{"ranks": 4, "flat": [[bytes, seconds], ...], "staged": [...]}`, written by
  `cocodiff bench collectives`. On that many ranks it replaces the model.

All other keys are required, and unknown keys are refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from cocodiff.errors import ConfigError
from cocodiff.topology.level import Level, check_label, check_share, is_int
from cocodiff.topology.measured import Measured

# A link with less than this share of the bandwidth of the level inside it is slow, unless the level says otherwise.
_SLOW_SHARE = 0.25


@dataclass(frozen=True)
class Cluster:
    """The levels of a cluster, innermost first, and what is known of exchanges over several of them.

    `flat_efficiency` is the measured share of the slowest level's bandwidth that one flat all-to-all over several
    levels reaches; 1.0 if it was not measured. `measured` holds times of whole exchanges. Raises `ConfigError` for
    impossible values.
    """

    name: str
    levels: tuple[Level, ...]
    flat_efficiency: float = 1.0
    measured: Measured | None = None

    def __post_init__(self) -> None:
        check_label(self.name, "cluster")
        where = f"cluster {self.name!r}"
        if not isinstance(self.levels, tuple) or not all(isinstance(level, Level) for level in self.levels):
            raise ConfigError(f"{where}: levels must be a tuple of Level, not {self.levels!r}")
        if not self.levels:
            raise ConfigError(f"{where}: levels must hold at least one level")
        names = [level.name for level in self.levels]
        if len(set(names)) != len(names):
            raise ConfigError(f"{where}: levels must have different names, not {names}")
        for level in self.levels[:-1]:
            if level.size is None:
                raise ConfigError(f"{where}: only the outermost level may leave its size open, not {level.name!r}")
        check_share(self.flat_efficiency, "flat_efficiency", where)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the levels, innermost first. Raises `ConfigError` if one is open: call `resolve` first."""
        return tuple(self._concrete(level) for level in self.levels)

    @property
    def num_ranks(self) -> int:
        """The number of ranks of the whole cluster. Raises `ConfigError` if a size is open."""
        return math.prod(self.sizes)

    @property
    def slow(self) -> tuple[bool, ...]:
        """Whether each level is slow: what its `slow` says, or, if that is None, what its bandwidth says.

        Then a level is slow if it has less than a quarter of the bandwidth of the level inside it. The innermost level
        is slow only if its `slow` is True.
        """
        flags: list[bool] = []
        for index, level in enumerate(self.levels):
            if level.slow is not None:
                flags.append(level.slow)
            else:
                flags.append(index > 0 and level.bandwidth_gbs < _SLOW_SHARE * self.levels[index - 1].bandwidth_gbs)
        return tuple(flags)

    def resolve(self, num_ranks: int) -> Cluster:
        """Return this cluster with concrete sizes that hold exactly `num_ranks` ranks.

        From the innermost level outwards, a level keeps its full size as long as there are ranks to fill it. The level
        that they do not fill shrinks, and all levels outside it get size 1. Raises `ConfigError` if a full level does
        not divide the number of units inside it, or if there are more ranks than the levels hold.
        """
        if not is_int(num_ranks) or num_ranks < 1:
            raise ConfigError(f"cluster {self.name!r}: the number of ranks must be at least 1, not {num_ranks!r}")
        remaining = num_ranks
        resolved: list[Level] = []
        for level in self.levels:
            size = remaining if level.size is None else min(level.size, remaining)
            if remaining % size:
                raise ConfigError(
                    f"cluster {self.name!r}: level {level.name!r} has {size} parts, which do not divide the "
                    f"{remaining} units that {num_ranks} ranks fill; {self._legal_near(num_ranks)}"
                )
            if beyond := [part for part, _ in level.part_gbs if part >= remaining]:
                raise ConfigError(
                    f"cluster {self.name!r}: level {level.name!r} has {remaining} parts on {num_ranks} ranks, numbered "
                    f"from 0, and part_gbs names {beyond[0]}"
                )
            resolved.append(level.of_size(size))
            remaining //= size
        if remaining > 1:
            shape = " x ".join(str(level.size) for level in self.levels)
            raise ConfigError(
                f"cluster {self.name!r}: levels {shape} hold {self.num_ranks} ranks, this run has {num_ranks}"
            )
        return dataclasses.replace(self, levels=tuple(resolved))

    def with_sizes(self, sizes: tuple[int, ...]) -> Cluster:
        """Return a cluster of some of these ranks: the same links with other sizes.

        Times that were measured are dropped, since they are those of exchanges among all ranks, and so are the rates of
        single parts, which have other numbers there.
        """
        if sizes == self.sizes:
            return self
        levels = zip(self.levels, sizes, strict=True)
        return dataclasses.replace(
            self,
            levels=tuple(dataclasses.replace(level.of_size(size), part_gbs=()) for level, size in levels),
            measured=None,
        )

    def to_json(self) -> str:
        """Return the JSON form that the module's docstring describes."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Cluster:
        """Return the cluster that a JSON text in the form of the module's docstring describes.

        Raises `ConfigError` with the key that is missing, unknown or wrong.
        """
        try:
            data = json.loads(text, object_pairs_hook=_no_duplicates)
        except ConfigError:
            raise
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"this is not JSON for a cluster: {error}") from error
        fields = dict(_checked_keys(data, {"name", "levels"}, {"flat_efficiency", "measured"}, "the cluster"))
        if not isinstance(fields["levels"], list):
            raise ConfigError(f"the cluster: levels must be a list, not {fields['levels']!r}")
        levels = []
        for index, item in enumerate(fields["levels"]):
            required = {"name", "size", "bandwidth_gbs", "latency_us"}
            optional = {"slow", "part_gbs", "on_the_way", "wiring", "flat_efficiency"}
            levels.append(Level(**_checked_keys(item, required, optional, f"levels[{index}]")))
        if fields.get("measured") is not None:
            keys = {"ranks", "flat", "staged"}
            fields["measured"] = Measured(**_checked_keys(fields["measured"], keys, set(), "measured"))
        return cls(**{**fields, "levels": tuple(levels)})

    def seconds(self, exchange: str, bytes_per_rank: float) -> float:
        """Return the seconds of one whole exchange, `"flat"` or `"staged"`.

        They are MEASURED if there are measurements on this many ranks, otherwise MODELLED.
        """
        if self.measured is not None and self.measured.ranks == self.num_ranks:
            return self.measured.seconds(exchange, bytes_per_rank)
        return self.flat_seconds(bytes_per_rank) if exchange == "flat" else self.staged_seconds(bytes_per_rank)

    def flat_share(self, crossed: Collection[int]) -> float:
        """The share of its bandwidth that a flat all-to-all reaches that crosses these levels: 1 if it crosses one."""
        if len(crossed) < 2:
            return 1.0
        own = self.levels[max(crossed)].flat_efficiency
        return self.flat_efficiency if own is None else own

    def flat_seconds(self, bytes_per_rank: float) -> float:
        """Return the MODELLED seconds of one all-to-all in which each rank sends `bytes_per_rank` evenly to all ranks.

        This is an alpha-beta model. All levels move bytes at the same time, so the slowest of them sets the time, and
        the latencies of all messages add up. The model contains neither contention beyond `flat_efficiency` nor
        changes of the library's algorithm with the size of the message. Published models of this kind have ordered
        real runs wrongly until latencies were measured, so put measured bandwidths and latencies into the levels
        before you trust a small difference.
        """
        sizes = self.sizes
        part_bytes = bytes_per_rank / math.prod(sizes)
        efficiency = self.flat_share([level for level, size in enumerate(sizes) if size > 1])
        inner_ranks = 1
        transfer_seconds = latency_seconds = 0.0
        for level, size in zip(self.levels, sizes, strict=True):
            num_peers = (size - 1) * inner_ranks
            beta = level.bandwidth_gbs * 1e9 * efficiency
            transfer_seconds = max(transfer_seconds, num_peers * part_bytes / beta)
            latency_seconds += num_peers * level.latency_us * 1e-6
            inner_ranks *= size
        return transfer_seconds + latency_seconds

    def staged_seconds(self, bytes_per_rank: float) -> float:
        """Return the MODELLED seconds of the same exchange in stages, one for each level of size > 1.

        Each stage moves the whole buffer once among the `size` parts of its level, in fewer and larger messages than a
        flat exchange. The limits of the model are those of `flat_seconds`. Stages of different tensors, which overlap
        in a run, do not overlap in the model.
        """
        total_seconds = 0.0
        for level, size in zip(self.levels, self.sizes, strict=True):
            message_seconds = level.latency_us * 1e-6 + bytes_per_rank / size / (level.bandwidth_gbs * 1e9)
            total_seconds += (size - 1) * message_seconds
        return total_seconds

    def _concrete(self, level: Level) -> int:
        if level.size is None:
            raise ConfigError(
                f"cluster {self.name!r}: level {level.name!r} has an open size: call resolve(num_ranks) first"
            )
        return level.size

    def _legal_near(self, num_ranks: int) -> str:
        """Return the words of an error that name the nearest numbers of ranks that fit the levels."""
        # A number that fits is some units, at most a level's size, of everything inside that level.
        below, above = [], []
        inner_ranks = 1
        for level in self.levels:
            units = num_ranks // inner_ranks
            if units >= 1:
                below.append(inner_ranks * (units if level.size is None else min(units, level.size)))
            if level.size is None or units + 1 <= level.size:
                above.append(inner_ranks * (units + 1))
            inner_ranks *= level.size or 1
        text = f"the nearest rank counts that fit are {max(below)}"
        return f"{text} and {min(above)}" if above else f"the nearest rank count that fits is {max(below)}"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ConfigError(f"the key {key!r} occurs twice in one object")
        fields[key] = value
    return fields


def _checked_keys(data: Any, required: set[str], optional: set[str], where: str) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be a JSON object, not {data!r}")
    if missing := sorted(required - data.keys()):
        raise ConfigError(f"{where}: the key {missing[0]!r} is missing")
    if unknown := sorted(data.keys() - required - optional):
        known = ", ".join(sorted(required | optional))
        raise ConfigError(f"{where}: the key {unknown[0]!r} is unknown; known are {known}")
    return data
