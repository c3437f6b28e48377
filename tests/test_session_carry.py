"""What holding costs, and when cash may be used, is the same in a backtest, in a session and over HTTP, to the cent."""

import math
from collections import Counter
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.given import Given
from tests.parity.drawn import both as drawn_both
from tests.parity.drawn import configuration, difference, play
from tests.test_exchange_operations import client_of
from tests.test_rules_carry import daily, half_hours
from tests.test_session_parity import assert_same, both, settings, specification
from trader_lib.clock.sessions import NEW_YORK
from trader_lib.errors.taxonomy import Rejected
from trader_lib.exchange.costs import Costs
from trader_lib.exchange.engine import Exchange
from trader_lib.journal.journal import SqliteJournal
from trader_lib.market.actions import Announced
from trader_lib.market.sample import sample_bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.replay.replay import replay
from trader_lib.research.backtest import backtest
from trader_lib.rules.sizing import SizingRules
from trader_lib.runs.session_cells import journal_bars, session_statistics
from trader_lib.session.session import SessionResult, run_session
from trader_lib.session.spec import SessionSpec, StrategyShare
from trader_lib.trading.events import BarsClosed
from trader_lib.trading.orders import OrderRequest, OrderSide

pytestmark = pytest.mark.usefixtures("quiet")

RATES = Costs(margin_rate=0.08, borrow_rate=0.03, slippage_bps=2)


@pytest.mark.parametrize("transport", ["in_process", "http"])
async def test_session_is_charged_what_the_backtest_was(transport: str, tmp_path: Path) -> None:
    weights = ((0.0, 0.0),) * 5 + ((1.4, -0.3),) * 40 + ((0.0, -0.8),) * 20
    strategy, bars = Given(weights=weights), sample_bars("AAPL,IBM", "2005-01-03", "2005-06-30")
    costs, sizing = RATES, SizingRules(leverage=1.8)
    tested = backtest(strategy, bars, costs=costs, sizing=sizing, check=False)
    spec = SessionSpec(symbols=bars.symbols, costs=costs, leverage=1.8)
    run = await run_session(
        spec, settings(transport), bars=bars, strategy=strategy, journal_path=tmp_path / "journal.sqlite"
    )
    assert_same(tested, run)
    assert tested.simulation.interest > 100.0 and tested.simulation.borrow_fees > 100.0
    assert np.array_equal(tested.cash.to_numpy()[-run.bars :], run.curve["cash"].to_numpy())


@pytest.mark.parametrize("seed", [3, 5, 9])
async def test_drawn_accounts_over_http_are_charged_the_same(seed: int) -> None:
    drawn = configuration(seed)
    drawn.account["costs"] = drawn.account["costs"].model_copy(
        update={"margin_rate": 0.25, "borrow_rate": 0.8, "settlement_days": 1}
    )
    assert difference(*await drawn_both(drawn, "http")) == ""


@pytest.mark.parametrize("first", range(0, 24, 6))
def test_drawn_configurations_agree(first: int) -> None:
    seen: Counter[str] = Counter()
    for outcome in map(play, range(first, first + 6)):
        assert outcome.broken == "", f"seed {outcome.seed}: {outcome.broken}"
        seen += outcome.seen
    assert seen["orders"] > 10


@pytest.mark.parametrize("transport", ["in_process", "http"])
async def test_cash_account_that_waits_for_settlement_orders_the_same(transport: str, tmp_path: Path) -> None:
    days = ("2010-03-08", "2010-03-12")
    bars = synthetic_bars(("AAPL", "MSFT"), *days, timeframe="30Min", seed=7)
    given: dict[str, Any] = {
        "strategy": "rsi_reversion",
        "params": {"period": 5},
        "symbols": ("AAPL", "MSFT"),
        "timeframe": "30Min",
        "multiplier": 1,
        "start": date(2010, 3, 9),
        "end": date(2010, 3, 12),
    }
    later = specification(given, costs=Costs(settlement_days=1))
    tested, run = await both(later, transport, tmp_path, bars)
    assert_same(tested, run)
    at_once = backtest(
        later.build_strategy(), bars, start=later.start, end=later.end, sizing=later.sizing, multiplier=1
    )
    assert tested.order_list_hash != at_once.order_list_hash  # money of the morning was missing in the afternoon


CARRIED = ((0.0, 0.0),) * 5 + ((1.4, -0.3),) * 20 + ((0.0, -0.8),) * 10


