"""A longer time frame beside a shorter one shows closed bars alone, in research and in a session."""

from datetime import date

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trader_lib.clock.sessions import NEW_YORK
from trader_lib.config.settings import load_settings
from trader_lib.errors.taxonomy import Misused
from trader_lib.market.bars import Bars, Provenance, Timeframe
from trader_lib.market.sample import sample_bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.research.backtest import backtest
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.strategy.causality import LookAhead, check_causal
from trader_lib.strategy.contract import Strategy
from trader_lib.strategy.sma_cross import SmaCross
from trader_lib.strategy.start import LookbackExceeded, check_start
from trader_lib.trading.order_list import compare_order_lists

A_DAY = 13  # half-hours
HALF_DAYS = ("2024-11-29", "2024-12-24")


class DayTrend(Strategy):
    """Hold a symbol while its half-hour closes above the mean close of the last days."""

    days: int = 3

    @property
    def warmup(self) -> int:
        """Bars that hold so many whole days, wherever they begin."""
        return (self.days + 1) * A_DAY

    @property
    def lookback_max(self) -> int:
        """As many: short days make it hold more days, never fewer."""
        return self.warmup + A_DAY

    def targets(self, bars):
        daily = bars.closed("1Day")
        mean = daily.align(daily.frame("close").rolling(self.days).mean())
        return np.where(bars.close > mean, 0.5 / len(bars.symbols), 0.0)


class ShowsTheOpenDay(DayTrend):
    """The same with the day that is still going on: what a merge by date gives."""

    def targets(self, bars):
        dates = pd.DatetimeIndex(bars.index).tz_convert(NEW_YORK).normalize()
        daily = bars.frame("close").groupby(dates).last()
        mean = daily.rolling(self.days).mean().reindex(dates).to_numpy()
        return np.where(bars.close > mean, 0.5 / len(bars.symbols), 0.0)


class TooShort(DayTrend):
    """Names fewer bars than its days reach back to."""

    @property
    def lookback_max(self) -> int:
        return self.warmup

    @property
    def warmup(self) -> int:
        return self.days * A_DAY


@pytest.fixture(scope="module")
def half_hours() -> Bars:
    return synthetic_bars(["AAA", "BBB"], "2024-11-01", "2025-01-10", Timeframe.MIN_30, seed=5)


def test_days_are_those_that_pandas_makes(half_hours):
    daily = half_hours.closed("1Day")
    dates = half_hours.index.tz_convert(NEW_YORK).normalize()
    for field, how in {"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum"}.items():
        expected = half_hours.frame(field).groupby(dates).agg(how)
        assert np.array_equal(daily.frame(field).to_numpy(), expected.to_numpy())
        assert (daily.frame(field).index == expected.index.tz_convert("UTC")).all()


def test_a_day_is_known_with_its_last_bar_on_half_days_too(half_hours):
    daily = half_hours.closed("1Day")
    known = pd.Series(daily.known, half_hours.index.tz_convert(NEW_YORK))
    for day, last in {"2024-11-27": "15:30", "2024-11-29": "12:30", "2024-12-24": "12:30"}.items():
        changes = known[day].diff().fillna(0)
        assert list(changes[changes > 0].index.strftime("%H:%M")) == [last]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.sampled_from(["1Hour", "2Hour", "1Day", "1Week", "1Month"]))
def test_what_was_known_does_not_depend_on_what_came_later(half_hours, rows, length):
    whole, past = half_hours.closed(length), half_hours.head(rows).closed(length)
    aligned = whole.align(whole.frame("high"))[:rows]
    assert np.array_equal(past.align(past.frame("high")), aligned, equal_nan=True)


def test_a_day_holds_regular_hours_alone():
    stamps = pd.DatetimeIndex(
        [f"2024-12-0{day} {hour}" for day in (2, 3) for hour in ("08:30", "09:30", "15:30", "16:30")], tz=NEW_YORK
    )
    close = np.array([90.0, 100, 101, 150, 91, 102, 103, 160])[:, None]
    origin = Provenance("example", "", Timeframe.MIN_30, "raw")
    bars = Bars(close, close, close, close, close, stamps, ["AAA"], origin)
    daily = bars.closed("1Day")
    assert daily.frame("high")["AAA"].tolist() == [101.0, 103.0]
    assert daily.known.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    # from 8:30 half an hour is no hour
    assert bars.closed("1Hour").frame("high")["AAA"].tolist() == [100.0, 101, 150, 91, 102, 103, 160]


def test_hours_without_a_night():
    around = pd.date_range("2024-03-09 22:00", periods=8, freq="30min", tz="UTC")
    close = np.arange(8.0)[:, None] + 1
    bars = Bars(close, close, close, close, close, around, ["BTC"], Provenance("example", "", Timeframe.MIN_30, "raw"))
    hours = bars.closed("1Hour", calendar="24/7")
    assert hours.frame("close")["BTC"].tolist() == [2.0, 4, 6, 8] and hours.known.tolist() == [0, 1, 1, 2, 2, 3, 3, 4]


def test_resampled_bars_run_like_any_others(half_hours):
    daily = half_hours.resample("1Day")
    assert daily.timeframe is Timeframe.DAY_1 and daily.provenance.synthetic
    assert np.array_equal(daily.close, half_hours.closed("1Day").frame("close").to_numpy())
    rebuilt = Bars.from_frame(daily.to_frame(), synthetic=True)
    assert rebuilt.content_hash == daily.content_hash
    result = backtest(SmaCross(fast=2, slow=5), daily)
    assert result.orders


def test_the_checks_pass_an_honest_strategy_and_name_the_row_of_one_that_is_not(half_hours):
    assert check_causal(DayTrend(), half_hours, rows=80, fresh=False).truncations >= 60
    check_start(DayTrend(), half_hours)
    with pytest.raises(LookAhead, match="row"):
        check_causal(ShowsTheOpenDay(), half_hours, rows=80, fresh=False)
    with pytest.raises(LookbackExceeded):
        check_start(TooShort(), half_hours)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("transport", ["in_process", "http"])
async def test_a_session_builds_the_same_days_from_its_bars(half_hours, transport, tmp_path):
    spec = SessionSpec(
        strategy=f"{__file__}:DayTrend",
        symbols=half_hours.symbols,
        start=date(2024, 11, 18),
        end=date(2024, 12, 27),
        timeframe="30Min",
    )
    tested = backtest(spec.build_strategy(), half_hours, start=spec.start, end=spec.end, cash=float(spec.cash))
    chosen = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": transport}})
    run = await run_session(spec, chosen, bars=half_hours, journal_path=tmp_path / "journal.sqlite")
    found = compare_order_lists(tested.orders, run.orders)
    assert found.equal, found.summary()
    assert tested.order_list_hash == run.order_list_hash and len(run.orders) > 20


def test_what_is_refused_says_what_to_do(half_hours):
    with pytest.raises(Misused, match="cannot be built"):
        sample_bars(["IBM"], start="2005-01-03", end="2005-03-01").closed("1Hour")
    with pytest.raises(Misused, match="cannot be built"):
        half_hours.closed("45Min")
    with pytest.raises(Misused, match=r"There is no time frame '1Dya'.*1Day"):
        half_hours.closed("1Dya")
    with pytest.raises(Misused, match="There is no time frame"):
        half_hours.resample("1Week")
    with pytest.raises(Misused, match="one row each"):
        half_hours.closed("1Day").align(half_hours.close)
    with pytest.raises(Misused, match="There is no exchange calendar"):
        half_hours.closed("1Day", calendar="NYSE5")
