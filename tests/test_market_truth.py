"""Inputs whose right answer is known by hand: holes, splits in raw prices, and symbols that trade once in a while."""

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from trader_lib import Bars, Costs, SmaCross, Strategy, backtest, sample_bars, synthetic_bars
from trader_lib.clock.sessions import TradingCalendar
from trader_lib.config.sections import DataSettings
from trader_lib.config.settings import load_settings
from trader_lib.errors.taxonomy import BadData
from trader_lib.market.history import FEED
from trader_lib.market.store import BarStore
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec, StrategyShare
from trader_lib.trading.order_list import compare_order_lists, order_list_hash

PRICES = ["open", "high", "low", "close"]


pytestmark = pytest.mark.usefixtures("quiet")


class Hold(Strategy):
    weight: float = 1.0

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars: Bars) -> NDArray[np.float64]:
        return np.full((bars.n, len(bars.symbols)), self.weight / len(bars.symbols))


def daily(count: int = 20, symbol: str = "A", start: date = date(2024, 1, 2), price: float = 100.0) -> pd.DataFrame:
    """Sessions of the NYSE in a row, all at one price."""
    sessions = TradingCalendar().sessions(start, date(start.year, 12, 31))[:count]
    figures = dict.fromkeys(PRICES, price)
    days = [session.date for session in sessions]
    return pd.DataFrame({"symbol": symbol, "timestamp": days, **figures, "volume": 1e6})


# --- holes


def test_seven_sessions_that_are_missing_are_refused_alone_as_beside_another() -> None:
    """Of the first twenty sessions of 2024 the sixth to the twelfth: 9 to 18 January, the 15th is a holiday."""
    torn = daily().drop(index=range(5, 12))
    said = []
    for table in (torn, pd.concat([torn, daily(symbol="B")])):
        with pytest.raises(
            BadData, match=r"A at 2024-01-09 .* between 2024-01-08 and 2024-01-19, 7 sessions"
        ) as refused:
            Bars.from_frame(table)
        said.append(str(refused.value))
    assert said[0] == said[1] and "gaps=7" in said[0]


def test_a_missing_session_is_refused_and_a_holiday_is_not() -> None:
    assert Bars.from_frame(daily()).n == 20  # over the 15th of January, Martin Luther King's day
    with pytest.raises(BadData, match="1 session of XNYS"):
        Bars.from_frame(daily().drop(index=9))


def test_a_month_of_2008_is_missed_and_does_not_turn_into_a_better_year() -> None:
    year = sample_bars("AAPL", start="2008-01-02", end="2008-12-31").to_frame()
    october = year["timestamp"].dt.tz_convert("America/New_York").dt.month == 10
    with pytest.raises(BadData, match="between 2008-09-30 and 2008-11-03, 23 sessions"):
        Bars.from_frame(year[~october])


def test_gaps_say_how_many_sessions_may_be_carried() -> None:
    """Seven sessions at the last close, 100, without volume."""
    torn = daily().drop(index=range(5, 12))
    for gaps in ("carry", 7, 20):
        bars = Bars.from_frame(torn, gaps=gaps)
        assert bars.n == 20 and bars.volume[5:12].max() == 0.0 and (bars.close == 100.0).all()
    with pytest.raises(BadData, match="7 sessions"):
        Bars.from_frame(torn, gaps=6)


def test_weekly_bars_are_one_a_week_and_a_lost_quarter_is_a_hole() -> None:
    """Fridays of two years; Good Friday and the eves of two Christmases have none, so that steps of two weeks occur."""
    sessions = {session.date for session in TradingCalendar().sessions(date(2021, 1, 1), date(2023, 3, 1))}
    fridays = [day.date() for day in pd.date_range("2021-01-08", periods=110, freq="7D") if day.date() in sessions]
    figures = dict.fromkeys(PRICES, 100.0)
    table = pd.DataFrame({"timestamp": fridays, **figures, "volume": 1e6})
    assert Bars.from_frame(table, symbols="A").n == len(fridays) < 110
    with pytest.raises(BadData, match="one bar a week"):
        Bars.from_frame(table.drop(index=range(50, 63)), symbols="A")


