"""Several strategies in one session: each as if it were alone, the account their sum, and no failure that spreads."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.dying import die_after
from tests.venue import as_alpaca, beside, goes_on, recent_minutes
from trader_lib.config.settings import Settings, load_settings
from trader_lib.errors.taxonomy import Halted, Misused
from trader_lib.exchange.costs import Costs
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.journal.journal import SqliteJournal
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars
from trader_lib.replay.replay import replay
from trader_lib.research.backtest import BacktestResult, backtest
from trader_lib.risk.limits import Limits
from trader_lib.session.session import SessionResult, run_session
from trader_lib.session.spec import SessionSpec, StrategyShare
from trader_lib.steering.control import ControlFile
from trader_lib.strategy.contract import Strategy
from trader_lib.strategy.exits import ProtectiveExits
from trader_lib.trading.events import (
    AgentFailed,
    FillRecorded,
    OrderFailed,
    OrderIntended,
    PortfolioChanged,
    RiskDecided,
    TradingState,
    TradingStateChanged,
)
from trader_lib.trading.order_list import compare_order_lists, order_list_hash
from trader_lib.trading.orders import SIDE_SIGN, OrderRequest, OrderSide

TREND = StrategyShare(
    name="trend",
    strategy="sma_cross",
    params={"fast": 5, "slow": 15},
    symbols=("AAPL", "IBM"),
    capital="60%",
    limits=Limits(max_order_notional=30_300),
)
SWING = StrategyShare(
    name="swing",
    strategy="rsi_reversion",
    params={"period": 3, "entry": 45.0, "exit": 65.0, "stop_loss": 0.02, "take_profit": 0.03},
    symbols=("MSFT", "GOOG"),
    capital="30000",
    min_trade=0.002,
)
APART = SessionSpec(
    strategies=(TREND, SWING),
    symbols=("AAPL", "GOOG", "IBM", "MSFT"),
    start=date(2005, 1, 3),
    end=date(2005, 4, 29),
    costs=Costs(commission_per_share=0.01, commission_minimum=1.0, slippage_bps=3),
)


pytestmark = pytest.mark.usefixtures("quiet")


def settings(transport: str = "in_process") -> Settings:
    return load_settings(environ={}, env_file=None, overrides={"broker": {"transport": transport}})


def fresh(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


async def run(folder: Path, spec: SessionSpec = APART, transport: str = "in_process", **more: Any) -> SessionResult:
    fresh(folder)
    return await run_session(spec, settings(transport), journal_path=folder / "journal.sqlite", **more)


def alone(spec: SessionSpec, label: str) -> BacktestResult:
    """The backtest of one strategy of a session, with what it has there."""
    one = next(one for one in spec.assignments() if one.label == label)
    assert one.capital is not None and one.limits is not None
    return backtest(
        one.strategy,
        sample_bars(one.symbols),
        start=spec.start,
        end=spec.end,
        cash=float(one.capital),
        costs=spec.costs,
        limits=one.limits,
        multiplier=spec.multiplier,
        sizing=one.sizing,
    )


def said(result: SessionResult, *kinds: Any) -> list[Any]:
    with SqliteJournal(result.journal_path, read_only=True) as journal:
        return [event.payload for event in journal.read(types=kinds)]


def assert_each_as_if_alone(spec: SessionSpec, result: SessionResult) -> None:
    for share in spec.strategies:
        tested, orders = alone(spec, share.name), result.orders_of(share.name)
        found = compare_order_lists(tested.orders, orders)
        assert found.equal, "\n".join([share.name, found.summary(), *(row.sentence() for row in found.differences[:5])])
        assert orders and tested.order_list_hash == order_list_hash(orders)
        equity = result.curves[share.name]["equity"].to_numpy()
        assert np.array_equal(tested.equity.to_numpy()[-len(equity) :], equity)
        refused = [(no.decided_at, no.symbol) for no in result.refusals if no.strategy == share.name]
        assert refused == [(no.decided_at, no.symbol) for no in tested.refusals]


def assert_sum(result: SessionResult, spec: SessionSpec) -> None:
    """At every bar the account holds what its strategies hold together, and what none of them was given."""
    idle = spec.cash - sum(share.capital_usd(spec.cash) for share in spec.strategies)
    told = said(result, PortfolioChanged)
    assert told
    for one in told:
        together: dict[str, Decimal] = {}
        for strategy in one.strategies:
            for position in strategy.positions:
                together[position.symbol] = together.get(position.symbol, Decimal(0)) + position.qty
        assert {symbol: qty for symbol, qty in together.items() if qty} == {p.symbol: p.qty for p in one.positions}
        assert one.cash == sum(strategy.cash for strategy in one.strategies) + idle
        cents = abs(one.equity - sum(strategy.equity for strategy in one.strategies) - idle)
        assert cents <= Decimal("0.01") * len(one.strategies)  # each is rounded to its own cent
    assert result.reconciliation.ok, result.reconciliation.differences
    assert all(agent.state == "ok" for agent in result.health), result.health


@pytest.mark.parametrize("transport", ["in_process", "http"])
async def test_each_strategy_orders_what_it_would_order_alone(transport: str, tmp_path: Path) -> None:
    result = await run(tmp_path, transport=transport)
    assert_each_as_if_alone(APART, result)
    assert_sum(result, APART)
    assert [no.strategy for no in result.refusals] and {no.strategy for no in result.refusals} == {"trend"}
    assert all("trend: The order is worth" in no.reasons[0] for no in result.refusals)
    assert any(order.purpose == "exit" for order in result.orders_of("swing"))
    assert len(result.orders) == len(result.orders_of("trend")) + len(result.orders_of("swing"))
    assert {agent.agent for agent in result.health} >= {"strategy:trend", "strategy:swing"}


async def test_over_both_wires_two_strategies_say_the_same_in_the_same_sequence(tmp_path: Path) -> None:
    spec = APART.model_copy(update={"end": date(2005, 2, 28)})
    journals = []
    for transport in ("in_process", "http"):
        result = await run(tmp_path / transport, spec, transport)
        with SqliteJournal(result.journal_path, read_only=True) as journal:
            journals.append([(event.source, event.payload) for event in journal.read() if event.kind == "output"])
    assert journals[0] == journals[1]


async def test_in_the_same_symbols_the_account_is_the_sum(tmp_path: Path) -> None:
    shares = tuple(share.model_copy(update={"symbols": ()}) for share in APART.strategies)
    spec = APART.model_copy(update={"strategies": shares, "symbols": ("AAPL", "IBM", "MSFT")})
    result = await run(tmp_path, spec)
    assert_sum(result, spec)
    shared = {order.symbol for order in result.orders_of("trend")} & {
        order.symbol for order in result.orders_of("swing")
    }
    assert shared == {"AAPL", "IBM", "MSFT"}


async def test_torn_anywhere_two_strategies_go_on_as_they_would_have(tmp_path: Path) -> None:
    spec = APART.model_copy(update={"end": date(2005, 2, 18)})
    one = await run(tmp_path / "whole", spec)
    with SqliteJournal(one.journal_path, read_only=True) as journal:
        events = list(journal.read())
    for rows in (1, 3, *range(40, len(events), 97), len(events) - 2):
        folder = fresh(tmp_path / f"torn-{rows}")
        with SqliteJournal(folder / "journal.sqlite") as torn:
            for event in events[:rows]:
                torn.append(event)
        other = await run(folder, spec, resume=True)
        assert other.order_list_hash == one.order_list_hash, rows
        assert (other.equity_end, other.cash_end, other.bars) == (one.equity_end, one.cash_end, one.bars), rows
        for label, curve in one.curves.items():
            assert curve.equals(other.curves[label]), (rows, label)
        names = [intent.request.client_order_id for intent in said(other, OrderIntended)]
        assert len(names) == len(set(names)), rows


async def test_two_strategies_replay(tmp_path: Path) -> None:
    result = await run(tmp_path)
    with SqliteJournal(result.journal_path, read_only=True) as journal:
        again = await replay(journal)
        assert again.agrees, again.sentence()
        assert again.strategy == "trend + swing" and again.params["trend"]["fast"] == 5
        other = APART.assignments()[1].strategy.model_copy(update={"entry": 40.0})
        found = await replay(journal, other=other, of="swing")
        assert found.divergences and {divergence.agent for divergence in found.divergences} == {"strategy:swing"}
        same = await replay(journal, other=APART.assignments()[0].strategy, of="trend")
        assert same.agrees and same.compared["order_proposed"]
        with pytest.raises(Misused, match="Did you mean 'trend'"):
            await replay(journal, other=other, of="trent")


# ---- limits


async def test_drawdown_of_one_strategy_halts_that_one_alone(tmp_path: Path) -> None:
    careful = SWING.model_copy(update={"limits": Limits(max_drawdown=0.01)})
    spec = APART.model_copy(update={"strategies": (TREND, careful)})
    result = await run(tmp_path, spec)
    changes = said(result, TradingStateChanged)
    assert [(change.strategy, change.state) for change in changes] == [("swing", TradingState.HALTED)]
    assert_each_as_if_alone(spec, result)
    assert_sum(result, spec)


async def test_a_day_that_one_strategy_loses_reduces_that_one_alone(tmp_path: Path) -> None:
    careful = SWING.model_copy(update={"limits": Limits(max_daily_loss=0.001)})
    spec = APART.model_copy(update={"strategies": (TREND, careful)})
    result = await run(tmp_path, spec)
    changes = said(result, TradingStateChanged)
    assert [(change.strategy, change.state) for change in changes] == [("swing", TradingState.REDUCING)]
    assert_each_as_if_alone(spec, result)
    assert_sum(result, spec)
    assert any("swing: Trading is REDUCING" in reason for no in result.refusals for reason in no.reasons)


async def test_the_account_s_own_limits_bind_all_of_them(tmp_path: Path) -> None:
    spec = APART.model_copy(update={"limits": Limits(max_gross_exposure=0.45)})
    result = await run(tmp_path, spec)
    assert_sum(result, spec)
    reasons = [
        reason for no in result.refusals for reason in no.reasons if reason.startswith("account: Gross exposure")
    ]
    assert reasons
    for decided in said(result, RiskDecided):
        assert {check.scope for check in decided.checks} == {"account", decided.request.strategy}


# ---- one that fails


class Failing(Strategy):
    """Holds what it has from the fifth bar on, and raises from the eighth."""

    raise_at: int = 8

    @property
    def warmup(self) -> int:
        return 1

    @property
    def exits(self) -> ProtectiveExits | None:
        return ProtectiveExits(trailing_stop=0.05)

    def targets(self, bars: Bars) -> NDArray[np.float64]:
        if bars.n >= self.raise_at:
            raise ZeroDivisionError("a strategy of somebody's")
        return np.where(np.arange(bars.n) >= 4, 0.4, 0.0)[:, None] * np.ones((1, len(bars.symbols)))


async def test_one_that_raises_orders_nothing_more_keeps_its_exits_and_stops_nobody(tmp_path: Path) -> None:
    spec = APART.model_copy(update={"costs": Costs()})
    built = {"trend": spec.assignments()[0].strategy, "swing": Failing()}
    result = await run(tmp_path, spec, strategy=built)
    failures = said(result, AgentFailed)
    assert {failure.agent for failure in failures} == {"strategy:swing"} and len(failures) == 6
    health = {agent.agent: agent for agent in result.health}
    assert health["strategy:swing"].state == "down" and "ZeroDivisionError" in health["strategy:swing"].reason
    assert all(agent.state == "ok" for name, agent in health.items() if name != "strategy:swing")
    tested, orders = alone(spec, "trend"), result.orders_of("trend")
    assert compare_order_lists(tested.orders, orders).equal

    mine = result.orders_of("swing")
    entries = [order for order in mine if order.purpose == "entry"]
    exits = [order for order in mine if order.purpose == "exit"]
    assert entries and max(order.decided_at for order in entries) < min(order.decided_at for order in exits[2:])
    moved = [order for order in exits if order.symbol == "GOOG"]
    assert len(moved) > 1, "the stop trails on, though the strategy is not asked any more"
    assert [order.stop_price for order in moved] == sorted(order.stop_price or Decimal(0) for order in moved)
    held = sum(SIDE_SIGN[order.side] * order.filled_qty for order in entries if order.symbol == "GOOG")
    assert moved[-1].filled_qty == held > 0
    assert result.reconciliation.ok


async def test_every_order_and_every_fill_has_its_owner(tmp_path: Path) -> None:
    result = await run(tmp_path)
    owner = {intent.request.client_order_id: intent.request.strategy for intent in said(result, OrderIntended)}
    assert set(owner.values()) == {"trend", "swing"}
    assert all(name.startswith(f"{label}-") for name, label in owner.items())
    fills = [recorded.fill for recorded in said(result, FillRecorded)]
    assert {fill.strategy for fill in fills} == {"trend", "swing"}
    assert all(fill.strategy == owner[fill.client_order_id] for fill in fills if fill.client_order_id in owner)
    assert any(fill.client_order_id not in owner for fill in fills), "the leg of a pair has an id that the broker gave"


# ---- against each other


class Stepped(Strategy):
    """Holds a weight of each symbol from one bar on to another."""

    weight: float
    first: int
    last: int

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars: Bars) -> NDArray[np.float64]:
        row = np.arange(bars.n)
        held = np.where((row >= self.first) & (row < self.last), self.weight, 0.0)
        return held[:, None] * np.ones((1, len(bars.symbols)))


OPPOSED = SessionSpec(
    strategies=(
        TREND.model_copy(update={"symbols": (), "capital": "50%", "limits": Limits()}),
        SWING.model_copy(update={"symbols": (), "capital": "50%"}),
    ),
    symbols=("IBM",),
    start=date(2005, 1, 3),
    end=date(2005, 2, 4),
)


async def test_long_and_short_net_out_and_what_the_sum_cannot_do_is_refused_with_the_figures(tmp_path: Path) -> None:
    built = {"trend": Stepped(weight=0.5, first=3, last=9), "swing": Stepped(weight=-0.3, first=5, last=12)}
    result = await run(tmp_path, OPPOSED, strategy=built)
    assert_sum(result, OPPOSED)
    held = [
        {one.strategy: [position.qty for position in one.positions] for one in told.strategies}
        for told in said(result, PortfolioChanged)
    ]
    assert any(one["trend"] and one["trend"][0] > 0 and one["swing"] and one["swing"][0] < 0 for one in held)
    assert held[-1] == {"trend": [], "swing": []} and not result.positions
    refused = [no for no in result.refusals if no.strategy == "trend"]
    assert refused and all(no.checks == ("NETTING",) for no in refused)
    assert "account: The account is" in refused[0].reasons[0] and "an order may close" in refused[0].reasons[0]
    assert not said(result, OrderFailed), "what risk lets pass, the broker takes"


async def test_one_does_not_trade_with_the_other(tmp_path: Path) -> None:
    built = {"trend": Stepped(weight=0.5, first=3, last=9), "swing": Stepped(weight=0.4, first=9, last=30)}
    result = await run(tmp_path, OPPOSED, strategy=built)
    assert_sum(result, OPPOSED)
    (no,) = result.refusals
    assert (no.strategy, no.side, no.checks) == ("swing", "buy", ("WASH_TRADE",))
    assert "account: It could trade with the open order trend-" in no.reasons[0]
    first = result.orders_of("swing")[0]
    assert 0 < (first.decided_at - no.decided_at).days <= 3, "the next bar asks again"
    assert not said(result, OrderFailed)


async def test_operator_who_flattens_closes_what_the_strategies_hold(tmp_path: Path) -> None:
    built = {"trend": Stepped(weight=0.5, first=3, last=30), "swing": Stepped(weight=-0.3, first=5, last=30)}
    told: list[bool] = []

    def closed(bars: int, _stamp: datetime) -> None:
        if bars == 12:
            ControlFile.beside(tmp_path / "journal.sqlite").append("flatten", reason="test", by="ada")
            told.append(True)

    result = await run(tmp_path, OPPOSED, strategy=built, progress=closed)
    assert told and not result.positions
    assert_sum(result, OPPOSED)
    out = [order for order in result.orders if order.purpose == "exit"]
    assert [(order.strategy, order.filled_qty == order.qty) for order in out] == [("trend", True)]
    last = {one.strategy: sum(p.qty for p in one.positions) for one in said(result, PortfolioChanged)[-1].strategies}
    assert last["trend"] == -last["swing"] > 0, "what one is long and the other short, the account does not hold"
    assert said(result, TradingStateChanged)[-1].state is TradingState.HALTED


# ---- at a real market, where the account is what it is


@asynccontextmanager
async def market() -> AsyncIterator[Settings]:
    """Alpaca's protocol around an account that holds 10 IBM already, and whose market goes on by itself."""
    bars = recent_minutes()
    with ExchangeServer(Exchange(bars, bars.n - 60), key_id="key", secret_key="secret") as server:
        held = OrderRequest(symbol="IBM", side=OrderSide.BUY, qty=Decimal(10), client_order_id="before")
        server.call(server.exchange.advance)
        server.call(lambda: server.exchange.submit(held))
        server.call(server.exchange.advance)
        broker = as_alpaca(server)

        async with asyncio.timeout(60), beside(goes_on(server)):
            yield load_settings(environ={}, env_file=None, overrides={"broker": broker})


