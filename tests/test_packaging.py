"""What is installed is what is in the checkout, as a wheel and as an editable install."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "cocodiff", "kernels")
FLAGS = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")


def _lacks() -> str | None:
    """Why nothing can be built here without an index, if so."""
    if importlib.util.find_spec("pip") is None:
        return "pip is not installed"
    try:
        found = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return "setuptools is not installed"
    return None if int(found.split(".")[0]) >= 77 else f"setuptools {found} is older than 77"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_lacks() is not None, reason=f"cannot build offline: {_lacks()}"),
]

# In a fresh process: where things come from, and that the parts can be used.
PROBE = """
import importlib.util, json
import cocodiff, cocodiff.errors, cocodiff.kernels
from importlib.metadata import entry_points, version
from importlib.resources import files
kernels = importlib.util.find_spec("kernels")
scripts = [e.value for e in entry_points(group="console_scripts") if e.name == "cocodiff"]
print(json.dumps({
    "cocodiff": cocodiff.__file__,
    "kernels": cocodiff.kernels.__file__,
    "top_level_kernels": kernels and list(kernels.submodule_search_locations or [kernels.origin]),
    "weights": sorted(f.name for f in (files("cocodiff.tiny") / "weights").iterdir()),
    "versions": [version("cocodiff"), cocodiff.__version__],
    "scripts": scripts,
}))
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_TARGET")} | variables
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in, so that nothing is written into the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, copy / part)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", *FLAGS, "--wheel-dir", out, checkout, cwd=out)
    (path,) = out.glob("cocodiff-*.whl")
    return path


def expected_files() -> set[str]:
    """Every module and weight of the checkout, under its installed name."""
    names = {str(path.relative_to(ROOT)) for path in (ROOT / "cocodiff").rglob("*.py")}
    names |= {str(path.relative_to(ROOT)) for path in (ROOT / "cocodiff" / "tiny" / "weights").iterdir()}
    names |= {"cocodiff/py.typed"}
    source = ROOT / "kernels" / "src"
    return names | {str("cocodiff/kernels" / path.relative_to(source)) for path in source.rglob("*.py")}


def check_probe(found: dict, package: Path, kernels: Path) -> None:
    assert Path(found["cocodiff"]).resolve() == (package / "__init__.py").resolve()
    assert Path(found["kernels"]).resolve() == (kernels / "__init__.py").resolve()
    for place in found["top_level_kernels"] or []:  # Hugging Face's own, if at all
        assert not Path(place).resolve().is_relative_to(package.parent.resolve())
    assert "transformer.safetensors" in found["weights"]
    assert found["versions"][0] == found["versions"][1]
    assert "cocodiff.cli:main" in found["scripts"]


def test_wheel_holds_everything_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    installed = {name for name in names if ".dist-info/" not in name}
    assert {"cocodiff/kernels/__init__.py", "cocodiff/tiny/weights/transformer.safetensors"} <= installed
    assert installed == expected_files()
    assert {name.split("/")[0] for name in installed} == {"cocodiff"}, "only one top-level name, above all no kernels"
    assert any(name.endswith("LICENSE") for name in names)


def test_wheel_installs(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", *FLAGS, "--target", target, wheel, cwd=tmp_path)
    assert not (target / "kernels").exists()
    found = json.loads(run(sys.executable, "-c", PROBE, cwd=tmp_path, PYTHONPATH=str(target)))
    check_probe(found, target / "cocodiff", target / "cocodiff" / "kernels")


def test_editable_installs(checkout: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, system_site_packages=True, with_pip=False)
    python = home / "bin" / "python"
    if not python.exists():
        pytest.skip("virtual environments here have no bin/python")
    # The new environment also sees what this one does: torch, pip and setuptools, wherever they are.
    (lib,) = (home / "lib").glob("python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (lib / "zz-outer.pth").write_text("\n".join(here) + "\n")

    run(python, "-m", "pip", "install", *FLAGS, "--editable", checkout, cwd=tmp_path)
    found = json.loads(run(python, "-c", PROBE, cwd=tmp_path))
    check_probe(found, checkout / "cocodiff", checkout / "kernels" / "src")
    assert (home / "bin" / "cocodiff").exists()