def test_without_a_known_calendar_only_a_long_silence_is_a_hole() -> None:
    """Bars of Sundays follow no exchange that was named; a named one is held to its sessions."""
    days = pd.date_range("2024-01-01", periods=60, freq="D")
    figures = dict.fromkeys(PRICES, 100.0)
    table = pd.DataFrame({"symbol": "BTC", "timestamp": days, **figures, "volume": 1e6})
    assert Bars.from_frame(table.drop(index=range(20, 25))).n == 55
    with pytest.raises(BadData, match="15 days"):
        Bars.from_frame(table.drop(index=range(20, 35)))
    with pytest.raises(BadData, match="5 sessions of 24/7"):
        Bars.from_frame(table.drop(index=range(20, 25)), calendar="24/7")
    assert Bars.from_frame(table.drop(index=range(20, 25)), calendar="24/7", gaps=5).n == 60
    with pytest.raises(BadData, match="calendar='24/7'"):
        Bars.from_frame(table, gaps="carry")


# --- splits


def apple(adjustment: Any) -> Bars:
    """Across the split of 2:1 on 28 February 2005: 88.99 the evening before, 44.68 in the morning."""
    bars = sample_bars("AAPL", start="2005-02-01", end="2005-03-31", adjustment=adjustment)
    return Bars.from_frame(bars.to_frame(), adjustment=adjustment)  # prices alone: the sample knows of its split


def test_raw_bars_across_a_split_are_refused_and_adjusted_ones_earn_what_was_earned() -> None:
    with pytest.raises(BadData, match=r"AAPL at 2005-02-28 .*88\.99 to 44\.68 overnight, like a split of 2:1") as said:
        backtest(Hold(), apple("raw"))
    assert "adjustment='all' or 'split'" in str(said.value)
    result = backtest(Hold(), apple("all"), cash=10_000, costs=Costs.none())
    assert result.statistics["total_return"] == pytest.approx(0.0702, abs=0.001)
    assert backtest(Hold(), apple("raw"), end="2005-02-25").orders  # before the night it is all one price


async def test_a_session_refuses_what_a_backtest_refuses(tmp_path: Path) -> None:
    spec = SessionSpec(strategy="sma_cross", params={"fast": 2, "slow": 5}, symbols=("AAPL",), adjustment="raw")
    dates = {"start": date(2005, 2, 1), "end": date(2005, 3, 31)}
    with pytest.raises(BadData, match="like a split of 2:1"):
        await run_session(
            spec.model_copy(update=dates),
            load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}}),
            bars=apple("raw"),
            journal_path=tmp_path / "journal.sqlite",
        )


@pytest.mark.parametrize(
    ("before", "after", "ratio"),
    [
        (100.0, 50.0, "2:1"),
        (90.0, 61.0, "3:2"),
        (90.0, 30.0, "3:1"),
        (80.0, 20.0, "4:1"),
        (200.0, 20.0, "10:1"),
        (1.0, 10.1, "1:10"),
        (3.0, 6.0, "1:2"),
        (0.5, 12.5, "1:25"),
    ],
)
def test_usual_ratios_are_recognised(before: float, after: float, ratio: str) -> None:
    table = daily(10)
    table.loc[:4, PRICES], table.loc[5:, PRICES] = before, after
    with pytest.raises(BadData, match=f"like a split of {ratio}, "):
        backtest(Hold(), Bars.from_frame(table))
    assert backtest(
        Hold(), Bars.from_frame(table, adjustment="split"), cash=10_000
    ).orders  # the owner says it was none


@pytest.mark.parametrize("after", [70.0, 60.0, 40.0, 350.0, 140.0])
def test_falls_and_rises_that_are_no_ratio_are_traded(after: float) -> None:
    table = daily(10)
    table.loc[5:, PRICES] = after
    assert backtest(Hold(), Bars.from_frame(table), cash=10_000).orders


def test_a_split_is_seen_between_the_minutes_of_two_days() -> None:
    table = synthetic_bars("AAA", "2024-03-04", "2024-03-06", "30Min", seed=1).to_frame()
    later = table["timestamp"] >= pd.Timestamp("2024-03-06", tz="America/New_York")
    table.loc[later, PRICES] /= 4
    with pytest.raises(BadData, match=r"AAA at 2024-03-06 .* like a split of 4:1"):
        backtest(SmaCross(fast=2, slow=5), Bars.from_frame(table, timeframe="30Min"))


# --- symbols that trade once in a while


SPAN = ("2024-02-26", "2024-04-12")  # 34 sessions of 26 quarters of an hour; no half day


