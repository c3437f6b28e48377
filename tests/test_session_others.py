"""What others do with the account of a session, in symbols that it trades and in others."""

import asyncio
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loguru import logger
from numpy.typing import NDArray

from tests.venue import as_alpaca, goes_on, recent_minutes, wait_for
from trader_lib.config.settings import load_settings
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.journal.journal import SqliteJournal
from trader_lib.journal.opening import open_journal
from trader_lib.market.bars import Bars
from trader_lib.risk.limits import Limits
from trader_lib.session.replay import replay
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.strategy.contract import Strategy
from trader_lib.trading.events import AccountReported, Event, OrderAdopted, PortfolioChanged, Reconciled, RiskDecided
from trader_lib.trading.orders import OrderRequest, OrderSide


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger.disable("trader_lib")
    yield
    logger.enable("trader_lib")


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
            feed = asyncio.create_task(_goes_on_once_agreed(server, path, 1))
            first = asyncio.create_task(run_session(spec, wire, strategy=held, journal_path=path, progress=die))
            await dead.wait()
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            feed.cancel()
            server.call(lambda: server.exchange.cancel(resting.id))  # while nobody listens
            feed = asyncio.create_task(_goes_on_once_agreed(server, path, 2))
            try:
                result = await run_session(spec, wire, strategy=held, journal_path=path, resume=True)
            finally:
                feed.cancel()
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


async def _goes_on_once_agreed(server: ExchangeServer, path: Path, times: int) -> None:
    """Let the market move as soon as the books have agreed so many times."""
    await asyncio.to_thread(wait_for, lambda: _count(path) >= times)
    await goes_on(server, after_s=0.0)


def _count(path: Path) -> int:
    if not path.exists():
        return 0
    with open_journal(path) as journal:
        return sum(event.payload.ok for event in journal.read(types=[Reconciled]))  # type: ignore[attr-defined]


def _is_gone(event: Event) -> bool:
    return isinstance(event.payload, OrderAdopted) and (
        event.payload.order.client_order_id,
        event.payload.remaining,
    ) == (
        "resting",
        0,
    )
