"""No module outside the clock room reads the time, sleeps, or draws random numbers or identifiers.

A run repeats only if all of them come from the clock, the identifiers and the generators it was given.
"""

import ast
import re
from pathlib import Path

import pytest

import trader_lib

PACKAGE = Path(trader_lib.__file__).parent
FORBIDDEN = re.compile(
    r"time(\..+)?"
    r"|(random|uuid_utils)(\..+)?"
    r"|secrets(?!\.compare_digest$)(\..+)?"
    r"|uuid(?!\.UUID$)(\..+)?"
    r"|numpy\.random(?!\.Generator$)\..+"
    r"|datetime\.(datetime|date)\.(now|utcnow|today)"
    r"|pandas\.(Timestamp|DatetimeIndex)\.(now|utcnow|today)"
    r"|asyncio\.sleep"
    r"|(.*[._ ])?(loop|loop\(\))\.(time|call_later|call_at)"
    r"|threading\.Timer|os\.urandom|os\.times"
)


def offences(source: str) -> list[str]:
    """Return `line: name` for each use of a clock, a sleep or a source of chance."""
    tree = ast.parse(source)
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imported[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def full_name(node: ast.AST) -> str:
        match node:
            case ast.Name(id):
                return imported.get(id, f"own {id}")
            case ast.Attribute(value, attr):
                return f"{full_name(value)}.{attr}"
            case ast.Call(func):
                return f"{full_name(func)}()"
        return "own"

    yields = {
        id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call) and [ast.unparse(a) for a in n.args] == ["0"]
    }
    found = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            name = full_name(node)
            # asyncio.sleep(0) gives others a turn and reads no clock
            names = [] if name == "asyncio.sleep" and id(node) in yields else [name]
        elif isinstance(node, ast.Call) and [ast.unparse(a) for a in node.args[:1]] in (["'now'"], ["'today'"]):
            names = [f"datetime.datetime.{node.args[0].value}"]
        found |= {f"{node.lineno}: {name}" for name in names if FORBIDDEN.fullmatch(name)}
    return sorted(found)


@pytest.mark.parametrize("path", sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py")))
def test_module_takes_time_and_chance_from_what_it_was_given(path):
    if path.startswith("clock/") or path == "_modidx.py":
        pytest.skip("the clock room itself, and nbdev's index")
    assert offences((PACKAGE / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "from time import perf_counter",
        "import time as t\nt.monotonic()",
        "import datetime as dt\ndt.datetime.now()",
        "from datetime import datetime as D, UTC\nD.now(UTC)",
        "from datetime import date\ndate.today()",
        "import pandas as pd\npd.Timestamp.now('UTC')",
        "import pandas as pd\npd.Timestamp('now')",
        "import numpy as np\nnp.random.default_rng(1)",
        "import numpy as np\nnp.datetime64('today')",
        "from numpy.random import default_rng",
        "import random",
        "import secrets",
        "import uuid\nuuid.uuid4()",
        "from uuid import uuid4",
        "import uuid_utils",
        "import asyncio\nasync def f():\n    await asyncio.sleep(1)",
        "from asyncio import sleep",
        "import asyncio\nasyncio.get_running_loop().time()",
        "def f(loop):\n    loop.call_later(1, f)",
        "def f(self):\n    return self._loop.time()",
        "import os\nos.urandom(3)",
        "import threading\nthreading.Timer(1, print)",
    ],
)
def test_the_search_finds_it(source):
    assert offences(source)


@pytest.mark.parametrize(
    "source",
    [
        "from datetime import datetime, time\ndatetime.fromisoformat('2005-01-03')\ntime(9, 30)",
        "def f(clock, event):\n    return clock.now(), event.time, event.time.time()",
        "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    async with asyncio.timeout(3): pass",
        "import numpy as np\ndef f(rng: np.random.Generator): return rng.random()",
        "from uuid import UUID\nUUID('0' * 32)",
        "time = 3\ntime + 1",
    ],
)
def test_the_search_leaves_the_innocent_alone(source):
    assert offences(source) == []
