"""The compiled engine against a plain reading of its own timeline, on random markets."""

import math
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.given import Given
from trader_lib.clock.sessions import TradingCalendar
from trader_lib.config.settings import Settings
from trader_lib.exchange.costs import Costs
from trader_lib.journal.journal import SqliteJournal
from trader_lib.market.bars import Bars, Provenance, Timeframe
from trader_lib.research.backtest import BacktestResult, backtest
from trader_lib.research.engine import run
from trader_lib.research.ledger import (
    CANCELED,
    EXPIRED,
    FILLED,
    OPEN,
    REFUSALS_KEPT,
    Market,
    Rules,
    plain_market,
)
from trader_lib.risk.checks import RecentOrders, decide
from trader_lib.risk.limits import Limits, SymbolLimits
from trader_lib.rules.account import buying_power, may_short, order_cost, reserved_cost
from trader_lib.rules.checks import (
    HALTED,
    REDUCING,
    RiskFacts,
    margin_of,
    pending_exposure,
    pending_margin,
    state_after_close,
)
from trader_lib.rules.exits import NO_EXITS, exit_due, exit_prices
from trader_lib.rules.folding import cash_flow, equity, exposure, fold_fill
from trader_lib.rules.matching import affordable_qty, commission, fill_price, fill_qty, match_oco, match_price
from trader_lib.rules.numbers import round_to, to_decimal, to_float
from trader_lib.rules.sizing import SizingRules
from trader_lib.session.session import SessionResult, run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.strategy.exits import ProtectiveExits
from trader_lib.strategy.planner import PlannedAction, Planner
from trader_lib.trading.events import OrderIntended, TradingState, TradingStateChanged
from trader_lib.trading.order_list import compare_order_lists
from trader_lib.trading.orders import OrderClass, OrderRequest, OrderSide, OrderType, TimeInForce

SYMBOLS = ("AAA", "BBB", "CCC", "DDD")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
STATUS = {OPEN: "open", FILLED: "filled", CANCELED: "canceled", EXPIRED: "expired"}


@dataclass
class Leg:
    kind: int
    limit: float
    stop: float
    status: str = "open"
    filled: float = 0.0
    average: float = 0.0
    fills: list[tuple[int, float, float]] = field(default_factory=list)


@dataclass
class Order:
    decided: int
    s: int
    side: int
    qty: float
    exit: bool
    cost: float
    legs: list[Leg]
    remaining: float
    triggered: bool = False

    def end(self, status: str) -> None:
        for leg in self.legs:
            leg.status = status