@pytest.fixture(scope="module")
def tape() -> pd.DataFrame:
    """AAA trades in a little over half of the quarters of an hour, BBB in all of them."""
    whole = synthetic_bars("AAA,BBB", *SPAN, timeframe="15Min", seed=11).to_frame()
    traded = np.random.default_rng(4).random(len(whole)) < 0.57
    stamps = whole["timestamp"]
    thin = traded | (stamps == stamps.min()) | (stamps == stamps.max())
    return whole[thin | (whole["symbol"] == "BBB").to_numpy()]


def test_a_thin_symbol_has_the_same_rows_alone_and_in_company(tape: pd.DataFrame, tmp_path: Path) -> None:
    """34 × 26 = 884 rows, from the store as from a frame, whoever else is loaded."""
    alone = Bars.from_frame(tape[tape["symbol"] == "AAA"], timeframe="15Min", gaps="carry")
    company = Bars.from_frame(tape, timeframe="15Min", gaps="carry")
    assert alone.n == company.n == 884 and np.isfinite(company.close).all()
    assert alone.content_hash == company.sel(["AAA"]).content_hash
    assert 300 < (alone.volume == 0).sum() < 450

    store = BarStore(tmp_path)
    store.write(Bars.from_frame(tape[tape["symbol"] == "AAA"], timeframe="15Min"))  # as traded, nothing made up
    store.write(company.sel(["BBB"]))
    assert store.read("AAA", "15Min").content_hash == alone.content_hash
    assert store.read("AAA,BBB", "15Min").content_hash == company.content_hash


async def test_two_strategies_of_a_session_order_what_each_orders_alone(tape: pd.DataFrame, tmp_path: Path) -> None:
    bars = Bars.from_frame(tape, timeframe="15Min", gaps="carry", adjustment="all")
    shares = tuple(
        StrategyShare(
            name=symbol.lower(), strategy="sma_cross", params={"fast": 3, "slow": 9}, symbols=(symbol,), capital="40000"
        )
        for symbol in bars.symbols
    )
    spec = SessionSpec(
        strategies=shares,
        symbols=bars.symbols,
        timeframe="15Min",
        start=date(2024, 3, 1),
        end=date(2024, 4, 12),
        costs=Costs(volume_share=0.1),
    )
    settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})
    result = await run_session(spec, settings, bars=bars, journal_path=tmp_path / "journal.sqlite")
    for one in spec.assignments():
        table = tape[tape["symbol"] == one.symbols[0]]
        tested = backtest(
            one.strategy,
            Bars.from_frame(table, timeframe="15Min", gaps="carry", adjustment="all"),
            start=spec.start,
            end=spec.end,
            cash=float(one.capital or 0),
            costs=spec.costs,
            limits=one.limits,
            multiplier=spec.multiplier,
            sizing=one.sizing,
        )
        orders = result.orders_of(one.label)
        found = compare_order_lists(tested.orders, orders)
        assert found.equal, (one.label, found.summary())
        assert len(orders) > 20 and tested.order_list_hash == order_list_hash(orders)


def test_bars_outside_regular_hours_are_no_measure_for_a_symbol_that_has_none(tape: pd.DataFrame) -> None:
    """BBB trades on Friday at 16:45 and AAA, which lives until Monday, never after 16:00."""
    late, monday = tape[tape["symbol"] == "BBB"].tail(1).copy(), tape[tape["symbol"] == "AAA"].tail(1).copy()
    late["timestamp"] += pd.Timedelta(hours=1)
    monday["timestamp"] = pd.Timestamp("2024-04-15 09:30", tz="America/New_York").tz_convert("UTC")
    table = pd.concat([tape, late, monday])
    with pytest.raises(BadData, match=r"AAA at 2024-02-26 21:.*hours='regular'"):
        Bars.from_frame(table, timeframe="15Min", gaps="carry")
    regular = Bars.from_frame(table, timeframe="15Min", gaps="carry", hours="regular")
    assert regular.n == 885 and np.isnan(regular.close[-1, 1])
    extended = Bars.from_frame(table, timeframe="15Min", gaps="carry", hours="extended").sel(["AAA"])
    assert (extended.volume > 0).sum() == (regular.volume[:, 0] > 0).sum()  # the same trades


def test_what_nobody_names_is_the_same_in_the_store_the_settings_and_at_alpaca() -> None:
    settings = DataSettings()
    assert settings.feed == FEED and settings.adjustment == "all"
