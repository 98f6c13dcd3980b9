"""scripts/emulated_cluster: real hosts and slow links, taken down again whatever happens."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "emulated_cluster"
ABLE = hasattr(os, "geteuid") and os.geteuid() == 0 and bool(shutil.which("ip")) and bool(shutil.which("tc"))
needs_root = pytest.mark.skipif(not ABLE, reason="needs root, ip and tc (Debian: iproute2)")

TOTAL = 2_000_000
# Rank 0 receives so much from the last rank. It prints the seconds from the first part that it has to the last, and the
# bytes that its host's link counted. Its buffer is small: little has come before it looks.
TALK = f"""
import os, socket, time
rank, world, total = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), {TOTAL}
def counted():
    return int(open("/sys/class/net/eth0/statistics/rx_bytes").read())
if rank == 0:
    before, server = counted(), socket.create_server((os.environ["MASTER_ADDR"], 7777))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    peer, _ = server.accept()
    seen = len(peer.recv(65536))
    began = time.monotonic()
    while seen < total:
        seen += len(peer.recv(65536))
    print("measured", time.monotonic() - began, counted() - before)
elif rank == world - 1:
    for _ in range(100):
        try:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], 7777)); break
        except OSError:
            time.sleep(0.1)
    peer.sendall(bytes(total)); time.sleep(1)