@dataclass
class Reference:
    """One order, one bar, one step at a time; objects and Decimals in place of arrays."""

    market: Market
    costs: Costs
    limits: Limits
    sizing: SizingRules
    exits: ProtectiveExits | None
    multiplier: float
    cash: float

    def __post_init__(self) -> None:
        n = self.market.close.shape[1]
        self.symbols = SYMBOLS[:n]
        self.planner = Planner(self.symbols, self.sizing, self.exits)
        self.recent = RecentOrders.within(self.limits)
        self.mark, self.mark_s = np.full(n, math.nan), np.full(n, math.nan)
        self.orders: list[Order] = []
        self.working: list[Order] = []
        self.refusals: list[tuple[int, int, tuple[str, ...]]] = []
        self.state, self.day_start, self.peak = 0, self.cash, self.cash
        self.curve: list[float] = []

    def run(self, weights: np.ndarray, start: int) -> None:
        for t in range(start, len(weights)):
            self.match(t)
            if self.market.ends_session[t]:
                for order in self.working:
                    if not order.exit:
                        order.end("expired")
                        self.planner.on_order_closed(self.symbols[order.s], "entry")
                self.working = [order for order in self.working if order.exit]
            close = self.market.close[t]
            alive = ~np.isnan(close)
            self.mark[alive], self.mark_s[alive] = close[alive], self.market.closed_s[t]
            self.planner.on_close(close)
            self.equity = equity(self.cash, self.planner.positions, self.mark)
            self.curve.append(self.equity)
            self.peak = max(self.peak, self.equity)
            before = self.state
            self.state = state_after_close(before, self.equity, self.day_start, self.peak, self.limits.values())
            self.decide(t, weights[t])
            if before != HALTED and self.state == HALTED:
                self.withdraw()
            if self.market.ends_session[t]:
                self.day_start = self.equity
        for order in self.working:
            order.end("canceled")

    def withdraw(self) -> None:
        for order in self.working:
            if not order.exit:
                order.end("canceled")
                self.planner.on_order_closed(self.symbols[order.s], "entry")
        self.working = [order for order in self.working if order.exit]

    def match(self, t: int) -> None:
        used = dict.fromkeys(range(len(self.symbols)), 0.0)
        rates = self.costs.rates()
        for order in self.working:
            bar = tuple(float(figures[t, order.s]) for figures in self.market[:3])
            if math.isnan(bar[0]):
                continue
            leg, by_stop = order.legs[0], False
            if len(order.legs) == 2:
                stop = order.legs[1].stop
                price, by_stop, order.triggered = match_oco(order.side, leg.limit, stop, order.triggered, *bar)
            else:
                price, order.triggered = match_price(leg.kind, order.side, leg.limit, leg.stop, order.triggered, *bar)
            leg = order.legs[1] if by_stop else leg
            if math.isnan(price):
                continue
            volume = float(self.market.volume[t, order.s])
            qty = fill_qty(order.remaining, volume, rates.volume_share, used[order.s], self.sizing.fractional)
            price = fill_price(leg.kind, order.side, price, rates.slippage_bps)
            if order.side > 0 and self.multiplier == 1:
                qty = affordable_qty(qty, price, self.cash, rates, self.sizing.fractional)
            if qty <= 0:
                continue
            fee = commission(qty, price, rates.per_share, rates.bps, rates.minimum)
            self.cash = round_to(self.cash + cash_flow(order.side * qty, price, fee), 2)
            self.planner.on_fill(self.symbols[order.s], order.side * qty, price, "exit" if order.exit else "entry")
            used[order.s] = round_to(used[order.s] + qty, 9)
            leg.filled, leg.average, _ = fold_fill(leg.filled, leg.average, qty, price)
            leg.fills.append((t, qty, price))
            order.remaining = round_to(order.remaining - qty, 9)
            if order.remaining == 0:
                order.end("canceled")
                leg.status = "filled"
        self.working = [order for order in self.working if order.remaining > 0]

    def decide(self, t: int, weights: np.ndarray) -> None:
        actions = self.planner.plan(weights.copy(), self.market.close[t], self.cash, self.equity)
        canceled, refused = set(), []
        for action in actions:
            s = self.symbols.index(action.symbol)
            if action.kind.startswith("cancel"):
                is_exit = action.kind == "cancel_exit"
                (order,) = [order for order in self.working if order.s == s and order.exit == is_exit]
                order.end("canceled")
                self.working.remove(order)
                self.planner.on_order_closed(action.symbol, "exit" if is_exit else "entry")
                if is_exit:
                    canceled.add(s)
            elif not self.submit(t, s, action) and action.kind == "order":
                refused.append(s)
        for s in refused:
            position = self.planner.positions[s]
            if s not in canceled or position == 0 or self.exits is None:
                continue
            where = (position, self.planner.avg_entry[s], self.planner.extreme[s])
            stop, limit = exit_prices(*where, *self.exits.rates())
            if (math.isnan(stop) and math.isnan(limit)) or exit_due(position, self.market.close[t, s], stop, limit):
                continue
            kind = "limit" if math.isnan(stop) else "stop" if math.isnan(limit) else "oco"
            side = -1 if position > 0 else 1
            self.submit(t, s, PlannedAction("exit", self.symbols[s], side, abs(position), kind, limit, stop))

    def submit(self, t: int, s: int, action: PlannedAction) -> bool:
        now = EPOCH + timedelta(seconds=float(self.market.closed_s[t]))
        oco, is_exit = action.order_type == "oco", action.kind == "exit"
        limit = None if math.isnan(action.limit_price) else to_decimal(action.limit_price, 4)
        stop = None if math.isnan(action.stop_price) else to_decimal(action.stop_price, 4)
        request = OrderRequest(
            symbol=action.symbol,
            side=OrderSide.BUY if action.side_sign > 0 else OrderSide.SELL,
            qty=to_decimal(action.qty, 9),
            type=OrderType.LIMIT if oco else OrderType(action.order_type),
            limit_price=limit,
            stop_price=None if oco else stop,
            stop_loss_price=stop if oco else None,
            order_class=OrderClass.OCO if oco else OrderClass.SIMPLE,
            time_in_force=TimeInForce.GTC if is_exit else TimeInForce.DAY,
            purpose="exit" if is_exit else "entry",
            client_order_id=f"{t}-{s}",
        )
        facts = self.facts(s, request, now)
        decision = decide(request, facts, self.limits)
        if not decision.approved:
            self.refusals.append((t, s, decision.refused_by))
            return False
        self.recent.record(request, now)
        nan = math.nan
        if oco:
            legs = [Leg(1, action.limit_price, nan), Leg(2, nan, action.stop_price)]
        else:
            legs = [Leg({"market": 0, "limit": 1, "stop": 2}[action.order_type], action.limit_price, action.stop_price)]
        order = Order(t, s, action.side_sign, action.qty, is_exit, facts.order_cost, legs, action.qty)
        self.orders.append(order)
        self.working.append(order)
        self.planner.on_order_open(
            action.symbol,
            action.side_sign * action.qty,
            request.purpose,
            stop_price=action.stop_price,
            limit_price=action.limit_price,
        )
        return True

    def facts(self, s: int, request: OrderRequest, now: datetime) -> RiskFacts:
        held = self.planner.positions
        long, short, gross = exposure(held, self.mark)
        reserved, pending, margin, wash = 0.0, 0.0, margin_of(held, self.mark), False
        for order in self.working:
            reserved = round_to(reserved + reserved_cost(order.cost, order.qty, order.remaining), 2)
            if not order.exit:
                gross = pending_exposure(gross, order.side, order.remaining, held[order.s], self.mark[order.s])
                margin = pending_margin(margin, order.side, order.remaining, held[order.s], self.mark[order.s])
                pending += order.side * order.remaining if order.s == s else 0.0
            pairs = request.order_class is OrderClass.OCO or len(order.legs) == 2
            wash = wash or (order.s == s and not pairs and self.meets(request, order))
        side = 1 if request.side is OrderSide.BUY else -1
        return RiskFacts(
            state=self.state,
            exits_pass=True,
            restricted=request.symbol in self.limits.restricted,
            capability=0,
            wash_trade=wash,
            allow_short=self.limits.of(request.symbol).allow_short and may_short(self.equity, self.multiplier),
            duplicate_age_s=self.recent.duplicate_age_s(request, now),
            orders_in_window=self.recent.count(now),
            reference_price=float(self.mark[s]),
            reference_age_s=now.timestamp() - float(self.mark_s[s]),
            position_qty=float(held[s]),
            pending_qty=pending,
            gross_exposure=gross,
            margin_used=margin,
            buying_power=buying_power(self.cash, self.equity, long, short, reserved, self.multiplier),
            order_cost=order_cost(
                side, to_float(request.qty), held[s], float(self.mark[s]), to_float(request.limit_price)
            ),
            equity=self.equity,
            day_start_equity=self.day_start,
            peak_equity=self.peak,
        )

    def meets(self, request: OrderRequest, other: Order) -> bool:
        if (other.side > 0) == (request.side is OrderSide.BUY):
            return False
        if other.legs[0].kind != 1 or request.type is not OrderType.LIMIT:
            return True
        buyer, seller = to_float(request.limit_price), other.legs[0].limit
        return buyer >= seller if other.side < 0 else seller >= buyer


