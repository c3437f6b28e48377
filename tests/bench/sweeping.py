"""A thousand SMA pairs over a hundred thousand bars: `sweep`, a bare fused loop with the same fills, and vectorbt.

The bare loop has running sums, whole shares, next-open fills, cents, drawdown and the moments of a Sharpe ratio, and
nothing else: no orders, no risk checks, no calendar, no costs, no trades. It is the floor. vectorbt takes the same
signals through `from_signals`, fifty of the pairs. By CPU time of one thread, in turns.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

BARS = 100_000
PAIRS = [(fast, slow) for fast in range(5, 55, 2) for slow in range(60, 260, 5)]  # 1,000
VECTORBT_PAIRS = 50  # what of them vectorbt gets: its time grows with their number
TURNS = 3


@njit(nogil=True)
def bare(
    open_: NDArray[np.float64], close: NDArray[np.float64], pairs: NDArray[np.int64], out: NDArray[np.float64]
) -> None:
    rows = len(close)
    for k in range(len(pairs)):
        fast, slow = pairs[k]
        quick, lasting, cash, held, target = 0.0, 0.0, 100_000.0, 0.0, -1.0
        peak, deepest, before, total, squares, fills = cash, 0.0, cash, 0.0, 0.0, 0
        for t in range(rows):
            if target >= 0.0 and target != held:
                cash = math.floor((cash - (target - held) * open_[t]) * 100.0 + 0.5) / 100.0
                held = target
                fills += 1
            target = -1.0
            quick += close[t] - (close[t - fast] if t >= fast else 0.0)
            lasting += close[t] - (close[t - slow] if t >= slow else 0.0)
            worth = math.floor((cash + held * close[t]) * 100.0 + 0.5) / 100.0
            if t >= slow - 1:
                up = quick / fast > lasting / slow
                if up and held == 0.0:
                    target = float(math.floor(worth / close[t]))
                elif not up and held != 0.0:
                    target = 0.0
            if worth > peak:
                peak = worth
            else:
                deepest = min(deepest, worth / peak - 1.0)
            change = worth - before
            total += change
            squares += change * change
            before = worth
        out[k, 0], out[k, 1], out[k, 2], out[k, 3] = (
            before / 100_000.0 - 1.0,
            deepest,
            total / math.sqrt(squares),
            fills,
        )


def _vectorbt(open_: Any, close: Any, pairs: list[tuple[int, int]]) -> object:
    import pandas as pd
    import vectorbt as vbt

    series = pd.Series(close)
    means = {n: series.rolling(n).mean().to_numpy() for n in {n for pair in pairs for n in pair}}
    up = np.column_stack([means[fast] > means[slow] for fast, slow in pairs])
    before = np.vstack([np.zeros((1, up.shape[1]), dtype=bool), up[:-1]])
    earlier = np.vstack([np.zeros((2, up.shape[1]), dtype=bool), up[:-2]])
    enter, leave = before & ~earlier, ~before & earlier
    found = vbt.Portfolio.from_signals(
        close[:, None].repeat(up.shape[1], 1), enter, leave, price=open_[:, None], init_cash=100_000, freq="1min"
    )
    return found.total_return(), found.sharpe_ratio(), found.max_drawdown()


def _cpu(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


MEMORY = """
import resource, sys
from tests.bench.sweeping import prices, PAIRS
from trader_lib import sweep, SmaCross
from trader_lib.exchange.costs import Costs
bars = prices()
grid = [{"fast": f, "slow": s} for f, s in PAIRS]
sweep(SmaCross, grid[:2], bars, workers=1, costs=Costs(volume_share=0))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sweep(SmaCross, grid, bars, workers=1, costs=Costs(volume_share=0))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def prices() -> Any:
    """Synthetic one-minute bars of one symbol."""
    from trader_lib import synthetic_bars

    bars = synthetic_bars(["SYN"], date(2010, 1, 4), date(2011, 2, 28), "1Min", seed=1)
    return bars.head(BARS)


def sweeping(row: Callable[..., Any]) -> list[Any]:
    """Nanoseconds a bar and pair, medians of turns, and the memory of the sweep beyond its start."""
    from trader_lib import SmaCross, sweep
    from trader_lib.exchange.costs import Costs

    bars, costs = prices(), Costs(volume_share=0)
    open_, close = bars.open[:, 0].copy(), bars.close[:, 0].copy()
    pairs, out = np.array(PAIRS), np.zeros((len(PAIRS), 4))
    grid = [{"fast": fast, "slow": slow} for fast, slow in PAIRS]
    some = PAIRS[:: len(PAIRS) // VECTORBT_PAIRS][:VECTORBT_PAIRS]
    bare(open_, close, pairs[:2], out)
    found = sweep(SmaCross, grid, bars, workers=1, costs=costs)
    _vectorbt(open_, close, some[:2])
    taken: dict[str, list[float]] = {"ours": [], "bare": [], "theirs": []}
    for _ in range(TURNS):
        taken["ours"].append(_cpu(lambda: sweep(SmaCross, grid, bars, workers=1, costs=costs)) / len(PAIRS))
        taken["bare"].append(_cpu(lambda: bare(open_, close, pairs, out)) / len(PAIRS))
        taken["theirs"].append(_cpu(lambda: _vectorbt(open_, close, some)) / len(some))
    ours, floor, theirs = (statistics.median(taken[name]) / bars.n * 1e9 for name in ("ours", "bare", "theirs"))
    same = float(np.mean(np.abs(found["fills"].to_numpy(dtype=float) - out[:, 3]) <= 0.02 * out[:, 3] + 2))
    memory = float(subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True).stdout)
    unit = "ns a bar and pair"
    return [
        row(f"sweep, {len(PAIRS):,} SMA pairs × {bars.n:,} bars, one thread", ours, unit, "", None),
        row(
            "a bare fused loop, the same fills, nothing else",
            floor,
            unit,
            "sweep is as slow as so many",
            ours / floor,
        ),
        row("pairs whose number of fills is the bare loop's, within 2 %", same * 100, "%", "", None),
        row("vectorbt from_signals, 50 of the pairs", theirs, unit, "sweep is so many times as fast", theirs / ours),
        row("memory of the sweep beyond its start", memory, "MB", "", None),
    ]