"""


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str
    namespaces: set[str]  # that it left behind


def _run(*arguments, command=("sh", "-c", "echo rank $RANK of $WORLD_SIZE")):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "--", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    stdout, stderr = process.communicate(timeout=200)
    return Done(process.returncode, stdout, stderr, _namespaces(process.pid))


def _namespaces(pid):
    """Namespaces of one cluster: their names hold its process id. Others may run on this machine."""
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    return {line.split()[0] for line in listed.splitlines() if re.match(rf"cocodiff{pid}[a-z]", line)}


FOUR_GPUS = (
    "--nodes",
    "2",
    "--ranks-per-node",
    "4",
    "--ranks-per-gpu",
    "2",
    "--gpu-link",
    "1gbit",
    "--link",
    "100mbit",
)


@needs_root
def test_every_rank_knows_its_place_and_its_hosts_address():
    address = "$(ip -4 -o address show eth0 | tr -s ' ' | cut -d' ' -f4)"
    done = _run(*FOUR_GPUS, command=("sh", "-c", f"echo rank $RANK local $LOCAL_RANK of $WORLD_SIZE at {address}"))
    assert done.returncode == 0, done.stderr
    for rank in range(8):
        assert f"[{rank}] rank {rank} local {rank % 2} of 8 at 10.77.0.{rank // 2 + 1}/24" in done.stdout
    assert not done.namespaces


@needs_root
def test_the_shape_is_a_cluster_that_cocodiff_reads():
    done = _run(*FOUR_GPUS, command=("sh", "-c", '[ "$RANK" != 0 ] || cat $EMULATED_CLUSTER | tr -d "\\n"'))
    assert done.returncode == 0, done.stderr
    text = next(line for line in done.stdout.splitlines() if "emulated" in line).split("] ", 1)[1]
    levels = json.loads(text)["levels"]
    assert [(level["name"], level["size"]) for level in levels] == [("host", 2), ("gpu", 2), ("node", 2)]
    assert [level["bandwidth_gbs"] for level in levels[1:]] == [0.0625, 0.003125]

    from cocodiff import Cluster

    assert Cluster.from_json(text).resolve(8).slow == (False, True, True)


@needs_root
@pytest.mark.parametrize("racks", [1, 2])
def test_the_link_is_as_slow_as_it_says(racks):
    shape = ("--nodes", "2", "--ranks-per-node", "1", "--link", "20mbit" if racks == 1 else "1gbit")
    shape += () if racks == 1 else ("--racks", "2", "--rack-link", "20mbit")
    done = _run(*shape, command=(sys.executable, "-c", TALK))
    assert done.returncode == 0, done.stdout + done.stderr
    seconds, counted = map(float, done.stdout.split("measured ")[1].split()[:2])
    assert counted >= TOTAL  # the interface saw it all
    assert seconds >= 0.75 * TOTAL * 8 / 20e6  # never faster than the link, but for what buckets and buffers hold


def _links(folder, **links):
    file = folder / "links.json"
    file.write_text(json.dumps({name.replace("_", " "): rate for name, rate in links.items()}))
    return "--links", str(file)


@needs_root
def test_one_host_has_a_link_of_its_own(tmp_path):
    shape = ("--nodes", "3", "--ranks-per-node", "1", "--link", "1gbit", *_links(tmp_path, node_1="20mbit"))
    done = _run(*shape, command=("sh", "-c", "echo $RANK: $(tc qdisc show dev eth0)"))
    assert done.returncode == 0, done.stdout + done.stderr
    rates = {line[1]: line.split(" rate ")[1].split()[0] for line in done.stdout.splitlines() if " rate " in line}
    assert rates == {"0": "1Gbit", "1": "20Mbit", "2": "1Gbit"}


@needs_root
def test_one_cable_of_an_outer_level_is_as_slow_as_it_says(tmp_path):
    """Parts are numbered over the whole cluster: of gpus 0 to 3 the last one's own link would be the second node's."""
    shape = ("--nodes", "2", "--ranks-per-node", "2", "--link", "1gbit", "--gpu-link", "1gbit")
    for slow in ({"node_1": "20mbit"}, {"gpu_3": "20mbit"}):
        done = _run(*shape, *_links(tmp_path, **slow), command=(sys.executable, "-c", TALK))
        assert done.returncode == 0, done.stdout + done.stderr
        assert float(done.stdout.split("measured ")[1].split()[0]) >= 0.75 * TOTAL * 8 / 20e6


@needs_root
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"node 2": "20mbit"}', "'node 2' has no link here; those that have one: node 0 to 1, gpu 0 to 3"),
        ('{"rack 0": "20mbit"}', "'rack 0' has no link"),
        ('{"node": "20mbit"}', "'node' has no link"),
        ('{"node 1": "20mbps"}', "'20mbps' is no rate"),
        ('{"node 1": 20}', "a JSON object of rates"),
        ("node 1", "links.json: "),
    ],
)
def test_links_that_cannot_be_are_one_clear_line(text, words, tmp_path):
    (tmp_path / "links.json").write_text(text)
    done = _run("--ranks-per-node", "2", "--gpu-link", "1gbit", "--links", str(tmp_path / "links.json"))
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


@needs_root
def test_a_failing_rank_ends_all_and_its_status_and_last_words_come_back():
    done = _run(
        "--grace-seconds", "1", command=("sh", "-c", '[ "$RANK" = 2 ] && { echo last words; exit 7; }; sleep 600')
    )
    assert done.returncode == 7
    assert "rank 2 ended with status 7" in done.stderr and "last words" in done.stderr
    assert not done.namespaces


@contextlib.contextmanager
def _running():
    """A cluster whose ranks wait, once all of them run. What is left of it is killed in the end, by process id."""
    shape = ("--nodes", "2", "--ranks-per-node", "1")
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *shape, "--", "sh", "-c", "echo up; sleep 600"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )
    family = [psutil.Process(process.pid)]
    try:
        assert all("up" in process.stdout.readline() for _ in range(2))
        family += family[0].children(recursive=True)
        yield process
    finally:
        process.terminate()  # it cleans up
        process.wait(60)
        for member in family[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.stdout.close()


@needs_root
def test_two_clusters_side_by_side():
    with _running() as first:
        done = _run()
        assert done.returncode == 0 and "rank 3 of 4" in done.stdout and not done.namespaces, done.stderr
        assert _namespaces(first.pid)  # it still runs


@needs_root
def test_leftovers_of_a_killed_cluster_go_with_the_next_one():
    with _running() as killed:
        killed.kill()
        killed.wait()
        assert _namespaces(killed.pid)  # it could not clean up
        assert _run().returncode == 0
        assert not _namespaces(killed.pid)


@needs_root
def test_an_interrupted_cluster_cleans_up():
    with _running() as interrupted:
        interrupted.send_signal(signal.SIGINT)
        assert interrupted.wait(60) == 130
        assert not _namespaces(interrupted.pid)


@needs_root
def test_mpiexec_enters_the_namespaces():
    if shutil.which("mpiexec") is None:
        pytest.skip("needs mpiexec (pip install 'cocodiff[mpi]')")
    said = "echo rank $PMI_RANK of $PMI_SIZE at $(ip -4 -o address show eth0 | tr -s ' ' | cut -d' ' -f4)"
    done = _run("--launcher", "mpiexec", command=("sh", "-c", said))
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(4):
        assert f"rank {rank} of 4 at 10.77.0.{rank // 2 + 1}/24" in done.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--link", "100mbps"), "100mbps"),
        (("--link", "10bit"), "under 1000 bit/s"),
        (("--nodes", "0"), "counted from 1"),
        (("--racks", "2"), "--rack-link"),
        (("--ranks-per-node", "3", "--gpu-link", "1gbit", "--ranks-per-gpu", "2"), "does not divide"),
    ],
)
@needs_root
def test_bad_arguments_are_one_clear_line(arguments, words):
    done = _run(*arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


@needs_root
def test_no_command_is_said():
    assert "no command" in subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True).stderr


@needs_root
def test_latency_works_or_the_kernel_has_no_netem():
    done = _run("--latency-us", "100")
    assert done.returncode == 0 or "no netem" in done.stderr


@needs_root
def test_without_root_it_says_so():
    as_nobody = (
        f"import os, runpy, sys; sys.argv = ['x', '--', 'true']; sys.path.insert(0, {str(SCRIPT.parent)!r}); "
        f"main = runpy.run_path({str(SCRIPT)!r})['main']; os.setuid(65534); sys.exit(main())"
    )
    nobody = subprocess.run([sys.executable, "-c", as_nobody], capture_output=True, text=True)
    assert nobody.returncode == 2 and "needs root" in nobody.stderr, nobody.stderr
