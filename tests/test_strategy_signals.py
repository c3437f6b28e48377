"""What strategies offer compiled is what their targets are, bit by bit, over drawn prices and parameters."""

import numpy as np
import pandas as pd

from trader_lib.market.bars import Bars, Provenance, Timeframe
from trader_lib.strategy.contract import Strategy, history_bars, target_weights
from trader_lib.strategy.rsi_reversion import RsiReversion
from trader_lib.strategy.signals import signal_weights
from trader_lib.strategy.sma_cross import SmaCross

Chance = np.random.Generator


def drawn_bars(chance: Chance, rows: int = 320) -> Bars:
    """A few symbols of rounded prices, so that means tie; late beginnings, early ends, stretches without a move."""
    symbols = int(chance.integers(1, 5))
    moves = chance.normal(0.0, 0.02, (rows, symbols)) * (chance.random((rows, symbols)) < 0.7)
    close = np.round(50.0 * np.exp(np.cumsum(moves, axis=0)), int(chance.integers(0, 3))) + 1.0
    for s in range(1, symbols):
        close[: int(chance.integers(0, 60)), s] = np.nan
        close[rows - int(chance.integers(0, 60)) :, s] = np.nan
    index = pd.date_range("2020-01-02 14:30", periods=rows, freq="min", tz="UTC")
    origin = Provenance("drawn", "none", Timeframe("1Min"), "raw", synthetic=True)
    names = [f"S{s}" for s in range(symbols)]
    return Bars(close, close, close, close, np.where(np.isnan(close), np.nan, 1e5), index, names, origin)


def drawn_strategy(chance: Chance) -> Strategy:
    if chance.random() < 0.5:
        period, entry = int(chance.integers(2, 20)), float(chance.choice([20.0, 45.0, 50.0]))
        return RsiReversion(period=period, entry=entry, exit=entry + 5.0, patience=int(chance.integers(1, 30)))
    fast = int(chance.integers(1, 30))
    return SmaCross(fast=fast, slow=fast + int(chance.integers(1, 60)))


def test_compiled_weights_are_the_targets_to_the_last_bit() -> None:
    chance = np.random.Generator(np.random.PCG64(11))
    for case in range(60):
        bars, strategy = drawn_bars(chance), drawn_strategy(chance)
        ours = signal_weights(strategy.compiled_weights, bars)
        ours[: strategy.warmup - 1] = 0.0
        assert np.array_equal(ours, target_weights(strategy, bars)), (case, strategy)


def test_compiled_weights_begin_where_the_history_begins() -> None:
    chance = np.random.Generator(np.random.PCG64(12))
    for _ in range(20):
        bars, strategy, first = drawn_bars(chance), drawn_strategy(chance), int(chance.integers(0, 100))
        ours = signal_weights(strategy.compiled_weights, bars, first)[first:]
        later = bars.rows_between(first, bars.n)
        settled = history_bars(strategy) if isinstance(strategy, RsiReversion) else 0  # what it carried from before
        ours[: strategy.warmup - 1] = 0.0
        assert np.array_equal(ours[settled:], target_weights(strategy, later)[settled:])
