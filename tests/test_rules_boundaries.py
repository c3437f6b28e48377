"""Rules where a figure touches its bound exactly: what is allowed there, and what the next step beyond it does."""

import math

import numpy as np
import pytest

from trader_lib.rules.account import (
    buying_power,
    is_ruined,
    maintenance_margin,
    order_cost,
    reserved_cost,
)
from trader_lib.rules.actions import close_after, dividend_cash, split_position
from trader_lib.rules.checks import (
    ACTIVE,
    CHECK_COUNT,
    HALTED,
    REDUCING,
    Check,
    LimitValues,
    OrderFacts,
    RiskFacts,
    beyond_reference,
    check_order,
    in_window,
    is_reducing,
    limits_at,
    lost_since,
    pending_exposure,
    pending_margin,
    recent_count,
    sells_short,
    state_after_close,
)
from trader_lib.rules.exits import exit_due, exit_prices, update_extreme
from trader_lib.rules.folding import cash_flow, equity, exposure, fold_fill
from trader_lib.rules.margin import held_after, liquidation
from trader_lib.rules.matching import (
    LIMIT,
    MARKET,
    STOP,
    STOP_LIMIT,
    CostRates,
    affordable_qty,
    commission,
    fill_price,
    fill_qty,
    limit_fill_price,
    match_price,
    slip,
)
from trader_lib.rules.numbers import round_down, round_to, tick_decimals
from trader_lib.rules.sizing import SizingRules, desired_order, fit_to_budget

BUY, SELL = 1, -1
NONE = math.nan


def just_over(value: float) -> float:
    return float(np.nextafter(value, math.inf))


def just_under(value: float) -> float:
    return float(np.nextafter(value, -math.inf))


# ---- matching


@pytest.mark.parametrize(
    ("side", "limit", "expected"),
    [(BUY, 99.0, 99.0), (BUY, just_under(99.0), NONE), (SELL, 101.0, 101.0), (SELL, just_over(101.0), NONE)],
)
def test_limit_that_the_bar_just_touches_fills_at_its_price(side: int, limit: float, expected: float) -> None:
    price = limit_fill_price(side, limit, 100.0, 101.0, 99.0)
    assert price == expected or (math.isnan(price) and math.isnan(expected))


@pytest.mark.parametrize(
    ("side", "stop", "touched"),
    [(BUY, 101.0, True), (BUY, just_over(101.0), False), (SELL, 99.0, True), (SELL, just_under(99.0), False)],
)
def test_stop_that_the_bar_just_touches_fires(side: int, stop: float, touched: bool) -> None:
    price, triggered = match_price(STOP, side, NONE, stop, False, 100.0, 101.0, 99.0)
    assert triggered is touched
    assert price == stop if touched else math.isnan(price)


def test_stop_limit_whose_trigger_is_exactly_its_limit_fills_there() -> None:
    assert match_price(STOP_LIMIT, BUY, 101.0, 101.0, False, 100.0, 102.0, 99.0) == (101.0, True)
    price, triggered = match_price(STOP_LIMIT, BUY, just_under(101.0), 101.0, False, 100.0, 102.0, 99.0)
    assert math.isnan(price) and triggered


def test_slippage_is_for_market_and_stop_orders_alone() -> None:
    prices = [fill_price(kind, BUY, 100.0, 10.0) for kind in (MARKET, LIMIT, STOP, STOP_LIMIT)]
    assert prices == [100.1, 100.0, 100.1, 100.0]


def test_a_basis_point_is_a_ten_thousandth() -> None:
    assert slip(10_000.0, BUY, 100.0) == 10_100.0
    assert slip(10_000.0, SELL, 100.0) == 9_900.0
    assert commission(1_000.0, 1_000.0, 0.0, 10.0, 0.0) == 1_000.0


def test_share_of_the_volume_that_is_used_up_exactly_fills_nothing_more() -> None:
    assert fill_qty(10.0, 1000.0, 0.1, 100.0, False) == 0.0
    assert fill_qty(10.0, 1000.0, 0.1, 99.0, False) == 1.0
    assert fill_qty(10.0, 1000.0, 0.1, 90.0, False) == 10.0
    assert fill_qty(10.0, 0.0, 0.0, 0.0, False) == 10.0  # a share of nothing is no cap