def random_market(rng: np.random.Generator) -> Market:
    rows, n = int(rng.integers(20, 90)), int(rng.integers(1, 5))
    swing = float(rng.choice([0.004, 0.02, 0.05]))
    close = np.round(rng.uniform(20, 200, n) * np.exp(np.cumsum(rng.normal(0, swing, (rows, n)), axis=0)), 2) + 5
    gap = np.round(np.vstack([close[:1], close[:-1]]) * (1 + rng.normal(0, swing / 2, (rows, n))), 2)
    high = np.round(np.maximum(gap, close) * (1 + rng.uniform(0, swing, (rows, n))), 2)
    low = np.round(np.minimum(gap, close) * (1 - rng.uniform(0, swing, (rows, n))), 2)
    volume = np.floor(rng.lognormal(9, 2, (rows, n))) * (rng.random((rows, n)) > 0.1)
    arrays = [gap, np.maximum(high, np.maximum(gap, close)), np.minimum(low, np.minimum(gap, close)), close, volume]
    for s in range(1, n):
        first, last = (int(rng.integers(0, 8)), rows - int(rng.integers(0, 8))) if rng.random() < 0.5 else (0, rows)
        for array in arrays:
            array[:first, s] = array[last:, s] = math.nan
    session = int(rng.choice([1, 5, 13]))
    step = 86_400.0 if session == 1 else 60.0
    closed_s = 1e9 + np.arange(rows) * step
    return plain_market(*arrays, closed_s, (np.arange(rows) + 1) % session == 0)


