"""Collects notebooks as tests, under one true coverage figure.

A plain `nbdev_test` runs exported cells in the notebook's namespace, where coverage cannot see the module they
were exported to, and where the rules are compiled anew for each notebook. Here an exported cell stands for its copy in
the module (found by the `# %% ….ipynb #cellid` headers that nbdev writes): what it defines is taken from there, so that
lines and branches count where they live and machine code is reused. That both copies are the same, tests/test_project.py
holds.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import json
import os
import re
import sys
import textwrap
import traceback
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

os.environ.setdefault("TRADER_RUNS__TRIALS", "false")  # what tests try is no trial of a strategy
NBS = Path(__file__).parent
LIBRARY = NBS.parent / "trader_lib"
HEADER = re.compile(r"^# %% (?P<notebook>\S+\.ipynb) #?(?P<cell>\S+)$")
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(?P<text>.+?)\s*$", re.MULTILINE)
SKIPPED_FLAGS = {"live", "eval: false"}


@cache
def exported_modules() -> dict[str, Path]:
    """Cell id → the module that the cell was exported to."""
    places: dict[str, Path] = {}
    for module in sorted(LIBRARY.rglob("*.py")):
        for line in module.read_text(encoding="utf-8").splitlines():
            if match := HEADER.match(line):
                places[match["cell"]] = module
    return places


def directives(source: str) -> set[str]:
    return {match["text"] for match in DIRECTIVE.finditer(source)}


def is_exported(source: str) -> bool:
    flags = directives(source)
    return bool(flags & {"export", "exporti", "exports"}) or any(flag.startswith("export ") for flag in flags)


def bound_names(tree: ast.AST) -> set[str]:
    """The names that a cell's statements bind at its top level, those inside of `if` and `try` included."""
    names: set[str] = set()
    todo = list(ast.iter_child_nodes(tree))
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue  # what is bound inside is its own
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        todo += ast.iter_child_nodes(node)
    return names


def exported_names(cell: dict[str, Any], notebook: Path) -> dict[str, Any]:
    """What an exported cell defines, taken from the module that it was exported to."""
    place = exported_modules().get(cell["id"])
    if place is None:
        raise AssertionError(f"{notebook}: cell {cell['id']} is not exported; run nbdev_export")
    module = importlib.import_module(".".join(place.relative_to(LIBRARY.parent).with_suffix("").parts))
    names = bound_names(ast.parse("".join(cell["source"])))
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def compile_cell(cell: dict[str, Any], notebook: Path) -> types.CodeType:
    filename = f"{notebook}#{cell['id']}"
    return compile("".join(cell["source"]), filename, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


class NotebookItem(pytest.Item):
    cell: dict[str, Any]

    def runtest(self) -> None:
        notebook = json.loads(self.path.read_text(encoding="utf-8"))
        module = types.ModuleType("notebook_" + re.sub(r"\W", "_", str(self.path.relative_to(NBS))))
        module.__file__ = str(self.path)
        sys.modules[module.__name__] = module
        environment, here = dict(os.environ), Path.cwd()
        logger.enable("trader_lib")  # as in a kernel of its own, whatever the notebook before has silenced
        os.chdir(self.path.parent)
        try:
            with asyncio.Runner() as runner:
                for cell in notebook["cells"]:
                    source = "".join(cell["source"])
                    if cell["cell_type"] != "code" or not source.strip() or directives(source) & SKIPPED_FLAGS:
                        continue
                    self.cell = cell
                    if is_exported(source):
                        module.__dict__.update(exported_names(cell, self.path))
                    else:
                        runner.run(run_cell(compile_cell(cell, self.path), module.__dict__))
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ.update(environment)
            del sys.modules[module.__name__]

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        """The cell that failed, and the frames from it downwards: the runner's own are noise."""
        frames = traceback.extract_tb(excinfo.tb)
        first = next((at for at, frame in enumerate(frames) if frame.name == "run_cell"), -1) + 1
        trace = "".join(traceback.format_list(frames[first:]))
        said = "".join(traceback.format_exception_only(excinfo.value))
        source = "".join(self.cell["source"])
        return f"{self.path} cell {self.cell['id']}\n\n{textwrap.indent(source, '    ')}\n\n{trace}{said}"

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, str(self.path.relative_to(NBS))


async def run_cell(code: types.CodeType, namespace: dict[str, Any]) -> None:
    """Run on a live loop, as a Jupyter kernel does, whether or not the cell awaits."""
    result = eval(code, namespace)
    if inspect.isawaitable(result):
        await result


class NotebookFile(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield NotebookItem.from_parent(self, name=self.path.stem)


def pytest_collect_file(parent: pytest.Collector, file_path: Path) -> pytest.Collector | None:
    if file_path.suffix == ".ipynb" and not file_path.name.startswith((".", "_")):
        return NotebookFile.from_parent(parent, path=file_path)
    return None
