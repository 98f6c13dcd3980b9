"""The network of scripts/emulated_cluster: one namespace for each host, joined by links with token buckets."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "cocodiff"
IN_FLIGHT = 262_144  # bytes that one connection may have on its way


class ClusterError(Exception):
    """Something the user can mend, told in one line."""


@dataclass(frozen=True)
class Step:
    """One level of the tree, from the outside in: how many parts each part outside has, and the rate of their links.

    `own` has the rates of links that differ, by the number of the part among all of its level, from 0 in rank order.
    """

    name: str
    count: int
    bits: float
    own: Mapping[int, float] = field(default_factory=dict)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")


def check_machine(latency_us: float) -> None:
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise ClusterError(f"needs {' and '.join(missing)} (Debian: apt-get install iproute2)")
    if os.geteuid() != 0:
        raise ClusterError("needs root: network namespaces and token buckets are made with ip and tc")
    if latency_us:
        name = f"{PREFIX}{os.getpid()}netem"
        run("ip", "netns", "add", name)
        try:
            run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
        except ClusterError:
            raise ClusterError("this kernel has no netem, so --latency-us cannot be added; leave it out") from None
        finally:
            run("ip", "netns", "delete", name)


def remove_leftovers() -> None:
    """Namespaces of runs whose process is gone."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name in (line.split()[0] for line in listed.splitlines() if line):
        match = re.fullmatch(rf"{PREFIX}(\d+)[a-z]+\d*", name)
        if match and not Path(f"/proc/{match[1]}").exists():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@contextlib.contextmanager
def network(steps: list[Step], latency_us: float) -> Iterator[list[str]]:
    """The hosts' namespaces, joined as `steps` say; host i has address 10.77.0.(i + 1) on its eth0."""
    made: list[str] = []

    def namespace(kind: str) -> str:
        name = f"{PREFIX}{os.getpid()}{kind}{len(made)}"
        run("ip", "netns", "add", name)
        made.append(name)
        run("ip", "-n", name, "link", "set", "lo", "up")
        # Links of clusters lose nothing: what a sender may have on its way is small and fits into the buckets' queues,
        # and the congestion control is the simplest, which never acts. (bbr would probe, pace and pause by itself.)
        for setting in ("congestion_control=reno", "slow_start_after_idle=0", f"wmem=4096 65536 {IN_FLIGHT}"):
            run("ip", "netns", "exec", name, "sysctl", "-qw", f"net.ipv4.tcp_{setting}")
        return name

    def bridge() -> str:
        name = namespace("bridge")
        run("ip", "-n", name, "link", "add", "name", "br0", "type", "bridge")
        run("ip", "-n", name, "link", "set", "br0", "up")
        return name

    def limit(name: str, device: str, bits: float) -> None:
        # A bucket of 1 ms, or of ten packets: what it holds after a pause leaves at once, which no real link does.
        burst = max(16_000, int(bits / 8 * 0.001))
        bucket = ("tbf", "rate", f"{int(bits)}bit", "burst", str(burst), "limit", str(256 * IN_FLIGHT))
        run("tc", "-n", name, "qdisc", "add", "dev", device, "root", "handle", "1:", *bucket)
        if latency_us:
            delay = ("netem", "delay", f"{latency_us / 2}us", "limit", "100000")
            run("tc", "-n", name, "qdisc", "add", "dev", device, "parent", "1:1", *delay)

    def join(outer: str, port: str, inner: str, device: str, bits: float) -> None:
        run("ip", "link", "add", port, "netns", outer, "type", "veth", "peer", "name", device, "netns", inner)
        for name, end in ((outer, port), (inner, device)):
            run("ip", "-n", name, "link", "set", end, "up")
            limit(name, end, bits)
        run("ip", "-n", outer, "link", "set", port, "master", "br0")

    def build(outer: str, remaining: list[Step], hosts: list[str], around: int = 0) -> None:
        """Fill the part of the level outside that has the number `around`."""
        step = remaining[0]
        for index in range(step.count):
            number = around * step.count + index
            bits = step.own.get(number, step.bits)
            if len(remaining) > 1:
                inner = bridge()
                join(outer, f"port{index}", inner, "uplink", bits)
                run("ip", "-n", inner, "link", "set", "uplink", "master", "br0")
                build(inner, remaining[1:], hosts, number)
            else:
                host = namespace("host")
                join(outer, f"port{index}", host, "eth0", bits)
                run("ip", "-n", host, "address", "add", f"10.77.0.{len(hosts) + 1}/24", "dev", "eth0")
                run("ip", "-n", host, "route", "add", "default", "dev", "eth0")  # how a program finds its own address
                hosts.append(host)

    try:
        hosts: list[str] = []
        if steps:
            build(bridge(), steps, hosts)
        else:
            hosts.append(namespace("host"))
            run("ip", "-n", hosts[0], "link", "add", "name", "eth0", "type", "veth", "peer", "name", "nowhere")
            run("ip", "-n", hosts[0], "link", "set", "nowhere", "up")
            run("ip", "-n", hosts[0], "link", "set", "eth0", "up")
            run("ip", "-n", hosts[0], "address", "add", "10.77.0.1/24", "dev", "eth0")
        yield hosts
    finally:
        for name in reversed(made):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
