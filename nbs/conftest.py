"""Collects notebooks as tests, under one true coverage figure.

A plain `nbdev_test` runs exported cells in the notebook's namespace, where coverage cannot see the module they
were exported to. Here every exported cell is compiled under the path and the line of its exported copy (found by
the `# %% ….ipynb #cellid` headers that nbdev writes), so that lines and branches count where they live.
"""

from __future__ import annotations

import ast
import asyncio
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

NBS = Path(__file__).parent
LIBRARY = NBS.parent / "trader_lib"
HEADER = re.compile(r"^# %% (?P<notebook>\S+\.ipynb) #?(?P<cell>\S+)$")
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(?P<text>.+?)\s*$", re.MULTILINE)
SKIPPED_FLAGS = {"live", "eval: false"}


@cache
def exported_cells() -> dict[str, tuple[Path, int]]:
    """Cell id → the module and the line (1-based) where that cell's exported code begins."""
    places: dict[str, tuple[Path, int]] = {}
    for module in sorted(LIBRARY.rglob("*.py")):
        for number, line in enumerate(module.read_text(encoding="utf-8").splitlines(), start=1):
            if match := HEADER.match(line):
                places[match["cell"]] = (module, number + 1)
    return places


def directives(source: str) -> set[str]:
    return {match["text"] for match in DIRECTIVE.finditer(source)}


def compile_cell(cell: dict[str, Any], notebook: Path) -> types.CodeType:
    """Compile a cell, an exported one under the place of its exported copy."""
    source = "".join(cell["source"])
    flags = directives(source)
    filename, shift = f"{notebook}#{cell['id']}", 0
    if flags & {"export", "exporti", "exports"} or any(flag.startswith("export ") for flag in flags):
        place = exported_cells().get(cell["id"])
        if place is None:
            raise AssertionError(f"{notebook}: cell {cell['id']} is not exported; run nbdev_export")
        lines = source.splitlines()
        leading = 0
        while leading < len(lines) and (DIRECTIVE.match(lines[leading]) or not lines[leading].strip()):
            leading += 1
        filename, shift = str(place[0]), place[1] - leading - 1
    tree = ast.parse(source, filename=filename)
    ast.increment_lineno(tree, shift)
    return compile(tree, filename, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


class NotebookItem(pytest.Item):
    cell: dict[str, Any]

    def runtest(self) -> None:
        notebook = json.loads(self.path.read_text(encoding="utf-8"))
        module = types.ModuleType("notebook_" + re.sub(r"\W", "_", str(self.path.relative_to(NBS))))
        module.__file__ = str(self.path)
        sys.modules[module.__name__] = module
        environment, here = dict(os.environ), Path.cwd()
        os.chdir(self.path.parent)
        try:
            with asyncio.Runner() as runner:
                for cell in notebook["cells"]:
                    source = "".join(cell["source"])
                    if cell["cell_type"] != "code" or not source.strip() or directives(source) & SKIPPED_FLAGS:
                        continue
                    self.cell = cell
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
