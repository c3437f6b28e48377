"""Rules for splits, adjusted prices, delistings, and numbers at both ends of what can be held."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trader_lib.rules.actions import (
    commission_as_traded,
    delisting_price,
    odd_shares,
    split_position,
    volume_in_bars,
)
from trader_lib.rules.folding import cash_flow, equity
from trader_lib.rules.matching import commission, fill_qty, slip
from trader_lib.rules.numbers import EXACT_MAX, PRICE_ERROR_MAX, off_tick, round_down, round_to
from trader_lib.rules.sizing import SizingRules, desired_order


@pytest.mark.parametrize("ratio", [2.0, 3.0, 7.0, 1.5, 1.25, 0.5, 0.1, 1 / 3])
@pytest.mark.parametrize("qty", [1.0, 99.0, 100.0, -1.0, -101.0, 0.25, 12.333333333])
def test_a_split_is_worth_nothing(qty: float, ratio: float) -> None:
    """Shares and cash after it are worth what the shares were before, to the cent and the billionth of a share."""
    before, after_price = 90.0, 90.0 / ratio
    after, average, cash = split_position(qty, before, ratio, after_price)
    assert after * after_price + cash == pytest.approx(qty * before, abs=0.02)
    assert average == pytest.approx(after_price, abs=1e-6) or after == 0.0
    if qty == int(qty):
        assert after == int(after) and math.copysign(1.0, cash or qty) == math.copysign(1.0, qty)
        assert abs(after + odd_shares(qty, ratio, after) * ratio - qty * ratio) < 1e-6
    else:
        assert cash == 0.0 and odd_shares(qty, ratio, after) == 0.0


def test_fees_of_prices_as_traded_are_the_plain_ones() -> None:
    rng = np.random.default_rng(1)
    for qty, price in zip(rng.integers(1, 10_000, 200), rng.uniform(0.5, 500, 200), strict=True):
        plain = commission(float(qty), price, 0.005, 1.5, 1.0)
        assert commission_as_traded(float(qty), price, 1.0, 0.005, 1.5, 1.0) == plain
        halved = commission_as_traded(2.0 * qty, price / 2.0, 0.5, 0.005, 1.5, 1.0)
        assert halved == pytest.approx(plain, abs=0.01)


def test_volume_counts_shares_of_the_bars() -> None:
    """1,000 shares as traded before a later 2-for-1 split are 2,000 of split-adjusted bars: 10 % of them are 200."""
    volume = float(volume_in_bars(np.array([1_000.0]), np.array([0.5]))[0])
    assert fill_qty(500.0, volume, 0.1, 0.0, False) == 200.0


def test_what_a_delisting_pays() -> None:
    assert delisting_price(12.3456, 1.0) == 12.3456 and delisting_price(10.0, 0.12345) == 1.2345
    assert cash_flow(-100.0, delisting_price(0.5, 0.1), 0.0) == 5.0


@pytest.mark.parametrize("shares", [9.3e9, 1e10, 123_456_789_012.0, 9.9e14])
def test_whole_shares_stay_whole_beyond_the_range_of_a_machine_integer(shares: float) -> None:
    assert round_to(shares, 9) == shares and round_to(-shares, 9) == -shares and round_down(shares, 9) == shares
    assert round_to(shares * 0.0001, 2) == pytest.approx(shares * 0.0001, abs=0.005)
    assert desired_order(1.0, 0.0, 0.0, 0.0001, shares * 0.0001, SizingRules()) == pytest.approx(shares, rel=1e-12)
    assert equity(0.0, np.array([shares]), np.array([0.0001])) == round_to(shares * 0.0001, 2)


def test_rounding_below_that_is_what_it_was() -> None:
    rng = np.random.default_rng(2)
    for value in [*rng.uniform(-1e6, 1e6, 500), 0.0, -0.0, 2.675, 1e-10]:
        for decimals in (0, 2, 4, 6, 9):
            scale = 10.0**decimals
            expected = math.copysign(math.floor(abs(value) * scale + 0.5) / scale, value)
            assert round_to(value, decimals) == expected
            assert round_down(value, decimals) == math.copysign(math.floor(abs(value) * scale) / scale, value)
    assert round_to(EXACT_MAX, 0) == round_down(EXACT_MAX, 0) == EXACT_MAX


def test_how_far_a_price_is_from_a_tick() -> None:
    prices = np.array([4e-5, 1.6e-4, 0.0001, 0.01, 0.0123456, 1.0, 290.123, np.nan])
    away = off_tick(prices)
    assert away[0] == pytest.approx(1.0) and away[1] == pytest.approx(0.25)  # 0.0000 and 0.0002
    assert away[2:4].tolist() == [0.0, 0.0] and 0.0 < away[4] < PRICE_ERROR_MAX and math.isnan(away[7])
    fine = np.arange(0.01, 0.02, 1e-6)
    assert off_tick(fine).max() <= PRICE_ERROR_MAX  # from a cent on, every price has a tick that is near enough
    assert slip(0.0001, -1, 500.0) == 0.0001  # no sale is for nothing


@pytest.mark.slow
def test_without_machine_code_the_engines_agree_as_well() -> None:
    """Drawn markets, by hand and in the evening, with NUMBA_DISABLE_JIT=1."""
    here = Path(__file__).with_name("test_research_actions.py")
    wanted = "by_hand or paid_out or regular or drawn_markets"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(here), "-k", wanted]
    done = subprocess.run(command, env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2_000:]
