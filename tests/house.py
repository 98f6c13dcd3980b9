"""The plan of the house and the checks against it, for test_imports.py. New modules go into LAYERS."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. A name stands for the module or package and all inside it; the longest match counts. A module
# may import its own layer and those below it, as long as there is no cycle.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("cocodiff.errors",),
    ("cocodiff.kernels", "cocodiff.tiny", "cocodiff.compat"),
    ("cocodiff.launch",),
    ("cocodiff.topology",),
    ("cocodiff.observe",),
    ("cocodiff.config",),
    ("cocodiff.parallel",),
    ("cocodiff.exchange",),
    ("cocodiff.selective",),
    ("cocodiff.plan",),
    ("cocodiff.state",),
    ("cocodiff.layer",),
    ("cocodiff.attention",),
    ("cocodiff.blocks",),
    ("cocodiff.models",),
    ("cocodiff.pipeline",),
    ("cocodiff.planner",),
    ("cocodiff.wrap",),
    ("cocodiff",),  # the public names: cocodiff/__init__.py
    ("cocodiff.bench",),
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
MAX_LINES_OF = {"cocodiff/attention.py": 150}

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
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATING:
                changed = node.func.value
            elif isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
                changed = node.value
            if isinstance(changed, ast.Name) and changed.id in outer:
                faults.append(f"line {node.lineno}: changes {changed.id} of the module")
    return sorted(set(faults))
