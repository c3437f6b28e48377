"""Every figure of a run against hand arithmetic and against vectorbt, scipy and pandas, for days, minutes and weeks."""

import pickle
from collections.abc import Callable
from datetime import date
from functools import cache

import numpy as np
import pandas as pd
import pytest
import vectorbt  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from trader_lib.clock.sessions import TradingCalendar
from trader_lib.errors.taxonomy import Misused
from trader_lib.exchange.costs import Costs
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.research.backtest import BacktestResult, backtest
from trader_lib.research.figures import FIGURES
from trader_lib.research.ratios import sessions_of
from trader_lib.research.statistics import FILL_COLUMNS, RETURN_FIGURES, statistics
from trader_lib.strategy.contract import Strategy
from trader_lib.strategy.sma_cross import SmaCross


class Weights(Strategy):
    """One weight for all symbols, or one for each of the first rows and the last of them from then on."""

    rows: tuple[float, ...] = (1.0,)

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars: Bars) -> np.ndarray:
        wanted = np.full(bars.n, self.rows[-1])
        wanted[: len(self.rows)] = self.rows[: bars.n]
        return np.repeat(wanted[:, None] / len(bars.symbols), len(bars.symbols), axis=1)


def frame(days: pd.DatetimeIndex, prices: np.ndarray) -> pd.DataFrame:
    columns = dict.fromkeys(("open", "high", "low", "close"), prices)
    return pd.DataFrame({"symbol": "A", "timestamp": days, **columns, "volume": 1e12})


def sessions(first: str, last: str) -> pd.DatetimeIndex:
    found = TradingCalendar().sessions(date.fromisoformat(first), date.fromisoformat(last))
    return pd.DatetimeIndex([one.date for one in found])


def week_ends(first: str, last: str) -> pd.DatetimeIndex:
    """The last session of each week, as weekly tables have them."""
    days = sessions(first, last)
    return days[np.append(days.isocalendar().week.to_numpy()[1:] != days.isocalendar().week.to_numpy()[:-1], True)]


def flat_bars(prices: list[float], first: str = "2024-01-02") -> Bars:
    days = sessions(first, "2024-12-31")[: len(prices)]
    return Bars.from_frame(frame(days, np.array(prices)))


def run(strategy: Strategy, bars: Bars, cash: float = 10_000) -> BacktestResult:
    return backtest(strategy, bars, cash=cash, costs=Costs.none())


def daily() -> BacktestResult:
    bars = sample_bars(["AAPL", "IBM", "MSFT"], start="2003-01-03", end="2012-12-31")
    return backtest(SmaCross(fast=10, slow=50), bars, costs=Costs(commission_bps=5, slippage_bps=2))


def minutes() -> BacktestResult:
    bars = synthetic_bars("AAA", "2024-01-02", "2024-03-28", "1Min", seed=3)
    return backtest(SmaCross(fast=50, slow=400), bars, costs=Costs(commission_bps=1))


def weekly() -> BacktestResult:
    """The week-ends of six years, each a row of a daily table."""
    ends = week_ends("2006-01-03", "2011-12-30")
    close = 100.0 * np.exp(np.cumsum(np.random.default_rng(5).normal(0.003, 0.03, len(ends))))
    return backtest(SmaCross(fast=2, slow=6), Bars.from_frame(frame(ends, close.round(2))), costs=Costs(slippage_bps=5))


KINDS: dict[str, Callable[[], BacktestResult]] = {
    "daily": cache(daily),
    "minutes": cache(minutes),
    "weekly": cache(weekly),
}
of_each_kind = pytest.mark.parametrize("kind", KINDS)


def session_returns(result: BacktestResult) -> "pd.Series[float]":
    """By pandas, apart from the library: the last equity of each New York day, and its change."""
    dates = pd.DatetimeIndex(result.equity.index).tz_convert("America/New_York").date
    closes = result.equity.groupby(dates).last()
    return closes.pct_change().fillna(closes.iloc[0] / result.starting_cash - 1.0)


def years(result: BacktestResult) -> float:
    first_last = [
        when.tz_convert("America/New_York").date() for when in (result.equity.index[0], result.equity.index[-1])
    ]
    return len(TradingCalendar().sessions(*first_last)) / 252


