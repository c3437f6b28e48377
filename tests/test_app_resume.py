"""`kill -9` of a run's kernel or of its command, then `trader paper --resume`: the same orders, in the same folder."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from trader_lib.app.cli import main
from trader_lib.steering.control import who_runs

TRADER = str(Path(sys.executable).with_name("trader"))
WHAT = ["--symbols", "AAPL,IBM", "--start", "2005-01-03", "--end", "2005-12-30", "-p", "fast=3", "-p", "slow=8"]


def wait_for(what: Callable[[], bool], seconds: float = 90.0) -> None:
    ends = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < ends, "waited for too long"
        time.sleep(0.02)


def events_in(journal: Path) -> int:
    try:
        connection = sqlite3.connect(f"file:{journal}?mode=ro", uri=True)
        try:
            return int(connection.execute("SELECT count(*) FROM events").fetchone()[0])
        finally:
            connection.close()
    except sqlite3.Error:
        return 0


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["kernel", "command"])
def test_killed_run_is_resumed_in_its_folder(
    victim: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = ["--runs", str(tmp_path / "runs")]
    command = [TRADER, "paper", "--transport", "in_process", *WHAT, *runs]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: any(events_in(path) > 100 for path in (tmp_path / "runs").glob("*/journal.sqlite")))
    run = next((tmp_path / "runs").glob("*Z-*"))
    _, runner = who_runs(run / "session.lock")
    assert runner is not None and runner.pid != process.pid
    os.kill(runner.pid if victim == "kernel" else process.pid, signal.SIGKILL)
    assert process.wait(60) == (5 if victim == "kernel" else -signal.SIGKILL)
    wait_for(lambda: not who_runs(run / "session.lock")[0])  # a kernel may outlive its command for a moment

    assert main(["paper", "--resume", run.name, *runs]) == 0
    result = orjson.loads((run / "result.json").read_bytes())
    assert main(["backtest", *WHAT, *runs, "--json"]) == 0
    assert result["order_list_hash"] in capsys.readouterr().out and result["reconciliation"]["ok"]
    assert (run / "report.html").is_file() and result["status"] == "completed"

    assert main(["paper", "--resume", run.name, *runs]) == 2
    assert "has ended already: every bar was played" in capsys.readouterr().err


def test_resumed_run_keeps_its_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "--resume", "latest-paper", "--start", "2005-01-03", "--runs", str(tmp_path)]) == 2
    assert "keeps its parameters. Leave out start" in capsys.readouterr().err
    assert main(["paper", "--resume", "latest-paper", "--runs", str(tmp_path)]) == 2
    assert "There is no paper run" in capsys.readouterr().err
