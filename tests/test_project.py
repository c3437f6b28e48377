"""The project as a whole: notebooks are the source, the library is their copy, importing is cheap."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
MODULES = sorted(path for path in (ROOT / "trader_lib").rglob("*.py"))
HAND_MADE = {"__init__.py", "_modidx.py"}

# The rooms of the house, from the ground up: a room imports from the rows above its own, and from its own room.
ROOMS: list[set[str]] = [
    {"errors", "clock", "config"},
    {"telemetry", "resilience"},
    {"rules"},
    {"trading"},
    {"market"},
    {"strategy"},
    {"risk"},
    {"exchange"},
    {"research", "bus", "journal", "broker"},
    {"agents"},
    {"recovery", "steering"},
    {"session"},
    {"replay"},
    {"evidence"},
    {"observe"},
    {"runs", "app"},
]
# Narrower than the order of the rows: what a room may import beside errors, clock, trading and its own.
ALLOWED = {
    "errors": {"errors"},
    "clock": {"errors", "clock"},
    "config": {"errors"},
    "telemetry": {"errors", "clock", "config"},
    "resilience": {"errors", "clock", "config", "telemetry"},
    "rules": set(),
    "strategy": {"errors", "clock", "telemetry", "rules", "trading", "market"},  # telemetry: the bar of a check
    "risk": {"errors", "rules", "trading"},
}


def copy_of_the_tree(to: Path) -> Path:
    shutil.copytree(
        ROOT,
        to,
        ignore=shutil.ignore_patterns(
            ".venv", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "_docs", "build"
        ),
    )
    # `runs` above also drops nbs/runs and trader_lib/runs, which belong to the project
    for room in ("nbs/runs", "trader_lib/runs"):
        shutil.copytree(ROOT / room, to / room, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    return to


def snapshot(tree: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(tree)): path.read_bytes()
        for folder in ("nbs", "trader_lib")
        for path in (tree / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != ".last_checked"
    }


def test_notebooks_are_clean_and_the_library_is_their_export(tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path / "tree")
    before = snapshot(tree)
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([Path(sys.executable).parent / command], cwd=tree, check=True, capture_output=True)
    after = snapshot(tree)
    changed = sorted(name for name in before | after if before.get(name) != after.get(name))
    assert not changed, f"run `make export` and commit: {changed}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_is_exported_from_the_notebook_it_names(module: Path) -> None:
    if module.name in HAND_MADE:
        return
    match = re.search(r"File to edit: (\S+\.ipynb)", module.read_text(encoding="utf-8"))
    assert match, f"{module} was made by hand; write it in a notebook"
    assert (module.parent / match[1]).resolve().exists(), f"{module} is stale: its notebook is gone"


@cache
def imports_of(module: Path) -> set[str]:
    """The rooms that a module imports from."""
    rooms = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = (*module.relative_to(ROOT / "trader_lib").parent.parts, "")[:-1]
            base = parts[: len(parts) - node.level + 1]
            target = [*base, *(node.module or "").split(".")]
            rooms.add(target[0])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trader_lib."):
            rooms.add((node.module or "").split(".")[1])
    return rooms - {""}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_from_rooms_above(module: Path) -> None:
    where = module.relative_to(ROOT / "trader_lib").parts
    if len(where) == 1:
        return
    room = where[0]
    row = next(number for number, names in enumerate(ROOMS) if room in names)
    above = set().union(*ROOMS[:row], {room})
    allowed = ALLOWED.get(room, above)
    if room == "agents":
        allowed = above - {"research", "exchange"}
    if room == "research":
        allowed = above - {"bus", "journal", "broker"}
    if room == "runs":
        allowed = above | {"runs"}
    if room == "app":
        allowed = above | {"runs", "app"}
    assert imports_of(module) <= allowed | {room}, f"{module} reaches into a room below or beside its own"


def test_importing_the_library_loads_nothing_heavy() -> None:
    code = "import sys; before = set(sys.modules); import trader_lib; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    heavy = {"pandas", "numpy", "numba", "alpaca", "vectorbt", "plotly", "pydantic", "papermill", "loguru", "starlette"}
    assert not heavy & {name.split(".")[0] for name in loaded}
    assert len(loaded) < 20, loaded


def test_every_public_name_is_where_the_package_says() -> None:
    import trader_lib

    for name in trader_lib.__all__:
        assert getattr(trader_lib, name) is not None
    with pytest.raises(AttributeError, match="it offers"):
        trader_lib.no_such_name


def test_notebooks_open_with_a_module_a_title_and_a_summary() -> None:
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells]
        titles = [source for source in sources[:3] if source.startswith("# ")]
        assert titles, f"{path} has no H1 among its first cells"
        assert "\n> " in titles[0], f"{path} has no one-line summary under its title"


def test_notebooks_neither_patch_nor_star_import_nor_run_loops() -> None:
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code":
                assert not re.search(r"^\s*(@patch|from \S+ import \*)|asyncio\.run\(", source, re.MULTILINE), path


def code_blocks(language: str, page: str = "README.md") -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", code_blocks("python"), ids=lambda block: block.splitlines()[0][:60])
def test_readme_python_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_readme_commands_exist() -> None:
    """Each `trader` and `make` line in the README and docs/commands.md names a command and options that are there."""
    from trader_lib.app.cli import app

    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    blocks = [block for page in ("README.md", "docs/commands.md") for block in code_blocks("bash", page)]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert any(line.startswith("make demo") for line in lines)
    for line in lines:
        words = line.split()
        if line.startswith("make "):
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line
        if line.startswith(("trader ", ".venv/bin/trader ")):
            app.parse_args(words[1:], print_error=False, exit_on_error=False)


def test_the_wheel_carries_data_templates_and_metadata(tmp_path: Path) -> None:
    """Built from the source distribution, as an installer would."""
    tree = copy_of_the_tree(tmp_path / "tree")
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    run = {"check": True, "capture_output": True, "text": True, "env": environment}
    subprocess.run([sys.executable, "-c", build, "build_sdist", str(tmp_path)], cwd=tree, **run)
    archive = next(tmp_path.glob("*.tar.gz"))
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    source = next((tmp_path / "unpacked").iterdir())
    subprocess.run([sys.executable, "-c", build, "build_wheel", str(tmp_path)], cwd=source, **run)
    wheel = next(tmp_path.glob("*.whl"))
    shutil.unpack_archive(wheel, tmp_path / "wheel", format="zip")
    inside = {str(path.relative_to(tmp_path / "wheel")) for path in (tmp_path / "wheel").rglob("*") if path.is_file()}
    for needed in (
        "trader_lib/py.typed",
        "trader_lib/market/data/sample_daily.parquet",
        "trader_lib/runs/templates/backtest.ipynb",
        "trader_lib/runs/templates/paper_session.ipynb",
        "trader_lib/course/01_own_data.ipynb",
        "trader_lib/observe/static/dashboard.html",
        "trader_lib/observe/static/dashboard.js",
    ):
        assert needed in inside, f"{needed} is missing from the wheel"
    metadata = next((tmp_path / "wheel").glob("*.dist-info/METADATA")).read_text()
    assert "Provides-Extra: research" in metadata
    assert "Provides-Extra: runs" in metadata
    needs = re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)
    assert any(need.startswith("alpaca-py") for need in needs)
    assert not [need for need in needs if need.startswith(("nbdev", "pytest")) and "extra ==" not in need]
