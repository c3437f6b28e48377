"""Interest, borrow fees, dividends and settlement: values worked out by hand, against the compiled engine."""

import math
from datetime import date
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.given import Given
from trader_lib.clock.sessions import TradingCalendar
from trader_lib.errors.taxonomy import Misused
from trader_lib.exchange.costs import Costs
from trader_lib.market.actions import Announced
from trader_lib.market.bars import Bars, Provenance, Timeframe
from trader_lib.market.sample import sample_bars
from trader_lib.research.backtest import BacktestResult, backtest
from trader_lib.research.sweep import sweep
from trader_lib.research.tear_sheet import cost_breakdown
from trader_lib.risk.limits import Limits
from trader_lib.rules.sizing import SizingRules
from trader_lib.strategy.sma_cross import SmaCross

FREE = Costs.none()
WIDE = Limits(max_gross_exposure=None, max_margin_used=None)
SMALLEST = SizingRules(min_trade=0.0)


def daily(closes: list[list[float]], first: str = "2024-01-02", gaps: Any = None, **origin: Any) -> Bars:
    """Daily bars, a column a symbol; they open at the close before, or at `gaps` by row."""
    close = np.array(closes, dtype=np.float64)
    opens = np.vstack([close[:1], close[:-1]])
    opens = np.where(np.isnan(opens), close, opens)
    for row, price in (gaps or {}).items():
        opens[row] = price
    high, low, volume = np.maximum(close, opens), np.minimum(close, opens), np.where(np.isnan(close), math.nan, 1e9)
    opens = np.where(np.isnan(close), math.nan, opens)
    stamps = TradingCalendar().bar_stamps(date.fromisoformat(first), date(2025, 12, 31), "1Day")[: len(close)]
    made = Provenance("drawn", "none", Timeframe("1Day"), **({"adjustment": "all", "synthetic": True} | origin))
    names = tuple("ABCD"[: close.shape[1]])
    return Bars(opens, high, low, close, volume, pd.DatetimeIndex(stamps, tz="UTC"), names, made)


def run(bars: Bars, weights: list[tuple[float, ...]], costs: Costs = FREE, **more: Any) -> BacktestResult:
    terms = {"limits": WIDE, "sizing": SMALLEST, "check": False, "trials": False} | more
    return backtest(Given(weights=tuple(weights)), bars, costs=costs, **terms)


def cents(amount: Decimal) -> Decimal:
    return amount.quantize(Decimal("0.01"), ROUND_HALF_UP)


def nights_of(bars: Bars) -> list[int]:
    """Days from each session to the next, from the calendar alone."""
    days = [one.date for one in TradingCalendar().sessions(bars.day(0), date(2026, 3, 1))]
    return [(days[row + 1] - days[row]).days for row in range(bars.n)]


def test_a_year_on_margin_costs_interest_on_every_day_of_it() -> None:
    """Bought once on credit: each session charges the settled debit, interest of before included, for its nights."""
    bars = daily([[100.0]] * 252)
    result = run(bars, [(1.5,), (math.nan,)], Costs(margin_rate=0.06, volume_share=0), sizing=SizingRules(leverage=2.0))
    debt, expected = Decimal(50_000), []
    for nights in nights_of(bars)[2:]:  # filled in the second session, settled in the third
        expected.append(cents(debt * Decimal("0.06") * nights / 360))
        debt += expected[-1]
    assert result.simulation.interest == float(sum(expected))
    assert float(result.cash.iloc[-1]) == -float(debt) and sum(nights_of(bars)[2:]) == pytest.approx(365, abs=5)
    assert result.statistics["interest"] == result.simulation.interest and "borrow_fees" not in result.statistics


def test_weekends_and_holidays_count() -> None:
    bars = daily([[100.0]] * 10, first="2024-01-10")
    assert bars.day(2) == date(2024, 1, 12)  # a Friday before Martin Luther King's day
    cash = run(
        bars, [(2.0,), (math.nan,)], Costs(margin_rate=0.36, volume_share=0), sizing=SizingRules(leverage=2.0)
    ).cash
    assert [-round(float(one), 2) for one in cash.diff().iloc[2:5]] == [400.0, 100.4, 100.5]  # 4 nights, then one each


