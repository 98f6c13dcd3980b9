"""Finds out which cluster a run is on: the one that the user names, otherwise from the hosts of the ranks.

All ranks must pass the same `hosts`, so that all get the same cluster.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from cocodiff.errors import ConfigError
from cocodiff.topology.cluster import Cluster, Level
from cocodiff.topology.presets import PRESETS

# ASSUMED bandwidths (1e9 bytes/s, one rank, one direction) inside a host and between hosts if only hosts are known.
_ASSUMED_GBS = {"cuda": (200.0, 25.0), "xpu": (15.0, 200.0 / 12), "cpu": (5.0, 1.0)}
_ASSUMED_LOCAL_LATENCY_US = 10.0
_ASSUMED_NETWORK_LATENCY_US = 30.0


def detect(hosts: Sequence[str], device_type: str) -> tuple[Cluster, str]:
    """Return the resolved cluster of ranks on these hosts (`hosts[rank]`), and one sentence that says why.

    One host gives one level. Contiguous blocks with the same number of ranks on each host give two levels, `local` and
    `network`. Any other order gives one level, so that a staged exchange has one stage; the sentence says so.
    Bandwidths are assumed from `device_type` ("cuda", "xpu" or "cpu"), and a level that crosses hosts is slow. Raises
    `ConfigError` if there are no hosts.
    """
    _check_hosts(hosts)
    local_gbs, network_gbs = _ASSUMED_GBS.get(device_type, _ASSUMED_GBS["cpu"])
    num_ranks = len(hosts)
    blocks = [(host, len(list(ranks))) for host, ranks in groupby(hosts)]
    num_hosts = len(set(hosts))
    if num_hosts == 1:
        level = Level("local", num_ranks, local_gbs, _ASSUMED_LOCAL_LATENCY_US)
        return Cluster("detected", (level,)), f"all {num_ranks} ranks run on host {hosts[0]}: one level"

    network = Level("network", num_hosts, network_gbs, _ASSUMED_NETWORK_LATENCY_US, slow=True)
    sizes = {length for _, length in blocks}
    if len(blocks) == num_hosts and len(sizes) == 1:
        per_host = sizes.pop()
        local = Level("local", per_host, local_gbs, _ASSUMED_LOCAL_LATENCY_US)
        why = f"{num_hosts} hosts run {per_host} ranks each: levels local {per_host} x network {num_hosts}"
        return Cluster("detected", (local, network)), why

    uniform = Level("network", num_ranks, network_gbs, _ASSUMED_NETWORK_LATENCY_US, slow=True)
    if len(blocks) == num_hosts:
        fault = f"uneven ({_listing(blocks)})"
    else:
        fault = f"interleaved (rank order visits {len(blocks)} runs of ranks on {num_hosts} hosts)"
    why = f"staging is off because ranks per node are {fault}: one uniform level"
    return Cluster("detected", (uniform,)), why


def load_cluster(spec: str | os.PathLike[str] | Cluster, hosts: Sequence[str], device_type: str) -> tuple[Cluster, str]:
    """Return the cluster that `spec` names, resolved for `len(hosts)` ranks, and one sentence on its source.

    `spec` is "auto" (see `detect`), the name of a preset, the path of a JSON file (a text that ends in ".json" or names
    a file), or a `Cluster`. Levels that put more ranks into a node than share a host are not refused, but the sentence
    says so. Raises `ConfigError` for an unknown name, an unreadable file, or a number of ranks that does not fit the
    levels.
    """
    _check_hosts(hosts)
    if isinstance(spec, str) and spec == "auto":
        return detect(hosts, device_type)
    check_name(spec)
    if isinstance(spec, Cluster):
        cluster, source = spec, f"cluster {spec.name!r} as given"
    elif isinstance(spec, str) and spec in PRESETS:
        cluster, source = PRESETS[spec], f"preset {spec!r}"
    else:
        cluster, source = read_cluster(spec), f"cluster file {os.fspath(spec)!r}"
    resolved = cluster.resolve(len(hosts))
    shape = " x ".join(f"{level.name} {level.size}" for level in resolved.levels)
    sentence = f"{source}: levels {shape}"
    doubt = _doubt(resolved, hosts)
    return resolved, f"{sentence}; but {doubt}" if doubt else sentence


def check_name(spec: str | os.PathLike[str] | Cluster) -> None:
    """Raise `ConfigError` for a text that is neither "auto" nor a preset nor may be a file.

    Files are not read here: a rank that lacks one must say so after it has joined the others, who would wait for it.
    """
    if not isinstance(spec, str) or spec == "auto" or spec in PRESETS:
        return
    if "\0" in spec or not (spec.endswith(".json") or os.sep in spec or os.path.isfile(spec)):
        raise ConfigError(
            f"unknown cluster {spec!r}: give 'auto', the path of a JSON file, or a preset: "
            + ", ".join(sorted(PRESETS))
        )


def _check_hosts(hosts: Sequence[str]) -> None:
    if isinstance(hosts, str) or not hosts:
        raise ConfigError(f"hosts must name one host per rank, not {hosts!r}")


def read_cluster(spec: str | os.PathLike[str]) -> Cluster:
    """Return the cluster of a JSON file; the size of its outermost level may be open. Raises `ConfigError`."""
    check_name(spec)
    path = Path(spec)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a name that no file can have
        raise ConfigError(f"cannot read the cluster file {str(path)!r}: {error}") from error
    try:
        return Cluster.from_json(text)
    except ConfigError as error:
        raise ConfigError(f"cluster file {str(path)!r}: {error}") from error


def _doubt(cluster: Cluster, hosts: Sequence[str]) -> str:
    """Return what does not fit between the levels and the hosts, or an empty text."""
    counts = Counter(hosts)
    if len(counts) == 1:
        return ""
    host, fewest = min(counts.items(), key=lambda item: (item[1], item[0]))
    if len(cluster.levels) == 1:
        return f"this one level spans {len(counts)} hosts, so nothing is staged" if max(counts.values()) > 1 else ""
    inner_ranks = cluster.num_ranks // cluster.sizes[-1]
    if inner_ranks > fewest:
        return f"levels inside a node hold {inner_ranks} ranks but host {host} runs {fewest}"
    for start in range(0, len(hosts), inner_ranks):
        inside = sorted(set(hosts[start : start + inner_ranks]))
        if len(inside) > 1:
            last = start + inner_ranks - 1
            names = ", ".join(inside)
            return f"levels inside a node hold ranks {start} to {last} but these run on hosts {names}"
    return ""


def _listing(blocks: Sequence[tuple[str, int]], shown: int = 4) -> str:
    parts = [f"{host} {length}" for host, length in blocks[:shown]]
    return ", ".join(parts) + (f" and {len(blocks) - shown} more" if len(blocks) > shown else "")