# ---- risk

FREE = LimitValues(
    max_order_qty=math.inf,
    max_order_notional=math.inf,
    max_position_qty=math.inf,
    max_position_notional=math.inf,
    max_gross_exposure=math.inf,
    max_margin_used=math.inf,
    price_collar=math.inf,
    reference_max_age_s=math.inf,
    max_daily_loss=math.inf,
    max_drawdown=math.inf,
    max_orders=math.inf,
    throttle_window_s=60.0,
    duplicate_window_s=0.0,
)
ORDER = OrderFacts(BUY, 10.0, MARKET, NONE, NONE)
FACTS = RiskFacts(
    state=ACTIVE,
    exits_pass=False,
    restricted=False,
    allow_short=True,
    capability=0,
    wash_trade=False,
    duplicate_age_s=math.inf,
    orders_in_window=0.0,
    reference_price=100.0,
    reference_age_s=0.0,
    position_qty=0.0,
    pending_qty=0.0,
    gross_exposure=0.0,
    margin_used=0.0,
    buying_power=1_000_000.0,
    order_cost=1_000.0,
    equity=8_000.0,
    day_start_equity=8_000.0,
    peak_equity=8_000.0,
)


def failed(order: OrderFacts = ORDER, facts: RiskFacts = FACTS, limits: LimitValues = FREE) -> set[Check]:
    """The checks that refuse an order."""
    passed, observed, bound = np.zeros(CHECK_COUNT, bool), np.full(CHECK_COUNT, NONE), np.full(CHECK_COUNT, NONE)
    approved = check_order(order, facts, limits, passed, observed, bound)
    refused = {Check(at) for at in range(CHECK_COUNT) if not passed[at]}
    assert bool(approved) == (not refused)
    return refused


def test_an_ordinary_order_passes_every_check() -> None:
    assert failed() == set()


@pytest.mark.parametrize(
    ("check", "limit", "observed"),
    [
        (Check.ORDER_QTY, "max_order_qty", 10.0),
        (Check.ORDER_NOTIONAL, "max_order_notional", 1_000.0),
        (Check.POSITION_QTY, "max_position_qty", 10.0),
        (Check.POSITION_NOTIONAL, "max_position_notional", 1_000.0),
        (Check.GROSS_EXPOSURE, "max_gross_exposure", 0.125),
        (Check.MARGIN, "max_margin_used", 0.0375),  # 30 % of 1,000 USD over 8,000
        (Check.THROTTLE, "max_orders", 1.0),
    ],
)
def test_a_figure_that_touches_its_limit_passes_and_the_next_one_does_not(
    check: Check, limit: str, observed: float
) -> None:
    assert failed(limits=FREE._replace(**{limit: observed})) == set()
    assert failed(limits=FREE._replace(**{limit: just_under(observed)})) == {check}


def test_a_reference_price_that_is_exactly_as_old_as_allowed_passes() -> None:
    limits = FREE._replace(reference_max_age_s=300.0)
    assert failed(facts=FACTS._replace(reference_age_s=300.0), limits=limits) == set()
    assert failed(facts=FACTS._replace(reference_age_s=just_over(300.0)), limits=limits) == {Check.REFERENCE}


def test_an_order_without_a_reference_price_is_refused() -> None:
    assert Check.REFERENCE in failed(facts=FACTS._replace(reference_price=0.0))


def test_a_limit_exactly_at_the_collar_passes() -> None:
    limits, order = FREE._replace(price_collar=0.125), ORDER._replace(order_type=LIMIT, limit_price=112.5)
    assert failed(order, limits=limits) == set()
    assert failed(order._replace(limit_price=just_over(112.5)), limits=limits) == {Check.PRICE_COLLAR}
    sell = ORDER._replace(side_sign=SELL, order_type=LIMIT, limit_price=87.5)
    assert failed(sell, limits=limits) == set()
    assert failed(sell._replace(limit_price=just_under(87.5)), limits=limits) == {Check.PRICE_COLLAR}
    assert beyond_reference(order._replace(limit_price=90.0), 100.0) == 0.0  # passive


