"""A check of the tests themselves: put one fault at a time into a copy of the tree and see whether a test fails.

    python -m tests.mutations                       all faults of tests/faults.py
    python -m tests.mutations --only "no grace"     those whose name contains this
    python -m tests.mutations --tests tests/unit    other tests than those that a fault names

Prints a table of what was caught and what survived, and ends with the number of faults that were not caught.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults import FAULTS, Fault

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "kernels")
TIMEOUT_SECONDS = 900  # a fault may make ranks wait for each other; their own tests give up before
CAUGHT, SURVIVED, INVALID = "caught", "SURVIVED", "INVALID"


def check_lines(faults: Sequence[Fault]) -> None:
    """Raise ValueError for a fault whose line does not occur in its file exactly once."""
    for fault in faults:
        count = (ROOT / fault.file).read_text().count(fault.line)
        if count != 1:
            raise ValueError(f"{fault.name!r}: {fault.file} has {count} times {fault.line!r}")


def copy_tree(folder: Path) -> Path:
    """A copy of the checkout that imports its own packages, as an editable install does."""
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
    shutil.copytree(ROOT / "kernels", tree / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "cocodiff" / "kernels").symlink_to("../kernels/src")
    return tree


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """The exit status of pytest in a tree, and its last lines."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return 1, "did not end"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, lines[0] if lines else (done.stdout + done.stderr).strip().splitlines()[-1]


def verdict(fault: Fault, tests: Sequence[str]) -> tuple[str, str]:
    """Whether the tests see a fault, and what pytest said."""
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder))
        path = tree / fault.file
        path.write_text(path.read_text().replace(fault.line, fault.faulty))
        try:
            compile(path.read_text(), fault.file, "exec")
        except SyntaxError as error:
            return INVALID, str(error)
        status, said = run_tests(tree, tests)
    return {0: SURVIVED, 1: CAUGHT}.get(status, INVALID), said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--tests", nargs="+", help="run these tests for every fault")
    args = parser.parse_args()
    faults = [fault for fault in FAULTS if args.only in fault.name]
    check_lines(faults)
    print("| fault | file | tests | verdict | seconds |\n|---|---|---|---|---|", flush=True)
    missed = 0
    for fault in faults:
        began = time.monotonic()
        found, said = verdict(fault, args.tests or fault.tests)
        missed += found != CAUGHT
        cells = (fault.name, fault.file, said.removeprefix("FAILED ").split(" - ")[0], found)
        print(f"| {' | '.join(cells)} | {time.monotonic() - began:.0f} |", flush=True)
    print(f"\n{len(faults) - missed} of {len(faults)} faults caught")
    return missed


if __name__ == "__main__":
    sys.exit(main())
