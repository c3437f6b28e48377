"""`trader watch` and `trader dashboard`, on sessions in processes of their own and on finished runs."""

import asyncio
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path

import httpx
import pytest

from trader_lib.config.settings import load_settings
from trader_lib.runs.store import RunFolder, RunStore
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.steering.control import ControlFile
from trader_lib.steering.status import session_status

Trader = Callable[..., tuple[int, str, str]]

TRADER = "import sys; from trader_lib.app.cli import main; sys.exit(main())"
# A session that takes its time: argument 1 is the run folder, 2 the seconds a bar.
SLOW = """
import asyncio, sys, time
from datetime import date
from pathlib import Path
from loguru import logger
from trader_lib.config.settings import load_settings
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
logger.disable("trader_lib")
settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})
spec = SessionSpec(params={"fast": 2, "slow": 5}, symbols=("IBM",), start=date(2005, 1, 3), end=date(2012, 12, 31))
def closed(bars, at):
    time.sleep(float(sys.argv[2]))
asyncio.run(run_session(spec, settings, journal_path=Path(sys.argv[1]) / "journal.sqlite", progress=closed))
"""


@pytest.fixture
def finished(tmp_path: Path) -> RunFolder:
    """A session of two months, ended in good order."""
    run = RunStore(tmp_path / "runs").create("paper")
    settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})
    spec = SessionSpec(params={"fast": 2, "slow": 5}, symbols=("IBM",), start=date(2012, 1, 3), end=date(2012, 2, 29))
    with asyncio.Runner() as runner:
        runner.run(run_session(spec, settings, journal_path=run.journal))
    return run


@contextmanager
def process(*command: str, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours, ended whatever happens."""
    started = subprocess.Popen([sys.executable, "-c", *command], **options)  # type: ignore[call-overload]
    try:
        yield started
    finally:
        if started.poll() is None:
            started.kill()
        started.wait()


def wait_for(found: Callable[[], object], seconds: float = 60.0) -> None:
    ends = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.1)


def is_trading(run: RunFolder) -> bool:
    try:
        return session_status(run.journal).equity is not None
    except Exception:  # there is no journal yet, or its first page is being written
        return False


def test_finished_session_is_drawn_once_and_is_not_running(trader: Trader, finished: RunFolder) -> None:
    code, out, _ = trader("watch")
    equity = session_status(finished.journal).equity
    assert code == 7 and f"{equity:,.2f}" in out and "ended" in out and "every bar was played" in out
    code, out, _ = trader("watch", finished.name, "--once", "--json")
    shown = json.loads(out)
    assert code == 7 and shown["condition"] == "ended" and shown["figures"]["equity"] == str(equity)


def test_watch_is_particular_about_what_it_is_given(trader: Trader, tmp_path: Path, finished: RunFolder) -> None:
    code, _, err = trader("watch", "--every", "0", finished.name)
    assert code == 2 and "0.1 to 3600" in err
    code, _, err = trader("watch", finished.name[:-1] + "x")
    assert code == 2 and "Did you mean" in err and finished.name in err
    backtest = RunStore(tmp_path / "runs").create("backtest")
    code, _, err = trader("watch", backtest.name)
    assert code == 2 and "not a session" in err


def test_session_is_followed_until_it_dies(tmp_path: Path) -> None:
    """With --json a document a line, whenever something changed; the exit code tells how it went."""
    run = RunStore(tmp_path / "runs").create("paper")
    with process(SLOW, str(run.path), "0.1") as session:
        wait_for(lambda: is_trading(run))
        follow = (TRADER, "watch", run.name, "--runs", str(tmp_path / "runs"), "--json", "--every", "0.2")
        with process(*follow, stdout=subprocess.PIPE) as watcher:
            assert watcher.stdout is not None
            first = json.loads(watcher.stdout.readline())
            second = json.loads(watcher.stdout.readline())
            assert first["condition"] == "alive" and second["events"] >= first["events"]
            ControlFile.beside(run.journal).append("halt", reason="a test", by="ada")
            while json.loads(watcher.stdout.readline())["state"] != "HALTED":
                pass
            session.kill()
            *_, last = watcher.stdout.read().splitlines()
            assert json.loads(last)["condition"] == "dead" and watcher.wait(20) == 7


def test_terminal_shows_a_session_live_and_ctrl_c_leaves_it(tmp_path: Path) -> None:
    run = RunStore(tmp_path / "runs").create("paper")
    with process(SLOW, str(run.path), "0.1") as session:
        wait_for(lambda: is_trading(run))
        ours, theirs = pty.openpty()
        environ = os.environ | {"COLUMNS": "130", "LINES": "50", "TERM": "xterm-256color"}
        command = (TRADER, "watch", run.name, "--runs", str(tmp_path / "runs"), "--every", "0.2")
        with process(*command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as watcher:
            os.close(theirs)
            shown = ""
            ends = time.monotonic() + 60
            while shown.count("sma_cross") < 3 and time.monotonic() < ends:
                if select.select([ours], [], [], 1)[0]:
                    shown += os.read(ours, 65536).decode("utf-8", "replace")
            watcher.send_signal(signal.SIGINT)
            while watcher.poll() is None and time.monotonic() < ends:
                if select.select([ours], [], [], 0.2)[0]:
                    with suppress(OSError):  # the terminal is gone with the last who held it
                        shown += os.read(ours, 65536).decode("utf-8", "replace")
            assert watcher.wait(20) == 0, "it was alive when it was left"
        os.close(ours)
        assert "running" in shown and "ACTIVE" in shown and shown.count("sma_cross") >= 3
        assert session.poll() is None, "nobody touched the session"


@pytest.mark.parametrize("token", ["", "open-sesame"])
def test_dashboard_serves_a_finished_run_until_ctrl_c(token: str, tmp_path: Path, finished: RunFolder) -> None:
    environ = os.environ | ({"TRADER_MONITORING__TOKEN": token} if token else {})
    command = (TRADER, "dashboard", finished.name, "--runs", str(tmp_path / "runs"), "--json")
    with process(*command, stdout=subprocess.PIPE, env=environ) as server:
        assert server.stdout is not None
        said = b""
        while not said.rstrip().endswith(b"}"):
            said += server.stdout.readline()
        told = json.loads(said)
        assert told["run"] == finished.name and told["buttons"] is bool(token) and told["url"].startswith("http://127.")
        seen = httpx.get(f"{told['url']}/api/session").json()
        assert seen["condition"] == "ended" and seen["run"] == finished.name
        assert httpx.get(f"{told['url']}/api/operator").json()["buttons"] is bool(token)
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0


def test_dashboard_opens_a_backtest_by_its_result(tmp_path: Path) -> None:
    run = RunStore(tmp_path / "runs").create("backtest")
    run.result_file.write_text('{"kind": "backtest", "status": "completed", "statistics": {"sharpe_ratio": 1.25}}')
    command = (TRADER, "dashboard", run.name, "--runs", str(tmp_path / "runs"))
    with process(*command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        url = server.stdout.readline().decode().split(" is at ")[1].split(". ")[0]
        seen = httpx.get(f"{url}/api/session").json()
        assert seen["condition"] == "report" and seen["result"]["statistics"] == {"sharpe_ratio": 1.25}
        assert httpx.get(f"{url}/api/operator").json()["buttons"] is False, "there is nothing to stop"