@of_each_kind
def test_ratios_are_those_of_vectorbt_on_session_returns(kind: str) -> None:
    result = KINDS[kind]()
    returns, seen = session_returns(result), result.statistics
    per_year = len(returns) / years(result)
    indexed = returns.set_axis(pd.date_range("2000-01-01", periods=len(returns)))
    theirs = indexed.vbt.returns(freq="1D", year_freq=pd.Timedelta(days=per_year))
    for name, expected in {
        "total_return": theirs.total(),
        "annual_return": theirs.annualized(),
        "annual_volatility": theirs.annualized_volatility(),
        "sharpe_ratio": theirs.sharpe_ratio(),
        "sortino_ratio": theirs.sortino_ratio(),
        "omega_ratio": theirs.omega_ratio(),
        "tail_ratio": theirs.tail_ratio(),
        "value_at_risk": theirs.value_at_risk(),
        "expected_shortfall": theirs.cond_value_at_risk(),
    }.items():
        assert seen[name] == pytest.approx(expected, rel=1e-6), name


@of_each_kind
def test_shape_and_extremes_are_those_of_scipy_and_pandas(kind: str) -> None:
    result = KINDS[kind]()
    returns, seen = session_returns(result), result.statistics
    months = (1.0 + returns).groupby([f"{day:%Y-%m}" for day in returns.index]).prod() - 1.0
    for name, expected in {
        "skew": scipy_stats.skew(returns, bias=False),
        "kurtosis": scipy_stats.kurtosis(returns, bias=False),
        "best_day": returns.max(),
        "worst_day": returns.min(),
        "best_month": months.max(),
        "worst_month": months.min(),
        "sessions": len(returns),
        "years": years(result),
    }.items():
        assert seen[name] == pytest.approx(expected, rel=1e-6), name


@of_each_kind
def test_drawdowns_are_those_of_vectorbt(kind: str) -> None:
    result = KINDS[kind]()
    before = result.equity.index[0] - pd.Timedelta(nanoseconds=1)
    curve = pd.concat([pd.Series([result.starting_cash], index=[before]), result.equity])
    theirs, times = curve.reset_index(drop=True).vbt.drawdowns, curve.index
    table = theirs.records
    days = (
        times[table["end_idx"]] - times[table["peak_idx"] if "peak_idx" in table else table["start_idx"]]
    ) / pd.Timedelta(days=1)
    deepest = table.loc[(table["valley_val"] / table["peak_val"]).idxmin()]
    recovery = (times[int(deepest["end_idx"])] - times[int(deepest["valley_idx"])]) / pd.Timedelta(days=1)
    seen = result.statistics
    assert seen["max_drawdown"] == pytest.approx(theirs.max_drawdown(), rel=1e-6)
    assert seen["max_drawdown"] == pytest.approx(result.drawdown.min(), rel=1e-6)
    assert seen["longest_drawdown_days"] == pytest.approx(days.max(), abs=1e-6)
    if deepest["status"] == 1:
        assert seen["recovery_days"] == pytest.approx(recovery, abs=1e-6)
    else:
        assert seen["recovery_days"] is None and "not been made good" in result.statistics.reasons["recovery_days"]
    assert seen["calmar_ratio"] == pytest.approx(seen["annual_return"] / -theirs.max_drawdown(), rel=1e-6)


@of_each_kind
def test_trades_are_vectorbts_positions(kind: str) -> None:
    result = KINDS[kind]()
    seen, closed = result.statistics, result.portfolio.positions.closed
    profits = closed.pnl.values
    assert seen["trades"] == closed.count() > 10
    assert seen["open_trades"] == result.portfolio.positions.open.count()
    for name, expected in {
        "win_rate": closed.win_rate(),
        "profit_factor": closed.profit_factor(),
        "expectancy": closed.expectancy(),
        "system_quality_number": closed.sqn(),
        "average_win": profits[profits > 0].mean(),
        "average_loss": profits[profits < 0].mean(),
    }.items():
        assert seen[name] == pytest.approx(expected, rel=1e-4), name


@of_each_kind
def test_alpha_and_beta_are_those_of_a_regression_on_buy_and_hold(kind: str) -> None:
    result = KINDS[kind]()
    closes = result.bars.frame("close").iloc[result.start :]
    held = (closes / closes.iloc[0]).mean(axis=1)
    dates = pd.DatetimeIndex(held.index).tz_convert("America/New_York").date
    market = held.groupby(dates).last().pct_change().to_numpy()[1:]
    ours = session_returns(result).to_numpy()[1:]
    line = scipy_stats.linregress(market, ours)
    seen = result.statistics
    assert seen["buy_and_hold_return"] == pytest.approx(held.iloc[-1] - 1.0, rel=1e-6)
    assert seen["beta"] == pytest.approx(line.slope, rel=1e-6)
    assert seen["correlation"] == pytest.approx(line.rvalue, rel=1e-6)
    assert seen["alpha"] == pytest.approx(line.intercept * seen["sessions"] / seen["years"], rel=1e-6)


