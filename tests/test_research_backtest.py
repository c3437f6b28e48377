"""Backtests on real session hours, and their twin in vectorbt."""

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

from trader_lib.clock.sessions import TradingCalendar
from trader_lib.errors.taxonomy import BadData, Misused
from trader_lib.exchange.costs import Costs
from trader_lib.market.bars import Bars, Provenance, Timeframe
from trader_lib.research.backtest import backtest
from trader_lib.risk.limits import Limits
from trader_lib.rules.sizing import SizingRules
from trader_lib.strategy.contract import Strategy
from trader_lib.strategy.exits import ProtectiveExits


class Flip(Strategy):
    """Long for `days` bars, out for as many, each symbol with the same weight; short where asked."""

    days: int = 3
    weight: float = 0.4
    protected: bool = False

    @property
    def warmup(self) -> int:
        return 1

    @property
    def exits(self) -> ProtectiveExits | None:
        return ProtectiveExits(stop_loss=0.004, take_profit=0.006) if self.protected else None

    def targets(self, bars: Bars) -> np.ndarray:
        on = (np.arange(bars.n) // self.days) % 2 == 0
        return np.where(on[:, None], self.weight, 0.0) * np.ones((1, len(bars.symbols)))


def hourly(volume: float) -> Bars:
    """The sessions around Thanksgiving 2025: Wednesday, half of Friday, Monday."""
    start, end = datetime(2025, 11, 26).date(), datetime(2025, 12, 1).date()
    stamps = TradingCalendar().bar_stamps(start, end, "1Hour")
    close = np.full((len(stamps), 1), 100.0)
    index = pd.DatetimeIndex(stamps, tz="UTC")
    origin = Provenance("example", "none", Timeframe("1Hour"), "raw", synthetic=True)
    return Bars(close, close, close, close, np.full_like(close, volume), index, ("AAA",), origin)


def test_day_order_dies_at_the_early_close_of_a_half_day() -> None:
    bars = hourly(volume=100.0)
    assert bars.n == 7 + 4 + 7
    result = backtest(Flip(days=99, weight=0.9), bars, costs=Costs(volume_share=0.5))
    expired = [order for order in result.orders if order.status.value == "expired"]
    lasts = [order.fills[-1].bar for order in expired]
    assert lasts == [
        datetime(2025, 11, 26, 20, 30, tzinfo=UTC),  # a full day's last bar starts at 15:30 in New York
        datetime(2025, 11, 28, 17, 30, tzinfo=UTC),  # the half day's at 12:30
        datetime(2025, 12, 1, 20, 30, tzinfo=UTC),
    ]
    # each of Friday's four bars gave its fifty shares to the one order decided at Wednesday's last close
    assert expired[1].decided_at == datetime(2025, 11, 26, 20, 30, tzinfo=UTC)
    assert [float(fill.qty) for fill in expired[1].fills] == [50.0] * 4


def wavy(rows: int = 400, seed: int = 5) -> Bars:
    rng = np.random.default_rng(seed)
    stamps = TradingCalendar().bar_stamps(datetime(2024, 1, 2).date(), datetime(2024, 1, 31).date(), "5Min")[:rows]
    close = np.round(100 * np.exp(np.cumsum(rng.normal(0, 0.003, (rows, 3)), axis=0)), 2)
    open_ = np.vstack([close[:1], close[:-1]])
    high, low = np.maximum(open_, close) + 0.2, np.minimum(open_, close) - 0.2
    origin = Provenance("example", "none", Timeframe("5Min"), "raw", synthetic=True)
    index = pd.DatetimeIndex(stamps, tz="UTC")
    volume = np.floor(rng.lognormal(8, 1, (rows, 3)))
    return Bars(open_, high, low, close, volume, index, ("AAA", "BBB", "CCC"), origin)


@pytest.mark.parametrize("weight", [0.3, 0.6, -0.3])
@pytest.mark.parametrize("protected", [False, True])
def test_vectorbt_holds_the_same_money_at_every_bar(weight: float, protected: bool) -> None:
    costs = Costs(commission_per_share=0.005, commission_minimum=1.0, slippage_bps=1.5)
    sizing = SizingRules(leverage=1.8)
    result = backtest(Flip(days=9, weight=weight, protected=protected), wavy(), costs=costs, sizing=sizing)
    assert len(result.simulation.fills) > 20
    assert np.abs(result.portfolio.value().to_numpy() - result.equity.to_numpy()).max() < 0.01
    assert np.abs(result.portfolio.cash().to_numpy() - result.cash.to_numpy()).max() < 0.01
    assert result.portfolio.wrapper.index.tz is None
    assert float(result.equity_end) == result.equity.iloc[-1] == result.statistics["equity_end"]


def test_several_fills_of_one_symbol_in_one_bar_reach_vectorbt_one_by_one() -> None:
    result = backtest(Flip(days=5, protected=True), wavy(), costs=Costs(volume_share=0.02))
    same_bar = result.fills_frame.groupby(["bar", "symbol"]).size()
    assert len(result.portfolio.orders.records) == len(result.fills_frame)
    assert np.abs(result.portfolio.value().to_numpy() - result.equity.to_numpy()).max() < 0.01
    assert same_bar.max() >= 1


def test_records_and_table_tell_the_same() -> None:
    result = backtest(Flip(days=7, protected=True), wavy(), limits=Limits(max_orders=3, throttle_window_s=600))
    frame = result.orders_frame
    for record, row in zip(result.orders, frame.itertuples(), strict=True):
        assert record.decided_at == row.decided_at and record.symbol == row.symbol
        assert (record.side.value, record.type.value, record.status.value) == (row.side, row.type, row.status)
        assert float(record.filled_qty) == row.filled_qty == float(sum(fill.qty for fill in record.fills))
    assert result.refused == len(result.refusals) and "THROTTLE" in result.refused_by
    assert all("window, but at most 3" in " ".join(refusal.reasons) for refusal in result.refusals[:3])
    assert result.refusals[0].checks == ("THROTTLE",)


def test_fractional_quantities_and_exits_do_not_go_together() -> None:
    with pytest.raises(Misused, match="fraction"):
        backtest(Flip(protected=True), wavy(), sizing=SizingRules(fractional=True))
    result = backtest(Flip(), wavy(), sizing=SizingRules(fractional=True))
    assert any(order.qty != order.qty.to_integral_value() for order in result.orders)
    assert "BacktestResult(Flip" in repr(result)


def test_dates_outside_the_data_are_refused() -> None:
    with pytest.raises(BadData, match="outside the data"):
        backtest(Flip(), wavy(), start="2030-01-02")
