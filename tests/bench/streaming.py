"""A session over one-minute bars of one symbol, beside NautilusTrader and a plain loop in Python, in turns.

All three trade the same crossover with market orders. The session writes its journal to disk and runs as it does for a
user: risk with its checks, an exchange in the same process, nothing left out. The loop keeps orders and cash alone.
NautilusTrader runs in an environment of its own, which `make bench` makes; without it the row is left out.
"""

from __future__ import annotations

import asyncio
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from trader_lib import SessionSpec, SmaCross, backtest, load_settings, run_session, synthetic_bars
from trader_lib.market.bars import Bars

FAST, SLOW = 10, 50
CASH = 100_000.0
NAUTILUS = Path("build/bench/nautilus/bin/python")
DURABILITY = "process"
ORDERS_MAX = 100_000
COSTS = {"volume_share": 1.0}  # an order fills at once, as with the two others


class Run(NamedTuple):
    cpu_s: float
    bars: int
    orders: int
    grown_mb: float = 0.0  # resident memory at the end above that after a tenth of the bars
    order_list_hash: str = ""


def minute_bars(count: int) -> Bars:
    """So many synthetic one-minute bars of one symbol."""
    last = date(2010 + count // (252 * 390) + 1, 12, 31)
    return synthetic_bars(["SYN"], date(2010, 1, 4), last, "1Min", seed=1).head(count)


def plain_loop(bars: Bars) -> Run:
    """The crossover as a loop over Python's own floats: an order at a close fills at the next open."""
    opens, closes = bars.open[:, 0].tolist(), bars.close[:, 0].tolist()
    began = time.process_time()
    window: deque[float] = deque(maxlen=SLOW)
    cash, held, wanted, orders = CASH, 0.0, 0.0, 0
    for open_, close in zip(opens, closes, strict=True):
        if wanted:
            cash, held, wanted, orders = cash - wanted * open_, held + wanted, 0.0, orders + 1
        window.append(close)
        if len(window) < SLOW:
            continue
        fast, slow = sum(list(window)[-FAST:]) / FAST, sum(window) / SLOW
        target = float(int((cash + held * close) / close)) if fast > slow else 0.0
        wanted = target - held if bool(target) != bool(held) else 0.0
    return Run(time.process_time() - began, bars.n, orders)


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def our_session(bars: Bars) -> Run:
    """`run_session` with its journal on disk."""
    limits = {"max_orders": ORDERS_MAX}
    spec = SessionSpec.model_validate(
        {"strategy": "sma_cross", "symbols": ["SYN"], "timeframe": "1Min", "limits": limits, "costs": COSTS}
    )
    overrides = {"broker": {"kind": "simulated", "transport": "in_process"}, "journal": {"durability": DURABILITY}}
    settings = load_settings(overrides=overrides, env_file=None)
    resident: list[float] = []

    def progress(count: int, at: datetime) -> None:
        if count == bars.n // 10:
            resident.append(_resident_mb())

    with TemporaryDirectory() as folder:
        began = time.process_time()
        path = Path(folder) / "journal.sqlite"
        strategy = SmaCross(fast=FAST, slow=SLOW)
        result = asyncio.run(
            run_session(spec, settings, bars=bars, strategy=strategy, journal_path=path, progress=progress, check=False)
        )
        took, grown = time.process_time() - began, _resident_mb() - resident[0]
        return Run(took, result.bars, len(result.orders), grown, result.order_list_hash)


def nautilus(bars: Bars) -> Run:
    """NautilusTrader's backtest engine in its own environment."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "bars.npy"
        figures = (bars.open, bars.high, bars.low, bars.close, bars.volume)
        np.save(path, np.stack([bars.times_ns.astype(np.float64), *(figure[:, 0] for figure in figures)]))
        script = Path(__file__).with_name("nautilus_peer.py")
        found = subprocess.run([NAUTILUS, script, path], capture_output=True, text=True, check=True)
    told = json.loads(found.stdout.splitlines()[-1])
    return Run(told["cpu_s"], told["bars"], told["orders"])


def streaming(row: Callable[..., Any], bars_wanted: int = 20_000, turns: int = 3) -> list[Any]:
    """Rows of the table: CPU time a bar, of each and beside the session's."""
    bars = minute_bars(bars_wanted)
    limits = {"max_orders": ORDERS_MAX}
    kinds: dict[str, Callable[[Bars], Run]] = {"a loop in plain Python": plain_loop, "session": our_session}
    if NAUTILUS.exists():
        kinds["NautilusTrader"] = nautilus
    else:
        print(f"NautilusTrader is left out: there is no {NAUTILUS}; `make bench` makes it.", file=sys.stderr)
    runs: dict[str, list[Run]] = {name: [] for name in kinds}
    for turn in range(turns):
        for name in sorted(kinds, reverse=bool(turn % 2)):
            runs[name].append(kinds[name](bars))
    engine = backtest(SmaCross(fast=FAST, slow=SLOW), bars, limits=limits, costs=COSTS)
    ours = runs["session"][-1]
    assert ours.order_list_hash == engine.order_list_hash, "the session ordered otherwise than the backtest"
    per_bar = {name: statistics.median(run.cpu_s / run.bars for run in each) * 1e6 for name, each in runs.items()}
    found = [
        row(
            f"{name}, {each[-1].bars:,} minute bars, {each[-1].orders:,} orders",
            per_bar[name],
            "µs a bar",
            "session",
            per_bar[name] / per_bar["session"],
        )
        for name, each in runs.items()
    ]
    grown = max(run.grown_mb for run in runs["session"])
    return [*found, row("memory that a session takes after its first tenth", grown, "MB", "", None)]
