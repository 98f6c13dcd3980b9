"""Finds out which rank this process is from the variables that its launcher has set.

Known launchers are torchrun (RANK, WORLD_SIZE, LOCAL_RANK), MPICH and Intel MPI's Hydra (PMI_*, MPI_LOCAL*), PMIx,
PALS, Open MPI and Slurm steps. The first name of a tuple below that is set counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cocodiff.errors import LaunchError
from cocodiff.launch.mpi import load_mpi
from cocodiff.launch.waits import Waits

# Launcher -> the variable with the rank, and the one with the number of ranks (None if the launcher sets none).
_LAUNCHERS: Mapping[str, tuple[str, str | None]] = {
    "torchrun": ("RANK", "WORLD_SIZE"),
    "pmi": ("PMI_RANK", "PMI_SIZE"),
    "pmix": ("PMIX_RANK", None),
    "pals": ("PALS_RANKID", None),
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS"),
}
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")
_LOCAL_RANKS = (
    "LOCAL_RANK",
    "PALS_LOCAL_RANKID",
    "PMIX_LOCAL_RANK",
    "PMI_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "SLURM_LOCALID",
)
_LOCAL_SIZES = (
    "LOCAL_WORLD_SIZE",
    "PALS_LOCAL_SIZE",
    "PMI_LOCAL_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
)
# From this number on Slurm numbers the batch script itself, interactive shells and the like, which are no job steps.
_SLURM_FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of its run.

    Attributes:
        rank: this process's number, 0 to world_size - 1.
        local_rank: its number among the ranks of this host; chooses the device.
        world_size: the number of ranks of the run.
        local_world_size: the number of ranks on this host; None if the launcher does not say.
        launcher: "torchrun", "pmi", "pmix", "pals", "openmpi", "slurm" or "none".
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int | None
    launcher: str


def discover(environ: Mapping[str, str]) -> Ranks:
    """Return the ranks that the launcher's variables in `environ` describe, and one rank if there are none.

    torchrun's variables come before all others. PALS and PMIx set no number of ranks; if no other variable has it, MPI
    (mpi4py) is asked. Slurm's variables count only in a job step: a plain `python` in an allocation is one rank.

    Raises `LaunchError` with variable, value and cure if a value is not a whole number, a rank is not below its size,
    a variable is missing, or sizes contradict each other.
    """
    if not _in_slurm_step(environ):
        environ = {name: value for name, value in environ.items() if not name.startswith("SLURM_")}
    launcher = next((name for name, (rank, _) in _LAUNCHERS.items() if rank in environ), None)
    if launcher is None:
        _refuse_sizes_without_rank(environ)
        return Ranks(0, 0, 1, 1, "none")

    rank_name, own_size_name = _LAUNCHERS[launcher]
    rank = _number(environ, rank_name)
    local_size_name = _first(environ, _LOCAL_SIZES)
    local_world_size = None if local_size_name is None else _number(environ, local_size_name, least=1)
    size_name = _size_name(environ, rank_name, own_size_name)
    if size_name is None:
        size_name, world_size = (
            "the size MPI reports",
            _size_from_mpi(rank_name, rank, local_world_size, Waits.read(environ)),
        )
    else:
        world_size = _number(environ, size_name, least=1)
    if "WORLD_SIZE" in environ and _number(environ, "WORLD_SIZE", least=1) != world_size:
        raise LaunchError(
            f"WORLD_SIZE={environ['WORLD_SIZE']} contradicts {size_name}={world_size}: unset WORLD_SIZE, or "
            "set RANK and LOCAL_RANK with it"
        )
    _refuse_above(rank_name, rank, size_name, world_size)
    if local_size_name is None or local_world_size is None:
        limit_name, limit = size_name, world_size
    else:
        limit_name, limit = local_size_name, local_world_size
        _refuse_above(local_size_name, local_world_size, size_name, world_size, inclusive=True)
    local_rank = _local_rank(environ, f"{rank_name}={rank}", world_size, limit_name, limit)
    return Ranks(rank, local_rank, world_size, local_world_size, launcher)


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    if not all(name in environ for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID")):
        return False
    step = environ["SLURM_STEP_ID"]
    return step.isascii() and step.isdigit() and int(step) < _SLURM_FIRST_SPECIAL_STEP


def _first(environ: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in environ), None)


def _number(environ: Mapping[str, str], name: str, least: int = 0) -> int:
    try:
        value = int(environ[name])
    except ValueError:
        value = least - 1
    if value < least:
        raise LaunchError(
            f"{name}={environ[name]!r} is not a whole number of at least {least}: unset it, or let mpiexec "
            "or torchrun set it"
        )
    return value


def _refuse_above(name: str, value: int, limit_name: str, limit: int, inclusive: bool = False) -> None:
    if value > limit or (value == limit and not inclusive):
        raise LaunchError(
            f"{name}={value} {'is above' if inclusive else 'is not below'} {limit_name}={limit}: unset what "
            "an outer job or shell left in the environment, or start all ranks with one mpiexec or torchrun"
        )


def _size_name(environ: Mapping[str, str], rank_name: str, own_size_name: str | None) -> str | None:
    """Return the variable that holds the number of ranks, and None if only MPI knows it."""
    if own_size_name in environ:
        return own_size_name
    if rank_name != "RANK" and ("PMIX_RANK" in environ or "PALS_RANKID" in environ):
        return _first(environ, _SIZES)
    raise LaunchError(
        f"{rank_name}={environ[rank_name]} is set but {own_size_name} is not: set both, or unset both, or "
        "start with mpiexec or torchrun"
    )


def _size_from_mpi(rank_name: str, rank: int, local_world_size: int | None, waits: Waits) -> int:
    try:
        MPI = load_mpi(rank, waits)
    except Exception as error:  # a missing package, or one whose MPI library does not load
        raise LaunchError(
            f"{rank_name}={rank} is set, and this launcher gives the number of ranks only to MPI, but mpi4py cannot "
            f'be imported ({error}): pip install "cocodiff[mpi]", or set RANK, WORLD_SIZE and LOCAL_RANK'
        ) from error
    mpi_rank, mpi_size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    if mpi_rank != rank or mpi_size < (local_world_size or 1):
        library = MPI.Get_library_version().splitlines()[0].strip(" \0")
        raise LaunchError(
            f"the launcher says {rank_name}={rank}, but MPI library {library} sees {mpi_rank} of {mpi_size}: "
            "mpiexec and mpi4py belong to different MPIs; build mpi4py against the launcher's MPI, or set "
            "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    return mpi_size


def _local_rank(environ: Mapping[str, str], said: str, world_size: int, limit_name: str, limit: int) -> int:
    name = _first(environ, _LOCAL_RANKS)
    if name is None:
        if world_size == 1:
            return 0
        raise LaunchError(
            f"{said} is set but no local rank ({', '.join(_LOCAL_RANKS)}): set LOCAL_RANK to this process's "
            "number on its host, or start with mpiexec or torchrun"
        )
    local_rank = _number(environ, name)
    _refuse_above(name, local_rank, limit_name, limit)
    return local_rank


def _refuse_sizes_without_rank(environ: Mapping[str, str]) -> None:
    for rank_name, size_name in _LAUNCHERS.values():
        if size_name is not None and size_name in environ and _number(environ, size_name, least=1) > 1:
            raise LaunchError(
                f"{size_name}={environ[size_name]} is set but {rank_name} is not: set both, or unset both, "
                "or start with mpiexec or torchrun"
            )
