"""The driver that follows a real market: on a virtual clock against doubles, and live against the exchange's server."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.venue import as_alpaca, beside, goes_on, recent_minutes
from trader_lib.agents.market_data import MarketDataAgent
from trader_lib.broker.inbox import BarArrived, Inbox
from trader_lib.broker.port import StreamCounters
from trader_lib.bus.bus import InProcessBus
from trader_lib.clock.clock import VirtualClock
from trader_lib.clock.ids import SeededIds
from trader_lib.clock.sessions import TradingCalendar
from trader_lib.config.settings import load_settings
from trader_lib.errors.taxonomy import Retryable, Unauthorized
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.journal.opening import open_journal
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.session.drivers import STOPPED, Gateway, RealTimeDriver, next_close
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.trading.events import (
    AccountReported,
    BarRow,
    BarsClosed,
    CancelIntended,
    ClockTicked,
    Event,
    FillRecorded,
    HistoryLoaded,
    OrderAcknowledged,
    OrderIntended,
    Reconciled,
    TradeUpdated,
)
from trader_lib.trading.orders import Order, OrderRequest, OrderSide
from trader_lib.trading.portfolio import Fill

CALENDAR = TradingCalendar()
ROW = BarRow(open=10, high=11, low=9, close=10, volume=100)


pytestmark = pytest.mark.usefixtures("quiet")


class Market:
    """A broker whose inbox the test fills and whose history the test has laid out; every wait moves the clock."""

    def __init__(self, clock: VirtualClock, step_s: float) -> None:
        self.inbox = PatientInbox(clock, step_s)
        self.bars: list[Bars | Exception] = []
        self.asked: list[tuple[date, date]] = []
        self.reports = 0
        self.counters = StreamCounters(True, 0, 0, 0, None)

    def streams(self) -> dict[str, StreamCounters]:
        return {"data": self.counters}

    async def account(self) -> AccountReported:
        self.reports += 1
        return AccountReported.model_validate({"cash": 1000, "equity": 1000, "buying_power": 1000})

    async def history(self, symbols: Sequence[str], timeframe: str, start: date, end: date, **more: Any) -> Bars:
        self.asked.append((start, end))
        found = self.bars.pop(0) if len(self.bars) > 1 else self.bars[0]
        if isinstance(found, Exception):
            raise found
        return found


class PatientInbox(Inbox):
    """An inbox in which waiting costs virtual time instead of real."""

    def __init__(self, clock: VirtualClock, step_s: float) -> None:
        super().__init__()
        self.clock, self.step_s = clock, step_s

    async def get(self, *, timeout_s: float | None = None) -> Any:
        if not len(self):
            self.clock.advance_to(self.clock.now() + timedelta(seconds=self.step_s))
            if self._failure is None:
                raise Retryable("nothing came")
        return await super().get(timeout_s=timeout_s)


class Stage:
    def __init__(self, start: datetime, timeframe: str, *, step_s: float = 1.0, **more: Any) -> None:
        self.clock = VirtualClock(start)
        self.bus = InProcessBus(self.clock, SeededIds("stage"), None, "stage")
        self.market = Market(self.clock, step_s)
        self.events: list[Event] = []
        self.commits = 0
        self.bus.subscribe("test", [], self.hear)
        self.agent = MarketDataAgent(self.bus, self.clock, CALENDAR, ("AAPL", "IBM"), timeframe)
        self.gateway = Gateway(self.bus, self.market, SeededIds("gateway"))  # type: ignore[arg-type]
        self.driver = RealTimeDriver(
            self.bus,
            self.clock,
            self.market,  # type: ignore[arg-type]
            self.market,
            CALENDAR,
            self.agent,
            self.gateway,
            SeededIds("driver"),
            self.commit,
            ("AAPL", "IBM"),
            timeframe,
            more.pop("last_at", None),
            **more,
        )

    async def hear(self, event: Event) -> None:
        self.events.append(event)

    def commit(self) -> None:
        self.commits += 1

    def heard(self, kind: Any) -> list[Any]:
        return [event.payload for event in self.events if isinstance(event.payload, kind)]


OPEN = datetime(2005, 1, 4, 14, 30, tzinfo=UTC)


async def test_minute_bars_come_from_the_stream_once_all_symbols_have_theirs() -> None:
    stage = Stage(OPEN + timedelta(minutes=1), "1Min", bars_max=1)
    stage.market.inbox.put(BarArrived("AAPL", OPEN, ROW))
    stage.market.inbox.put(BarArrived("IBM", OPEN, ROW))
    stage.market.inbox.put(BarArrived("FB", OPEN, ROW))
    assert await stage.driver.run(asyncio.Event()) == "1 bars were traded"
    closed = stage.heard(BarsClosed)
    assert len(closed) == 1 and list(closed[0].bars) == ["AAPL", "IBM"] and stage.commits
    assert stage.market.reports == 1 and not stage.market.asked


async def test_symbol_that_did_not_trade_is_not_waited_for_longer_than_a_moment() -> None:
    stage = Stage(OPEN + timedelta(minutes=1), "1Min", bars_max=1)
    stage.market.inbox.put(BarArrived("AAPL", OPEN, ROW))
    await stage.driver.run(asyncio.Event())
    assert list(stage.heard(BarsClosed)[0].bars) == ["AAPL"]
    assert 5 <= (stage.clock.now() - OPEN).total_seconds() - 60 <= 8


async def test_daily_bars_are_fetched_after_the_close_and_asked_for_until_they_are_there() -> None:
    bars = sample_bars(["AAPL", "IBM"], start="2005-01-03", end="2005-01-04")
    stage = Stage(datetime(2005, 1, 4, 15, tzinfo=UTC), "1Day", bars_max=1, step_s=600, last_at=bars.at(0), tick_s=900)
    stage.market.bars = [Retryable("down"), bars.head(1), bars]
    await stage.driver.run(asyncio.Event())
    closed = stage.heard(BarsClosed)
    assert [bar.at for bar in closed] == [bars.at(1)] and stage.clock.now() > closed[0].closed_at
    assert stage.market.asked == [(date(2004, 12, 30), date(2005, 1, 4))] * 3  # a thin symbol may have none today
    assert len(stage.heard(ClockTicked)) > 5


async def test_bars_that_are_not_closed_yet_are_left_for_later() -> None:
    bars = sample_bars(["AAPL", "IBM"], start="2005-01-03", end="2005-01-05")
    ends = datetime(2005, 1, 4, 22, tzinfo=UTC)
    stage = Stage(datetime(2005, 1, 4, 15, tzinfo=UTC), "1Day", step_s=600, ends_at=ends)
    stage.market.bars = [bars]
    assert await stage.driver.run(asyncio.Event()) == "the end was reached"
    assert [bar.at for bar in stage.heard(BarsClosed)] == [bars.at(0), bars.at(1)]


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (datetime(2005, 1, 4, 15, 10, tzinfo=UTC), datetime(2005, 1, 4, 15, 30, tzinfo=UTC)),  # in the first hour
        (datetime(2005, 1, 4, 20, 45, tzinfo=UTC), datetime(2005, 1, 4, 21, 0, tzinfo=UTC)),  # the last is short
        (datetime(2005, 1, 4, 12, 0, tzinfo=UTC), datetime(2005, 1, 4, 15, 30, tzinfo=UTC)),  # before the open
    ],
)
async def test_next_close_of_an_hourly_bar(now: datetime, expected: datetime) -> None:
    assert next_close(CALENDAR, "1Hour", now) == expected


async def test_stop_ends_and_settle_takes_what_has_arrived() -> None:
    stage, stop = Stage(OPEN, "1Min"), asyncio.Event()
    stage.gateway.start()
    request = OrderRequest(symbol="IBM", side=OrderSide.BUY, qty=1, client_order_id="c-1")  # type: ignore[arg-type]
    leg = order(id="leg", client_order_id="theirs", status="held")
    for payload in (
        OrderIntended(request=request, decided_at=OPEN),
        OrderAcknowledged(client_order_id="c-1", order=order(legs=(leg,))),
        CancelIntended(client_order_id="c-1"),
    ):
        await stage.bus.publish(payload, source="test", correlation_id="the bar's")
    await stage.bus.idle()
    for told in (order(), leg, order(id="x", client_order_id="somebody else's")):
        stage.market.inbox.put(TradeUpdated(event="new", order=told, timestamp=OPEN))
    await stage.driver.settle()
    ours = [event.correlation_id for event in stage.events if isinstance(event.payload, TradeUpdated)]
    assert ours[:2] == ["the bar's"] * 2 and ours[2] != "the bar's" and stage.gateway.sent == 2
    stop.set()
    assert await stage.driver.run(stop) == STOPPED


def order(**fields: Any) -> Order:
    given = {"id": "o-1", "client_order_id": "c-1", "symbol": "IBM", "side": "buy", "qty": 1, "status": "new"}
    return Order.model_validate(given | {"submitted_at": OPEN} | fields)


FILL = Fill(
    execution_id="x-1",
    order_id="o-1",
    client_order_id="c-1",
    symbol="IBM",
    side=OrderSide.BUY,
    qty=Decimal(1),
    price=Decimal(10),
    timestamp=OPEN,
)


async def test_account_is_asked_for_again_only_after_a_fill() -> None:
    stage = Stage(OPEN, "1Min")
    stage.gateway.start()
    await stage.gateway.report_account("a")
    await stage.gateway.report_account("b")
    await stage.gateway.publish(TradeUpdated(event="new", order=order(), timestamp=OPEN))
    await stage.gateway.report_account("c")
    assert stage.market.reports == 1
    await stage.gateway.report_account("d")
    assert stage.market.reports == 1
    await stage.bus.publish(FillRecorded(fill=FILL), source="test", correlation_id="e")
    await stage.bus.idle()
    await stage.gateway.report_account("e")
    assert stage.market.reports == 2


async def test_account_is_asked_for_after_a_fill_that_the_stream_never_told() -> None:
    stage = Stage(OPEN, "1Min")
    stage.gateway.start()
    await stage.gateway.report_account("a")
    repaired = FILL.model_copy(update={"execution_id": "repair:o-1:1"})
    await stage.bus.publish(FillRecorded(fill=repaired), source="test", correlation_id="b")
    await stage.bus.idle()
    await stage.gateway.report_account("c")
    assert stage.market.reports == 2


async def test_bar_waits_until_the_account_is_known() -> None:
    stage = Stage(OPEN + timedelta(minutes=1), "1Min", bars_max=1)
    for symbol in ("AAPL", "IBM"):
        stage.market.inbox.put(BarArrived(symbol, OPEN, ROW))
    answer, asked = stage.market.account, []

    async def account() -> AccountReported:
        asked.append(stage.clock.now())
        if len(asked) < 3:
            raise Retryable("down")
        return await answer()

    stage.market.account = account  # type: ignore[method-assign]
    await stage.driver.run(asyncio.Event())
    kinds = [type(event.payload) for event in stage.events]
    assert len(asked) == 3 and kinds.index(AccountReported) < kinds.index(BarsClosed)


async def test_account_that_was_asked_for_before_a_fill_and_answered_after_it_is_asked_for_again() -> None:
    stage = Stage(OPEN, "1Min")
    stage.gateway.start()
    answer = stage.market.account

    async def account() -> AccountReported:
        report = await answer()
        if stage.market.reports == 1:  # a fill crosses the answer
            await stage.bus.publish(FillRecorded(fill=FILL), source="test", correlation_id="fill")
            await stage.bus.idle()
        return report

    stage.market.account = account  # type: ignore[method-assign]
    await stage.gateway.report_account("a")
    await stage.bus.idle()
    await stage.gateway.report_account("b")
    await stage.bus.idle()
    await stage.gateway.report_account("c")
    assert stage.market.reports == 2


async def test_nothing_is_decided_on_an_account_while_a_fill_that_it_may_hold_waits_to_be_read() -> None:
    stage = Stage(OPEN + timedelta(minutes=1), "1Min", bars_max=1)
    for symbol in ("AAPL", "IBM"):
        stage.market.inbox.put(BarArrived(symbol, OPEN, ROW))
    answer = stage.market.account

    async def account() -> AccountReported:
        if not stage.market.reports:
            update = TradeUpdated(event="fill", order=order(), qty=Decimal(1), price=Decimal(10), timestamp=OPEN)
            stage.market.inbox.put(update)
        return await answer()

    stage.market.account = account  # type: ignore[method-assign]
    await stage.driver.run(asyncio.Event())
    kinds = [type(event.payload) for event in stage.events]
    assert kinds.index(TradeUpdated) < kinds.index(BarsClosed) and stage.market.reports == 2


def minutes(count: int) -> Bars:
    found = synthetic_bars(("AAPL", "IBM"), date(2005, 1, 4), date(2005, 1, 4), timeframe="1Min", seed=3)
    return found.head(count)


@pytest.mark.parametrize("trouble", ["reconnects", "failures"])
async def test_bars_that_a_stream_left_out_are_fetched_and_only_the_last_is_acted_upon(trouble: str) -> None:
    stage = Stage(OPEN + timedelta(minutes=1), "1Min", bars_max=5)
    stage.market.bars = [Retryable("down"), minutes(5)]
    for symbol in ("AAPL", "IBM"):
        stage.market.inbox.put(BarArrived(symbol, OPEN, ROW))

    async def break_down() -> None:
        while not stage.heard(BarsClosed):  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(0)
        stage.clock.advance_to(OPEN + timedelta(minutes=5, seconds=10))
        stage.market.counters = replace(stage.market.counters, **{trouble: 1})

    breakdown = asyncio.create_task(break_down())
    await stage.driver.run(asyncio.Event())
    await breakdown
    closed = stage.heard(BarsClosed)
    assert [bar.at for bar in closed] == [OPEN + timedelta(minutes=n) for n in range(5)]
    assert [bar.late for bar in closed] == [False, True, True, True, False]
    assert stage.driver.filled == 4 and len(stage.heard(ClockTicked)) >= 1


async def test_bars_of_the_time_in_which_a_session_was_down_are_fetched() -> None:
    stage = Stage(OPEN + timedelta(minutes=3, seconds=20), "1Min", bars_max=2, resumed=True)
    stage.agent.resume(OPEN, 1)
    stage.market.bars = [minutes(3)]
    await stage.driver.run(asyncio.Event())
    assert [bar.late for bar in stage.heard(BarsClosed)] == [True, False]


class Books:
    """A reconciler that says what the test has laid out."""

    def __init__(self, stage: Stage, *answers: Any) -> None:
        self.stage, self.answers, self.looks = stage, list(answers), []

    async def look(self, settle: Any) -> Any:
        self.looks.append(round((self.stage.clock.now() - OPEN).total_seconds()))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


async def test_books_are_looked_at_on_a_timer_and_again_soon_where_something_differs() -> None:
    stage = Stage(OPEN, "1Min", ends_at=OPEN + timedelta(minutes=8), reconcile_s=120.0, tick_s=30.0)
    agree = Reconciled(ok=True)
    books = stage.driver.reconciler = Books(stage, agree, None, agree, Retryable("down"), agree)  # type: ignore
    await stage.driver.run(asyncio.Event())
    spans = [later - sooner for sooner, later in pairwise(books.looks)]
    assert books.looks[0] == pytest.approx(120, abs=1)
    assert [pytest.approx(span, abs=2) for span in spans] == [120, 6, 120, 30]


async def test_books_are_looked_at_after_a_stream_has_come_back() -> None:
    stage = Stage(OPEN, "1Min", ends_at=OPEN + timedelta(seconds=10))
    stage.market.bars = [Retryable("down")]
    stage.market.counters = replace(stage.market.counters, reconnects=1)
    books = stage.driver.reconciler = Books(stage, Reconciled(ok=True))  # type: ignore[assignment]
    await stage.driver.run(asyncio.Event())
    assert len(books.looks) == 1


async def test_stream_that_is_lost_for_good_ends_the_run() -> None:
    stage = Stage(OPEN, "1Min")
    stage.market.inbox.fail(Unauthorized("the keys were withdrawn"))
    with pytest.raises(Unauthorized, match="withdrawn"):
        await stage.driver.run(asyncio.Event())


# ---- live, against the exchange's own server


async def test_session_at_alpaca_runs_in_real_time(tmp_path: Path) -> None:
    bars = recent_minutes()
    start_index = bars.n - 60
    with ExchangeServer(Exchange(bars, start_index), key_id="key", secret_key="secret") as server:
        broker = as_alpaca(server)
        settings = load_settings(environ={}, env_file=None, overrides={"broker": broker})
        spec = SessionSpec(params={"fast": 2, "slow": 4}, symbols=("AAPL", "IBM"), timeframe="1Min", bars_max=10)

        async with asyncio.timeout(60), beside(goes_on(server)):
            result = await run_session(spec, settings, journal_path=tmp_path / "journal.sqlite")
    assert result.bars >= 10 and result.orders and result.reconciliation.ok, result.reconciliation.differences
    assert all(agent.state == "ok" for agent in result.health), result.health
    with open_journal(tmp_path / "journal.sqlite") as journal:
        loaded = next(event.payload for event in journal.read(types=[HistoryLoaded]))
    assert (
        isinstance(loaded, HistoryLoaded) and loaded.rows == 4
    )  # as many as a backtest is given, not what was fetched
