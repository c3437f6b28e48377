"""The planner, told of events one by one, decides as the arrays do that the compiled engine keeps."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trader_lib.rules.entries import GUARD_COUNT, NO_TERMS, plain_terms
from trader_lib.rules.exits import update_extreme
from trader_lib.rules.sizing import Decision, Situation, SizingRules, plan_orders
from trader_lib.strategy.exits import ProtectiveExits
from trader_lib.strategy.planner import Planner, book_fill

SYMBOLS = ("AAA", "BBB", "CCC")
N = len(SYMBOLS)


class Arrays:
    """What the compiled engine keeps, and how it is moved on: no planner involved."""

    def __init__(self, rules, exits):
        self.rules, self.exits = rules, exits.rates()
        self.positions, self.avg_entry, self.extreme = np.zeros(N), np.zeros(N), np.full(N, math.nan)
        self.blocked = np.zeros(N, np.int8)
        self.working, self.exit_qty = np.zeros(N), np.zeros(N)
        self.stop, self.limit = np.full(N, math.nan), np.full(N, math.nan)

    def decide(self, weights, close, cash, equity):
        update_extreme(self.positions, close, self.extreme)
        flags, numbers = [np.zeros(N, bool) for _ in range(2)], [np.zeros(N) for _ in range(3)]
        held = Situation(
            self.positions,
            self.avg_entry,
            self.extreme,
            self.blocked,
            self.working,
            plain_terms(1, N)[0],
            np.zeros(N),
            np.full((N, GUARD_COUNT), math.nan),
            self.exit_qty,
            self.stop,
            self.limit,
        )
        decision = Decision(*flags, *numbers)
        plan_orders(0, weights, NO_TERMS, held, close, cash, equity, self.rules, self.exits, decision)
        return *flags, *numbers

    def fill(self, s, qty, price, is_exit):
        book_fill(s, qty, price, is_exit, self.positions, self.avg_entry, self.extreme, self.blocked)
        if is_exit:
            self.exit_qty[s] -= abs(qty)
        else:
            self.working[s] -= qty


def follow(planner, arrays, actions, decision):
    """Carry out a decision on both sides, checking that the actions say what the arrays do."""
    cancel_exit, cancel_working, qty, stop, limit = decision
    told = {(a.kind, a.symbol): a for a in actions}
    for s, symbol in enumerate(SYMBOLS):
        assert (("cancel_exit", symbol) in told) == cancel_exit[s]
        assert (("cancel_working", symbol) in told) == cancel_working[s]
        if cancel_exit[s]:
            planner.on_order_closed(symbol, "exit")
            arrays.exit_qty[s] = 0.0
        if cancel_working[s]:
            planner.on_order_closed(symbol)
            arrays.working[s] = 0.0
        order = told.get(("order", symbol))
        assert (order.side_sign * order.qty if order else 0.0) == qty[s]
        if order:
            planner.on_order_open(symbol, qty[s])
            arrays.working[s] = qty[s]
        exit_ = told.get(("exit", symbol))
        assert (exit_ is not None) == (not (math.isnan(stop[s]) and math.isnan(limit[s])))
        if exit_:
            assert exit_.qty == abs(planner.positions[s]) and exit_.side_sign == -np.sign(planner.positions[s])
            np.testing.assert_equal((exit_.stop_price, exit_.limit_price), (stop[s], limit[s]))
            planner.on_order_open(
                symbol, -planner.positions[s], "exit", stop_price=exit_.stop_price, limit_price=exit_.limit_price
            )
            arrays.exit_qty[s] = abs(arrays.positions[s])
            arrays.stop[s], arrays.limit[s] = stop[s], limit[s]


BAR = st.tuples(
    st.lists(st.sampled_from([-0.4, 0.0, 0.3, 0.5]), min_size=N, max_size=N),
    st.lists(st.floats(0.9, 1.12), min_size=N, max_size=N),
    st.lists(st.sampled_from([0.0, 0.4, 1.0]), min_size=N, max_size=N),
)


@given(st.lists(BAR, min_size=3, max_size=25), st.booleans())
@settings(max_examples=60, deadline=None)
def test_planner_and_arrays_decide_alike(bars, trailing):
    exits = ProtectiveExits(stop_loss=0.06, take_profit=0.09, trailing_stop=0.05 if trailing else None)
    planner, arrays = Planner(SYMBOLS, exits=exits), Arrays(SizingRules(), exits)
    close, cash = np.array([10.0, 25.0, 3.0]), 50_000.0
    for weights, moves, shares in bars:
        close = np.round(close * moves, 2)
        for s, symbol in enumerate(SYMBOLS):  # a stop that was touched fills at the close, then target orders in part
            if arrays.exit_qty[s] and np.sign(arrays.positions[s]) * (close[s] - arrays.stop[s]) <= 0:
                qty = -arrays.positions[s]
                cash -= qty * close[s]
                arrays.fill(s, qty, close[s], True)
                planner.on_fill(symbol, qty, close[s], "exit")
            elif qty := float(np.trunc(arrays.working[s] * shares[s])):
                cash -= qty * close[s]
                arrays.fill(s, qty, close[s], False)
                planner.on_fill(symbol, qty, close[s])
        equity = cash + float((arrays.positions * close).sum())
        planner.on_close(close)
        decision = arrays.decide(np.array(weights), close, cash, equity)
        actions = planner.plan(np.array(weights), close, cash, equity)
        follow(planner, arrays, actions, decision)
        for mine, theirs in (
            (planner.positions, arrays.positions),
            (planner.avg_entry, arrays.avg_entry),
            (planner.extreme, arrays.extreme),
            (planner.blocked_sign, arrays.blocked),
            (planner.working_qty, arrays.working),
            (planner.exit_qty, arrays.exit_qty),
        ):
            np.testing.assert_array_equal(mine, theirs)


def test_actions_come_in_the_order_cancels_sells_buys_exits():
    planner = Planner(SYMBOLS, exits=ProtectiveExits(stop_loss=0.1))
    for symbol in ("BBB", "CCC"):
        planner.adopt(symbol, 100.0, 10.0)
    planner.on_order_open("CCC", -100.0, "exit", stop_price=9.0)
    close = np.full(N, 10.0)
    planner.on_close(close)
    actions = planner.plan(np.array([0.4, 0.1, 0.0]), close, 8_000.0, 10_000.0)
    assert [(a.kind, a.symbol) for a in actions] == [
        ("cancel_exit", "CCC"),
        ("order", "CCC"),
        ("order", "AAA"),
        ("exit", "BBB"),
    ]


def test_fills_beyond_what_works_leave_nothing_working():
    planner = Planner(SYMBOLS)
    planner.on_order_open("AAA", 10.0)
    planner.on_fill("AAA", 12.0, 5.0)
    assert planner.working_qty[0] == 0.0 and planner.positions[0] == 12.0


@pytest.mark.parametrize("purpose", ["entry", "exit"])
def test_closing_an_order_that_is_gone_changes_nothing(purpose):
    planner = Planner(SYMBOLS)
    planner.on_order_closed("AAA", purpose)
    assert not planner.working_qty.any() and not planner.exit_qty.any()
