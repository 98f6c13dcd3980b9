"""Joining on one rank, the store over which ranks meet, and errors that name their cure."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from cocodiff.errors import LaunchError
from cocodiff.launch import Ranks, backend, check_backend, job, join
from cocodiff.launch.rendezvous import open_store
from cocodiff.launch.waits import Waits
from tests.distributed.ranks import free_port

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


@pytest.mark.parametrize(
    ("launcher", "step", "cure"),
    [
        ("pmi", None, "mpiexec and mpi4py belong to different MPIs.*MASTER_ADDR"),
        ("slurm", None, "set MASTER_ADDR and MASTER_PORT .*no MPI is needed.*srun --mpi=pmix"),
        ("pmix", "0", "set MASTER_ADDR and MASTER_PORT .*no MPI is needed.*srun --mpi=pmix"),
    ],
)
def test_a_foreign_mpi_is_named(launcher, step, cure, no_master, monkeypatch):
    fake_mpi(monkeypatch, 0, 1)
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    if step is not None:
        monkeypatch.setenv("SLURM_STEP_ID", step)
    with pytest.raises(LaunchError, match=rf"started 4 ranks.*MPI library Some MPI 1\.2 sees 0 of 1: {cure}"):
        open_store(Ranks(0, 0, 4, 4, launcher), QUICK)


@pytest.mark.parametrize(("port", "words"), [("99999", "99999 is no port"), ("port", "port"), ("1", "timed out")])
def test_a_bad_address_is_named(port, words, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(LaunchError, match=rf"MASTER_ADDR=127\.0\.0\.1 MASTER_PORT={port}.*{words}"):
        open_store(TWO, QUICK)


def test_the_store_listens_where_the_ranks_meet_and_nowhere_else(monkeypatch):
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    first = Ranks(0, 0, 2, 2, "slurm")
    store = open_store(first, QUICK)
    again = open_store(first, QUICK)  # a second store of this process on the same port
    again.set("key", "value")
    assert store.get("key") == b"value"
    socket.create_connection(("127.0.0.1", port), timeout=60).close()
    for elsewhere in ("127.0.0.2", "::1"):
        with pytest.raises(OSError):
            socket.create_connection((elsewhere, port), timeout=60).close()


def test_collectives_wait_longer_than_the_start():
    join(ONE, "gloo", torch.device("cpu"), Waits(start_seconds=5, collective_seconds=1e6))
    try:
        options = dist.group.WORLD._get_backend(torch.device("cpu")).options
        assert options._timeout == timedelta(seconds=1e6)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("place", "bound"), [("cuda:0", "cuda:0"), ("xpu:0", None), ("cpu", None)])
def test_a_device_is_bound_where_other_groups_can_live_beside_it(place, bound, monkeypatch):
    given = {}
    monkeypatch.setattr(dist, "is_backend_available", lambda name: True)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: given.update(kwargs))
    monkeypatch.setattr(sys.modules["cocodiff.launch.join"], "let_idle", lambda *args: None)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", lambda: None)
    join(ONE, {"cuda": "nccl", "xpu": "xccl", "cpu": "gloo"}[place.split(":")[0]], torch.device(place))
    assert given["device_id"] == (None if bound is None else torch.device(bound))


def test_nccl_is_asked_for_one_order_of_launches_before_it_starts(monkeypatch):
    class Started(Exception):
        pass

    def started(*args):
        raise Started(os.environ.get("NCCL_LAUNCH_ORDER_IMPLICIT"))

    monkeypatch.setattr(job, "discover", lambda environ: TWO)
    monkeypatch.setattr(job, "choose_backend", lambda kind: ("nccl", ""))
    monkeypatch.setattr(job, "device_name", lambda *args: None)
    monkeypatch.setattr(job, "join", started)
    for kind, given, expected in (("cuda", None, "1"), ("cuda", "0", "0"), ("cpu", None, None)):
        monkeypatch.delenv("NCCL_LAUNCH_ORDER_IMPLICIT", raising=False)
        if given is not None:
            monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", given)
        monkeypatch.setattr(job, "local_device", lambda *args, kind=kind: torch.device(kind, 0))
        with pytest.raises(Started) as caught:
            job.start_job(None)
        assert caught.value.args == (expected,)
    monkeypatch.delenv("NCCL_LAUNCH_ORDER_IMPLICIT", raising=False)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ([["gloo for cpu", "a", None]] * 2, ""),
        ([["nccl for cuda", "a", "x"], ["nccl for cuda", "b", "x"], ["nccl for cuda", "a", "y"]], ""),
        ([["nccl for cuda", "a", "x"]] * 2, "launch: ranks share devices: ranks 0, 1 (x). Start as many ranks"),
        ([["gloo for cpu", "a", None], None, None], "launch: ranks 1, 2 of 3 did not start in time"),
        ([["gloo for cpu", "a", None], ["nccl for cuda", "a", "x"]], "mismatch: ranks chose different backends"),
    ],
)
def test_the_verdict_on_what_the_ranks_chose(choices, said):
    verdict = sys.modules["cocodiff.launch.join"]._verdict(choices)
    assert verdict.startswith(said) and bool(verdict) == bool(said)


def test_rank_0_names_the_ranks_that_do_not_start(monkeypatch, caplog):
    monkeypatch.setattr(sys.modules["cocodiff.launch.join"], "open_store", lambda *args: dist.HashStore())
    monkeypatch.setattr(sys.modules["cocodiff.launch.join"], "_VERDICT_SECONDS", 0.1)
    with pytest.raises(LaunchError, match="ranks 1, 2 of 3 did not start in time.*COCODIFF_START_SECONDS"):
        join(Ranks(0, 0, 3, 3, "slurm"), "gloo", torch.device("cpu"), Waits(start_seconds=0.4, notice_seconds=0.2))
    assert "rank 0 has waited 0.2 s for ranks 1, 2 to start" in caplog.text


def test_a_wait_in_which_no_thread_runs_ends_with_words():
    script = """
import ctypes
from cocodiff.launch.mpi import waiting_for_all
from cocodiff.launch.waits import Waits
from tests.distributed.ranks import free_port
with waiting_for_all(3, Waits()):
    pass
with waiting_for_all(3, Waits(start_seconds=0.4, notice_seconds=0.2)):
    ctypes.PyDLL(None).sleep(600)  # holds Python's lock, as the start of MPI does
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == -9 and len(done.stderr.splitlines()) == 2, done.stderr
    assert "rank 3 has waited 0.2 s for all ranks to start" in done.stderr
    assert "rank 3 ends: not all ranks started within 0.4 s (COCODIFF_START_SECONDS)" in done.stderr


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
for name in ("ranks", "backend", "rendezvous", "join", "guard", "leaving", "mpi"):
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
