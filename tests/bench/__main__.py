"""Measure import time, the engines and the order path, each beside a floor or a peer in the same run.

Machines are noisy: read the ratios. Nothing here is a test; a figure that worsens is a question, not a failure.
Example: python -m tests.bench --json bench.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    what: str
    figure: float
    unit: str
    against: str
    ratio: float | None


def median_s(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of several calls after one that does not count."""
    call()
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def importing() -> list[Row]:
    """`import trader_lib` in a fresh interpreter, beside one that imports nothing and one that imports pandas."""

    def fresh(code: str) -> float:
        return median_s(lambda: subprocess.run([sys.executable, "-c", code], check=True), 9)

    bare = fresh("pass")
    ours, pandas = fresh("import trader_lib") - bare, fresh("import pandas") - bare
    return [
        Row("import trader_lib", ours * 1e3, "ms", "", None),
        Row("import pandas", pandas * 1e3, "ms", "import trader_lib", pandas / max(ours, 1e-6)),
    ]


def engines(bars_wanted: int) -> list[Row]:
    """One SMA crossover over synthetic one-minute bars: the whole backtest, and vectorbt's from_signals."""
    import numpy as np
    import pandas as pd
    import vectorbt as vbt

    from trader_lib import SmaCross, backtest, synthetic_bars
    from trader_lib.market.bars import Bars

    years = bars_wanted / (252 * 390)
    bars: Bars = synthetic_bars(["SYN"], date(2010, 1, 4), date(2010 + int(years) + 1, 12, 31), "1Min", seed=1)
    bars = bars.head(min(bars_wanted, bars.n))
    strategy = SmaCross(fast=10, slow=50)
    whole = median_s(lambda: backtest(strategy, bars), 3)
    close = pd.Series(bars.close[:, 0])
    opens = pd.Series(bars.open[:, 0])

    def peer() -> object:
        fast, slow = close.rolling(10).mean(), close.rolling(50).mean()
        up = (fast > slow).to_numpy()
        enter = np.concatenate([[False], up[:-1] & ~np.concatenate([[False], up[:-2]])])
        leave = np.concatenate([[False], ~up[:-1] & np.concatenate([[False], up[:-2]])])
        return vbt.Portfolio.from_signals(close, enter, leave, price=opens, init_cash=100_000).total_return()

    theirs = median_s(peer, 3)
    per_bar = 1e9 / bars.n
    return [
        Row(f"backtest, {bars.n:,} one-minute bars", whole * per_bar, "ns a bar", "", None),
        Row("vectorbt from_signals, the same crossover", theirs * per_bar, "ns a bar", "backtest", theirs / whole),
    ]


def sessions() -> list[Row]:
    """A session of agents over a year of daily bars, by transport, beside the same backtest."""
    from trader_lib import SessionSpec, SmaCross, backtest, load_settings, run_session, sample_bars

    symbols = ["AAPL", "IBM", "MSFT"]
    spec = SessionSpec.model_validate(
        {"strategy": "sma_cross", "symbols": symbols, "start": "2007-01-03", "end": "2007-12-31"}
    )
    bars = sample_bars(symbols)
    floor = median_s(lambda: backtest(SmaCross(), bars, start="2007-01-03", end="2007-12-31").order_list_hash, 3)
    rows = []
    for transport in ("in_process", "http"):
        settings = load_settings(overrides={"broker": {"kind": "simulated", "transport": transport}}, env_file=None)
        took = median_s(lambda settings=settings: asyncio.run(run_session(spec, settings)), 3)
        rows.append(Row(f"session, {transport}", took / 251 * 1e3, "ms a bar", "backtest", took / floor))
    return rows


PARTS = {"import": importing, "engines": lambda: engines(1_000_000), "sessions": sessions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", choices=[*PARTS, []], help="only these parts")
    parser.add_argument("--json", type=Path, help="write the figures to a file too")
    chosen = parser.parse_args()
    rows = [row for name in chosen.part or PARTS for row in PARTS[name]()]
    for row in rows:
        beside = f"{row.ratio:8.1f} × {row.against}" if row.ratio is not None else ""
        print(f"{row.what:<50}{row.figure:>12.2f} {row.unit:<10}{beside}")
    if chosen.json:
        chosen.json.write_text(json.dumps([row._asdict() for row in rows], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
