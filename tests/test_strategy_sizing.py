"""Invariants of sizing and of a whole decision, over any account that hypothesis can think of."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trader_lib.rules.entries import GUARD_COUNT, NO_TERMS, TERM_COUNT, plain_terms
from trader_lib.rules.exits import ExitRates
from trader_lib.rules.sizing import Decision, Situation, SizingRules, plan_orders, size_orders

N = 4
RULES = st.builds(
    SizingRules,
    fractional=st.booleans(),
    min_trade=st.sampled_from([0.0, 0.01, 0.1]),
    leverage=st.sampled_from([1.0, 2.0]),
    margin=st.booleans(),
)


def numbers(low, high, **extra):
    return st.lists(st.floats(low, high, **extra), min_size=N, max_size=N).map(np.array)


def shares(low=-500, high=500):
    return st.lists(st.integers(low, high), min_size=N, max_size=N).map(lambda whole: np.array(whole, float))


WEIGHTS = st.lists(st.one_of(st.floats(-2, 2), st.just(0.0), st.just(math.nan)), min_size=N, max_size=N).map(np.array)
CLOSE = st.lists(
    st.one_of(st.integers(50, 50_000).map(lambda cents: cents / 100), st.just(math.nan)), min_size=N, max_size=N
).map(np.array)
CASH = st.integers(-1_000_000, 20_000_000).map(lambda cents: cents / 100)


def worth(positions, close):
    return float(np.nansum(positions * close))


def sized(weights, positions, pending, close, cash, rules):
    out = np.full(N, math.nan)
    size_orders(weights, positions, pending, close, cash, cash + worth(positions, close), rules, out)
    return out


@given(WEIGHTS, shares(), CLOSE, CASH, RULES)
@settings(max_examples=100, deadline=None)
def test_opening_buys_never_cost_more_than_the_budget(weights, positions, close, cash, rules):
    qty = sized(weights, positions, np.zeros(N), close, cash, rules)
    equity = cash + worth(positions, close)
    covers = worth(np.where((positions < 0) & (qty > 0), qty, 0), close)
    proceeds = worth(np.where((positions > 0) & (qty < 0), -qty, 0), close) if rules.margin else 0.0
    opening = worth(np.where((positions >= 0) & (qty > 0), qty, 0), close)
    budget = cash + proceeds - covers + (rules.leverage - 1) * equity
    assert opening <= max(budget, 0.0) + 1e-6


@given(WEIGHTS, shares(0, 500), shares(0, 100), CLOSE, CASH, RULES)
@settings(max_examples=100, deadline=None)
def test_buys_on_their_way_have_spent_their_part(weights, positions, pending, close, cash, rules):
    rules = rules._replace(margin=False, leverage=1.0)
    qty = sized(weights, positions, pending, close, cash, rules)
    assert worth(np.where(qty > 0, qty, 0), close) <= max(cash - worth(pending, close), 0.0) + 1e-6


@given(WEIGHTS, shares(), CLOSE, CASH, RULES)
@settings(max_examples=100, deadline=None)
def test_no_order_crosses_zero(weights, positions, close, cash, rules):
    after = positions + sized(weights, positions, np.zeros(N), close, cash, rules)
    assert (positions * after >= 0).all()


@given(WEIGHTS, shares(), shares(), CLOSE, CASH, RULES)
@settings(max_examples=100, deadline=None)
def test_quantities_are_finite_and_whole_unless_fractions_are_allowed(weights, positions, pending, close, cash, rules):
    qty = sized(weights, positions, pending, close, cash, rules)
    assert np.isfinite(qty).all()
    if not rules.fractional:
        assert (qty == np.round(qty)).all()
    assert (qty[np.isnan(close)] == 0).all()
    if cash + worth(positions, close) > 0:
        assert (qty[np.isnan(weights)] == 0).all()


@given(WEIGHTS, shares(), CLOSE, CASH, RULES)
@settings(max_examples=100, deadline=None)
def test_only_closing_trades_are_smaller_than_min_trade(weights, positions, close, cash, rules):
    qty = sized(weights, positions, np.zeros(N), close, cash, rules)
    equity = cash + worth(positions, close)
    small = (qty != 0) & (np.abs(qty) * close < rules.min_trade * equity)
    assert (positions[small] + qty[small] == 0).all()


@given(shares(), CLOSE, CASH, RULES)
@settings(max_examples=100, deadline=None)
def test_a_close_is_never_dropped_or_cut(positions, close, cash, rules):
    qty = sized(np.zeros(N), positions, np.zeros(N), close, cash, rules)
    priced = ~np.isnan(close)
    assert (qty[priced] == -positions[priced]).all()


@given(numbers(-0.25, 0.25), CLOSE, st.integers(100_000, 10_000_000), RULES)
@settings(max_examples=100, deadline=None)
def test_a_decision_that_was_filled_at_its_closes_is_not_made_again(weights, close, cents, rules):
    cash = cents / 100
    first = sized(weights, np.zeros(N), np.zeros(N), close, cash, rules)
    again = np.full(N, math.nan)
    left = cash - worth(first, close)
    # equity is what it was: the engines keep whole cents, and a sum of floats may differ in its last bit
    size_orders(weights, first, np.zeros(N), close, left, cash, rules, again)
    assert (again == 0).all()


def plan(weights, blocked, positions, working, resting, close, cash, rules, exits):
    """One decision as a dict of arrays; what rests lies at 1 and 10,000 USD."""
    entry, best = np.where(positions != 0, 100.0, 0.0), np.where(positions != 0, 110.0, math.nan)
    at = [np.where(resting != 0, price, math.nan) for price in (1.0, 10_000.0)]
    cancel_exit, cancel_working = np.ones(N, bool), np.ones(N, bool)
    qty, stop, limit = (np.full(N, 7.0) for _ in range(3))
    blocked = blocked.copy()
    equity = cash + worth(positions, close)
    terms, guard = plain_terms(1, N)[0], np.full((N, GUARD_COUNT), math.nan)
    held = Situation(positions, entry, best, blocked, working, terms, np.zeros(N), guard, resting, *at)
    decision = Decision(cancel_exit, cancel_working, qty, stop, limit)
    plan_orders(0, weights, NO_TERMS, held, close, cash, equity, rules, exits, decision)
    return {"cancel_exit": cancel_exit, "cancel_working": cancel_working, "qty": qty, "stop": stop, "limit": limit} | {
        "blocked": blocked
    }


SIGNS = st.lists(st.sampled_from([-1, 0, 1]), min_size=N, max_size=N).map(lambda signs: np.array(signs, np.int8))
EXITS = st.builds(
    ExitRates,
    stop_loss=st.sampled_from([math.nan, 0.05]),
    take_profit=st.sampled_from([math.nan, 0.1]),
    trailing_stop=st.sampled_from([math.nan, 0.08]),
)


@given(WEIGHTS, SIGNS, shares(), shares(), shares(0, 500), CLOSE, CASH, RULES, EXITS)
@settings(max_examples=100, deadline=None)
def test_a_decision_never_has_two_orders_for_the_same_shares(
    weights, blocked, positions, working, resting, close, cash, rules, exits
):
    made = plan(weights, blocked, positions, working, resting, close, cash, rules, exits)
    ordered, works = made["qty"] != 0, working != 0
    placed = ~np.isnan(made["stop"]) | ~np.isnan(made["limit"])
    rests = (resting != 0) & ~made["cancel_exit"]
    assert not (ordered & works).any()
    assert not (ordered & rests).any()
    assert not (placed & (ordered | works | rests | (positions == 0))).any()
    assert not (made["cancel_exit"] & (resting == 0)).any()
    assert not (made["cancel_working"] & ~works).any()
    assert (positions * (positions + made["qty"]) >= 0).all()


@given(WEIGHTS, SIGNS, shares(), CLOSE, CASH, RULES, EXITS)
@settings(max_examples=100, deadline=None)
def test_a_blocked_side_is_not_entered(weights, blocked, positions, close, cash, rules, exits):
    flat = np.zeros(N)
    made = plan(weights, blocked, flat, flat, flat, close, cash, rules, exits)
    same = (blocked != 0) & (weights * blocked > 0)
    assert (made["qty"][same] == 0).all() and (made["blocked"][same] == blocked[same]).all()
    changed = (blocked != 0) & (weights * blocked <= 0)
    assert (made["blocked"][changed] == 0).all()


@given(shares(-50, 50), CLOSE, CASH, RULES, EXITS)
@settings(max_examples=100, deadline=None)
def test_exits_are_placed_on_their_side_of_the_close(positions, close, cash, rules, exits):
    weights = np.full(N, math.nan)  # no opinion: positions stay and get their exits
    flat = np.zeros(N)
    made = plan(weights, flat.astype(np.int8), positions, flat, flat, close, cash, rules, exits)
    side = np.sign(positions)
    for prices, way in ((made["stop"], 1), (made["limit"], -1)):
        placed = ~np.isnan(prices) & ~np.isnan(close)
        assert (way * side[placed] * (close - prices)[placed] > 0).all()
    due = made["blocked"] != 0
    assert (made["qty"][due] == -positions[due]).all()


@pytest.mark.parametrize("weight", [0.5, 0.0, math.nan])
def test_sizing_is_callable_from_another_compiled_function(weight):
    from numba import njit

    @njit
    def kernel(weights, close, rules, exits, out):
        flat, block = np.zeros(1), np.zeros(1, np.int8)
        none, flags, other = np.full(1, np.nan), np.zeros(1, np.bool_), np.zeros(1, np.bool_)
        terms, nothing, guard = np.zeros((1, TERM_COUNT)), np.zeros(1), np.full((1, GUARD_COUNT), np.nan)
        held = Situation(flat, flat, none, block, nothing, terms, nothing, guard, flat, none, none)
        decision = Decision(flags, other, out, np.zeros(1), np.zeros(1))
        plan_orders(0, weights, np.zeros((0, 1, TERM_COUNT)), held, close, 1000.0, 1000.0, rules, exits, decision)

    out = np.zeros(1)
    kernel(np.array([weight]), np.array([10.0]), SizingRules(), ExitRates(), out)
    assert out[0] == (50.0 if weight == 0.5 else 0.0)
