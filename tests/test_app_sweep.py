"""`trader sweep` and `trader walkforward` as commands: a run folder, a report, Ctrl-C, kill -9, resume."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from trader_lib.app.cli import main
from trader_lib.runs.store import RunStore

DAYS = ("--symbols", "IBM", "--start", "2004-01-02", "--end", "2007-12-31")
GRID = ("--grid", "fast=5:20:5", "--grid", "slow=20,60")
MANY = (
    "--strategy",
    "vol_target",
    "--grid",
    "window=5:904:1",
    "--grid",
    "target=0.1,0.2",
    "--symbols",
    "IBM",
    "--workers",
    "1",
)


def command(*words: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        "import sys; from trader_lib.app.cli import main; sys.exit(main(sys.argv[1:]))",
        *words,
    ]


@pytest.mark.slow
def test_a_sweep_leaves_rows_a_report_and_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ("--runs", str(tmp_path))
    assert main(("sweep", *GRID, *DAYS, *runs)) == 0
    run = RunStore(tmp_path).find("latest-sweep")
    figures = run.result().statistics
    table = pd.read_parquet(run.path / "sweep" / "sweep.parquet")
    assert len(table) == figures["combinations"] == 8 and figures["combinations_refused"] == 1
    assert table["sharpe_ratio"].max() == pytest.approx(figures["sharpe_ratio"])
    page = run.report.read_text(encoding="utf-8")
    assert "Is it luck?" in page and "more than luck" in page and "8 combinations" in page
    assert main(("sweep", "--resume", run.name, *runs)) == 2
    assert "every row already" in capsys.readouterr().err
    assert main(("sweep", "--resume", run.name, *GRID, *runs)) == 2


@pytest.mark.slow
def test_a_walk_forward_leaves_folds_and_a_result(tmp_path: Path) -> None:
    assert main(("walkforward", *GRID, *DAYS, "--train", "2y", "--test", "1y", "--runs", str(tmp_path))) == 0
    run = RunStore(tmp_path).find("latest-walkforward")
    result = run.result()
    assert result.status == "completed" and result.statistics["folds"] == 2 and result.equity_end
    assert "where they were chosen" in run.report.read_text(encoding="utf-8")


def parts_of(folder: Path) -> list[Path]:
    return list(folder.glob("*/sweep/parts/*.parquet"))


def begun(folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait until some rows are kept."""
    for _ in range(1200):
        if parts_of(folder):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("no rows within a minute")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_sweep_that_is_stopped_or_killed_goes_on(tmp_path: Path, number: int, code: int) -> None:
    words = command("sweep", *MANY, "--runs", str(tmp_path))
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        begun(tmp_path, process)
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)  # the kernel leads a group of its own, and ends with its parent's socket
        else:
            process.send_signal(number)
        _, said = process.communicate(timeout=120)
        assert process.returncode == code, said
    if number == signal.SIGINT:
        assert "--resume" in said
    kept = sum(len(pd.read_parquet(part)) for part in parts_of(tmp_path))
    assert 0 < kept < 1800
    assert main(("sweep", "--resume", "latest-sweep", "--runs", str(tmp_path))) == 0
    run = RunStore(tmp_path).find("latest-sweep")
    assert run.result().status == "completed" and run.result().statistics["combinations_done"] == 1800
    assert len(pd.read_parquet(run.path / "sweep" / "sweep.parquet")) == 1800


def test_a_card_that_is_not_there_is_said_before_a_run_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trader_lib.research.sweep.why_no_card", lambda: "there is no CUDA device here.")
    assert main(("sweep", *GRID, *DAYS, "--device", "cuda", "--runs", str(tmp_path))) == 3
    assert "cannot run on a graphics card: there is no CUDA device here." in capsys.readouterr().err
    assert not list(tmp_path.glob("*sweep*"))
