"""Imports point one way, files are small, importing does no work. New modules go into LAYERS."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. A name stands for the module or package and all inside it; the longest match counts. A module
# may import its own layer and those below it, as long as there is no cycle.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("cocodiff.errors",),
    (
        "cocodiff.kernels",
        "cocodiff.exchange.layout",
        "cocodiff.timeline",
        "cocodiff.patches",
        "cocodiff.tiny",
    ),
    ("cocodiff.launch", "cocodiff.topology"),
    ("cocodiff.config", "cocodiff.tokens"),
    ("cocodiff.mesh", "cocodiff.lanes"),
    ("cocodiff.exchange",),
    ("cocodiff.engine",),
    ("cocodiff.attention",),
    ("cocodiff.models",),
    ("cocodiff.door",),
    ("cocodiff.wrap",),
    ("cocodiff",),  # the public names: cocodiff/__init__.py
    ("cocodiff.doctor",),
    ("cocodiff.cli",),
    ("cocodiff.__main__",),
)

# What these may import of ours besides themselves.
ALONE: dict[str, tuple[str, ...]] = {
    "cocodiff.errors": (),
    "cocodiff.kernels": (),
    "cocodiff.tiny": ("cocodiff.errors",),
}

MAX_LINES = 300
MAX_LINES_OF = {"cocodiff.attention": 200}

# What importing must not load: whatever is slow, optional, or has an opinion on the machine.
HEAVY = set(
    "accelerate diffusers einops huggingface_hub intel_extension_for_pytorch matplotlib mpi4py numpy "
    "oneccl_bindings_for_pytorch PIL rich tqdm transformers typer".split()
)

MUTATING = {
    *(
        "append",
        "extend",
        "insert",
        "add",
        "update",
        "setdefault",
        "pop",
        "popitem",
        "remove",
        "discard",
        "clear",
    ),
    *("appendleft", "extendleft", "sort", "reverse"),
}
MUTABLE_CALLS = {"dict", "list", "set", "defaultdict", "OrderedDict", "Counter", "deque", "bytearray"}
MUTABLE_NODES = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)

# Module name -> (source, whether it is a package's __init__)
Sources = Mapping[str, tuple[str, bool]]


def read_sources() -> dict[str, tuple[str, bool]]:
    """Every module of the installed package, by the name it is imported under."""
    sources = {}
    for folder, package in (
        (ROOT / "cocodiff", ("cocodiff",)),
        (ROOT / "kernels" / "src", ("cocodiff", "kernels")),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = (*package, *path.relative_to(folder).with_suffix("").parts)
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            sources[name] = (path.read_text(encoding="utf-8"), is_package)
    return sources


def home(module: str, names: tuple[str, ...] | Mapping[str, object]) -> str | None:
    """The longest of `names` that is the module or contains it. The root package stands for itself alone."""
    matches = [n for n in names if module == n or (n != "cocodiff" and module.startswith(n + "."))]
    return max(matches, key=len, default=None)


def layer_of(module: str) -> int:
    """The module's place in LAYERS; KeyError for one that has none."""
    name = home(module, tuple(name for layer in LAYERS for name in layer))
    for height, layer in enumerate(LAYERS):
        if name in layer:
            return height
    raise KeyError(module)


def imported(module: str, sources: Sources) -> Iterator[str]:
    """Our modules that this one imports, anywhere in it: lazily and for type checkers, too."""
    source, is_package = sources[module]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            candidates = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            candidates = [(base, alias.name) for alias in node.names]
        else:
            continue
        for name, attribute in candidates:
            if name.split(".")[0] != "cocodiff":
                continue
            if attribute is not None and f"{name}.{attribute}" in sources:
                yield f"{name}.{attribute}"  # `from package import submodule`
            else:
                yield name