def random_weights(rng: np.random.Generator, market: Market) -> np.ndarray:
    rows, n = market.close.shape
    changes = rng.random((rows, n)) < rng.choice([0.05, 0.2, 0.6])
    drawn = rng.choice([0.0, 0.0, 0.2, 0.5, 0.9, -0.3], (rows, n))
    weights = np.zeros((rows, n))
    for t in range(rows):
        weights[t] = np.where(changes[t], drawn[t], weights[t - 1] if t else 0.0)
    return np.where(np.isnan(market.close), 0.0, weights)


def some(rng: np.random.Generator, *values: object) -> object:
    return values[int(rng.integers(len(values)))]


def random_rules(rng: np.random.Generator) -> tuple[Costs, Limits, SizingRules, ProtectiveExits | None, int]:
    costs = Costs(
        commission_per_share=some(rng, 0.0, 0.005),
        commission_bps=some(rng, 0.0, 3.0),
        commission_minimum=some(rng, 0.0, 1.0),
        slippage_bps=some(rng, 0.0, 2.5),
        volume_share=some(rng, 0.0, 0.05, 0.1),
    )
    limits = Limits(
        max_order_qty=some(rng, None, None, 300),
        max_order_notional=some(rng, None, None, 20_000),
        max_position_qty=some(rng, None, None, 500),
        max_position_notional=some(rng, None, 40_000),
        max_gross_exposure=some(rng, None, 2.0, 0.8),
        max_margin_used=some(rng, 1.0, 1.0, 0.3),
        max_daily_loss=some(rng, None, None, 0.02),
        max_drawdown=some(rng, None, None, 0.03),
        symbols=some(rng, {}, {}, {"AAA": SymbolLimits(max_order_qty=150, allow_short=False)}),
        max_orders=some(rng, 200, 2),
        throttle_window_s=some(rng, 60.0, 200.0, 86_400.0),
        duplicate_window_s=some(rng, None, 1.0, 86_400.0),
        price_collar=some(rng, None, 0.10),
        restricted=some(rng, frozenset(), frozenset({"BBB"})),
        allow_short=some(rng, True, True, False),
    )
    stop, target, trail = some(rng, None, 0.03, 0.08), some(rng, None, 0.05, 0.15), some(rng, None, 0.04, 0.1)
    exits = (
        ProtectiveExits(stop_loss=stop, take_profit=target, trailing_stop=trail) if stop or target or trail else None
    )
    multiplier = int(some(rng, 1, 2, 4))
    fractional = exits is None and bool(rng.random() < 0.3)
    sizing = SizingRules(fractional, some(rng, 0.01, 0.0), some(rng, 1.0, 1.0, 1.5), multiplier > 1)
    return costs, limits, sizing, exits, multiplier


