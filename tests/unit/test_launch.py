"""Ranks from synthetic environments, and errors that name variable, value and cure."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from cocodiff.errors import LaunchError
from cocodiff.launch import Ranks, discover

ONE = Ranks(0, 0, 1, 1, "none")

HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
PALS = {"PALS_RANKID": "13", "PALS_LOCAL_RANKID": "1"}


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


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        ({}, ONE),
        ({"PATH": "/bin", "LOCAL_RANK": "3"}, ONE),
        (TORCHRUN, Ranks(3, 1, 4, 2, "torchrun")),
        (
            {**TORCHRUN, "PMI_RANK": "0", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"},
            Ranks(3, 1, 4, 2, "torchrun"),
        ),
        ({**SLURM, **TORCHRUN}, Ranks(3, 1, 4, 2, "torchrun")),
        (HYDRA, Ranks(5, 1, 8, 4, "pmi")),
        ({**HYDRA, "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "1"}, Ranks(5, 1, 8, 4, "pmi")),
        ({**HYDRA, "WORLD_SIZE": "8"}, Ranks(5, 1, 8, 4, "pmi")),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, Ranks(0, 0, 1, None, "pmi")),
        ({**PALS, "PMI_RANK": "13", "PMI_SIZE": "24"}, Ranks(13, 1, 24, None, "pmi")),
        ({**PALS, "WORLD_SIZE": "24"}, Ranks(13, 1, 24, None, "pals")),
        (OPENMPI, Ranks(3, 1, 4, 2, "openmpi")),
        ({**OPENMPI, "PMIX_RANK": "3"}, Ranks(3, 1, 4, 2, "pmix")),
        ({**SLURM, "PMIX_RANK": "3"}, Ranks(3, 1, 4, None, "pmix")),
        (SLURM, Ranks(3, 1, 4, None, "slurm")),
    ],
)
def test_discover(environ, ranks, no_mpi):
    assert discover(environ) == ranks


@pytest.mark.parametrize(
    "changed",
    [
        {"SLURM_STEP_ID": None},
        {"SLURM_STEP_ID": "4294967290"},
        {"SLURM_STEP_ID": "x"},
        {"SLURM_NTASKS": None},
    ],
)
def test_a_plain_python_in_a_slurm_allocation_is_alone(changed):
    environ = {name: value for name, value in {**SLURM, **changed}.items() if value is not None}
    assert discover(environ) == ONE


def test_local_ranks_are_asked_in_order():
    names = [
        "LOCAL_RANK",
        "PALS_LOCAL_RANKID",
        "PMIX_LOCAL_RANK",
        "PMI_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MPI_LOCALRANKID",
        "SLURM_LOCALID",
    ]
    environ = {"SLURM_PROCID": "7", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}
    for number, name in reversed(list(enumerate(names))):
        environ[name] = str(number)
        assert discover(environ).local_rank == number


@pytest.mark.parametrize("environ", [PALS, {**PALS, "PMIX_RANK": "13"}, {**PALS, "PMI_RANK": "13"}])
def test_pals_asks_mpi_for_the_size(environ, monkeypatch):
    fake_mpi(monkeypatch, 13, 24)
    ranks = discover(environ)
    assert (ranks.rank, ranks.local_rank, ranks.world_size) == (13, 1, 24)


@pytest.mark.parametrize("environ", [PALS, {"PALS_RANKID": "0", "PALS_LOCAL_RANKID": "0", "PALS_LOCAL_SIZE": "12"}])
def test_pals_with_a_foreign_mpi_says_so(environ, monkeypatch):
    fake_mpi(monkeypatch, 0, 1)
    with pytest.raises(LaunchError, match="Some MPI 1.2 sees 0 of 1: mpiexec and mpi4py belong to different MPIs"):
        discover(environ)


def test_pals_without_mpi4py_names_the_cure(no_mpi):
    with pytest.raises(LaunchError, match=r"PALS_RANKID=13.*pip install \"cocodiff\[mpi\]\""):
        discover(PALS)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({**TORCHRUN, "RANK": "three"}, ["RANK='three'", "whole number", "torchrun"]),
        ({**TORCHRUN, "RANK": "-1"}, ["RANK='-1'"]),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, ["WORLD_SIZE='0'"]),
        ({**TORCHRUN, "WORLD_SIZE": ""}, ["WORLD_SIZE=''"]),
        ({**TORCHRUN, "LOCAL_RANK": "1.0"}, ["LOCAL_RANK='1.0'"]),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "x"}, ["LOCAL_WORLD_SIZE='x'"]),
        ({**TORCHRUN, "RANK": "4"}, ["RANK=4", "not below WORLD_SIZE=4", "unset"]),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, ["LOCAL_RANK=2", "not below LOCAL_WORLD_SIZE=2"]),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "5"}, ["LOCAL_WORLD_SIZE=5", "above WORLD_SIZE=4"]),
        ({"RANK": "0"}, ["RANK=0 is set but WORLD_SIZE is not", "torchrun"]),
        ({"RANK": "0", **HYDRA}, ["RANK=0 is set but WORLD_SIZE is not"]),
        ({"PMI_RANK": "0"}, ["PMI_RANK=0 is set but PMI_SIZE is not"]),
        ({"OMPI_COMM_WORLD_RANK": "0"}, ["OMPI_COMM_WORLD_SIZE is not"]),
        ({"WORLD_SIZE": "4"}, ["WORLD_SIZE=4 is set but RANK is not"]),
        ({"PMI_SIZE": "4"}, ["PMI_SIZE=4 is set but PMI_RANK is not"]),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ["RANK=1", "no local rank", "set LOCAL_RANK"]),
        ({**HYDRA, "WORLD_SIZE": "16"}, ["WORLD_SIZE=16 contradicts PMI_SIZE=8", "unset WORLD_SIZE"]),
        ({**SLURM, "SLURM_PROCID": "9"}, ["SLURM_PROCID=9", "SLURM_NTASKS=4"]),
    ],
)
def test_discover_errors_name_variable_value_and_cure(environ, words):
    with pytest.raises(LaunchError) as caught:
        discover(environ)
    assert all(word in str(caught.value) for word in words), str(caught.value)
