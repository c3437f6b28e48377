"""Trials are counted beside the runs whoever makes them, and counting never costs a run."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trader_lib.market.sample import sample_bars
from trader_lib.research.backtest import backtest
from trader_lib.research.overfitting import deflate
from trader_lib.research.sweep import sweep
from trader_lib.research.trials import LEDGER, Trial, TrialLedger
from trader_lib.research.walkforward import walk_forward
from trader_lib.strategy.sma_cross import SmaCross

BARS = sample_bars(["IBM"], start="2009-01-02", end="2010-12-31")
WRITER = """
import sys
from pathlib import Path
from trader_lib.research.trials import Trial, TrialLedger
ledger = TrialLedger(Path(sys.argv[1]))
for k in range(400):
    key = f"{sys.argv[2]}{k}"
    ledger.enter(Trial("", "backtest", "x" * 3000, ("IBM",), "1Day", "2010-01-04", "2010-12-31", 1, key))
"""


def test_forgotten_trials_make_the_best_one_less_likely_to_be_more_than_luck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRADER_RUNS__TRIALS", "true")
    axes = {"fast": [5, 10], "slow": [30, 50, 100]}
    fresh = deflate(sweep(SmaCross, axes, BARS, progress=False))
    assert fresh.trials == 6
    for slow in range(40, 49):
        backtest(SmaCross(fast=7, slow=slow), BARS)
    walk_forward(SmaCross, {"fast": [6, 7], "slow": [20]}, BARS, train="1y", test="6m")
    again = deflate(sweep(SmaCross, axes, BARS, progress=False))
    assert again.trials == 6 + 9 + 2
    assert again.expected_best > fresh.expected_best and again.deflated < fresh.deflated
    kinds = [one.kind for one in TrialLedger(tmp_path / "runs" / LEDGER).entries()]
    assert kinds == ["sweep", *["backtest"] * 9, "walkforward", "sweep"]


def test_another_strategy_and_other_years_are_other_trials(tmp_path: Path) -> None:
    ledger = TrialLedger(tmp_path / LEDGER)
    backtest(SmaCross(fast=7, slow=40), BARS, trials=ledger)
    seen = ledger.entries()[0]
    later, earlier = BARS.day(-1).replace(year=2015), BARS.day(0).replace(year=2005)
    assert ledger.about("sma_cross", ["IBM"], BARS.day(-1), later) == [seen]
    assert ledger.about("momentum", ["IBM"], earlier, later) == []
    assert ledger.about("sma_cross", ["AAPL"], earlier, later) == []
    assert ledger.about("sma_cross", ["IBM"], later, later) == []


def test_two_processes_write_every_line_whole(tmp_path: Path) -> None:
    path = tmp_path / "runs" / LEDGER
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "ab"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert {one.key for one in TrialLedger(path).entries()} == {f"{name}{k}" for name in "ab" for k in range(400)}
    assert len(path.read_bytes().splitlines()) == 800


def test_a_run_that_cannot_be_counted_runs(tmp_path: Path, quiet: None) -> None:
    (tmp_path / "file").touch()
    result = backtest(SmaCross(fast=7, slow=40), BARS, trials=TrialLedger(tmp_path / "file" / LEDGER))
    assert len(result.orders) > 0


def test_the_command_shows_what_runs_have_counted(trader: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = trader("runs", "trials")
    assert code == 0 and "has no trial yet" in out + err
    TrialLedger(tmp_path / "runs" / LEDGER).enter(
        Trial("2026-11-28T09:00:00Z", "sweep", "sma_cross", ("IBM",), "1Day", "2010-01-04", "2010-12-31", 40, "k")
    )
    code, out, _ = trader("runs", "trials", "--json")
    assert code == 0 and json.loads(out)[0]["trials"] == 40
    code, _, err = trader("runs", "trials", "sma_crss")
    assert code == 2 and "Did you mean 'sma_cross'" in err