def test_a_reference_of_less_than_a_dollar_is_one() -> None:
    assert failed(facts=FACTS._replace(reference_price=0.5)) == set()


def test_a_short_position_counts_by_its_size() -> None:
    sell = ORDER._replace(side_sign=SELL)
    assert failed(sell, limits=FREE._replace(max_position_qty=10.0)) == set()
    assert failed(sell, limits=FREE._replace(max_position_qty=9.0)) == {Check.POSITION_QTY}
    assert failed(sell, limits=FREE._replace(max_position_notional=999.0)) == {Check.POSITION_NOTIONAL}


def test_an_account_of_half_a_dollar_has_figures_and_one_of_nothing_has_none() -> None:
    limits = FREE._replace(max_gross_exposure=2_000.0, max_margin_used=600.0)
    assert failed(facts=FACTS._replace(equity=0.5), limits=limits) == set()
    assert failed(facts=FACTS._replace(equity=0.0), limits=limits) == {Check.GROSS_EXPOSURE, Check.MARGIN}


def test_half_a_share_on_its_way_counts() -> None:
    assert pending_exposure(100.0, BUY, 0.5, 0.0, 100.0) == 150.0
    assert pending_margin(100.0, BUY, 0.5, 0.0, 100.0) == 115.0
    assert not is_reducing(BUY, 0.25, 0.5, 0.0)


def test_an_order_that_costs_exactly_the_buying_power_passes() -> None:
    assert failed(facts=FACTS._replace(buying_power=1_000.0)) == set()
    assert failed(facts=FACTS._replace(buying_power=just_under(1_000.0))) == {Check.BUYING_POWER}


def test_the_same_order_is_no_duplicate_once_the_window_is_exactly_over() -> None:
    limits = FREE._replace(duplicate_window_s=1.0)
    assert failed(facts=FACTS._replace(duplicate_age_s=1.0), limits=limits) == set()
    assert failed(facts=FACTS._replace(duplicate_age_s=just_under(1.0)), limits=limits) == {Check.DUPLICATE}
    assert not in_window(10.0, 11.0, 1.0)
    assert in_window(10.0, just_under(11.0), 1.0)
    assert recent_count(np.array([-math.inf, 10.0, 10.5, 11.0]), 11.0, 1.0) == 2.0


@pytest.mark.parametrize(("check", "before"), [(Check.DAILY_LOSS, "day_start_equity"), (Check.DRAWDOWN, "peak_equity")])
def test_a_loss_exactly_at_its_bound_stops_nothing(check: Check, before: str) -> None:
    limits = FREE._replace(max_daily_loss=0.25) if check is Check.DAILY_LOSS else FREE._replace(max_drawdown=0.25)
    facts = FACTS._replace(equity=6_000.0, **{before: 8_000.0})
    if check is Check.DRAWDOWN:
        facts = facts._replace(day_start_equity=6_000.0)
    assert failed(facts=facts, limits=limits) == set()
    assert failed(facts=facts._replace(equity=just_under(6_000.0)), limits=limits) == {check}


def test_the_trading_state_changes_beyond_the_bounds_and_not_at_them() -> None:
    limits = FREE._replace(max_daily_loss=0.25, max_drawdown=0.5)
    assert state_after_close(ACTIVE, 6_000.0, 8_000.0, 8_000.0, limits) == ACTIVE
    assert state_after_close(ACTIVE, just_under(6_000.0), 8_000.0, 8_000.0, limits) == REDUCING
    assert state_after_close(HALTED, just_under(6_000.0), 8_000.0, 8_000.0, limits) == HALTED
    assert state_after_close(ACTIVE, 6_000.0, 8_000.0, 12_000.0, limits) == ACTIVE
    assert state_after_close(ACTIVE, 5_999.99, 8_000.0, 12_000.0, limits) == HALTED


