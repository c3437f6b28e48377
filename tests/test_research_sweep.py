"""A sweep's rows are backtests, in every way of running it; what is done survives; memory stays within the budget."""

import os
import signal
import subprocess
import sys
import tracemalloc
import warnings
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numba import config, types

from trader_lib.errors.taxonomy import Misconfigured, Misused
from trader_lib.exchange.costs import Costs
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.research.backtest import LookAheadWarning, agreed, backtest
from trader_lib.research.combinations import combinations
from trader_lib.research.many import SERIES_BYTES, Runner, SeriesKept, groups_within, signal_runs
from trader_lib.research.measures import MEASURES
from trader_lib.research.sweep import sweep
from trader_lib.risk.limits import Limits
from trader_lib.rules.sizing import SizingRules
from trader_lib.strategy.contract import Strategy
from trader_lib.strategy.momentum import Momentum
from trader_lib.strategy.rsi_reversion import RsiReversion
from trader_lib.strategy.signals import CompiledSignal, Signal
from trader_lib.strategy.sma_cross import SmaCross
from trader_lib.strategy.vol_target import VolTarget

Chance = np.random.Generator
AXES = {"fast": range(5, 45, 5), "slow": range(20, 180, 20)}


def drawn(chance: Chance) -> Strategy:
    match int(chance.integers(0, 4)):
        case 0:
            fast = int(chance.integers(1, 20))
            return SmaCross(fast=fast, slow=fast + int(chance.integers(1, 40)))
        case 1:
            stops = [None, 0.02, 0.05]
            return RsiReversion(
                period=int(chance.integers(2, 20)),
                entry=45.0,
                stop_loss=stops[int(chance.integers(0, 3))],
                take_profit=stops[int(chance.integers(0, 3))],
            )
        case 2:
            return Momentum(lookback=int(chance.integers(6, 60)), top=int(chance.integers(1, 3)), every=5)
        case _:
            return VolTarget(target=float(chance.uniform(0.05, 0.5)), window=int(chance.integers(2, 30)))


def drawn_terms(chance: Chance) -> dict[str, object]:
    costs = Costs(
        commission_per_share=float(chance.choice([0.0, 0.01])),
        slippage_bps=float(chance.choice([0.0, 5.0])),
        volume_share=float(chance.choice([0.0, 0.0001, 0.1])),
    )
    limits = Limits(
        max_order_notional=40_000.0 if chance.random() < 0.5 else None,
        max_drawdown=0.1 if chance.random() < 0.3 else None,
        max_daily_loss=0.02 if chance.random() < 0.3 else None,
    )
    return {
        "start": "2007-03-01" if chance.random() < 0.5 else None,
        "end": "2008-06-30",
        "cash": float(chance.choice([5_000.0, 100_000.0])),
        "costs": costs,
        "limits": limits,
        "multiplier": int(chance.choice([1, 2, 4])),
        "sizing": SizingRules(min_trade=float(chance.choice([0.0, 0.01, 0.05]))),
    }


@pytest.mark.parametrize("compiled", [True, False])
def test_the_order_list_of_each_row_is_the_one_of_its_backtest(compiled: bool) -> None:
    """One runner for all rows, so that what a run leaves behind in the arrays would show in the next."""
    prices, chance = sample_bars(["AAPL", "IBM", "MSFT"], start="2006-06-01", end="2008-06-30"), _chance(5)
    orders = 0
    for case in range(8):
        one, terms = drawn(chance), drawn_terms(chance)
        samples = [one.model_dump(), *(other.model_dump() for other in _likes(one, chance))]
        grid = combinations(type(one), samples)
        cut, first = prices, 0
        if terms["start"] is not None:
            first = int(np.searchsorted(prices.times_ns, pd.Timestamp("2007-03-01", tz="America/New_York").value))
        runner = Runner(grid, cut, first, agreed(**terms), compiled=compiled)
        for row in (*range(len(samples)), 0):
            runner.run([row])
            expected = backtest(grid.build(row), prices, **terms)
            table, fills = runner.last()
            offset = len(cut) - len(expected.bars)
            table["decided"] -= offset
            fills["bar"] -= offset
            ours = replace(expected, simulation=expected.simulation._replace(orders=table, fills=fills))
            assert ours.order_list_hash == expected.order_list_hash, (case, row, grid.build(row), terms)
            orders += len(table)
    assert orders > 1000


def _chance(seed: int) -> Chance:
    return np.random.Generator(np.random.PCG64(seed))


def _likes(one: Strategy, chance: Chance) -> list[Strategy]:
    found: list[Strategy] = []
    while len(found) < 2:
        other = drawn(chance)
        if type(other) is type(one):
            found.append(other)
    return found


