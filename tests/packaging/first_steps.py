"""Take the first step of every command in an installed package, and print what each answered, as JSON.

It runs inside an environment that has nothing but trader_lib and some of its extras, so it imports nothing else. The
argument `reports` adds the commands that execute notebooks, which take seconds each.
"""

import asyncio
import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from trader_lib import SmaCross, backtest, sample_bars
from trader_lib.app.cli import main
from trader_lib.errors.extras import missing_packages
from trader_lib.runs.store import RunStore
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec

WHAT = ("--symbols", "AAPL", "--start", "2012-01-03", "--end", "2012-02-15", "-p", "fast=2", "-p", "slow=5")
JOBS = '[[job]]\nname = "daily"\nnotebook = "backtest"\ncron = "30 17 * * mon-fri"\n'
PRICES = "Date,Open,High,Low,Close,Volume\n2024-01-02,10,11,9,10,100\n2024-01-03,10,11,9,10,100\n"
STEPS: dict[str, tuple[str, ...]] = {
    "agent": ("agent", "risk"),
    "backtest": ("backtest", *WHAT),
    "check": ("check", *WHAT),
    "config": ("config",),
    "course": ("course", "first_strategy"),
    "costs": ("costs", "latest-paper"),
    "dashboard": ("dashboard", "no-such-run"),
    "data check": ("data", "check", "prices.csv", "--symbol", "IBM"),
    "data fetch": ("data", "fetch", "IBM", "--start", "2024-01-02"),
    "data import": ("data", "import", "prices.csv", "--symbol", "IBM"),
    "data list": ("data", "list"),
    "data screen": ("data", "screen"),
    "data show": ("data", "show", "IBM"),
    "demo": ("demo", "--help"),
    "doctor": ("doctor", "--offline"),
    "explain": ("explain", "latest-paper", "sma_cross-AAPL-20120103"),
    "exchange": ("exchange", "--symbols", "NOTHERE"),
    "journal verify": ("journal", "verify", "latest-paper"),
    "journal show": ("journal", "show", "latest-paper", "--limit", "3"),
    "journal export": ("journal", "export", "latest-paper", "--to", "events.parquet"),
    "kill": ("kill", "latest-paper", "--reason", "test", "--by", "ada"),
    "live": ("live", "--account", "1"),
    "new project": ("new", "my_project"),
    "new strategy": ("new", "strategy", "buy_the_dip"),
    "lots": ("lots", "latest-paper"),
    "notify test": ("notify", "test"),
    "paper": ("paper", "--broker", "simulated", "--transport", "in_process", *WHAT),
    "parity": ("parity", "latest-paper"),
    "reduce": ("reduce", "latest-paper", "--reason", "test", "--by", "ada"),
    "replay": ("replay", "latest-paper"),
    "resume": ("resume", "latest-paper", "--reason", "test", "--by", "ada"),
    "run": ("run", "no-such.ipynb"),
    "runs compare": ("runs", "compare", "latest-paper", "latest-paper"),
    "runs list": ("runs", "list"),
    "runs trials": ("runs", "trials"),
    "runs show": ("runs", "show", "latest-paper"),
    "schedule check": ("schedule", "check", "jobs.toml"),
    "schedule example": ("schedule", "example"),
    "schedule history": ("schedule", "history"),
    "schedule run": ("schedule", "run", "jobs.toml", "--once"),
    "search": ("search", "--space", "fast=2:4", "--trials", "2", "--folds", "1", *WHAT[:-4], "-p", "slow=5"),
    "status": ("status", "latest-paper"),
    "strategies": ("strategies",),
    "summary": ("summary", "latest-paper"),
    "sweep": ("sweep", "--grid", "fast=2:4:1", *WHAT[:-4], "-p", "slow=5"),
    "verdict": ("verdict", "no-such-run"),
    "walkforward": ("walkforward", "--grid", "fast=2,3", "--train", "40y", *WHAT[:-4]),
    "watch": ("watch", "latest-paper", "--once"),
}
WITH_REPORTS = ("backtest", "paper", "search", "sweep")


def first_step(words: tuple[str, ...]) -> dict[str, object]:
    """Run one command; return its exit code and what it wrote."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    return {"code": code, "out": out.getvalue()[-2000:], "err": err.getvalue()[-2000:]}


def session_without_extras() -> int:
    """Run a session from Python in a run folder; return how many orders it placed."""
    run = RunStore("runs").create("paper")
    run.write_params({"kind": "paper", "parameters": {"broker": "simulated", "transport": "in_process"}})
    spec = SessionSpec(
        strategy="sma_cross", params={"fast": 2, "slow": 5}, symbols=("AAPL",), start="2012-01-03", end="2012-02-15"
    )
    return len(asyncio.run(run_session(spec, journal_path=run.journal)).orders)


def everything(with_reports: bool) -> dict[str, object]:
    """Return what the package did in Python, and what each command answered."""
    Path("jobs.toml").write_text(JOBS)
    Path("prices.csv").write_text(PRICES)
    bars = sample_bars(["AAPL"], start="2012-01-03", end="2012-02-15")
    result = backtest(SmaCross(fast=2, slow=5), bars)
    found: dict[str, object] = {
        "orders": session_without_extras(),
        "backtest_orders": len(result.orders),
        "trades": result.statistics["trades"],
    }
    installed = not missing_packages("runs")
    steps = {name: words for name, words in STEPS.items() if with_reports or not installed or name not in WITH_REPORTS}
    return found | {"steps": {name: first_step(words) for name, words in steps.items()}}


if __name__ == "__main__":
    os.environ.pop("TRADER_PROFILE", None)
    sys.stdout.write(json.dumps(everything("reports" in sys.argv[1:])))