def told(text: str, *figures: float) -> tuple[object, ...]:
    return (text, *("-" if math.isnan(figure) else float(figure) for figure in figures))


def both(seed: int) -> tuple[Reference, object, Market]:
    rng = np.random.default_rng(seed)
    market = random_market(rng)
    weights = random_weights(rng, market)
    costs, limits, sizing, exits, multiplier = random_rules(rng)
    if seed % 3 == 0:
        weights = np.where(rng.random(weights.shape) < 0.5, math.nan, weights)
    start, cash = int(rng.integers(0, 5)), float(some(rng, 100_000.0, 30_000.0, 2_500.0))
    reference = Reference(market, costs, limits, sizing, exits, float(multiplier), cash)
    reference.run(weights, start)
    rules = Rules(
        costs.rates(),
        limits.table(reference.symbols),
        sizing,
        exits.rates() if exits else NO_EXITS,
        np.array([symbol in limits.restricted for symbol in reference.symbols]),
        np.array([limits.of(symbol).allow_short for symbol in reference.symbols]),
        float(multiplier),
    )
    return reference, run(market, weights, rules, start=start, starting_cash=cash), market


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 2**31))
def test_engine_gives_the_orders_of_a_plain_reading_of_the_timeline(seed: int) -> None:
    reference, simulation, _ = both(seed)
    expected, expected_fills = [], []
    for order in reference.orders:
        for leg in order.legs:
            expected_fills += [(t, len(expected), *told("", qty, price)[1:]) for t, qty, price in leg.fills]
            expected.append(
                (
                    *(order.decided, order.s, order.side, order.exit, leg.kind),
                    *told(leg.status, order.qty, leg.limit, leg.stop, leg.filled, leg.average),
                )
            )
    table = simulation.orders
    got = [
        (
            *(int(row["decided"]), int(row["symbol"]), int(row["side"]), bool(row["exit"]), int(row["type"])),
            *told(STATUS[int(row["status"])], row["qty"], row["limit"], row["stop"], row["filled"], row["average"]),
        )
        for row in table
    ]
    assert got == expected
    fills = [(int(f["bar"]), int(f["order"]), float(f["qty"]), float(f["price"])) for f in simulation.fills]
    assert sorted(fills) == sorted(expected_fills)
    assert simulation.equity[len(simulation.equity) - len(reference.curve) :].tolist() == reference.curve
    assert simulation.refused == len(reference.refusals) and simulation.state == reference.state
    assert [(int(r["decided"]), int(r["symbol"])) for r in simulation.refusals] == [r[:2] for r in reference.refusals]
    assert float(simulation.cash[-1]) == reference.cash


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**31))
def test_books_balance_at_every_bar(seed: int) -> None:
    _, simulation, market = both(seed)
    marks = np.zeros_like(market.close)
    last = np.zeros(market.close.shape[1])
    for t, row in enumerate(market.close):
        last = np.where(np.isnan(row), last, row)
        marks[t] = last
    worth = simulation.cash + (simulation.positions * marks).sum(axis=1)
    assert np.abs(worth - simulation.equity).max() < 0.006
    bought = np.zeros(market.close.shape[1])
    for fill in simulation.fills:
        assert market.volume[fill["bar"], fill["symbol"]] > 0 or fill["qty"] > 0
        bought[fill["symbol"]] += fill["side"] * fill["qty"]
    assert np.allclose(bought, simulation.positions[-1])
    assert (simulation.orders["status"] != OPEN).all()
    ordered = simulation.orders["qty"]
    assert (simulation.orders["filled"] <= ordered + 1e-9).all()


