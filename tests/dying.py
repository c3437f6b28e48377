"""A session in a process of its own that is killed once its journal has so many more rows."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIES = """
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from {module} import {spec}, settings
from trader_lib.journal.journal import SqliteJournal
from trader_lib.session.session import run_session

append, last = SqliteJournal.append, [0]

def deadly(self, event):
    append(self, event)
    last[0] += 1
    if last[0] == {rows}:
        os.kill(os.getpid(), signal.SIGKILL)

SqliteJournal.append = deadly
asyncio.run(run_session({spec}, settings({transport}), journal_path=Path({path!r}), resume=True))
"""


async def die_after(rows: int, path: Path, module: str, spec: str, transport: str = "") -> None:
    """Run or resume the session at a journal's path until it is killed after so many rows.

    module: of a test file that has the specification, by its name `spec`, and `settings`. transport: given to
    `settings`, "" for none.
    """
    given = repr(transport) if transport else ""
    script = DIES.format(root=str(ROOT), module=module, spec=spec, rows=rows, path=str(path), transport=given)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stderr=subprocess.DEVNULL)
    assert await process.wait() == -signal.SIGKILL