def test_nothing_is_lost_by_a_gain_and_everything_where_there_was_nothing() -> None:
    assert lost_since(8_001.0, 8_000.0) == 0.0
    assert lost_since(1.0, 0.0) == math.inf
    assert lost_since(0.5, 1.0) == 0.5


def test_an_order_that_closes_a_position_exactly_reduces_and_one_share_more_does_not() -> None:
    assert is_reducing(SELL, 10.0, 10.0, 0.0)
    assert not is_reducing(SELL, 11.0, 10.0, 0.0)
    assert not is_reducing(SELL, 10.0, 10.0, -1.0)
    assert is_reducing(BUY, 10.0, -10.0, -5.0)  # what goes the other way does not count
    assert not is_reducing(BUY, 10.0, 0.0, 0.0)
    assert not sells_short(SELL, 10.0, 10.0, 0.0)
    assert sells_short(SELL, 11.0, 10.0, 0.0)
    assert sells_short(SELL, 10.0, 10.0, -1.0)
    assert not sells_short(BUY, 10.0, -20.0, 0.0)


def test_states_let_through_what_they_promise() -> None:
    closing = ORDER._replace(side_sign=SELL)
    held = FACTS._replace(position_qty=10.0)
    assert failed(facts=FACTS._replace(state=REDUCING)) == {Check.TRADING_STATE}
    assert failed(closing, held._replace(state=REDUCING)) == set()
    assert failed(closing, held._replace(state=HALTED)) == {Check.TRADING_STATE}
    exit_ = closing._replace(protective=True)
    assert failed(exit_, held._replace(state=HALTED)) == {Check.TRADING_STATE}
    assert failed(exit_, held._replace(state=HALTED, exits_pass=True)) == set()


# ---- numbers and folding


def test_prices_from_one_dollar_on_have_two_decimals() -> None:
    assert (tick_decimals(1.0), tick_decimals(just_under(1.0))) == (2, 4)


def test_rounding_at_the_half() -> None:
    assert (round_to(2.5, 0), round_to(-2.5, 0), round_to(just_under(2.5), 0)) == (3.0, -3.0, 2.0)
    assert (round_down(2.999, 2), round_down(-2.999, 2)) == (2.99, -2.99)
    assert math.isinf(round_to(math.inf, 2)) and math.isnan(round_to(math.nan, 2))


def test_nothing_is_a_positive_zero() -> None:
    """A negative zero would print as -0.00 and hash differently."""
    held, _, _ = fold_fill(-1.0, 50.0, 1.0, 50.0)
    _, _, realized = fold_fill(1.0, 50.0, -1.0, 50.0)
    for value in (held, realized, fold_fill(-1.0, 50.0, 1.0, 50.0)[2], cash_flow(0.0, 50.0, 0.0)):
        assert value == 0.0
        assert math.copysign(1.0, value) == 1.0


def test_a_fold_that_reduces_keeps_the_average_and_one_that_turns_takes_the_price() -> None:
    assert fold_fill(2.0, 50.0, -1.5, 60.0) == (0.5, 50.0, 15.0)
    assert fold_fill(2.0, 50.0, -2.5, 60.0) == (-0.5, 60.0, 20.0)
    assert fold_fill(-2.0, 50.0, 1.5, 60.0) == (-0.5, 50.0, -15.0)
    assert fold_fill(-2.0, 50.0, 2.5, 60.0) == (0.5, 60.0, -20.0)
    assert fold_fill(0.5, 50.0, -0.25, 60.0) == (0.25, 50.0, 2.5)
    assert fold_fill(0.5, 50.0, -0.75, 60.0) == (-0.25, 60.0, 5.0)


def test_worth_of_an_account_counts_what_is_held_alone() -> None:
    nothing, halves, prices = np.zeros(2), np.array([0.5, -0.5]), np.array([10.0, 30.0])
    assert exposure(halves, prices) == (5.0, 15.0, 20.0)
    assert exposure(nothing, np.array([math.nan, 30.0])) == (0.0, 0.0, 0.0)
    assert equity(100.0, halves, prices) == 90.0
    assert equity(100.0, nothing, np.array([math.nan, 30.0])) == 100.0
    assert math.copysign(1.0, equity(-0.001, nothing, prices)) == 1.0, "no minus before nothing"