async def carried(folder: Path, **more: Any) -> SessionResult:
    bars = sample_bars("AAPL,IBM", "2005-01-03", "2005-02-25")
    spec = SessionSpec(symbols=bars.symbols, costs=RATES, leverage=1.8)
    journal = folder / "journal.sqlite"
    return await run_session(
        spec, settings("in_process"), bars=bars, strategy=Given(weights=CARRIED), journal_path=journal, **more
    )


async def test_the_journal_says_what_was_charged_and_replays_to_the_same(tmp_path: Path) -> None:
    run = await carried(tmp_path)
    booked = run.booked
    assert (booked[["INT", "FEE"]] <= 0).all().all() and (booked["DIV"] == 0).all() and len(booked) > 20
    assert run.carried["interest"] == -round(booked["INT"].sum(), 2) > 0.0
    assert session_statistics(run, journal_bars(run))["borrow_fees"] == run.carried["borrow_fees"] > 0.0
    with SqliteJournal(run.journal_path, read_only=True) as record:
        again = await replay(record, strategy=Given(weights=CARRIED))
    assert again.agrees, again.divergences


async def test_torn_anywhere_nothing_is_charged_twice(tmp_path: Path) -> None:
    one = await carried(tmp_path)
    with SqliteJournal(one.journal_path, read_only=True) as journal:
        events = list(journal.read())
    closes = [n for n, event in enumerate(events, 1) if isinstance(event.payload, BarsClosed) and n > 60]
    for rows in (closes[0] - 2, closes[0] - 1, closes[0], closes[0] + 1, closes[9], closes[9] - 1, len(events) - 3):
        folder = tmp_path / f"torn-{rows}"
        folder.mkdir()
        with SqliteJournal(folder / "journal.sqlite") as torn:
            for event in events[:rows]:
                torn.append(event)
        other = await carried(folder, resume=True)
        assert other.order_list_hash == one.order_list_hash and other.reconciliation.ok, rows
        assert (other.equity_end, other.cash_end) == (one.equity_end, one.cash_end), rows
        assert other.booked.equals(one.booked), rows


async def test_each_of_several_strategies_pays_what_it_would_pay_alone(tmp_path: Path) -> None:
    """One borrows cash, the other shares; the account, which has both, is charged for what it owes as a whole."""
    bars = sample_bars("AAPL,IBM", "2005-01-03", "2005-03-31")
    levered, short = Given(weights=((1.7,),) * 30 + ((0.0,),)), Given(weights=((-0.6,),) * 40 + ((-0.2,),))
    shares = (
        StrategyShare(name="levered", strategy="sma_cross", symbols=("AAPL",), capital="60000", leverage=1.8),
        StrategyShare(name="short", strategy="sma_cross", symbols=("IBM",), capital="40000"),
    )
    spec = SessionSpec(symbols=bars.symbols, strategies=shares, costs=RATES)
    built = {"levered": levered, "short": short}
    journal = tmp_path / "journal.sqlite"
    run = await run_session(spec, settings("in_process"), bars=bars, strategy=built, journal_path=journal)
    paid = {}
    for one in spec.assignments(built):
        assert one.capital is not None and one.limits is not None
        tested = backtest(
            one.strategy,
            bars.sel(one.symbols),
            cash=float(one.capital),
            costs=RATES,
            sizing=one.sizing,
            limits=one.limits,
            check=False,
        )
        equity = run.curves[one.label]["equity"].to_numpy()
        assert np.array_equal(tested.equity.to_numpy()[-len(equity) :], equity), one.label
        paid[one.label] = tested.carried
    assert paid["levered"]["interest"] > 100.0 and paid["short"]["borrow_fees"] > 100.0
    assert run.carried["borrow_fees"] == paid["short"]["borrow_fees"]
    assert 0.0 < run.carried["interest"] < paid["levered"]["interest"]  # the account has the proceeds of the sale, too
    assert run.reconciliation.ok and all(agent.state == "ok" for agent in run.health)
    with SqliteJournal(run.journal_path, read_only=True) as record:
        assert (await replay(record, strategy=built)).agrees


