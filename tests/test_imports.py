"""Imports point one way, files are small, importing does no work. The plan itself is in house.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import LAYERS, MAX_LINES, MAX_LINES_OF, ROOT, import_faults, read_sources, state_faults


def run_python(code: str, cwd: Path) -> str:
    """Standard output of `code` in a process that sees the installed package; it must not write to stderr."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_imports_point_one_way() -> None:
    sources = read_sources()
    assert "cocodiff" in sources and "cocodiff.kernels" in sources
    assert import_faults(sources) == []


def test_no_module_keeps_state() -> None:
    faults = {module: state_faults(source) for module, (source, _) in read_sources().items()}
    assert {module: found for module, found in faults.items() if found} == {}


def test_files_are_small() -> None:
    """Every file that people read as code: Python, and what runs without an ending."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    paths = listed or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py")]
    code = [path for path in paths if path.endswith((".py", ".sh")) or (path[:8] == "scripts/" and "." not in path)]
    lines = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in code}
    assert "cocodiff/attention.py" in lines
    assert {path: n for path, n in lines.items() if n > MAX_LINES_OF.get(path, MAX_LINES)} == {}


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("cocodiff.config", "from cocodiff.wrap import wrap", "upwards"),
        ("cocodiff.exchange.flat", "def f():\n    from cocodiff import state", "upwards"),
        ("cocodiff.exchange.flat", "from ..models import flux", "upwards"),
        ("cocodiff.parallel.layout", "from cocodiff.exchange.flat import FlatExchange", "upwards"),
        ("cocodiff.state", "import cocodiff", "upwards"),
        ("cocodiff.tiny.models", "from cocodiff.kernels import pack", "alone"),
        ("cocodiff.kernels.pack", "from cocodiff import errors", "alone"),
        ("cocodiff.errors", "from cocodiff.nowhere import thing", "does not exist"),
        ("cocodiff.helpers", "", "no place"),
        ("cocodiff.launch.ranks", "from cocodiff.launch.join import join", "cycle"),
    ],
)
def test_the_guard_sees_a_wrong_import(module: str, source: str, fault: str) -> None:
    sources: dict[str, tuple[str, bool]] = {
        name: ("", name in ("cocodiff", "cocodiff.models"))
        for name in ("cocodiff", *(name for layer in LAYERS for name in layer))
    }
    sources |= {f"cocodiff.{name}": ("", False) for name in ("models.flux", "exchange.flat", "kernels.pack")}
    sources["cocodiff.launch.join"] = ("from cocodiff.launch import ranks", False)
    sources["cocodiff.launch.ranks"] = ("", False)
    assert import_faults(sources) == []
    faults = import_faults({**sources, module: (source, False)})
    assert len(faults) == 1 and fault in faults[0], faults


@pytest.mark.parametrize(
    "source",
    [
        "cache = {}",
        "seen: set[str] = set()",
        "handlers = [print]",
        "TABLE = {}\ndef put(key):\n    TABLE[key] = 1",
        "TABLE = []\ndef put(key):\n    TABLE.append(key)",
        "count = 0\ndef tick():\n    global count\n    count += 1",
    ],
)
def test_the_guard_sees_state(source: str) -> None:
    assert state_faults(source) != []


def test_the_guard_allows_constants_and_locals() -> None:
    source = """
TABLE = {"a": 1}
__all__ = ["f"]
def f(TABLE, x):
    found = []
    found.append(x)
    TABLE[x] = 1
"""
    assert state_faults(source) == []


def test_import_is_light(tmp_path: Path) -> None:
    """Importing loads torch, the standard library and our own modules, and no more of torch than torch itself does.

    That is what keeps it quick. There is no clock here: a machine may be busy.
    """
    code = """
import json, sys
import torch
before = set(sys.modules)
import cocodiff
new = sorted(set(sys.modules) - before)
print(json.dumps({
    "foreign": [m for m in new if m.split(".")[0] not in sys.stdlib_module_names | {"cocodiff"}],
    "initialized": torch.distributed.is_available() and torch.distributed.is_initialized(),
    "public": [name for name in cocodiff.__all__ if not hasattr(cocodiff, name)],
}))
"""
    lines = run_python(code, tmp_path).splitlines()
    assert len(lines) == 1, "importing printed something"
    found = json.loads(lines[0])
    assert found == {"foreign": [], "initialized": False, "public": []}


def test_no_top_level_kernels(tmp_path: Path) -> None:
    """`kernels` belongs to a Hugging Face package; ours must not answer to it."""
    code = """
import importlib.util, json
import cocodiff.kernels
spec = importlib.util.find_spec("kernels")
print(json.dumps([] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]))
"""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for place in json.loads(run_python(code, tmp_path)):
        assert place is None or not Path(place).resolve().is_relative_to(ROOT), place