def import_faults(sources: Sources) -> list[str]:
    """What is wrong with the arrows between these modules; empty when all is well."""
    faults = []
    graph: dict[str, set[str]] = {}
    for module in sources:
        try:
            height = layer_of(module)
        except KeyError:
            faults.append(f"{module} has no place in LAYERS")
            continue
        graph[module] = set(imported(module, sources)) - {module}
        alone = home(module, ALONE)
        for other in sorted(graph[module]):
            if other not in sources:
                faults.append(f"{module} imports {other}, which does not exist")
            elif home(other, tuple(name for layer in LAYERS for name in layer)) is None:
                continue  # reported above, as a module of its own
            elif layer_of(other) > height:
                faults.append(f"{module} imports upwards: {other}")
            elif alone and home(other, (alone, *ALONE[alone])) is None:
                faults.append(f"{module} must stand alone but imports {other}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        faults.append("cycle: " + " -> ".join(reversed(error.args[1])))
    return faults


def is_constant(name: str) -> bool:
    bare = name.lstrip("_")
    return bare.isupper() or (name.startswith("__") and name.endswith("__"))


def state_faults(source: str) -> list[str]:
    """Signs of state that a module keeps: mutable values, changes made by functions."""
    tree = ast.parse(source)
    faults, module_names = [], set()
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        called = value.func if isinstance(value, ast.Call) else None
        called_name = getattr(called, "id", getattr(called, "attr", None))
        mutable = isinstance(value, MUTABLE_NODES) or called_name in MUTABLE_CALLS
        for target in targets:
            if isinstance(target, ast.Name):
                module_names.add(target.id)
                if mutable and not is_constant(target.id):
                    faults.append(f"line {node.lineno}: {target.id} is mutable, not a constant")
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        local = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        local |= {n.arg for n in ast.walk(function) if isinstance(n, ast.arg)}
        outer = module_names - local
        for node in ast.walk(function):
            changed: ast.expr | None = None
            if isinstance(node, ast.Global):
                faults.append(f"line {node.lineno}: global {', '.join(node.names)}")
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in MUTATING
            ):
                changed = node.func.value
            elif isinstance(node, ast.Subscript | ast.Attribute) and isinstance(
                node.ctx, ast.Store | ast.Del
            ):
                changed = node.value
            if isinstance(changed, ast.Name) and changed.id in outer:
                faults.append(f"line {node.lineno}: changes {changed.id} of the module")
    return sorted(set(faults))


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
    lines = {module: len(source.splitlines()) for module, (source, _) in read_sources().items()}
    assert {m: n for m, n in lines.items() if n > MAX_LINES_OF.get(m, MAX_LINES)} == {}


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("cocodiff.config", "from cocodiff.wrap import wrap", "upwards"),
        ("cocodiff.exchange.flat", "def f():\n    from cocodiff import engine", "upwards"),
        ("cocodiff.exchange.flat", "from ..models import flux", "upwards"),
        ("cocodiff.exchange.layout", "from cocodiff.exchange.flat import FlatExchange", "upwards"),
        ("cocodiff.engine", "import cocodiff", "upwards"),
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
    """Nothing heavy, no more of torch.distributed than torch loads, no output, under 50 ms beyond torch."""
    code = """
import json, sys, time
import torch
before = set(sys.modules)
seconds = []
for _ in range(10):  # the least of them: this machine may be busy
    for name in set(sys.modules) - before:
        del sys.modules[name]
    start = time.perf_counter()
    import cocodiff
    seconds.append(time.perf_counter() - start)
print(json.dumps({
    "seconds": min(seconds),
    "modules": sorted(set(sys.modules) - before),
    "initialized": torch.distributed.is_available() and torch.distributed.is_initialized(),
    "public": [name for name in cocodiff.__all__ if not hasattr(cocodiff, name)],
}))
"""
    lines = run_python(code, tmp_path).splitlines()
    assert len(lines) == 1, "importing printed something"
    found = json.loads(lines[0])
    loaded = {m for m in found["modules"] if m.split(".")[0] in HEAVY or m.startswith("torch.distributed")}
    assert loaded == set()
    assert not found["initialized"]
    assert found["public"] == [], "names in __all__ that do not exist"
    assert found["seconds"] < 0.050


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
