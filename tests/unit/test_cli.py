"""The command line without ranks and without drawing: what it refuses, before anything starts, in one line."""

import os
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
from PIL import Image

from cocodiff import cli
from cocodiff.cli import together
from cocodiff.cli.drawing import Drawing
from cocodiff.cli.start import start_ranks, torchrun_arguments
from cocodiff.errors import ConfigError
from tests.distributed.ranks import without_launcher

LONG = "x" * 300


class Started(BaseException):
    """Everything was checked, and ranks would start or the drawing begin."""


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the command line with arguments, in a folder with files good and bad: (status, what it said)."""
    for name in set(os.environ) - without_launcher(os.environ).keys():
        monkeypatch.delenv(name)
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "foreign.json").write_text("{}")
    monkeypatch.chdir(tmp_path)

    def started(*args):
        raise Started

    for module in ("generate", "bench"):
        monkeypatch.setattr(sys.modules[f"cocodiff.cli.{module}"], "start_ranks", started)
    monkeypatch.setattr(Drawing, "run", started)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cocodiff", *arguments])
        with pytest.raises(BaseException) as caught:
            cli.main()
        said = capsys.readouterr()
        if caught.type is Started:
            return "started", said.out + said.err
        assert caught.type is SystemExit, caught.value
        return caught.value.code, said.out + said.err

    return run


GOOD = [
    "--prompt a",
    "--prompt= --steps 1 --seed 18446744073709551615",
    "--prompt a --ranks 2 --trace traces --report reports/r.json --out new",
    "--prompt a --image good.png --mask good.png --strength 0.5 --out folder/x.JPG",
    "--prompt a --model tiny:wan --frames 5 --out clip.gif",
    "--prompt a --model owner/name --dtype bf16 --guidance 0 --negative-prompt b --true-cfg 4",
    "--prompt a --ranks 4 --ulysses-degree 2 --cfg-degree 2 --cluster aurora",
    "--prompt a --ranks=2 --ring-degree 2",
]
BAD = {  # arguments of generate -> words of the one line
    "": "--prompt",
    "--prompt": "requires an argument",
    "--prompt a --heigth 64": "--height",
    "--prompt a b": "(b). `",
    "--prompt a --steps 0": "--steps",
    "--prompt a --steps -1": "--steps",
    "--prompt a --steps 2.5": "--steps",
    "--prompt a --steps 1000000": "--steps",
    "--prompt a --height 0": "--height",
    "--prompt a --width -64": "--width",
    "--prompt a --width 10000000": "--width",
    "--prompt a --frames 0": "--frames",
    "--prompt a --seed -1": "--seed",
    "--prompt a --seed 18446744073709551616": "--seed",
    "--prompt a --seed x": "--seed",
    "--prompt a --guidance nan": "--guidance nan",
    "--prompt a --guidance inf": "--guidance inf",
    "--prompt a --guidance -1": "--guidance -1",
    "--prompt a --true-cfg nan": "--true-cfg nan",
    "--prompt a --strength 0.5": "Give one with --image",
    "--prompt a --image good.png --strength 0": "--strength 0",
    "--prompt a --image good.png --strength nan": "--strength nan",
    "--prompt a --image good.png --strength 1.5": "--strength 1.5",
    "--prompt a --mask good.png": "with --image",
    "--prompt a --image none.png": "no such file",
    "--prompt a --image folder": "no such file",
    "--prompt a --image=": "no such file",
    f"--prompt a --image {LONG}": "no such file",
    "--prompt a --image cut.png": "no picture that Pillow can read",
    "--prompt a --image text.png": "no picture that Pillow can read",
    "--prompt a --image empty.png": "no picture that Pillow can read",
    "--prompt a --image good.png --mask text.png": "--mask text.png: this is no picture",
    "--prompt a --out=": "no name of a file",
    "--prompt a --out .": "no name of a file",
    "--prompt a --out ..": "no name of a file",
    "--prompt a --out .png": "no name of a file",
    "--prompt a --out x.xyz": "no format .xyz",
    "--prompt a --out none/x.png": "no folder none",
    "--prompt a --out good.png/x.png": "cannot write into this folder",
    "--prompt a --report folder": "--report folder: cannot be written",
    "--prompt a --report good.png/r.json": "--report",
    "--prompt a --model=": "names no model",
    "--prompt a --model tiny:sd4": "no such tiny model",
    "--prompt a --model tiny:": "no such tiny model",
    "--prompt a --model none": "no such folder",
    "--prompt a --model /none/at/all": "no such folder",
    "--prompt a --model a/b/c": "no such folder",
    f"--prompt a --model {LONG}": "no such folder",
    "--prompt a --dtype int8": "--dtype int8",
    "--prompt a --dtype=": "--dtype",
    "--prompt a --exchange flatt": "flatt",
    "--prompt a --schedule first": "first",
    "--prompt a --transmission balancd": "balancd",
    "--prompt a --cluster frontier": "unknown cluster 'frontier'",
    "--prompt a --cluster=": "unknown cluster ''",
    "--prompt a --ranks 2 --cluster foreign.json": "the key 'levels' is missing",
    "--prompt a --ranks 2 --cluster none.json": "cannot read the cluster file",
    "--prompt a --ranks 0": "--ranks",
    "--prompt a --ranks -2": "--ranks",
    "--prompt a --ranks 100000": "--ranks",
    "--prompt a --ranks two": "--ranks",
    "--prompt a --ranks 1 --trace t": "--trace: on one rank",
    "--prompt a --ranks 4 --cfg-degree 3": "--cfg-degree 3 does not fit 4 ranks: it must divide that number.",
    "--prompt a --ranks 4 --ring-degree 2 --ulysses-degree 4": "do not fit 4 ranks: their product must divide",
    "--prompt a --ranks 4 --cfg-degree 1 --ring-degree 1 --ulysses-degree 1": "their product must be that",
    "--prompt a --ranks 2 --ring-degree 0": "--ring-degree",
}
BENCH = {
    "--heads 0": "--heads",
    "--steps 0": "--steps",
    "--repeat -1": "--repeat",
    "--dtype int4": "--dtype int4",
    "--width 4": "--width",
    "--width 1000000000": "--width",
    "--width 100": "width 100 does not make 24 heads",
    "--heads 7": "does not make 7 heads",
    "--tokens 0": "--tokens",
    "--tokens 1000000000000": "--tokens",
    "--text 0": "--text",
    "--layers 0": "--layers 0",
    "--layers 0,0": "--layers 0,0",
    "--layers 1,2,3": "--layers 1,2,3",
    "--layers x": "--layers x",
    "--layers 99999999999": "--layers",
    "--scale 0": "--scale 0",
    "--scale 2": "--scale 2",
    "--scale -1": "--scale",
    "--scale nan": "--scale nan",
    "--scale 1/0": "--scale 1/0",
    "--scale 1e999999999": "--scale 1e999999999",
    "--scale=": "--scale",
    "--shape flux": "--shape flux is not one of flux-dev",
    "--methods=": "--methods",
    "--methods exact,fastest": "--methods fastest: there are",
    "--ring-degree 0": "--ring-degree 0",
    "--ring-degree 2,x": "--ring-degree 2,x",
    "--cfg-degree=": "--cfg-degree",
    "--cluster frontier": "unknown cluster",
    "--plot plot.xyz": "PNG",
    "--plot none/at/plot.png --json folder": "--json folder: cannot be written",
    "--save good.png": "--save good.png: cannot write into",
    "nonsense": "No such command",
    "collectives --patience nan": "--patience",
    "collectives --patience 0": "--patience",
    "collectives --largest 1": "--largest",
    "collectives --repeat 0": "--repeat",
    "collectives --out folder": "--out folder: cannot be written",
    "collectives --cluster frontier": "unknown cluster",
    "copies --ranks 0": "--ranks 0",
    "copies --ranks 24,x": "--ranks 24,x",
    "copies --ranks 1000000": "--ranks 1000000",
    "copies --shapes flux": "--shape flux",
    "copies --cluster single-node": "none of its levels is slow",
    "copies --cluster none.json": "cannot read the cluster file",
    "copies --pixels 0": "--pixels",
    "copies --branches 3": "--branches",
}


@pytest.mark.parametrize("arguments", GOOD)
def test_control_what_can_be_starts(run, arguments):
    assert run("generate", *arguments.split(" ")) == ("started", "")
    assert sorted(path.name for path in Path().iterdir() if path.suffix in (".JPG", ".gif")) == []  # only tried


@pytest.mark.parametrize("arguments, words", BAD.items())
def test_generate_refuses_in_one_line_before_anything_starts(run, arguments, words):
    status, said = run("generate", *arguments.split(" ") if arguments else ())
    assert status == 2 and words in said and said.startswith("cocodiff: ") and said.count("\n") == 1, said


@pytest.mark.parametrize("arguments, words", BENCH.items())
def test_bench_refuses_in_one_line_before_anything_starts(run, arguments, words):
    ranks = () if arguments.split(" ")[0] in ("copies", "nonsense") else ("--ranks", "2")
    status, said = run("bench", *arguments.split(" "), *ranks)
    assert status == 2 and words in said and said.startswith("cocodiff: ") and said.count("\n") == 1, said


@pytest.mark.parametrize(
    "arguments", ["--dtype bf16 --scale 1/64", "--dtype fp16 --json new.json --layers 1,2", "--scale 1e-9"]
)
def test_control_a_bench_that_can_be_starts(run, arguments):
    assert run("bench", *arguments.split(" "), "--ranks", "2") == ("started", "")
    assert run("bench", "collectives", "--ranks", "2", "--out", "c.json")[0] == "started"
    assert not Path("new.json").exists() and not Path("c.json").exists()


def test_version_and_help(run):
    from cocodiff import __version__

    assert run("--version") == (0, f"cocodiff {__version__}\n")
    status, said = run("generate", "--help")
    assert status == 0 and "--negative-prompt" in said
    assert "generate" in run()[1]


def test_verbose_shows_where_an_error_arose(run):
    assert "Traceback" in run("generate", "--prompt", "a", "--model", "none", "--verbose")[1]


def test_a_seed_of_64_bits_is_one_for_torch():
    import torch

    torch.Generator().manual_seed(2**64 - 1)


def test_torchrun_gets_the_command_without_ranks_and_looks_up_no_name():
    for given in (["--ranks", "2"], ["--ranks=2"]):
        arguments = torchrun_arguments(2, ["generate", *given, "--prompt", "a"])
        assert arguments[-5:] == ["-m", "cocodiff.cli", "generate", "--prompt", "a"]
        assert arguments[arguments.index("--local-addr") + 1] == "127.0.0.1"


def test_a_rank_that_the_system_ended_is_named(capsys):
    from cocodiff.cli.start import _ended_by_signal

    assert _ended_by_signal(1, 9) == 137
    assert "rank 1 was ended by SIGKILL: the system may have run out of memory" in capsys.readouterr().err


def test_ranks_of_ranks_are_refused(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="Leave --ranks out"):
        start_ranks(2)


def _everyone_says(monkeypatch, capsys, texts, patience_seconds):
    """What ranks print that fail with these texts; None for one that does not fail."""
    store, rank = dist.HashStore(), threading.local()
    monkeypatch.setattr(together, "_store", lambda: store)
    monkeypatch.setattr(together, "this_rank", lambda: (rank.number, len(texts)))

    def fail(number, text):
        rank.number = number
        together.say_once(text, patience_seconds)

    threads = [threading.Thread(target=fail, args=one) for one in enumerate(texts) if one[1] is not None]
    for thread in reversed(threads):
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(capsys.readouterr().err.splitlines())


def test_an_error_of_all_ranks_is_said_once(monkeypatch, capsys):
    assert _everyone_says(monkeypatch, capsys, ["bad", "bad", "bad"], 100.0) == ["cocodiff: bad"]


def test_control_an_error_of_one_rank_is_not_lost(monkeypatch, capsys):
    assert _everyone_says(monkeypatch, capsys, [None, "bad"], 0.5) == ["cocodiff (rank 1): bad"]
    assert _everyone_says(monkeypatch, capsys, ["bad", "worse"], 100.0) == ["cocodiff (rank 1): worse", "cocodiff: bad"]