def in_real_time(**fields: Any) -> SessionSpec:
    fast = {"strategy": "sma_cross", "params": {"fast": 2, "slow": 4}}
    shares = [
        {"name": "trend", "symbols": ["AAPL"], "capital": "50%", **fast},
        {"name": "swing", "symbols": ["IBM"], "capital": 20_000, **fast},
    ]
    given = {"strategies": shares, "symbols": ("AAPL", "IBM"), "timeframe": "1Min", "bars_max": 5}
    return SessionSpec.model_validate(given | fields)


async def test_what_the_account_holds_goes_to_the_one_that_trades_it(tmp_path: Path) -> None:
    async with market() as real:
        result = await run_session(in_real_time(), real, journal_path=tmp_path / "journal.sqlite")
    opening = said(result, FillRecorded)[0].fill
    assert (opening.client_order_id, opening.strategy, opening.qty) == ("opening", "swing", 10)
    for one in said(result, PortfolioChanged):
        together = {p.symbol: p.qty for strategy in one.strategies for p in strategy.positions}
        assert together == {p.symbol: p.qty for p in one.positions}
    assert result.bars >= 5 and result.reconciliation.ok, result.reconciliation.differences


async def test_account_that_cannot_be_shared_out_is_not_taken_over(tmp_path: Path) -> None:
    both = [
        share.model_dump() | {"symbols": ("AAPL", "IBM"), "capital": "60%" if share.name == "trend" else "30%"}
        for share in in_real_time().strategies
    ]
    async with market() as real:
        with pytest.raises(Halted, match="trend and swing both trade it"):
            await run_session(
                in_real_time(strategies=both), real, journal_path=fresh(tmp_path / "a") / "journal.sqlite"
            )
        rich = in_real_time(cash=1_000_000)
        with pytest.raises(Halted, match=r"given 520,000.00 USD together, and the account is worth"):
            await run_session(rich, real, journal_path=fresh(tmp_path / "b") / "journal.sqlite")


# ---- a real death


@pytest.mark.slow
async def test_killed_in_the_middle_of_two_strategies_it_sends_no_order_twice(tmp_path: Path) -> None:
    one = await run(tmp_path / "whole", transport="http")
    path = fresh(tmp_path / "killed") / "journal.sqlite"
    for rows in (150, 90):  # killed, and its successor too
        await die_after(rows, path, "tests.test_session_several", "APART", "http")
    other = await run(path.parent, transport="http", resume=True)
    assert other.order_list_hash == one.order_list_hash and other.equity_end == one.equity_end
    assert other.reconciliation.ok and all(curve.equals(other.curves[label]) for label, curve in one.curves.items())
    names = [intent.request.client_order_id for intent in said(other, OrderIntended)]
    assert len(names) == len(set(names))
    assert_each_as_if_alone(APART, other)
