"""Opens the key-value store on rank 0 over which the ranks of a run first meet.

Its address comes from MASTER_ADDR and MASTER_PORT, otherwise over MPI, which carries plain buffers: nothing is pickled.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from cocodiff.errors import LaunchError
from cocodiff.launch.mpi import load_mpi, waiting_for_all
from cocodiff.launch.ranks import Ranks
from cocodiff.launch.waits import Waits

if TYPE_CHECKING:
    import torch.distributed as dist

_CURE = 'pip install "cocodiff[mpi]", or set MASTER_ADDR and MASTER_PORT to an address and a free port of rank 0'
# When MPI has delivered the address, every rank is running, so that a connection succeeds quickly or never.
_CONNECT_SECONDS = 60.0
_ADDRESS_BYTES = 256


def open_store(ranks: Ranks, waits: Waits) -> dist.Store:
    """Open a store that all ranks share. Collective. Raises `LaunchError` with the cure."""
    import torch.distributed as dist

    if ranks.world_size == 1:
        return dist.HashStore()
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address and port:
        return _open_store_at(address, port, ranks, waits)
    if ranks.launcher == "torchrun":
        raise LaunchError(
            f"RANK={ranks.rank} and WORLD_SIZE={ranks.world_size} are set but MASTER_ADDR and MASTER_PORT "
            "are not: set them to an address and a free port of rank 0, or start with torchrun"
        )
    return _open_store_by_mpi(ranks, waits, address)


def _open_store_at(address: str, port: str, ranks: Ranks, waits: Waits) -> dist.Store:
    timeout = timedelta(seconds=waits.start_seconds)
    at = f"MASTER_ADDR={address} MASTER_PORT={port}"
    said = f"cocodiff: rank {ranks.rank} has waited {waits.notice_seconds:g} s for the others at {at}\n"
    notice = threading.Timer(waits.notice_seconds, os.write, (2, said.encode()))
    notice.daemon = True
    notice.start()
    try:
        number = int(port)
        if not 0 < number < 2**16:
            raise ValueError(f"{number} is no port")
        # Under torchrun the agent holds the store, not rank 0.
        holds = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        return _tcp_store(address, number, ranks, timeout, holds, _listen(address, number) if holds else None)
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {ranks.rank} of {ranks.world_size} cannot meet the others at {at} ({error}): the address must be "
            "rank 0's, reachable from here, and the port free there"
        ) from error
    finally:
        notice.cancel()


def _open_store_by_mpi(ranks: Ranks, waits: Waits, address: str | None) -> dist.Store:
    # MPI waits for ever, and a rank that failed before it came here cannot report that.
    comm = _world_communicator(ranks, waits)
    own_host = host_digest()
    hosts = bytearray(len(own_host) * ranks.world_size)
    with waiting_for_all(ranks.rank, waits):  # the script may have started MPI long before
        comm.Allgather(own_host, hosts)
    if bytes(hosts) == own_host * ranks.world_size:
        address = "127.0.0.1"
    message = bytearray(2 + _ADDRESS_BYTES)
    connect = timedelta(seconds=_CONNECT_SECONDS)
    store = None
    failure: Exception | None = None
    if ranks.rank == 0:
        try:
            # The port is bound before its number is sent, so that no other process can take it in between.
            address = address or _own_address()
            store = _tcp_store(address, 0, ranks, connect, True, _listen(address, 0))
            message[:2] = store.port.to_bytes(2, "big")
            text = address.encode()[:_ADDRESS_BYTES]
            message[2 : 2 + len(text)] = text
        except Exception as error:  # the others wait for the broadcast: send them port 0, then raise
            message[:2] = bytes(2)
            failure = error
    comm.Bcast(message, root=0)
    port, address = int.from_bytes(message[:2], "big"), message[2:].rstrip(b"\0").decode()
    if port == 0:
        raise LaunchError(f"rank 0 could not open a store for the others ({failure or 'see its output'}): {_CURE}")
    if store is None:
        try:
            store = _tcp_store(address, port, ranks, connect, False)
        except RuntimeError as error:
            raise LaunchError(
                f"rank {ranks.rank} cannot reach rank 0 at {address}:{port} ({error}): set MASTER_ADDR to an "
                "address of rank 0's host that the other hosts reach"
            ) from error
    store.set_timeout(timedelta(seconds=waits.start_seconds))
    return store


def _world_communicator(ranks: Ranks, waits: Waits) -> Any:
    """Return MPI's world communicator after a check that the launcher and the library agree on the ranks."""
    try:
        MPI = load_mpi(ranks.rank, waits)
    except Exception as error:  # a missing package, or one whose MPI library does not load
        raise LaunchError(
            f"rank {ranks.rank} of {ranks.world_size} needs mpi4py to find the others, which cannot be "
            f"imported ({type(error).__name__}: {error}): {_CURE}"
        ) from error
    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    if (rank, size) != (ranks.rank, ranks.world_size):
        library = MPI.Get_library_version().splitlines()[0].strip(" \0")
        raise LaunchError(
            f"the launcher ({ranks.launcher}) started {ranks.world_size} ranks and calls this one "
            f"{ranks.rank}, but MPI library {library} sees {rank} of {size}: {_mpi_cure(ranks.launcher)}"
        )
    return comm


def _mpi_cure(launcher: str) -> str:
    if launcher == "slurm" or "SLURM_STEP_ID" in os.environ:  # srun --mpi=pmix sets PMIx's variables, too
        return (
            "set MASTER_ADDR and MASTER_PORT to rank 0's host and a free port there, as scripts/cluster.slurm does: "
            "then no MPI is needed. Or, since srun and mpi4py belong to different MPIs, build mpi4py against the "
            "cluster's MPI and start with one of what `srun --mpi=list` says, such as srun --mpi=pmix"
        )
    return (
        "mpiexec and mpi4py belong to different MPIs; build mpi4py against the launcher's MPI (pip install --no-binary "
        "mpi4py mpi4py), use the mpiexec that belongs to mpi4py's, or set MASTER_ADDR and MASTER_PORT"
    )


def _listen(address: str, port: int) -> socket.socket | None:
    """Return a socket that listens on this address alone; None where only torch's way, on all of them, can succeed.

    That is where the address is not this host's own (it may be translated on the way), or where an earlier store of
    this process, which torch shares, has the port.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError:
        return None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(4096)
    except OSError:
        listener.close()
        return None
    return listener


def _tcp_store(
    address: str,
    port: int,
    ranks: Ranks,
    timeout: timedelta,
    holds: bool,
    listener: socket.socket | None = None,
) -> dist.TCPStore:
    """Open the store, which this process holds or reaches. One process may open it again at the same port."""
    import torch.distributed as dist

    return dist.TCPStore(
        address,
        port if listener is None else listener.getsockname()[1],
        ranks.world_size,
        is_master=holds,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=None if listener is None else listener.detach(),  # the store closes it
    )


def host_digest() -> bytes:
    """Return a digest that is equal on ranks with the same loopback address (host name and network namespace)."""
    try:
        namespace = os.readlink("/proc/self/ns/net")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).digest()


def _own_address() -> str:
    """Return an address of this host that others may reach: of its name, else its default route, else the name."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
        with socket.socket() as probe:
            probe.bind((address, 0))  # a name can resolve to an address that is not this namespace's
        if not address.startswith("127."):
            return address
    except OSError:
        pass
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing; TEST-NET-1 is reserved for documentation
            return str(probe.getsockname()[0])
    except OSError:
        return name