async def test_dividends_and_splits_of_raw_prices_reach_the_session(tmp_path: Path) -> None:
    """A long and a short position across a dividend, and a split of 3 for 2 with a dividend on the same day."""
    closes = [[100.0, 40.0]] * 6 + [[98.0, 40.0]] * 6 + [[64.0, 39.0]] * 6
    gaps = {6: [98.0, 40.0], 12: [64.0, 39.0]}
    days = daily(closes, gaps=gaps, adjustment="raw")
    known = [Announced("A", days.day(6), dividend=2.0), Announced("A", days.day(12), 1.5)]
    known += [Announced("A", days.day(12), dividend=0.35), Announced("B", days.day(12), dividend=1.0)]
    bars, strategy = days.with_actions(known), Given(weights=((0.4, -0.4), (math.nan, math.nan)))
    tested = backtest(strategy, bars, costs=RATES, check=False)
    spec = SessionSpec(symbols=bars.symbols, costs=RATES, adjustment="raw")
    for transport in ("in_process", "http"):
        journal = tmp_path / f"{transport}.sqlite"
        run = await run_session(spec, settings(transport), bars=bars, strategy=strategy, journal_path=journal)
        assert_same(tested, run)
        assert run.carried == tested.carried and len(run.corporate_actions) == len(tested.corporate_actions) == 1
    assert run.carried["dividends"] == 800.0 + 0.35 * 600 - 1_000.0


async def test_activities_show_over_rest_what_was_charged(tmp_path: Path) -> None:
    days = daily([[100.0, 40.0]] * 8, gaps={6: [100.0, 40.0]}, adjustment="raw")
    bars = days.with_actions([Announced("A", days.day(6), dividend=2.0)])
    exchange = Exchange(bars, start_index=1, costs=Costs(margin_rate=0.36, borrow_rate=0.72, volume_share=0))
    async with client_of(exchange) as client:
        for symbol, side, qty in (("A", OrderSide.BUY, 1_200), ("B", OrderSide.SELL, 100)):
            exchange.submit(OrderRequest(symbol=symbol, side=side, qty=Decimal(qty), client_order_id=symbol))
        while not exchange.is_over:
            exchange.advance()
        interest = (await client.get("/v2/account/activities/INT", params={"direction": "asc"})).json()
        assert [one["net_amount"] for one in interest[:2]] == ["-16.01", "-48.1"]  # of 16,008 and 16,032.01
        assert interest[1] | {"id": ""} == {
            "id": "",
            "activity_type": "INT",
            "date": "2024-01-05",
            "net_amount": "-48.1",
            "description": "Margin interest for 3 days",
            "status": "executed",
        }
        fees = (await client.get("/v2/account/activities", params={"activity_types": "FEE"})).json()
        assert fees[0]["net_amount"] == "-8" and fees[0]["description"] == "Fee for borrowed shares for 1 day"
        (dividend,) = (await client.get("/v2/account/activities/DIV")).json()
        assert (dividend["symbol"], dividend["qty"], dividend["per_share_amount"]) == ("A", "1200", "2")
        every = (await client.get("/v2/account/activities")).json()
        assert {one["activity_type"] for one in every} == {"FILL", "INT", "FEE", "DIV"}
        stamps = [one["id"][:17] for one in every]
        assert stamps == sorted(stamps, reverse=True) and len({one["id"] for one in every}) == len(every)
        newest = (await client.get("/v2/account/activities", params={"page_size": 3})).json()
        rest = (await client.get("/v2/account/activities", params={"page_token": newest[-1]["id"]})).json()
        assert [one["id"] for one in newest + rest] == [one["id"] for one in every]
        trades = (await client.get("/v2/account/activities", params={"category": "trade_activity"})).json()
        assert {one["activity_type"] for one in trades} == {"FILL"}


async def test_unsettled_money_is_no_buying_power_over_rest() -> None:
    bars = half_hours(3)
    exchange = Exchange(bars, start_index=1, multiplier=1, costs=Costs(settlement_days=1, volume_share=0))
    async with client_of(exchange) as client:

        async def account() -> tuple[str, str, str]:
            told = (await client.get("/v2/account")).json()
            return told["cash"], told["buying_power"], told["non_marginable_buying_power"]

        def trade(side: OrderSide, name: str) -> None:
            exchange.submit(OrderRequest(symbol="A", side=side, qty=Decimal(900), client_order_id=name))
            exchange.advance()

        trade(OrderSide.BUY, "in")
        trade(OrderSide.SELL, "out")
        assert await account() == ("100000", "10000", "10000")
        with pytest.raises(Rejected, match="insufficient buying power"):
            exchange.submit(OrderRequest(symbol="B", side=OrderSide.BUY, qty=Decimal(200), client_order_id="early"))
        while exchange.now.astimezone(NEW_YORK).hour != 16:
            exchange.advance()
        assert await account() == ("100000", "100000", "100000")