class Held(Strategy):
    """Long for some bars, out for as many; without compiled weights."""

    days: int = 3

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars: Bars) -> np.ndarray:
        return np.where((np.arange(bars.n) // self.days) % 2 == 0, 0.9, 0.0)[:, None] * np.ones(len(bars.symbols))


@pytest.mark.skipif(config.DISABLE_JIT, reason="nothing is compiled")
def test_the_loop_over_combinations_is_compiled_once_for_all_signals() -> None:
    """A loop that is made anew for each signal is made anew in each process too: that cost eleven seconds a sweep."""
    prices = sample_bars(["IBM"], start="2012-01-03")
    sweep(SmaCross, {"fast": [2]}, prices, trials=False)
    before = len(signal_runs.signatures)
    for one, days in ((RsiReversion, {"period": [5]}), (Momentum, {"lookback": [20]})):
        sweep(one, days, prices, trials=False)
    assert len(signal_runs.signatures) == before > 0
    assert all(isinstance(kind, types.FunctionType) for given in signal_runs.signatures for kind in given[:2])


def test_threads_give_the_same_rows_as_one_alone() -> None:
    prices = sample_bars(["IBM"], start="2006-06-01", end="2008-06-30")
    alone, threads = (sweep(SmaCross, AXES, prices, workers=n).frame for n in (1, 2))
    assert alone.equals(threads)


@pytest.mark.slow
def test_processes_give_the_same_rows_as_one_alone() -> None:
    prices = sample_bars(["IBM"], start="2006-06-01", end="2008-06-30")
    days = {"days": list(range(1, 25))}
    one, two = sweep(Held, days, prices, workers=1), sweep(Held, days, prices, workers=2)
    assert two.estimate.workers == 2 and not two.estimate.compiled
    assert one.frame.equals(two.frame)


def test_rows_are_in_the_order_of_the_grid_and_refusals_keep_theirs() -> None:
    found = sweep(SmaCross, {"slow": [10, 5], "fast": [7, 3]}, sample_bars(["IBM"], start="2012-01-03"))
    assert list(found.frame.index) == [(10, 7), (10, 3), (5, 7), (5, 3)] and list(found.frame.index.names) == [
        "slow",
        "fast",
    ]
    assert found.refused.index.tolist() == [(5, 7)]


def test_memory_stays_within_the_estimate() -> None:
    prices = synthetic_bars(["X"], date(2010, 1, 4), date(2010, 8, 31), "1Min", seed=1)
    sweep(SmaCross, {"fast": [5], "slow": [20]}, prices, workers=1)  # compiled, imported, calendar read
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    found = sweep(SmaCross, {"fast": range(2, 42), "slow": [50, 100]}, prices, workers=1)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    one_array = prices.close.nbytes
    assert len(found.frame) == 80 and prices.n > 60_000
    # beside the estimate: what the calendar says of each bar, and the frames of the check of compiled weights
    assert peak < found.estimate.total_mb * 2**20 + 16 * one_array < 40 * one_array + SERIES_BYTES


class Stopped:
    """A report that presses Ctrl-C after some rows."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, step: object) -> None:
        if step.done >= self.after:  # type: ignore[attr-defined]
            raise KeyboardInterrupt


def test_ctrl_c_keeps_what_is_done_and_resume_does_the_rest(tmp_path: Path) -> None:
    prices, days = sample_bars(["IBM"], start="2008-01-02", end="2010-06-30"), {"days": list(range(1, 121))}
    whole = sweep(Held, days, prices, workers=1).frame
    part = sweep(Held, days, prices, workers=1, folder=tmp_path / "s", report=Stopped(40))
    assert not part.complete and 40 <= len(part.frame) < 120
    assert part.frame.equals(whole.iloc[: len(part.frame)])
    with pytest.raises(Misused, match="holds a sweep already"):
        sweep(Held, days, prices, folder=tmp_path / "s")
    steps: list[int] = []
    rest = sweep(
        Held, days, prices, workers=1, folder=tmp_path / "s", resume=True, report=lambda p: steps.append(p.done)
    )
    assert rest.complete and rest.frame.equals(whole)
    assert steps[0] > len(part.frame) and steps[-1] == 120
    assert pd.read_parquet(tmp_path / "s" / "sweep.parquet").set_index("days").equals(whole)
    again: list[int] = []
    same = sweep(Held, days, prices, folder=tmp_path / "s", resume=True, report=lambda p: again.append(p.done))
    assert same.frame.equals(whole) and not again


def test_resume_refuses_another_sweep_and_repairs_a_broken_part(tmp_path: Path) -> None:
    prices, days = sample_bars(["IBM"], start="2008-01-02", end="2009-06-30"), {"days": list(range(1, 121))}
    part = sweep(Held, days, prices, workers=1, folder=tmp_path, report=Stopped(40))
    for changed in ({"costs": Costs(slippage_bps=1)}, {"cash": 5}, {"start": "2008-03-03"}):
        with pytest.raises(Misused, match="something else"):
            sweep(Held, days, prices, folder=tmp_path, resume=True, **changed)
    with pytest.raises(Misused, match="no sweep to go on with"):
        sweep(Held, days, prices, folder=tmp_path / "elsewhere", resume=True)
    broken = sorted((tmp_path / "parts").glob("*.parquet"))[0]
    broken.write_bytes(broken.read_bytes()[:100])
    rest = sweep(Held, days, prices, workers=1, folder=tmp_path, resume=True)
    assert rest.complete and rest.frame.equals(sweep(Held, days, prices, workers=1).frame) and len(part.frame) < 120


def test_a_full_disk_is_a_sentence_and_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prices, days = sample_bars(["IBM"], start="2008-01-02", end="2009-06-30"), {"days": list(range(1, 121))}
    real, calls = os.replace, []

    def full(source: object, target: object) -> None:
        calls.append(target)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(Misconfigured, match="No space left on device"):
        sweep(Held, days, prices, workers=1, folder=tmp_path)
    monkeypatch.undo()
    parts = list((tmp_path / "parts").glob("*.parquet"))
    assert len(parts) == 3 and not list(tmp_path.rglob("*.tmp"))
    assert sweep(Held, days, prices, workers=1, folder=tmp_path, resume=True).complete


KILLED = """
import sys, time
from trader_lib import sample_bars
from trader_lib.research.sweep import sweep
from trader_lib.strategy.vol_target import VolTarget
prices = sample_bars(["IBM"], start="2004-01-02", end="2010-06-30")
windows = {"window": list(range(5, 305))}
def told(step):
    print(step.done, flush=True)
again = "resume" in sys.argv
sweep(VolTarget, windows, prices, workers=1, folder=sys.argv[1], resume=again, report=told)
"""


@pytest.mark.slow
def test_kill_nine_and_resume_give_the_rows_of_an_undisturbed_sweep(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "s")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 100:
                process.send_signal(signal.SIGKILL)
                break
    assert list((tmp_path / "s" / "parts").glob("*.parquet")) and not (tmp_path / "s" / "sweep.parquet").exists()
    rest = subprocess.run([*command, "resume"], check=True, capture_output=True, text=True, timeout=120)
    assert int(rest.stdout.split()[0]) > 90
    table = pd.read_parquet(tmp_path / "s" / "sweep.parquet")
    prices = sample_bars(["IBM"], start="2004-01-02", end="2010-06-30")
    whole = sweep(VolTarget, {"window": list(range(5, 305))}, prices, workers=1)
    assert table.set_index("window").equals(whole.frame)


def lies(open_, high, low, close, volume, parameters, first, out) -> None:  # type: ignore[no-untyped-def]
    out[:] = 0.5


class Liar(Held):
    @property
    def compiled_weights(self) -> Signal:
        return Signal(CompiledSignal(lies), ())


def test_compiled_weights_that_are_not_the_targets_are_refused() -> None:
    prices = sample_bars(["IBM"], start="2012-01-03")
    with pytest.raises(Misused, match=r"the weight 0.9 .* by its targets and 0.5 compiled"):
        sweep(Liar, {"days": [2, 3]}, prices)
    assert sweep(Liar, {"days": [2, 3]}, prices, compiled=False)["fills"].gt(0).all()


def test_a_budget_that_holds_one_worker_starts_one() -> None:
    prices = sample_bars(["IBM"], start="2010-01-04")
    small = sweep(Held, {"days": [2, 3, 4]}, prices, workers=2, memory_mb=100)
    assert small.estimate.workers == 1 and small.estimate.total_mb < 100
    with pytest.raises(Misused, match="workers cannot sweep"):
        sweep(Held, {"days": [2]}, prices, workers=0)


def test_a_row_of_measures_is_complete() -> None:
    found = sweep(SmaCross, {"fast": [5], "slow": [20]}, sample_bars(["IBM"]), start="2005-01-03")
    assert found.frame[list(MEASURES)].notna().all(axis=None)


class Tomorrow(Held):
    """Long on bars before one that rises."""

    def targets(self, bars: Bars) -> np.ndarray:
        close = bars.close
        rises = np.zeros_like(close)
        rises[:-1] = close[1:] > close[:-1]
        return rises


def test_a_sweep_marks_a_strategy_that_looks_ahead() -> None:
    prices = sample_bars(["IBM"], start="2006-01-03", end="2006-12-29")
    with pytest.warns(LookAheadWarning, match="could not have been had"):
        found = sweep(Tomorrow, {"days": [2, 3]}, prices, workers=1)
    assert "it saw bars after" in found.look_ahead
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sweep(Tomorrow, {"days": [2, 3]}, prices, workers=1, check=False).look_ahead == ""
        assert sweep(Held, {"days": [2, 3]}, prices, workers=1).look_ahead == ""


def test_series_that_do_not_fit_are_made_again() -> None:
    """Room for four series, where twelve are needed: the rows are the same."""
    prices = sample_bars(["IBM"], start="2006-06-01", end="2007-06-29")
    grid = combinations(SmaCross, {"fast": [2, 3, 4, 5], "slow": [10, 11, 12, 13, 14, 15, 16, 17]})
    roomy, narrow = (Runner(grid, prices, 0, agreed()) for _ in range(2))
    narrow.series = SeriesKept(narrow.ground, 4)
    ours, theirs = (runner.run(range(len(grid)))[0] for runner in (narrow, roomy))
    assert np.array_equal(ours, theirs, equal_nan=True)
    offers = [grid.build(row).compiled_weights for row in range(len(grid))]
    parts = list(groups_within([offer for offer in offers if offer is not None], 4))
    assert len(parts) > 8 and [row for part in parts for row in part] == list(range(len(grid)))