def test_random_markets_reach_every_corner() -> None:
    seen: set[str] = set()
    for seed in range(60):
        reference, simulation, _ = both(seed)
        seen |= {leg.status for order in reference.orders for leg in order.legs}
        seen |= {"oco" for order in reference.orders if len(order.legs) == 2}
        seen |= {"oco stop" for order in reference.orders if len(order.legs) == 2 and order.legs[1].filled}
        seen |= {"oco limit" for order in reference.orders if len(order.legs) == 2 and order.legs[0].filled}
        seen |= {"partial" for order in reference.orders for leg in order.legs if len(leg.fills) > 1}
        seen |= {"short" for order in reference.orders if not order.exit and order.side < 0}
        seen |= {name for *_, names in reference.refusals for name in names}
        seen |= {("active", "reducing", "halted")[simulation.state]}
    assert seen >= {"filled", "canceled", "expired", "oco", "oco stop", "oco limit", "partial", "short", "reducing"}
    assert seen >= {"RESTRICTED", "SHORT_SALE", "THROTTLE", "ORDER_QTY", "ORDER_NOTIONAL", "POSITION_QTY"}
    assert seen >= {
        "POSITION_NOTIONAL",
        "GROSS_EXPOSURE",
        "BUYING_POWER",
        "DAILY_LOSS",
        "TRADING_STATE",
        "MARGIN",
        "DRAWDOWN",
        "halted",
    }


def test_plain_decimals_are_exact_over_the_border() -> None:
    _, simulation, _ = both(7)
    for price in simulation.fills["price"]:
        assert float(to_decimal(price, 4)) == price
    for cash in simulation.cash:
        assert to_decimal(cash, 2) == Decimal(repr(float(cash)))


@pytest.mark.parametrize("seed", [1, 9])
def test_tables_grow_with_the_run(seed: int) -> None:
    rng = np.random.default_rng(seed)
    market = random_market(rng)
    n = market.close.shape[1]
    weights = random_weights(rng, market)
    exits = ProtectiveExits(stop_loss=0.03, take_profit=0.05).rates()
    never = np.zeros(n, np.bool_)
    rules = Rules(Costs().rates(), Limits().table(SYMBOLS[:n]), SizingRules(), exits, never, ~never, 2.0)
    roomy = run(market, weights, rules)
    tight = run(market, weights, rules, table_rows=1)
    assert len(roomy.orders) > 4 and tight.orders.tobytes() == roomy.orders.tobytes()
    assert tight.fills.tobytes() == roomy.fills.tobytes()


