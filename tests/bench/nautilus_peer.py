"""One SMA crossover in NautilusTrader, run by the Python of its own environment.

Example: build/bench/nautilus/bin/python tests/bench/nautilus_peer.py bars.npy
bars.npy: stamps (ns, UTC), open, high, low, close, volume, one column a bar. Writes seconds, bars and orders as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from decimal import Decimal

import numpy as np
import pandas as pd
from nautilus_trader.backtest.engine import BacktestEngine, BacktestEngineConfig
from nautilus_trader.config import LoggingConfig, StrategyConfig
from nautilus_trader.indicators.averages import SimpleMovingAverage
from nautilus_trader.model.currencies import USD
from nautilus_trader.model.data import Bar, BarType
from nautilus_trader.model.enums import AccountType, OmsType, OrderSide
from nautilus_trader.model.identifiers import InstrumentId, Venue
from nautilus_trader.model.objects import Money
from nautilus_trader.persistence.wranglers import BarDataWrangler
from nautilus_trader.test_kit.providers import TestInstrumentProvider
from nautilus_trader.trading.strategy import Strategy

FAST, SLOW, SHARES = 10, 50, 100


class CrossoverConfig(StrategyConfig, frozen=True):
    instrument_id: InstrumentId
    bar_type: BarType


class Crossover(Strategy):
    def __init__(self, config: CrossoverConfig) -> None:
        super().__init__(config)
        self.fast, self.slow, self.is_long = SimpleMovingAverage(FAST), SimpleMovingAverage(SLOW), False

    def on_start(self) -> None:
        self.instrument = self.cache.instrument(self.config.instrument_id)
        for indicator in (self.fast, self.slow):
            self.register_indicator_for_bars(self.config.bar_type, indicator)
        self.subscribe_bars(self.config.bar_type)

    def on_bar(self, bar: Bar) -> None:
        if not self.indicators_initialized() or (self.fast.value > self.slow.value) == self.is_long:
            return
        self.is_long = not self.is_long
        side = OrderSide.BUY if self.is_long else OrderSide.SELL
        quantity = self.instrument.make_qty(SHARES)
        self.submit_order(self.order_factory.market(self.config.instrument_id, side, quantity))


def main() -> None:
    times, *figures = np.load(sys.argv[1])
    frame = pd.DataFrame(dict(zip(("open", "high", "low", "close", "volume"), figures, strict=True)))
    frame.index = pd.DatetimeIndex(times.astype(np.int64), tz="UTC")
    instrument = TestInstrumentProvider.equity(symbol="SYN", venue="SIM")
    bar_type = BarType.from_str(f"{instrument.id}-1-MINUTE-LAST-EXTERNAL")
    bars = BarDataWrangler(bar_type, instrument).process(frame)
    engine = BacktestEngine(BacktestEngineConfig(logging=LoggingConfig(bypass_logging=True)))
    cash = [Money(Decimal(10_000_000), USD)]
    engine.add_venue(Venue("SIM"), OmsType.NETTING, AccountType.MARGIN, starting_balances=cash, base_currency=USD)
    engine.add_instrument(instrument)
    engine.add_data(bars)
    engine.add_strategy(Crossover(CrossoverConfig(instrument_id=instrument.id, bar_type=bar_type)))
    began, cpu_began = time.perf_counter(), time.process_time()
    engine.run()
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    orders = engine.cache.orders_total_count()
    print(json.dumps({"wall_s": wall, "cpu_s": cpu, "bars": len(bars), "orders": orders}))


if __name__ == "__main__":
    main()
