"""What others do with the account of a session, in symbols that it trades and in others."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.venue import as_alpaca, beside, goes_on_once_agreed, recent_minutes
from trader_lib.config.settings import load_settings
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.journal.journal import SqliteJournal
from trader_lib.market.bars import Bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.replay.replay import replay
from trader_lib.risk.limits import Limits
from trader_lib.session.companions import SessionParts
from trader_lib.session.session import SessionResult, opening_fill, run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.strategy.contract import Strategy
from trader_lib.trading.events import (
    AccountReported,
    BarsClosed,
    Event,
    OrderAdopted,
    PortfolioChanged,
    RiskDecided,
    TradeUpdated,
)
from trader_lib.trading.orders import OrderRequest, OrderSide
from trader_lib.trading.portfolio import Position

pytestmark = pytest.mark.usefixtures("quiet")


class Held(Strategy):
    """Wants as much as there is money for, always."""

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars: Bars) -> NDArray[np.float64]:
        return np.ones((bars.n, len(bars.symbols)))


def by_hand(name: str, qty: int, **fields: Any) -> OrderRequest:
    told = {"symbol": "IBM", "side": OrderSide.BUY, "qty": Decimal(qty), "client_order_id": name}
    return OrderRequest.model_validate(told | fields)


@pytest.mark.slow
async def test_what_the_account_holds_and_orders_in_other_symbols_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IBM worth half the equity, and an order for a quarter more, leave too little room until that is gone."""
    monkeypatch.setattr("trader_lib.session.session.CONFIRM_S", 0.5)
    path, held = tmp_path / "journal.sqlite", Held()
    bars = recent_minutes()
    spec = SessionSpec(
        strategy="held", symbols=("AAPL",), timeframe="1Min", bars_max=12, limits=Limits(max_gross_exposure=1.1)
    )
    with ExchangeServer(Exchange(bars, bars.n - 120), key_id="key", secret_key="secret") as server:
        wire = load_settings(environ={}, env_file=None, overrides={"broker": as_alpaca(server)})
        server.call(server.exchange.advance)
        server.call(lambda: server.exchange.submit(by_hand("bought", 300)))
        for _ in range(3):
            server.call(server.exchange.advance)
        resting = server.call(
            lambda: server.exchange.submit(by_hand("resting", 150, type="limit", limit_price=100, time_in_force="gtc"))
        )
        dead = asyncio.Event()

        def die(count: int, at: datetime) -> None:
            if count == 4:
                dead.set()

        async with asyncio.timeout(100):
            async with beside(goes_on_once_agreed(server, path)):
                first = asyncio.create_task(run_session(spec, wire, strategy=held, journal_path=path, progress=die))
                await dead.wait()
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
            server.call(lambda: server.exchange.cancel(resting.id))  # while nobody listens
            async with beside(goes_on_once_agreed(server, path, 2)):
                result = await run_session(spec, wire, strategy=held, journal_path=path, resume=True)
    assert all(agent.state == "ok" for agent in result.health), result.health
    assert result.reconciliation.ok, result.reconciliation.differences
    with SqliteJournal(path) as journal:
        events = list(journal.read())
        again = await replay(journal, strategy=held)
    assert again.agrees, again.sentence()
    gone = next(event.seq for event in events if _is_gone(event))
    decisions = [(event.seq, event.payload) for event in events if isinstance(event.payload, RiskDecided)]
    early = [decided for seq, decided in decisions if seq < gone]
    assert len(early) >= 4 and not any(decided.approved for decided in early)
    assert {check.name for decided in early for check in decided.checks if not check.passed} == {"GROSS_EXPOSURE"}
    assert any(decided.approved for seq, decided in decisions if seq > gone)
    (account, told) = (
        next(e.payload for e in events if isinstance(e.payload, kind)) for kind in (AccountReported, PortfolioChanged)
    )
    assert abs(told.equity - account.equity) < 200, "what the account holds elsewhere is part of its worth"
    assert {position.symbol for position in result.positions} == {"AAPL", "IBM"}


def _is_gone(event: Event) -> bool:
    return isinstance(event.payload, OrderAdopted) and (
        event.payload.order.client_order_id,
        event.payload.remaining,
    ) == (
        "resting",
        0,
    )


# ---- on the embedded exchange, which dies with the session