def test_refusals_beyond_the_bound_are_counted_not_kept() -> None:
    rows = REFUSALS_KEPT + 50
    flat = np.full((rows, 1), 100.0)
    closed_s = 1e9 + 60.0 * np.arange(rows)
    market = plain_market(flat, flat, flat, flat, flat, closed_s, np.zeros(rows, np.bool_))
    limits = Limits(max_order_qty=1).table(SYMBOLS[:1])
    never = np.zeros(1, np.bool_)
    rules = Rules(Costs().rates(), limits, SizingRules(), NO_EXITS, never, ~never, 2.0)
    simulation = run(market, np.full((rows, 1), 0.5), rules)
    assert simulation.refused == rows and len(simulation.refusals) == REFUSALS_KEPT
    assert not len(simulation.orders)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_same_question_same_answer(seed: int) -> None:
    first, second = both(seed)[1], both(seed)[1]
    for one, other in zip(first, second, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


BREACHING = [7, 10, 18, 24, 50]


async def in_both_engines(seed: int, **bounds: object) -> tuple[BacktestResult, SessionResult]:
    """A random strategy, market and rules, in a backtest and in a session of agents; bounds replace the random ones."""
    rng = np.random.default_rng(seed)
    market = random_market(rng)
    weights = random_weights(rng, market)
    costs, limits, sizing, exits, multiplier = random_rules(rng)
    limits = limits.model_copy(update=bounds)
    timeframe = "1Day" if rng.random() < 0.4 else "15Min"
    stamps = TradingCalendar().bar_stamps(date(2025, 11, 24), date(2026, 6, 1), timeframe)[: len(weights)]
    origin = Provenance("example", "none", Timeframe(timeframe), "raw", synthetic=True)
    symbols = SYMBOLS[: market.close.shape[1]]
    bars = Bars(*market[:5], pd.DatetimeIndex(stamps, tz="UTC"), symbols, origin)
    strategy = Given(weights=weights.tolist(), protection=exits)
    shared = {"costs": costs, "limits": limits, "multiplier": multiplier}
    result = backtest(strategy, bars, sizing=sizing, **shared)
    spec = SessionSpec(
        symbols=symbols,
        timeframe=timeframe,
        fractional=sizing.fractional,
        min_trade=sizing.min_trade,
        leverage=sizing.leverage,
        **shared,
    )
    settings_ = Settings(broker={"kind": "simulated", "transport": "in_process"})
    return result, await run_session(spec, settings_, bars=bars, strategy=strategy)


def assert_alike(result: BacktestResult, session: SessionResult) -> None:
    comparison = compare_order_lists(result.orders, session.orders)
    assert comparison.equal, comparison.summary()
    assert session.order_list_hash == result.order_list_hash and session.equity_end == result.equity_end
    ours = [(refusal.decided_at, refusal.symbol, refusal.checks, refusal.reasons) for refusal in result.refusals]
    theirs = [(refusal.decided_at, refusal.symbol, refusal.checks, refusal.reasons) for refusal in session.refusals]
    assert ours == theirs


@pytest.mark.parametrize("seed", [0, 5, 6, 13, 18])
async def test_a_session_of_agents_places_the_same_orders(seed: int) -> None:
    assert_alike(*await in_both_engines(seed))


def states(session: SessionResult) -> list[TradingStateChanged]:
    with SqliteJournal(session.journal_path, read_only=True) as journal:
        return [event.payload for event in journal.read(types=[TradingStateChanged])]


@pytest.mark.parametrize("seed", BREACHING)
async def test_a_drawdown_halts_both_engines_at_the_same_close(seed: int) -> None:
    result, session = await in_both_engines(seed, max_drawdown=0.01, max_daily_loss=None)
    assert_alike(result, session)
    (halt,) = states(session)
    assert result.simulation.state == HALTED and halt.state is TradingState.HALTED and halt.exits_pass


@pytest.mark.parametrize("seed", BREACHING)
async def test_a_day_s_loss_reduces_both_engines_at_the_same_close(seed: int) -> None:
    result, session = await in_both_engines(seed, max_drawdown=None, max_daily_loss=0.003)
    assert_alike(result, session)
    (change,) = states(session)
    assert result.simulation.state == REDUCING and change.state is TradingState.REDUCING


async def test_after_a_halt_positions_are_still_protected_and_nothing_opens() -> None:
    protected = 0
    for seed in BREACHING:
        _, session = await in_both_engines(seed, max_drawdown=0.01, max_daily_loss=None)
        (halt,) = states(session)
        with SqliteJournal(session.journal_path, read_only=True) as journal:
            events = list(journal.read())
        at = next(place for place, event in enumerate(events) if event.payload == halt)
        later = [event.payload.request for event in events[at:] if isinstance(event.payload, OrderIntended)]
        assert {request.purpose for request in later} <= {"exit"}
        protected += len(later)
    assert protected > 0
