"""Runs a notebook as its reader would, cell by cell, in this process and the current folder, `!trader` included."""

import ast
import asyncio
import inspect
import io
import json
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from trader_lib.app.cli import main

FIGURES = {"Figure", "Still"}


@dataclass
class Played:
    """What a notebook left: its names, and what each code cell showed, as text."""

    names: dict[str, Any]
    shown: list[str] = field(default_factory=list)
    figures: int = 0

    def __getitem__(self, name: str) -> Any:
        return self.names[name]

    @property
    def text(self) -> str:
        """Everything that was shown."""
        return "\n".join(self.shown)


def play(path: Path) -> Played:
    """Run every cell of a notebook; a cell that fails raises what it raised."""
    module = ModuleType(f"lesson_{path.stem}")
    sys.modules[module.__name__] = module  # where pydantic looks up the annotations of its classes
    played = Played(module.__dict__)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    with asyncio.Runner() as runner:
        for cell in cells:
            if cell["cell_type"] == "code":
                out = io.StringIO()
                with redirect_stdout(out):
                    value = run_cell("".join(cell["source"]), f"{path.name}#{cell['id']}", module.__dict__, runner)
                played.figures += type(value).__name__ in FIGURES
                played.shown.append(out.getvalue() + as_text(value))
    return played


def run_cell(source: str, filename: str, names: dict[str, Any], runner: asyncio.Runner) -> Any:
    """Run the statements of a cell, and return the value of the last one where it is an expression."""
    if source.startswith("%%writefile "):
        head, _, text = source.partition("\n")
        Path(head.split()[1]).write_text(text, encoding="utf-8")
        return None
    names["_command"] = command
    lines = [f"_command({line[1:].strip()!r})" if line.startswith("!") else line for line in source.split("\n")]
    tree = ast.parse("\n".join(lines), filename)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    run(compile(tree, filename, "exec", flags=flags, dont_inherit=True), names, runner)
    if last is None:
        return None
    return run(compile(ast.Expression(last.value), filename, "eval", flags=flags, dont_inherit=True), names, runner)


def run(code: Any, names: dict[str, Any], runner: asyncio.Runner) -> Any:
    value = eval(code, names)
    return runner.run(value) if code.co_flags & inspect.CO_COROUTINE else value


def command(line: str) -> None:
    """What `!trader …` does, without a process of its own; `!python FILE` gets one."""
    words = shlex.split(line)
    if words[0] == "python":
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=120)
        sys.stdout.write(done.stdout + done.stderr)
        return
    if words[0] != "trader":
        raise AssertionError(f"A lesson types {words[0]}, which this runner does not know.")
    with redirect_stderr(sys.stdout):
        main(words[1:])


def as_text(value: Any) -> str:
    if value is None or type(value).__name__ in FIGURES:
        return ""
    return value._repr_html_() if hasattr(value, "_repr_html_") else repr(value)