def test_a_short_position_pays_by_its_value_at_each_close() -> None:
    closes = [100.0, 100.0, 110.0, 120.0, 90.0, 90.0, 90.0]
    bars = daily([[one] for one in closes], first="2024-01-02")  # a Tuesday
    result = run(bars, [(-0.5,), *[(math.nan,)] * 3, (0.0,)], Costs(borrow_rate=0.36, volume_share=0))
    nights = nights_of(bars)
    fees = [
        round(500 * closes[row] * 0.36 * nights[row] / 360, 2) for row in (1, 2, 3, 4)
    ]  # bought back at row 5's open
    assert result.simulation.borrow_fees == sum(fees) and nights[3] == 3
    assert float(result.equity.iloc[-1]) == 100_000 + 500 * (100 - 90) - sum(fees)


def test_costs_without_rates_change_nothing_and_say_nothing() -> None:
    bars = daily([[100.0], [101.0], [99.0], [103.0], [98.0]])
    weights = [(1.4,), (-0.8,), (-0.8,), (0.0,)]
    plain, stated = run(bars, weights), run(bars, weights, FREE.model_copy(update={"margin_rate": 0.0}))
    assert plain.order_list_hash == stated.order_list_hash and plain.equity.equals(stated.equity)
    assert plain.carried == {"interest": 0.0, "borrow_fees": 0.0, "dividends": 0.0}
    assert not {"interest", "borrow_fees", "dividends"} & set(plain.statistics)
    assert not {"margin_rate", "borrow_rate", "settlement_days"} & set(Costs().model_dump())
    assert not len(plain.taken.nights)


@pytest.mark.parametrize("wrong", [{"margin_rate": -0.1}, {"borrow_rate": 11}, {"settlement_days": 2}])
def test_impossible_rates_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(Misused, match=next(iter(wrong))):
        run(daily([[100.0]] * 3), [(1.0,)], wrong)  # type: ignore[arg-type]


def test_costs_are_broken_down_by_what_they_were_paid_for() -> None:
    bars = daily([[100.0, 50.0]] * 40)
    costs = Costs(margin_rate=0.08, borrow_rate=0.03, commission_bps=1.0, volume_share=0)
    result = run(bars, [(1.5, -0.2), (math.nan, math.nan)], costs, sizing=SizingRules(leverage=2.0))
    parts, lost = cost_breakdown(result), 100_000 - float(result.equity.iloc[-1])
    assert parts["interest_usd"] > 0 and parts["borrow_fees_usd"] > 0
    assert parts["commission_usd"] + parts["interest_usd"] + parts["borrow_fees_usd"] == pytest.approx(lost, abs=0.01)
    assert "interest_usd" not in cost_breakdown(run(bars, [(1.0, 0.0)]))


def test_a_sweep_is_charged_what_single_backtests_are() -> None:
    """Buys that cost more than the close they were sized at leave a small debt."""
    bars, costs = sample_bars("AAPL,IBM", "2005-01-03", "2006-06-30"), Costs(margin_rate=1.0, slippage_bps=50)
    swept = sweep(SmaCross, {"fast": [5, 10], "slow": [20, 40]}, bars, costs=costs, trials=False)
    ends = swept["total_return"].to_numpy().ravel().tolist()
    singles = [
        backtest(SmaCross(fast=fast, slow=slow), bars, costs=costs, check=False, trials=False)
        for fast in (5, 10)
        for slow in (20, 40)
    ]
    assert ends == pytest.approx([one.statistics["total_return"] for one in singles], abs=1e-9)
    assert all(one.simulation.interest > 0.0 for one in singles)


# ---- dividends and splits


