"""The wheel carries everything: installed alone, it runs from an empty folder without a network."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = {"recipes": "accuquant/shipped/recipes", "calib_data": "accuquant/shipped/calib_data"}
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files(folder: Path) -> set[str]:
    """Paths under ``folder``, without what Python leaves behind and hidden files."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {p.as_posix() for p in found if "__pycache__" not in p.parts and not any(x.startswith(".") for x in p.parts)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    [built] = folder.glob("accuquant-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin folder of an environment that has the wheel, and our own dependencies through a .pth file."""
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    binaries = folder / ("Scripts" if os.name == "nt" else "bin")
    run(binaries / "python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
    # Entries of a .pth file come after the environment's own packages, and the .pth files of the folders they name
    # (the editable install among them) are not read.
    [site] = folder.rglob("site-packages")
    outer = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site / "dependencies.pth").write_text("\n".join(outer), encoding="utf-8")
    return binaries


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_wheel_holds_what_the_package_needs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {f"accuquant/{name}" for name in files(ROOT / "accuquant")}
    shipped = {f"{inside}/{name}" for folder, inside in SHIPPED.items() for name in files(ROOT / folder)}
    assert package | shipped <= names
    for folder, ending in [
        ("accuquant/bundled/", "/model_index.json"),
        ("accuquant/bundled/", ".safetensors"),
        ("accuquant/evaluation/templates/", ".html.j2"),
        ("accuquant/shipped/recipes/", "dit_w8a8.yaml"),
        ("accuquant/shipped/calib_data/", ".jsonl"),
    ]:
        assert any(name.startswith(folder) and name.endswith(ending) for name in names), f"no {ending} in {folder}"


def test_wheel_holds_nothing_else(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"accuquant"}


def test_wheel_is_what_is_imported(installed, empty):
    where = run(installed / "python", "-c", "import accuquant; print(accuquant.__file__)", cwd=empty)
    assert Path(where.strip()).is_relative_to(installed.parent)


def test_recipes_are_listed(installed, empty):
    assert "dit_w8a8" in run(installed / "accuquant", "recipes", cwd=empty)


def test_dry_run_needs_no_clone_and_writes_nothing(installed, empty):
    run(installed / "accuquant", "calibrate", "dit_w8a8", "--dry-run", cwd=empty)
    assert list(empty.iterdir()) == []