# ---- what a small change to a rule would otherwise go unnoticed by


def is_plain_zero(value: float) -> bool:
    """Whether a value is 0 without a minus, which would print as -0.00 and hash differently."""
    return value == 0.0 and math.copysign(1.0, value) == 1.0


def test_a_number_whose_digits_a_float_holds_just_so_is_left_as_it_is() -> None:
    value = 900_719_925.4740993  # times ten million it is 2**53; one step further down lies another that is too
    assert value * 1e7 == 2.0**53
    assert (round_to(value, 7), round_down(value, 7)) == (value, value)


def test_credit_beyond_the_margin_buys_nothing() -> None:
    assert buying_power(0.0, 3_000.0, 10_000.0, 0.0, 0.0, 2.0) == 0.0
    assert buying_power(0.0, 3_000.0, 10_001.0, 0.0, 0.0, 4.0) == 0.0
    assert buying_power(0.0, 3_000.0, 9_999.0, 0.0, 0.0, 4.0) == 1.2


def test_a_day_trader_s_short_positions_take_buying_power_too() -> None:
    assert buying_power(7_000.0, 10_000.0, 5_000.0, 2_000.0, 0.0, 4.0) == (10_000.0 - 0.3 * 7_000.0) * 4.0


def test_an_order_that_only_closes_costs_nothing_even_without_a_price() -> None:
    assert order_cost(SELL, 10.0, 10.0, NONE, NONE) == 0.0
    assert pending_exposure(100.0, SELL, 10.0, 10.0, NONE) == 100.0
    assert pending_margin(100.0, SELL, 10.0, 10.0, NONE) == 100.0


def test_a_part_of_a_share_and_a_dollar_count() -> None:
    assert order_cost(BUY, 0.5, 0.0, 50.0, NONE) == 25.0
    assert reserved_cost(1.0, 2.0, 1.0) == 0.5


def test_an_account_with_exactly_nothing_is_ruined() -> None:
    assert is_ruined(0.0) and not is_ruined(0.01)


def test_nothing_held_ties_up_a_positive_nothing() -> None:
    assert is_plain_zero(maintenance_margin(0.0, 10.0))


def test_a_split_that_pays_less_than_half_a_cent_pays_a_positive_nothing() -> None:
    qty, _, cash = split_position(-1.0, 1.0, 0.5, 0.001)
    assert qty == 0.0
    assert is_plain_zero(cash)


def test_shares_that_the_volume_has_exactly_fill_whole() -> None:
    assert fill_qty(2.5, 25.0, 0.1, 0.0, False) == 2.5
    assert fill_qty(2.5, just_under(24.0), 0.1, 0.0, False) == 2.0


def costs(per_share: float = 0.0, bps: float = 0.0, minimum: float = 0.0) -> CostRates:
    return CostRates(per_share, bps, minimum, 0.0, 0.0)


def test_cash_that_pays_exactly_for_a_buy_fills_it() -> None:
    assert 0.3 / 0.1 < 3.0, "a division would lose a share"
    assert affordable_qty(3.0, 0.1, 0.3, costs(), False) == 3.0


@pytest.mark.parametrize(
    ("rates", "price", "cash", "fractional", "expected"),
    [
        (costs(per_share=1.0), 100.0, 10_100.0, False, 100.0),
        (costs(bps=100.0), 100.0, 10_100.0, False, 100.0),
        (costs(bps=100.0), 100.0, 1_010_000.0, True, 10_000.0),  # and not one more for 10,001 in place of 10,000
        (costs(minimum=35.0), 10.0, 105.0, False, 7.0),
        (costs(per_share=0.005), 19.633, 98.19, False, 4.0),  # five would cost a cent more, rounded twice
        (costs(per_share=0.005), 13.013, 65.09, True, 4.999),
    ],
)
def test_a_cash_account_fills_what_it_can_pay_with_its_commission(
    rates: CostRates, price: float, cash: float, fractional: bool, expected: float
) -> None:
    assert affordable_qty(1e6, price, cash, rates, fractional) == expected


