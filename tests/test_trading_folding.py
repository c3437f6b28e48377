"""Properties of the fold that both engines share."""

import math
from decimal import Decimal

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trader_lib.rules.folding import cash_flow, equity, exposure, fold_fill
from trader_lib.rules.numbers import to_decimal, to_float

whole = st.integers(-100_000, 100_000).filter(bool).map(float)
fractional = st.integers(-(10**12), 10**12).filter(bool).map(lambda units: units / 10**9)
prices = st.integers(1, 10**8).map(lambda ticks: ticks / 10**4)
fills = st.lists(st.tuples(st.one_of(whole, fractional), prices), min_size=1, max_size=20)


@given(fills)
@settings(max_examples=200, deadline=None)
def test_position_is_the_exact_sum_of_the_fills(fills: list[tuple[float, float]]) -> None:
    qty, average = 0.0, 0.0
    exact = Decimal(0)
    for fill_qty, price in fills:
        qty, average, realized = fold_fill(qty, average, fill_qty, price)
        exact += to_decimal(fill_qty, 9)
        assert to_decimal(qty, 9) == exact
        assert to_float(to_decimal(average, 6)) == average
        assert to_float(to_decimal(realized, 2)) == realized
        assert (average == 0.0) == (qty == 0.0)
        assert math.copysign(1.0, qty) == 1.0 or qty < 0.0, "a negative zero"


@given(fills)
@settings(max_examples=100, deadline=None)
def test_average_price_stays_within_the_prices_paid(fills: list[tuple[float, float]]) -> None:
    qty, average = 0.0, 0.0
    for fill_qty, price in fills:
        qty, average, _ = fold_fill(qty, average, fill_qty, price)
        if qty:
            assert min(p for _, p in fills) - 1e-6 <= average <= max(p for _, p in fills) + 1e-6


@given(st.lists(st.tuples(whole, prices), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_cash_and_position_account_for_all_profit(fills: list[tuple[float, float]]) -> None:
    """Once flat, what cash gained is what was realized, within the rounding of each fill."""
    qty, average, cash, profit = 0.0, 0.0, 0.0, 0.0
    bought = sum(q for q, _ in fills)
    closing = [*fills, *([(-bought, 10.0)] if bought else [])]
    for fill_qty, price in closing:
        cash += cash_flow(fill_qty, price, 0.0)
        qty, average, realized = fold_fill(qty, average, fill_qty, price)
        profit += realized
    assert qty == 0.0
    # half a cent a fill in cash and in realized, and half a millionth a share in each average
    slack = len(closing) * (0.01 + 1e-6 * sum(abs(q) for q, _ in closing))
    assert abs(cash - profit) <= slack


@given(st.lists(st.tuples(st.one_of(st.just(0.0), whole), prices), max_size=8), prices)
@settings(max_examples=100, deadline=None)
def test_equity_is_cash_plus_long_less_short(held: list[tuple[float, float]], cash: float) -> None:
    qty = np.array([q for q, _ in held], dtype=np.float64)
    price = np.array([p if q else math.nan for q, p in held], dtype=np.float64)
    long, short, gross = exposure(qty, price)
    assert long >= 0.0 and short >= 0.0
    assert abs(gross - (long + short)) < 0.02
    assert abs(equity(cash, qty, price) - (cash + long - short)) < 0.02


def test_compiled_and_plain_agree() -> None:
    plain = getattr(fold_fill, "py_func", fold_fill)
    for position in ((0.0, 0.0), (10.0, 5.5), (-10.0, 5.5)):
        for fill_qty in (-20.0, -10.0, -3.3, 3.3, 10.0, 20.0):
            assert plain(*position, fill_qty, 7.7777) == fold_fill(*position, fill_qty, 7.7777)


def test_nothing_filled_into_nothing_is_flat() -> None:
    assert fold_fill(0.0, 0.0, 0.0, 10.0) == (0.0, 0.0, 0.0)
