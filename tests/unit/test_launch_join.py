"""Devices, backends, joining on one rank, the guard by itself, and errors that name their cure."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from cocodiff.errors import LaunchError
from cocodiff.launch import Guard, Ranks, backend, check_backend, choose_backend, join, local_device
from cocodiff.launch.backend import serves
from cocodiff.launch.rendezvous import open_store
from cocodiff.launch.waits import Waits

ONE = Ranks(0, 0, 1, 1, "none")
TWO = Ranks(1, 1, 2, 2, "pmi")
QUICK = Waits(start_seconds=0.5)


def fake_mpi(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    module = ModuleType("mpi4py")
    comm = SimpleNamespace(Get_rank=lambda: rank, Get_size=lambda: size)
    module.MPI = SimpleNamespace(  # type: ignore[attr-defined]
        COMM_WORLD=comm, Get_library_version=lambda: "Some MPI 1.2\nbuilt somewhere"
    )
    monkeypatch.setitem(sys.modules, "mpi4py", module)


@pytest.fixture
def no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)


@pytest.fixture
def no_master(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)


def test_local_device_on_the_cpu():
    assert local_device("cpu", TWO) == torch.device("cpu")
    assert local_device(torch.device("cpu", 0), ONE) == torch.device("cpu")


def test_local_device_takes_what_torch_finds(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert local_device(None, TWO) == torch.device("cpu")
    chosen = fake_devices(monkeypatch, 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("xpu"))
    assert local_device(None, TWO) == torch.device("xpu", 1)
    assert chosen == [1]


def fake_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    chosen: list[int] = []
    api = SimpleNamespace(set_device=chosen.append)
    monkeypatch.setattr(backend, "_visible_devices", lambda device_type: (api, count))
    return chosen


@pytest.mark.parametrize(
    ("requested", "local_rank", "count", "index"),
    [("cuda", 5, 8, 5), ("cuda", 5, 4, 1), ("cuda:0", 3, 4, 3), ("cuda", 5, 1, 0), ("xpu:7", 2, 1, 0)],
)
def test_local_device_follows_the_local_rank(requested, local_rank, count, index, monkeypatch):
    chosen = fake_devices(monkeypatch, count)
    device = local_device(requested, Ranks(3 + local_rank, local_rank, 16, 8, "pmi"))
    assert device == torch.device(requested.split(":")[0], index)
    assert chosen == [index]


def test_a_single_rank_keeps_the_index_it_asked_for(monkeypatch):
    chosen = fake_devices(monkeypatch, 4)
    assert local_device("cuda:2", ONE).index == 2
    assert local_device("cuda", ONE).index == 0
    assert chosen == [2, 0]
    with pytest.raises(LaunchError, match="'cuda:4' was requested, but 4 are visible: 0 to 3"):
        local_device("cuda:4", ONE)


def test_local_device_errors(monkeypatch):
    with pytest.raises(LaunchError, match="'gpu' is no torch device"):
        local_device("gpu", ONE)
    fake_devices(monkeypatch, 0)
    with pytest.raises(LaunchError, match="'cuda' was requested, but torch .* sees none"):
        local_device("cuda", ONE)


def available(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in ("gloo", "nccl", "xccl", "mpi"):
        monkeypatch.setattr(dist, f"is_{name}_available", lambda found=name in names: found)


@pytest.mark.parametrize(
    ("device_type", "names", "chosen"),
    [
        ("cpu", ["gloo", "mpi"], "gloo"),
        ("cpu", ["mpi"], "mpi"),
        ("cuda", ["gloo", "nccl"], "nccl"),
        ("xpu", ["gloo", "xccl"], "xccl"),
    ],
)
def test_choose_backend(device_type, names, chosen, monkeypatch):
    available(monkeypatch, *names)
    name, why = choose_backend(device_type)
    assert name == chosen and why
    assert serves(name, device_type)


@pytest.mark.parametrize(
    ("device_type", "names", "words"),
    [
        ("cpu", [], "neither"),
        ("cuda", ["gloo"], "no nccl"),
        ("xpu", ["gloo"], "no xccl"),
        ("mps", ["gloo"], "'mps'"),
    ],
)
def test_choose_backend_never_falls_back_silently(device_type, names, words, monkeypatch):
    available(monkeypatch, *names)
    with pytest.raises(LaunchError, match=words):
        choose_backend(device_type)


@pytest.fixture
def lone_group(request):
    dist.init_process_group(getattr(request, "param", "gloo"), store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_gloo_group_does_not_carry_an_accelerator(lone_group):
    check_backend("cpu")
    for device_type, cure in (("cuda", "cpu:gloo,cuda:nccl"), ("xpu", "cpu:gloo,xpu:xccl")):
        with pytest.raises(LaunchError, match=f"cannot carry {device_type} tensors.*{cure}"):
            check_backend(device_type)
    with pytest.raises(LaunchError, match="cannot carry mps tensors: use cuda, xpu or cpu"):
        check_backend("mps")


@pytest.mark.parametrize("lone_group", ["cpu:gloo"], indirect=True)
def test_a_group_for_one_device_only(lone_group):
    check_backend("cpu")
    with pytest.raises(LaunchError, match="'cpu:gloo' cannot carry cuda"):
        check_backend("cuda")


def test_join_leaves_an_existing_group_alone(lone_group):
    group = dist.group.WORLD
    join(ONE, "gloo", torch.device("cpu"))
    join(Ranks(0, 0, 1, 1, "torchrun"), "gloo", torch.device("cpu"))
    assert dist.group.WORLD is group
    with pytest.raises(LaunchError, match=r"calls this rank 0 of 1, but the launcher \(pmi\) says 1 of 2"):
        join(TWO, "gloo", torch.device("cpu"))
    with pytest.raises(LaunchError, match="cannot carry cuda"):
        join(ONE, "gloo", torch.device("cuda", 0))


@pytest.mark.parametrize("name", ["gloo", "cpu:gloo", "cpu:gloo,cuda:gloo"])
def test_join_on_one_rank(name):
    join(ONE, name, torch.device("cpu"))
    try:
        assert dist.get_world_size() == 1
        side = dist.new_group([0], backend="gloo")
        dist.barrier(group=side)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "device", "words"),
    [
        ("gloo", "cuda:0", "cannot carry cuda"),
        ("nccl", "cpu", "cannot carry cpu"),
        ("cuda:nccl", "cpu", "cannot carry cpu"),
        ("nosuch", "cpu", "'nosuch' is not available"),
    ],
)
def test_join_refuses_a_backend_that_cannot_serve(name, device, words):
    with pytest.raises(LaunchError, match=words):
        join(ONE, name, torch.device(device))
    assert not dist.is_initialized()


def test_no_address_and_no_mpi4py_names_the_cure(no_master, no_mpi):
    with pytest.raises(LaunchError, match=r'mpi4py.*pip install "cocodiff\[mpi\]", or set MASTER_ADDR and MASTER_PORT'):
        open_store(TWO, QUICK)


def test_no_address_under_torchruns_variables_names_the_cure(no_master):
    with pytest.raises(LaunchError, match="MASTER_ADDR and MASTER_PORT are not: set them"):
        open_store(Ranks(1, 1, 2, 2, "torchrun"), QUICK)


@pytest.mark.parametrize("launcher", ["pmi", "slurm"])
def test_a_foreign_mpi_is_named(launcher, no_master, monkeypatch):
    fake_mpi(monkeypatch, 0, 1)
    with pytest.raises(LaunchError, match=r"started 4 ranks.*MPI library Some MPI 1\.2 sees 0 of 1.*MASTER_ADDR"):
        open_store(Ranks(0, 0, 4, 4, launcher), QUICK)


@pytest.mark.parametrize(("port", "words"), [("99999", "99999"), ("port", "port"), ("1", "timed out")])
def test_a_bad_address_is_named(port, words, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(LaunchError, match=rf"MASTER_ADDR=127\.0\.0\.1 MASTER_PORT={port}.*{words}"):
        open_store(TWO, QUICK)


def test_a_guard_reports_and_raises_on():
    store = dist.HashStore()
    guards = [Guard(store, rank, 2) for rank in range(2)]
    with pytest.raises(ValueError, match="^two\nlines$"):
        with guards[1].watch("generation"):
            with guards[1].watch("an inner call"):
                raise ValueError("two\nlines")
    report = dist.PrefixStore("cocodiff/guard/1", store).get("failed/1").decode()
    assert report == "rank 1 failed in generation: ValueError: two lines"
    with guards[1].watch("the next call"):
        pass
    for guard in reversed(guards):
        guard.close()
        guard.close()
    with guards[1].watch("watches nothing"):
        pass


def test_a_guard_on_one_rank_starts_no_thread():
    guard = Guard(dist.HashStore(), 0, 1)
    with pytest.raises(KeyError):
        with guard.watch("generation"):
            raise KeyError
    assert guard._thread is None
    guard.close()


def test_a_guards_process_ends_at_once_without_close():
    script = """