def adjusted_and_raw(dividend: float, ratio: float) -> tuple[Bars, Bars]:
    """The same sixty days adjusted for everything, and as they were traded: a dividend on day 20, a split on day 40."""
    rng = np.random.default_rng(7)
    path = np.round(200 * np.exp(np.cumsum(rng.normal(0, 0.01, 60))), 2)
    raw = path.copy()
    raw[40:] = path[40:] / ratio
    raw[20:] -= dividend * np.where(np.arange(60)[20:] < 40, 1.0, 1.0 / ratio)
    opens = np.append(raw[0], raw[:-1])
    opens[20], opens[40] = raw[19] - dividend, raw[39] / ratio
    factor = np.where(np.arange(60) < 40, 1.0 / ratio, 1.0)
    factor[:20] *= 1 - dividend / raw[19]

    def bars(open_: Any, close: Any, adjustment: str) -> Bars:
        columns = [one[:, None] for one in (open_, np.maximum(open_, close), np.minimum(open_, close), close)]
        stamps = TradingCalendar().bar_stamps(date(2024, 1, 2), date(2024, 6, 28), "1Day")[:60]
        origin = Provenance("drawn", "none", Timeframe("1Day"), adjustment, synthetic=True)
        return Bars(*columns, np.full((60, 1), 1e9), pd.DatetimeIndex(stamps, tz="UTC"), ("A",), origin)

    traded = bars(opens, raw, "raw")
    known = [Announced("A", traded.day(20), dividend=dividend), Announced("A", traded.day(40), ratio)]
    return bars(opens * factor, raw * factor, "all"), traded.with_actions(known)


@pytest.mark.parametrize(("dividend", "ratio"), [(1.5, 2.0), (4.0, 1.5), (0.24, 0.25)])
def test_raw_and_adjusted_prices_give_the_same_profit(dividend: float, ratio: float) -> None:
    """Wholly invested, so that a dividend buys more at the next open, as adjusted prices assume."""
    adjusted, raw = adjusted_and_raw(dividend, ratio)
    fractions = SizingRules(fractional=True, min_trade=0.0)
    results = [run(bars, [(1.0,)], sizing=fractions, cash=1_000_000) for bars in (adjusted, raw)]
    ends = [float(result.equity.iloc[-1]) for result in results]
    assert ends[0] == pytest.approx(ends[1], rel=2e-5)
    whole = [float(run(bars, [(1.0,)], cash=1_000_000).equity.iloc[-1]) for bars in (adjusted, raw)]
    assert whole[0] == pytest.approx(whole[1], abs=1_000)  # a few shares
    assert results[1].simulation.dividends > 0.0 == results[0].simulation.dividends
    assert results[1].statistics["dividends"] == results[1].simulation.dividends
    held = [result.statistics["buy_and_hold_return"] for result in results]
    assert held[0] == pytest.approx(held[1], rel=1e-9)


def test_a_dividend_is_paid_to_who_holds_at_the_close_before_it() -> None:
    closes = [[100.0], [100.0], [100.0], [98.0], [98.0]]
    bars = daily(closes, adjustment="raw").with_actions([Announced("A", date(2024, 1, 5), dividend=2.0)])  # row 3
    long = run(bars, [(0.5,), (math.nan,)])
    assert long.simulation.dividends == 1_000.0 and float(long.equity.iloc[-1]) == 100_000.0
    assert long.equity.to_numpy().tolist() == [100_000.0] * 5  # the close before is without the dividend
    short = run(bars, [(-0.5,), (math.nan,)])
    assert short.simulation.dividends == -1_000.0 and float(short.equity.iloc[-1]) == 100_000.0
    late = run(bars, [(0.0,)] * 2 + [(0.5,)])  # bought on the ex-date
    assert late.simulation.dividends == 0.0
    assert long.corporate_actions == ()


def test_a_dividend_and_a_split_of_one_day_pay_on_the_shares_after_the_split() -> None:
    bars = daily([[100.0], [100.0], [48.0], [48.0]], gaps={2: 48.0}, adjustment="raw")
    known = [Announced("A", date(2024, 1, 4), 2.0), Announced("A", date(2024, 1, 4), dividend=2.0)]
    result = run(bars.with_actions(known), [(0.5,), (math.nan,)])
    assert result.simulation.dividends == 2_000.0 and result.positions.iloc[-1, 0] == 1_000.0
    assert float(result.equity.iloc[-1]) == 100_000.0


def test_split_adjusted_prices_pay_the_dividend_of_a_share_of_the_bars() -> None:
    bars = daily([[50.0], [50.0], [49.0], [49.0]], adjustment="split")
    known = [Announced("A", date(2024, 1, 4), dividend=2.0), Announced("A", date(2024, 1, 5), 2.0)]  # 2 of 100 USD
    result = run(bars.with_actions(known), [(0.5,), (math.nan,)])
    assert result.simulation.dividends == 1_000.0 and float(result.equity.iloc[-1]) == 100_000.0


