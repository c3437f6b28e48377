"""What more workers bring to a sweep: one thread, two, and a Dask cluster of two; and one without compiled weights.

By wall time, in turns, so that only a machine with two free cores shows what there is to gain: the load is printed
beside the figures. The rows of each way are compared first. A strategy without compiled weights is beside vectorbt,
which gets its thousand combinations in one call, as it likes them best, by CPU time of one process.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

TURNS = 3
PAIRS = [(fast, slow) for fast in range(5, 55, 2) for slow in range(60, 260, 5)]  # 1,000


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    call()
    return clock() - began


def _vectorbt(bars: Any) -> Any:
    """The pairs as `targets` has them: long while the fast mean is above the slow one."""
    import pandas as pd
    import vectorbt as vbt

    series = pd.Series(bars.close[:, 0])
    means = {n: series.rolling(n).mean().to_numpy() for n in {n for pair in PAIRS for n in pair}}
    up = np.column_stack([means[fast] > means[slow] for fast, slow in PAIRS])
    before = np.vstack([np.zeros((1, up.shape[1]), dtype=bool), up[:-1]])
    earlier = np.vstack([np.zeros((2, up.shape[1]), dtype=bool), up[:-2]])
    wide = bars.close[:, [0]].repeat(up.shape[1], 1)
    found = vbt.Portfolio.from_signals(
        wide, before & ~earlier, ~before & earlier, price=bars.open[:, [0]], init_cash=100_000, freq="1D"
    )
    return found.total_return(), found.sharpe_ratio(), found.max_drawdown()


def workers(row: Callable[..., Any], bars_n: int = 100_000) -> list[Any]:
    """Seconds of a sweep by who does it, and of one by targets; ratios to one worker and to vectorbt."""
    from tests.bench.sweeping import prices
    from trader_lib import SmaCross, sample_bars, sweep
    from trader_lib.research.cluster import joined

    bars = prices().head(bars_n)
    grid = [{"fast": fast, "slow": slow} for fast, slow in PAIRS]
    quiet: dict[str, Any] = {"trials": False, "check": False, "progress": False}
    taken: dict[str, list[float]] = {"one": [], "two": [], "cluster": []}
    with joined(2) as there:
        ways: dict[str, dict[str, Any]] = {"one": {"workers": 1}, "two": {"workers": 2}, "cluster": {"cluster": there}}
        rows = {name: sweep(SmaCross, grid, bars, **way, **quiet).frame for name, way in ways.items()}
        assert rows["one"].equals(rows["two"]) and rows["one"].equals(rows["cluster"])
        for _ in range(TURNS):
            for name, way in ways.items():
                call = lambda way=way: sweep(SmaCross, grid, bars, **way, **quiet)  # noqa: E731 - a call to be timed
                taken[name].append(_seconds(call, time.perf_counter))
    one, two, far = (statistics.median(taken[name]) for name in ("one", "two", "cluster"))
    daily = sample_bars(["IBM"])
    by_targets = lambda: sweep(SmaCross, grid, daily, workers=1, compiled=False, **quiet)  # noqa: E731
    by_targets()
    _vectorbt(daily)
    ours = statistics.median(_seconds(by_targets, time.process_time) for _ in range(TURNS))
    theirs = statistics.median(_seconds(lambda: _vectorbt(daily), time.process_time) for _ in range(TURNS))
    what = f"sweep, {len(PAIRS):,} SMA pairs × {bars.n:,} bars"
    return [
        row(f"{what}, one worker (load {os.getloadavg()[0]:.0f})", one, "s", "", None),
        row(f"{what}, two threads", two, "s", "one worker takes so many times as long", one / two),
        row(f"{what}, a Dask cluster of two", far, "s", "one worker takes so many times as long", one / far),
        row(f"sweep by targets, {len(PAIRS):,} pairs × {daily.n:,} bars", ours, "s", "", None),
        row("vectorbt from_signals, the same pairs", theirs, "s", "sweep is so many times as fast", theirs / ours),
    ]
