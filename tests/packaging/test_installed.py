"""The package as pip installs it, outside of the repository: with no extra, with each, with all, on each Python.

Every environment takes the first step of every command (`first_steps.py`). Each either works or names the extra that it
lacks before it does anything; none ends in a traceback. Pythons that this machine does not have are skipped by name.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.packaging.first_steps import STEPS, WITH_REPORTS

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13")
EXTRAS = ("", "research", "runs", "schedule", "scale", "observe", "all")
NEEDS = {  # all of them, the one that is asked for first at the beginning
    **dict.fromkeys(("backtest", "live", "paper", "run", "sweep", "walkforward"), ("runs",)),
    **dict.fromkeys(("schedule check", "schedule run"), ("schedule", "runs")),
    "dashboard": ("observe",),
    "search": ("runs", "search"),
}
# What the commands answer where nothing is missing; 0 unless named. The session of `first_steps` has no result.json.
CODES = {
    "agent": 3,
    "dashboard": 2,
    "data fetch": 3,
    "exchange": 4,
    "live": 3,
    "notify test": 2,
    "run": 2,
    "runs compare": 4,
}
CODES |= {"runs show": 4, "verdict": 2, "walkforward": 4}
CODES |= dict.fromkeys(("kill", "reduce", "resume", "status", "watch"), 7)  # the session has ended
AFTER_REPORTS = {"runs compare", "runs show"}  # find a whole run where the reports were made before

pytestmark = pytest.mark.packaging


def interpreter(version: str) -> str | None:
    """The path of a Python, wherever it is: on the path under its own name, or installed by pyenv."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    installed = sorted((Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python"))
    return str(installed[-1]) if installed else shutil.which(f"python{version}")


def uv(*words: str) -> None:
    """Run uv, which comes with the development requirements; show what it wrote where it fails."""
    done = subprocess.run([sys.executable, "-m", "uv", *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "trader_lib"
    kept_out = shutil.ignore_patterns(".venv", "*.egg-info", "build", "__pycache__", ".*_cache", ".hypothesis", ".git")
    shutil.copytree(ROOT, source, ignore=kept_out)
    uv("build", "--quiet", "--out-dir", str(folder), str(source))
    return folder


def test_sdist_and_wheel_are_built_and_the_wheel_holds_what_runs_need(dist: Path) -> None:
    import zipfile

    (wheel,) = dist.glob("*.whl")
    assert list(dist.glob("*.tar.gz"))
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "trader_lib/py.typed",
        "trader_lib/config/profiles/live.toml",
        "trader_lib/market/data/sample_daily.parquet",
        "trader_lib/observe/static/dashboard.html",
        "trader_lib/runs/schema/result.schema.json",
        "trader_lib/runs/templates/backtest.ipynb",
        "trader_lib/runs/templates/paper_session.ipynb",
    ):
        assert needed in names
    assert not [name for name in names if name.startswith(("tests/", "nbs/"))]


def first_steps(python: Path, folder: Path, *words: str) -> dict[str, Any]:
    """Take the first steps with an environment's Python, in a folder outside of the repository."""
    script = folder / "first_steps.py"
    shutil.copyfile(Path(__file__).with_name("first_steps.py"), script)
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("TRADER_", "APCA_", "PYTHON"))}
    if not words:  # nothing is executed that would be worth compiling
        environ["NUMBA_DISABLE_JIT"] = "1"
    done = subprocess.run(
        [str(python), str(script), *words], cwd=folder, env=environ, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("version", PYTHONS)
def test_every_command_works_or_names_the_extra_it_lacks(version: str, extra: str, dist: Path, tmp_path: Path) -> None:
    base = interpreter(version)
    if base is None:
        pytest.skip(f"There is no Python {version} here.")
    (wheel,) = dist.glob("*.whl")
    uv("venv", "--quiet", "--python", base, str(tmp_path / "env"))
    python = tmp_path / "env/bin/python"
    wanted = f"trader_lib[{extra}] @ {wheel.as_uri()}" if extra else str(wheel)
    uv("pip", "install", "--quiet", "--python", str(python), "-c", str(ROOT / "constraints.txt"), wanted)

    with_reports = extra == "runs" or (extra == "all" and version == PYTHONS[0])
    found = first_steps(python, tmp_path, *(["reports"] if with_reports else []))

    assert found["orders"] > 0
    assert found["backtest_orders"] > 0
    assert found["trades"] > 0
    assert found["steps"].keys() == (
        STEPS.keys() - set(WITH_REPORTS) if extra == "all" and not with_reports else STEPS.keys()
    )
    for name, answer in found["steps"].items():
        assert "This is a bug" not in answer["err"], (name, answer)
        if lacking := [need for need in NEEDS.get(name, ()) if extra not in (need, "all")]:
            assert answer["code"] == 3, (name, answer)
            assert f"pip install 'trader_lib[{lacking[0]}]'" in answer["err"]
        else:
            expected = 0 if with_reports and name in AFTER_REPORTS else CODES.get(name, 0)
            assert answer["code"] == expected, (name, answer)


def test_the_steps_cover_every_command() -> None:
    """A command that is added takes its first step here as well."""
    from trader_lib.app.cli import app

    names = set()
    for name in app:
        if name.startswith("-"):
            continue
        below = [inner for inner in app[name] if not inner.startswith("-")]
        names |= {f"{name} {inner}" for inner in below} if below else {name}
    assert names == STEPS.keys()