DAILY = SessionSpec(
    strategy="rsi_reversion",
    params={"period": 3, "entry": 45.0, "exit": 65.0, "stop_loss": 0.02, "take_profit": 0.03},
    symbols=("AAPL", "IBM"),
    start=date(2010, 1, 4),
    end=date(2010, 2, 26),
)
MINUTES = DAILY.model_copy(update={"timeframe": "15Min", "start": date(2010, 3, 9), "end": date(2010, 3, 10)})


FIRST = 5  # bars before somebody begins
DOINGS = ((0, "new", "low"), (1, "new", "bought"), (2, "new", "more"), (3, "new", "late"), (5, "canceled", "low"))
ASKED = {
    "low": by_hand("low", 5, type="limit", limit_price=1, time_in_force="gtc"),
    "bought": by_hand("bought", 7),
    "more": by_hand("more", 3, symbol="AAPL"),
    "late": by_hand("late", 2),
}


@asynccontextmanager
async def somebody(parts: SessionParts) -> AsyncIterator[None]:
    """Who orders by hand on the session's exchange, and takes an order back, each right after a bar."""
    bars = 0

    async def hear(event: Event) -> None:
        nonlocal bars
        doing = next((doing for doing in DOINGS if doing[0] == bars - FIRST + 1), None)
        bars += 1
        if doing is None or parts.is_past(event):
            return
        _, told, name = doing
        if told == "new":
            await parts.broker.submit(ASKED[name])
        else:
            order = await parts.broker.order_by_client_id(name)
            assert order is not None
            await parts.broker.cancel(order.id)

    parts.bus.subscribe("somebody", [BarsClosed], hear)
    yield


@pytest.mark.parametrize("transport", ["in_process", "http"])
@pytest.mark.parametrize("spec", [DAILY, MINUTES], ids=["daily", "minutes"])
async def test_orders_of_others_on_the_embedded_exchange_survive_a_restart(
    spec: SessionSpec, transport: str, tmp_path: Path
) -> None:
    bars = None if spec is DAILY else synthetic_bars(("AAPL", "IBM"), "2010-03-08", "2010-03-10", timeframe="15Min")
    settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": transport}})

    async def run(path: Path, **more: Any) -> SessionResult:
        return await run_session(spec, settings, bars=bars, journal_path=path, companions=[somebody], **more)

    one = await run(tmp_path / "journal.sqlite")
    assert one.reconciliation.ok, one.reconciliation.differences
    with SqliteJournal(one.journal_path) as journal:
        events = list(journal.read())
        assert (await replay(journal)).agrees
    closed = [event.seq for event in events if isinstance(event.payload, BarsClosed)]
    heard = [(e.seq, e.payload) for e in events if isinstance(e.payload, TradeUpdated)]
    unheard = []  # from when something was done by hand until it was told: torn there, it is lost
    for bar, told, name in DOINGS:
        seq = next(seq for seq, update in heard if (update.event, update.order.client_order_id) == (told, name))
        unheard.append(range(closed[FIRST + bar - 1], seq))
    first, stop = unheard[0].start, unheard[1].stop
    edges = (first - 1, first, unheard[0].stop - 1, unheard[0].stop, stop)
    lost = 0
    for rows in (*edges, *range(stop, len(events), (len(events) - stop) // 3)[1:]):
        folder = tmp_path / f"torn-{rows}"
        folder.mkdir()
        with SqliteJournal(folder / "journal.sqlite") as torn:
            for event in events[:rows]:
                torn.append(event)
        other = await run(folder / "journal.sqlite", resume=True)
        assert other.reconciliation.ok, (rows, other.reconciliation.differences)
        if any(rows in window for window in unheard):
            lost += 1
            continue
        assert other.positions == one.positions, rows
        assert (other.order_list_hash, other.equity_end) == (one.order_list_hash, one.equity_end), rows
    assert lost


@pytest.mark.parametrize(("worth", "price"), [("30", "3"), ("0", "0.0001"), (None, "0.0001")])
def test_shares_that_came_for_nothing_are_taken_over(worth: str | None, price: str) -> None:
    """A transfer, or a spin-off: the broker says that nothing was paid, and a fill needs a price."""
    value = None if worth is None else Decimal(worth)
    position = Position(symbol="IBM", qty=Decimal(10), avg_entry_price=Decimal(0), market_value=value)
    fill = opening_fill(position, "", datetime(2024, 3, 1, 21, tzinfo=UTC))
    assert (fill.qty, fill.price) == (Decimal(10), Decimal(price))
