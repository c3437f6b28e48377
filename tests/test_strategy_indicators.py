"""Every indicator of TA-Lib looks at nothing later, begins with its warmup, and depends on what its lookback says."""

import sys

import numpy as np
import pytest

from trader_lib.errors.taxonomy import Misconfigured
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.strategy.indicators import indicator, indicator_lookback, indicator_warmup, indicators

BARS = synthetic_bars(["AAA"], "2018-01-02", "2019-12-31", seed=11)
NAMES = sorted(name for names in indicators().values() for name in names)
ROWS = (250, 301, 377, 429, BARS.n - 1)
EMPTY = {"ACOS", "ASIN"}  # of prices above 1 there is none
SELDOM = {"HT_TRENDMODE"}  # 0 or 1, from a phase that remembers: five rows need not show it


def outputs(name, bars):
    found = indicator(name, bars)
    return list(found.values()) if isinstance(found, dict) else [found]


@pytest.mark.parametrize("name", NAMES)
def test_values_begin_with_the_warmup_and_know_nothing_later(name):
    whole, first = outputs(name, BARS), indicator_warmup(name) - 1
    for values in whole:
        assert np.isnan(values[:first]).all()
    if name not in EMPTY and name != "SUPERTREND":
        assert all(not np.isnan(values[first:]).any() for values in whole)
    for row in ROWS[:2]:
        for values, known in zip(whole, outputs(name, BARS.head(row + 1)), strict=True):
            assert np.array_equal(values[: row + 1], known, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_value_depends_on_as_many_bars_as_the_lookback_says(name):
    lookback, whole = indicator_lookback(name), outputs(name, BARS)
    length = indicator_warmup(name) if lookback is None else lookback
    differs = False
    for row in ROWS:
        part = outputs(name, BARS.rows_between(row + 1 - length, row + 1))
        differs |= any(
            not np.allclose(values[row], last[-1], rtol=1e-9, atol=1e-9, equal_nan=True)
            for values, last in zip(whole, part, strict=True)
        )
    assert differs == (lookback is None) or name in SELDOM, "the lists in the chapter say otherwise"


def test_without_the_extra_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "talib", None)
    with pytest.raises(Misconfigured, match="An indicator needs the extra `indicators`"):
        indicator("RSI", BARS)