def test_each_limit_is_read_from_its_own_column() -> None:
    table = np.stack([np.full(13, NONE), np.arange(13.0)])
    assert limits_at(table, 1) == LimitValues(*range(13))


def test_what_is_not_allowed_shows_a_one_over_a_bound_of_nothing() -> None:
    passed, observed, bound = np.zeros(CHECK_COUNT, bool), np.full(CHECK_COUNT, NONE), np.full(CHECK_COUNT, NONE)
    facts = FACTS._replace(restricted=True, capability=1, wash_trade=True, allow_short=False)
    check_order(ORDER._replace(side_sign=SELL), facts, FREE, passed, observed, bound)
    for check in (Check.RESTRICTED, Check.CAPABILITY, Check.WASH_TRADE, Check.SHORT_SALE):
        assert (observed[check], bound[check], bool(passed[check])) == (1.0, 0.0, False), check
    check_order(ORDER, FACTS, FREE, passed, observed, bound)
    assert (observed[Check.SHORT_SALE], bound[Check.SHORT_SALE]) == (0.0, 1.0)


def called(qty: float, price: float, cash: float) -> tuple[bool, float]:
    """Whether there is a margin call on one position, and the signed shares that are traded then."""
    shares, out = np.array([qty]), np.zeros(1)
    return liquidation(shares, shares, np.array([price]), cash, out), float(out[0])


def test_an_account_that_is_worth_exactly_its_margin_is_not_called() -> None:
    assert called(10.0, 10.0, -70.0) == (False, 0.0)
    assert called(10.0, 10.0, -70.01)[0]


def test_a_margin_of_less_than_a_dollar_is_one() -> None:
    assert called(1.0, 3.0, -2.5) == (True, -1.0)


def test_an_account_that_is_worth_less_than_nothing_keeps_nothing() -> None:
    assert called(100.0, 1.0, -105.0) == (True, -100.0)


def test_half_of_a_single_share_is_closed_as_half() -> None:
    assert held_after(1.0, 0.5, 1e6, 0.0, True) == 0.5
    assert held_after(-1.0, 0.5, 1e6, 0.0, True) == -0.5


# ---- sizing and exits

WHOLE, PARTS = SizingRules(min_trade=0.0), SizingRules(fractional=True, min_trade=0.0)


def test_an_order_needs_a_price_and_a_share_of_a_share_only_its_part() -> None:
    assert desired_order(0.5, 0.0, 0.0, 0.0, 1_000.0, WHOLE) == 0.0
    assert desired_order(0.5, 0.0, 0.0, 100.0, 100.0, PARTS) == 0.5
    assert desired_order(1.0, 0.0, 0.0, 0.1, 0.5, PARTS) == 5.0, "half a dollar is something, too"


def test_a_position_is_reduced_to_its_target_and_no_further() -> None:
    assert desired_order(0.4, 10.0, 0.0, 10.0, 100.0, WHOLE) == -6.0
    assert desired_order(-0.6, -10.0, 0.0, 10.0, 100.0, WHOLE) == 4.0


def test_what_is_on_its_way_is_neither_bought_twice_nor_sold_beyond_the_position() -> None:
    assert desired_order(0.0, 10.0, 5.0, 10.0, 100.0, WHOLE) == -10.0
    assert desired_order(0.0, -10.0, -5.0, 10.0, 100.0, WHOLE) == 10.0
    assert desired_order(-2.0, 10.0, -4.0, 10.0, 100.0, WHOLE) == -6.0, "it is closed first, then turned"
    assert desired_order(-2.0, 1.0, -0.5, 10.0, 100.0, PARTS) == -0.5


def test_only_whole_shares_are_sold_short_and_fractions_held_are_sold_whole() -> None:
    assert desired_order(-0.5, 0.0, -2.5, 10.0, 100.0, PARTS) == -2.0
    assert desired_order(0.0, 0.5, 0.0, 100.0, 1_000.0, PARTS) == -0.5
    assert desired_order(0.0, 0.0, 0.5, 100.0, 1_000.0, PARTS) == -0.5


