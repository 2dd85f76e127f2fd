"""What pyproject.toml lists is what is on disk, in the wheel, and importable under one name."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def source_files() -> set[str]:
    """Paths of all modules as installed. Both folders are read by their own name, not through the link."""
    core = {p.relative_to(ROOT) for p in (ROOT / "fxcompress").rglob("*.py")}
    core = {p for p in core if p.parts[:2] != ("fxcompress", "passes")}
    passes = {"fxcompress" / p.relative_to(ROOT) for p in (ROOT / "passes").rglob("*.py")}
    return {p.as_posix() for p in core | passes}


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("fxcompress", "passes"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=skip)
    built = run_python("from setuptools.build_meta import build_wheel; build_wheel('dist')", cwd=tree)
    assert built.returncode == 0, built.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_packages_listed_are_packages_on_disk() -> None:
    on_disk = {
        Path(name).parent.as_posix().replace("/", ".") for name in source_files() if name.endswith("/__init__.py")
    }
    assert sorted(SETUPTOOLS["packages"]) == sorted(on_disk)


def test_no_module_outside_a_package() -> None:
    folders = {Path(name).parent.as_posix().replace("/", ".") for name in source_files()}
    assert folders == set(SETUPTOOLS["packages"]), "a folder of modules without __init__.py is not shipped"


def test_wheel_has_every_module_and_the_type_marker(wheel_names: set[str]) -> None:
    assert wheel_names == source_files() | {"fxcompress/py.typed"}


def test_link_leads_to_passes() -> None:
    link = ROOT / "fxcompress" / "passes"
    if not link.is_symlink():
        pytest.skip("this checkout has no symbolic links")
    assert link.readlink() == Path("../passes")
    assert link.resolve() == ROOT / "passes"


def test_passes_is_imported_from_the_top_level_folder() -> None:
    import fxcompress.passes

    assert fxcompress.passes.__file__ is not None
    assert Path(fxcompress.passes.__file__).resolve() == ROOT / "passes" / "__init__.py"


def test_import_passes_is_refused() -> None:
    run = run_python("import passes", cwd=ROOT)
    assert run.returncode != 0
    assert "ImportError" in run.stderr
    assert "import name is `fxcompress.passes`" in run.stderr


def test_core_imports_no_pass() -> None:
    code = "import sys, fxcompress; sys.exit(any(n.startswith('fxcompress.passes') for n in sys.modules))"
    run = run_python(code, cwd=ROOT)
    assert run.returncode == 0, run.stderr