@of_each_kind
def test_the_portfolio_is_annualised_as_the_statistics_are(kind: str) -> None:
    result = KINDS[kind]()
    seen, portfolio = result.statistics, result.portfolio
    for name, expected in {
        "sharpe_ratio": portfolio.sharpe_ratio(),
        "sortino_ratio": portfolio.sortino_ratio(),
        "annual_return": portfolio.annualized_return(),
        "annual_volatility": portfolio.annualized_volatility(),
        "omega_ratio": portfolio.omega_ratio(),
        "value_at_risk": portfolio.value_at_risk(),
    }.items():
        assert seen[name] == pytest.approx(expected, rel=1e-5), name
    assert portfolio.stats(silence_warnings=True)["Sharpe Ratio"] == pytest.approx(seen["sharpe_ratio"], rel=1e-5)
    assert portfolio.wrapper.freq == {"minutes": pd.Timedelta(minutes=1)}.get(kind, pd.Timedelta(days=1))
    assert len(portfolio.returns()) == len(result.equity)


def test_weekly_rows_that_double_in_two_years_grow_by_41_percent_a_year() -> None:
    ends = week_ends("2021-01-04", "2023-02-10")
    prices = 100.0 * 2.0 ** (np.asarray((ends - ends[0]).days) / 730.5)
    seen = run(Weights(), Bars.from_frame(frame(ends, prices)), cash=1_000_000).statistics
    assert seen["annual_return"] == pytest.approx(2**0.5 - 1, abs=0.005)
    assert seen["years"] == pytest.approx(2.09, abs=0.02)


def test_a_hole_of_two_years_is_two_years() -> None:
    """Bought at 100 in January 2010; 144 in January 2012 are 20 % a year, however few bars there are between."""
    early, late = sessions("2010-01-04", "2010-01-08"), sessions("2012-01-03", "2012-01-06")
    prices = np.array([100.0] * len(early) + [144.0] * len(late))
    stamps = (early.append(late)).tz_localize("America/New_York").tz_convert("UTC").as_unit("ns").asi8
    found = sessions_of(stamps, prices, 100.0)
    assert found.years == pytest.approx(2.01, abs=0.01)
    assert len(found.returns) == 9 and found.returns_a_year == pytest.approx(9 / found.years)
    assert 1.44 ** (1 / found.years) - 1 == pytest.approx(0.2, abs=0.002)


def test_one_losing_position_with_everything_in_between_is_one_trade() -> None:
    """Half of equity in a stock that rises from 10 to 20 and falls to 8, adjusted every day."""
    prices = [*np.linspace(10.0, 20.0, 20), *[8.0] * 4]
    result = run(Weights(rows=(*[0.5] * 21, 0.0)), flat_bars(prices))
    assert len(result.fills_frame) > 10
    assert (result.statistics["trades"], result.statistics["win_rate"], result.statistics["profit_factor"]) == (
        1,
        0.0,
        0.0,
    )
    assert result.statistics["average_win"] is None
    assert result.statistics.reasons["average_win"] == "No trade won."


def test_figures_of_three_trades_worked_out_by_hand() -> None:
    """100 shares each, bought and sold at 100→103, 103→101 and 101→107: +300, -200 and +600 USD."""
    prices = [100.0, 100.0, 103.0, 103.0, 101.0, 101.0, 107.0, 107.0]
    weights = (1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0)
    seen = run(Weights(rows=weights), flat_bars(prices)).statistics
    assert (seen["trades"], seen["open_trades"], seen["win_rate"]) == (3, 0, pytest.approx(2 / 3))
    assert (seen["average_win"], seen["average_loss"], seen["profit_factor"]) == (450.0, -200.0, 4.5)
    assert seen["expectancy"] == pytest.approx(700 / 3)
    assert seen["system_quality_number"] == pytest.approx(700 / 3 / np.std([300, -200, 600], ddof=1) * 3**0.5)
    assert seen["total_return"] == pytest.approx(0.07) and seen["buy_and_hold_return"] == pytest.approx(0.07)


