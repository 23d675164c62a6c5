"""The wheel: everything of the library, nothing beside it, and a console script that runs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import moba_cp
from tests.helpers.distributed import TIME_SCALE

ROOT = Path(__file__).parents[1]
# Where the sources stand in the checkout, and where in the wheel.
SOURCES = {
    "moba_cp": "moba_cp",
    "kernels": "moba_cp/kernels",
    "launchers": "moba_cp/launchers",
    "configs": "moba_cp/configs",
}
SOURCE_SUFFIXES = (".py", ".sh", ".sbatch", ".json", ".yaml", ".typed")


def sources() -> dict[str, Path]:
    """Name in the wheel -> file in the checkout, for all code and data of the library."""
    found = {}
    for folder, inside in SOURCES.items():
        # rglob follows no links, so links to them inside moba_cp/ count once.
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT / folder)
            linked = folder == "moba_cp" and relative.parts[0] in ("kernels", "launchers", "configs")
            if path.is_file() and path.suffix in SOURCE_SUFFIXES and not linked:
                found[f"{inside}/{relative.as_posix()}"] = path
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a clean copy of the checkout, built without a network."""
    base = tmp_path_factory.mktemp("wheel")
    for folder in SOURCES:
        links = [path.name for path in (ROOT / folder).iterdir() if path.is_symlink()]
        shutil.copytree(ROOT / folder, base / "src" / folder, ignore=shutil.ignore_patterns("__pycache__", *links))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, base / "src" / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(base), str(base / "src")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200 * TIME_SCALE)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = base.glob("*.whl")
    return built


def test_wheel_holds_the_library_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"moba_cp"}
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == set(sources()), "setup.cfg's packages or package_data miss something"


def test_kernels_need_nothing_of_the_rest():
    """In the checkout's root the folder is found as ``kernels``; libraries that look for one of that name import it."""
    code = "import sys, kernels; assert not any(name.startswith('moba_cp') for name in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200 * TIME_SCALE
    )
    assert done.returncode == 0, done.stderr


def test_console_script_runs_from_the_installed_wheel(wheel, tmp_path):
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True, timeout=200 * TIME_SCALE)
    environment = os.environ | {"PYTHONPATH": str(target)}
    code = "import moba_cp.kernels, moba_cp.launchers; print(moba_cp.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True
    )
    assert where.stdout.strip() == str(target / "moba_cp" / "__init__.py")
    code = "from moba_cp.train.yaml_config import packaged_configs as p; print(p()['hybrid/switch_90_10'])"
    config = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True
    )
    assert config.stdout.strip() == str(target / "moba_cp" / "configs" / "hybrid" / "switch_90_10.yaml")
    script = target / "bin" / "moba-cp"
    done = subprocess.run(
        [sys.executable, str(script), "--version"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, f"moba-cp {moba_cp.__version__}\n")
    wrong = subprocess.run([sys.executable, str(script), "frobnicate"], capture_output=True, text=True, env=environment)
    assert wrong.returncode == 2 and "is not a command" in wrong.stderr and "Traceback" not in wrong.stderr