def test_a_split_before_a_symbols_first_bar_moves_nothing() -> None:
    closes = [[math.nan, 10.0], [math.nan, 10.0], [50.0, 10.0], [50.0, 10.0]]
    known = [Announced("A", date(2024, 1, 3), 1.5), Announced("A", date(2024, 1, 4), dividend=1.0)]
    result = run(daily(closes, adjustment="raw").with_actions(known), [(0.0, 0.5), (math.nan, math.nan)])
    assert result.equity.tolist() == [100_000.0] * 4 and result.positions["B"].iloc[-1] == 5_000.0


# ---- settlement


def half_hours(days: int) -> Bars:
    stamps = TradingCalendar().bar_stamps(date(2024, 1, 2), date(2024, 1, 12), "30Min")[: 13 * days]
    price = np.full((len(stamps), 2), 100.0)
    origin = Provenance("drawn", "none", Timeframe("30Min"), "all", synthetic=True)
    return Bars(*[price] * 4, price * 1e6, pd.DatetimeIndex(stamps, tz="UTC"), ("A", "B"), origin)


def test_proceeds_of_a_sale_buy_nothing_before_the_next_session() -> None:
    """All in A at the first open; from A to B at noon of the second day: the money is there on the third."""
    bars = half_hours(4)
    weights = [(1.0, 0.0)] * 18 + [(0.0, 1.0)]
    later = Costs(settlement_days=1, volume_share=0)
    at_once, waiting = (run(bars, weights, costs, multiplier=1) for costs in (FREE, later))
    held = [np.flatnonzero(result.positions["B"].to_numpy())[0] for result in (at_once, waiting)]
    assert held[0] == 20 and held[1] == 26  # the bar after the sale's, and the first of the third session
    assert not waiting.refused and (waiting.cash >= 0).all()
    margin = run(bars, weights, later, multiplier=2)
    assert margin.order_list_hash == run(bars, weights, FREE, multiplier=2).order_list_hash


def test_a_buy_is_cut_at_its_fill_to_the_money_that_has_settled() -> None:
    """20,000 of 100,000 are settled when 300 shares are ordered at 100, and what was sold for 80,000 does not count."""
    bars = half_hours(2)
    weights = [(0.8, 0.0)] * 15 + [(0.0, 0.0)] * 2 + [(0.0, 0.3)]
    result = run(bars, weights, Costs(settlement_days=1, volume_share=0), multiplier=1)
    bought = [order for order in result.orders if order.symbol == "B"]
    assert float(bought[0].filled_qty) == 200.0


# ---- an account below zero


@pytest.mark.parametrize(("gaps", "purpose"), [({}, "entry"), ({2: 35_000.0}, "liquidation")])
def test_a_short_position_that_ruins_is_closed_and_said_so(gaps: dict[int, float], purpose: str) -> None:
    """One share short, and a price of 3.5 times: bought back at the next open, by the account or by the broker."""
    bars = daily([[10_000.0], [10_000.0], [35_000.0], [35_000.0], [40_000.0], [20_000.0]], gaps=gaps)
    result = run(bars, [(-1.0,)], cash=10_000, limits=Limits())
    assert result.positions["A"].tolist()[-3:] == [0.0, 0.0, 0.0]
    assert result.equity.tolist()[2:] == [-15_000.0] * 4 and result.ruined_at == bars.at(2)
    assert [order.purpose for order in result.orders] == ["entry", purpose]
    figures = result.statistics
    assert figures["annual_return"] is None and "ruined on 2024-01-04" in figures.reasons["annual_return"]
    assert figures["total_return"] == -2.5 and any("-15,000.00 USD" in note for note in result.notes)


def test_a_debt_that_is_left_goes_on_costing_interest_and_opens_nothing() -> None:
    bars = daily([[10_000.0], [10_000.0], [35_000.0], [35_000.0], [40_000.0], [20_000.0], [20_000.0]])
    result = run(bars, [(-1.0,)], Costs(margin_rate=0.35, volume_share=0), cash=10_000, limits=Limits())
    nights = nights_of(bars)
    owed = Decimal(15_000)
    for row in (4, 5, 6):  # bought back in row 3
        owed += cents(owed * Decimal("0.35") * nights[row] / 360)
    assert float(result.equity.iloc[-1]) == -float(owed) and len(result.orders) == 2