import torch.distributed as dist
from datetime import timedelta
from cocodiff.launch.guard import Guard
store = dist.TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=5), wait_for_workers=False)
Guard(store, 1, 2).watch("generation").__enter__()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "terminate" not in done.stderr and "Traceback" not in done.stderr


def test_importing_reads_no_environment_and_no_torch_distributed_state():
    script = """
import os, sys
class Watched(dict):
    def __getattribute__(self, name): raise AssertionError(name)
    def __getitem__(self, name): raise AssertionError(name)
import importlib.util, types
package = types.ModuleType("cocodiff"); package.__path__ = [sys.argv[1]]; sys.modules["cocodiff"] = package
launch = types.ModuleType("cocodiff.launch"); launch.__path__ = [sys.argv[1] + "/launch"]
sys.modules["cocodiff.launch"] = launch
# What the standard library does on import is not the question.
import logging, socket, subprocess, hashlib, importlib, warnings, threading, atexit
for name in ("ranks", "backend", "rendezvous", "join", "guard"):
    real, os.environ = os.environ, Watched()
    try:
        importlib.import_module(f"cocodiff.launch.{name}")
    finally:
        os.environ = real
assert "torch" not in sys.modules
"""
    package = backend.__file__.rsplit("/launch/", 1)[0]
    done = subprocess.run([sys.executable, "-c", script, package], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
