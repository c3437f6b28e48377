"""Bars under random histories, across processes, and where a notebook cell cannot go."""

import pickle
from datetime import UTC, date, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trader_lib.errors.taxonomy import BadData, Misused
from trader_lib.market.bars import Bars, BarValues, Provenance, Timeframe, window
from trader_lib.market.sample import sample_bars
from trader_lib.market.stamps import from_ns, midnight_ns, to_date
from trader_lib.market.synthetic import synthetic_bars

MINUTES = Provenance("test", "", Timeframe.MIN_1, "raw")


@st.composite
def histories(draw: st.DrawFn) -> Bars:
    """Clean minute bars of one to three symbols with lives of their own."""
    length, width = draw(st.integers(2, 12)), draw(st.integers(1, 3))
    close = np.full((length, width), np.nan)
    for column in range(width):
        birth = draw(st.integers(0, length - 1))
        end = draw(st.integers(birth, length))
        prices = st.floats(0.01, 1e5, allow_nan=False)
        close[birth:end, column] = draw(st.lists(prices, min_size=end - birth, max_size=end - birth))
    steps = draw(st.lists(st.integers(1, 700), min_size=length, max_size=length))
    index = pd.DatetimeIndex(pd.Timestamp("2024-01-02 14:30", tz="UTC") + pd.to_timedelta(np.cumsum(steps), unit="min"))
    symbols = ["AAA", "BBB", "CCC"][:width]
    return Bars(close * 0.99, close * 1.02, close * 0.98, close, close * 0, index, symbols, MINUTES)


@settings(max_examples=40, deadline=None)
@given(histories(), st.data())
def test_appending_bar_by_bar_gives_the_same_as_building_at_once(bars: Bars, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, bars.n))
    grown = bars.head(first)
    for row in range(first, bars.n):
        past = grown
        grown = grown.append(bars.at(row), bars.rows(row))
        assert past.content_hash == bars.head(row).content_hash
    assert grown.content_hash == bars.content_hash


@settings(max_examples=40, deadline=None)
@given(histories(), st.data())
def test_two_futures_of_one_past_do_not_meet(bars: Bars, data: st.DataObject) -> None:
    past = bars.head(data.draw(st.integers(0, bars.n - 1)))
    when = bars.at(bars.n - 1) + timedelta(days=1)
    price = {"AAA": BarValues(1, 1, 1, 1, 1)}, {"AAA": BarValues(2, 2, 2, 2, 2)}
    ended = past.n and np.isnan(past.close[-1, 0]) and not np.isnan(past.close[:, 0]).all()
    if ended:
        with pytest.raises(BadData, match="had ended"):
            past.append(when, price[0])
        return
    one = past.append(when, price[0])
    two = past.append(when, price[1])
    three = one.append(when + timedelta(minutes=1), price[1])
    assert (one.close[-1, 0], two.close[-1, 0], three.close[-2:, 0].tolist()) == (1, 2, [1, 2])


@settings(max_examples=40, deadline=None)
@given(histories())
def test_frames_and_pickles_lose_nothing(bars: Bars) -> None:
    copy = pickle.loads(pickle.dumps(bars))
    assert copy.content_hash == bars.content_hash
    assert copy.provenance == bars.provenance
    assert not copy.close.flags.writeable
    alive = ~np.isnan(bars.close).all(axis=1)
    if alive.any():
        held = ~np.isnan(bars.close).all(axis=0)
        names = [symbol for symbol, has in zip(bars.symbols, held, strict=True) if has]
        again = Bars.from_frame(bars.to_frame(), timeframe="1Min", symbols=names)
        assert again.n == alive.sum()
        assert np.array_equal(again.close, bars.close[alive][:, held], equal_nan=True)


def test_growing_past_the_room_keeps_every_row() -> None:
    bars = synthetic_bars("AAA", "2024-07-01", "2024-07-01", seed=1)
    grown = bars.head(0)
    for row in range(bars.n):
        grown = grown.append(bars.at(row), bars.rows(row))
    assert bars.n == 390
    assert grown.content_hash == bars.content_hash


def test_head_is_a_view_that_nobody_can_write_to() -> None:
    bars = sample_bars("AAPL,IBM")
    for past in (bars.head(100), bars.head(100).head(50), bars.between("2005-01-03", "2005-12-30")):
        for field in ("open", "high", "low", "close", "volume"):
            figures = getattr(past, field)
            assert np.shares_memory(figures, getattr(bars, field))
            assert figures.flags.c_contiguous
            with pytest.raises(ValueError, match="read-only"):
                figures[0, 0] = 1.0


def test_empty_bars_are_bars_but_no_window() -> None:
    empty = sample_bars("AAPL").head(0)
    assert "empty" in repr(empty)
    assert len(empty.index) == 0
    assert len(empty.to_frame()) == 0
    with pytest.raises(BadData, match="no bars at all"):
        window(empty)


def test_wrong_words_are_answered_with_the_right_ones() -> None:
    bars = sample_bars("AAPL")
    with pytest.raises(Misused, match="Did you mean 'close'"):
        bars.frame("closes")
    with pytest.raises(BadData, match="none or repeat"):
        bars.sel(["AAPL", "AAPL"])
    with pytest.raises(Misused, match="negative"):
        window(bars, warmup=-1)
    with pytest.raises(Misused, match="time zone"):
        bars.append(datetime(2013, 3, 4), {})
    with pytest.raises(BadData, match="midnight New York"):
        bars.append(datetime(2013, 3, 4, tzinfo=UTC), bars.rows(-1))


def test_dates_are_those_of_new_york_on_both_sides_of_the_clock_change() -> None:
    assert to_date(datetime(2024, 7, 2, 3, 59, tzinfo=UTC)) == date(2024, 7, 1)
    assert to_date(datetime(2024, 7, 2, 3, 59)) == date(2024, 7, 2)
    for day in (date(2024, 3, 10), date(2024, 3, 11), date(2024, 11, 3), date(2024, 11, 4)):
        assert to_date(from_ns(midnight_ns(day))) == day
    bars = sample_bars("IBM", "2005-04-01", "2005-04-04")
    assert [bars.at(row).hour for row in range(bars.n)] == [5, 4]


def test_carry_repeats_the_last_close_of_the_living_only() -> None:
    bars = sample_bars("AAPL,FB", "2012-05-15", "2012-05-17")
    assert np.isnan(bars.close[:, 1]).all()
    grown = bars.append(from_ns(midnight_ns(date(2012, 5, 18))), {}, carry=True)
    assert grown.rows(3) == {"AAPL": BarValues(*[bars.close[-1, 0]] * 4, 0.0)}