@pytest.mark.parametrize("days", [3, 4, 5])
def test_a_ruined_account_has_a_reason_instead_of_ratios(days: int) -> None:
    """Short for all of 10,000 USD at 100; at 350 it owes 15,000."""
    result = run(Weights(rows=(-1.0,)), flat_bars([100.0] * 3 + [350.0] * days))
    seen = result.statistics
    assert seen["total_return"] <= -1.0 and seen["trades"] is not None
    assert {name for name in RETURN_FIGURES if seen[name] is not None} == set()
    assert "ruined on 2024-01-05" in seen.reasons["annual_return"]


def test_a_benchmark_of_ones_own_takes_the_place_of_buy_and_hold() -> None:
    result = KINDS["daily"]()
    closes = sample_bars("IBM", start="2003-01-03", end="2012-12-31").frame("close")["IBM"]
    ours, market = session_returns(result), closes.reindex(result.equity.index).pct_change()
    line = scipy_stats.linregress(market.to_numpy()[1:], ours.to_numpy()[1:])
    seen = result.statistics_against(closes)
    assert seen["beta"] == pytest.approx(line.slope, rel=1e-6) and seen["beta"] != result.statistics["beta"]
    assert seen["sharpe_ratio"] == result.statistics["sharpe_ratio"]
    with pytest.raises(Misused, match="no time zone"):
        result.statistics_against(closes.tz_localize(None))
    with pytest.raises(Misused, match="no price from 2003"):
        result.statistics_against(closes.set_axis(closes.index + pd.Timedelta(days=9999)))


def test_every_figure_is_there_or_has_its_reason() -> None:
    for bars in (flat_bars([100.0]), flat_bars([100.0, 100.0]), flat_bars([100.0, 101.0, 99.0, 98.0, 105.0])):
        seen = run(Weights(), bars).statistics
        carried = {"interest", "borrow_fees", "dividends"}  # left out where nothing was charged or paid
        assert list(seen) == [name for name in FIGURES if name not in carried]
        assert {name for name, value in seen.items() if value is None} == seen.reasons.keys()
        assert all(reason.endswith(".") for reason in seen.reasons.values())
        again = pickle.loads(pickle.dumps(seen))  # as between the processes of a sweep
        assert again == seen and again.reasons == seen.reasons


def test_the_report_shows_figures_in_groups_and_says_why_some_are_missing(tmp_path) -> None:  # type: ignore[no-untyped-def]
    page = run(Weights(), flat_bars([100.0, 101.0, 99.0])).report(tmp_path / "report.html").read_text(encoding="utf-8")
    for figure in FIGURES.values():
        assert f"<h4>{figure.group}</h4>" in page
    assert "It takes 20 sessions or more, and there are 3." in page and FIGURES["fees"].meaning in page


DAYS = sessions("2024-01-02", "2024-12-31").tz_localize("America/New_York").tz_convert("UTC")
NOTHING = pd.DataFrame({name: pd.Series(dtype=object if name in ("bar", "symbol") else float) for name in FILL_COLUMNS})


@given(
    st.lists(st.floats(-1e9, 1e12, allow_nan=False), min_size=1, max_size=60),
    st.lists(st.floats(1e-4, 1e6), min_size=60, max_size=60),
)
def test_whatever_equity_does_each_figure_is_finite_or_has_a_reason(equity: list[float], prices: list[float]) -> None:
    curve = pd.Series(np.round(equity, 2), index=DAYS[: len(equity)])
    close = np.array(prices[: len(equity)])[:, None]
    seen = statistics(10_000.0, curve, curve * 0.0, NOTHING, close=close)
    assert all(type(value) in (int, float) and np.isfinite(value) for value in seen.values() if value is not None)
    assert {name for name, value in seen.items() if value is None} == seen.reasons.keys()
    assert (seen["annual_return"] is None) >= bool((curve <= 0.0).any())


@given(st.lists(st.floats(0.5, 2.0), min_size=25, max_size=60), st.sampled_from([1e-2, 10.0, 1e6]))
def test_ratios_do_not_depend_on_the_size_of_the_account(growth: list[float], scale: float) -> None:
    curve = pd.Series(10_000.0 * np.cumprod(growth), index=DAYS[: len(growth)])
    close = curve.to_numpy()[:, None]
    ours, theirs = (statistics(10_000.0 * k, curve * k, curve * 0.0, NOTHING, close=close) for k in (1.0, scale))
    for name in RETURN_FIGURES:
        if ours[name] is not None:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-6, abs=1e-9), name