def test_a_trade_that_is_exactly_as_large_as_it_has_to_be_is_made() -> None:
    assert desired_order(0.01, 0.0, 0.0, 10.0, 1_000.0, SizingRules(min_trade=0.01)) == 1.0
    assert desired_order(0.01, 0.0, 0.0, 10.0, 1_000.0, SizingRules(min_trade=just_over(0.01))) == 0.0


def fitted(
    wanted: list[float],
    *,
    cash: float,
    close: float = 50.0,
    positions: tuple[float, float] = (0.0, 0.0),
    pending: tuple[float, float] = (0.0, 0.0),
    rules: SizingRules = WHOLE,
    equity: float = 1_000.0,
) -> list[float]:
    """What is left of two wanted quantities after the budget was looked at."""
    out = np.array(wanted)
    fit_to_budget(np.array(positions), np.array(pending), np.full(2, close), cash, equity, rules, out)
    return [float(qty) for qty in out]


def test_one_share_on_its_way_covered_or_sold_counts_in_the_budget() -> None:
    assert fitted([0.0, 2.0], cash=100.0) == [0.0, 2.0]
    assert fitted([0.0, 2.0], cash=100.0, pending=(1.0, 0.0)) == [0.0, 1.0]
    assert fitted([0.0, 200.0], cash=100.0, close=0.5, pending=(100.0, 0.0)) == [0.0, 100.0]
    assert fitted([1.0, 2.0], cash=100.0, positions=(-1.0, 0.0)) == [1.0, 1.0]
    assert fitted([-1.0, 2.0], cash=50.0, positions=(1.0, 0.0)) == [-1.0, 2.0]
    assert fitted([-1.0, 2.0], cash=50.0) == [-1.0, 1.0], "a short sale brings no money that may be spent"


def test_one_share_beyond_the_money_is_not_bought() -> None:
    assert fitted([0.0, 1.0], cash=49.0) == [0.0, 0.0]
    assert fitted([0.0, 1.0], cash=0.5, close=0.8) == [0.0, 0.0]


def test_what_the_budget_leaves_has_to_be_large_enough() -> None:
    enough, more = SizingRules(min_trade=0.02), SizingRules(min_trade=just_over(0.02))
    assert fitted([0.0, 4.0], cash=20.0, close=10.0, rules=enough) == [0.0, 2.0]
    assert fitted([0.0, 4.0], cash=20.0, close=10.0, rules=more) == [0.0, 0.0]


def test_an_exit_is_due_at_its_very_price() -> None:
    assert exit_due(10.0, 95.0, 95.0, NONE) and not exit_due(10.0, just_over(95.0), 95.0, NONE)
    assert exit_due(10.0, 130.0, NONE, 130.0) and not exit_due(10.0, just_under(130.0), NONE, 130.0)
    assert exit_due(-10.0, 105.0, 105.0, NONE) and not exit_due(-10.0, just_under(105.0), 105.0, NONE)


def test_a_share_or_half_of_one_is_protected_as_a_long_position() -> None:
    assert exit_prices(1.0, 100.0, NONE, 0.05, 0.30, NONE) == (95.0, 130.0)
    assert exit_prices(0.5, 100.0, NONE, 0.05, 0.30, NONE) == (95.0, 130.0)
    extreme = np.array([50.0])
    update_extreme(np.array([0.5]), np.array([40.0]), extreme)
    assert extreme[0] == 50.0


def test_a_dividend_is_paid_in_cents_and_a_short_position_pays_it() -> None:
    assert (dividend_cash(10.0, 0.25), dividend_cash(-10.0, 0.25)) == (2.5, -2.5)
    assert is_plain_zero(dividend_cash(-1.0, 0.001))


def test_a_close_after_a_split_and_a_dividend_is_never_less_than_nothing() -> None:
    assert close_after(10.0, 2.0, 1.0) == 4.0
    assert close_after(10.0, 1.0, 9.5) == 0.5
    assert close_after(1.0, 1.0, 2.0) == 0.0
    assert math.isnan(close_after(NONE, 2.0, 1.0))
