"""A market of recent minutes behind Alpaca's protocol, for sessions that follow the wall clock."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from trader_lib.clock.sessions import NEW_YORK, TradingCalendar
from trader_lib.errors.taxonomy import BadData
from trader_lib.exchange.server import ExchangeServer
from trader_lib.journal.opening import journal_exists, open_journal
from trader_lib.market.bars import Bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.runs.store import RunFolder, RunStore
from trader_lib.steering.status import session_status
from trader_lib.trading.events import Reconciled


def recent_minutes() -> Bars:
    """Minute bars of two symbols on the last three trading days before today."""
    today = datetime.now(NEW_YORK).date()
    days = [day.date for day in TradingCalendar().sessions(today - timedelta(days=20), today - timedelta(days=1))][-3:]
    return synthetic_bars(("AAPL", "IBM"), days[0], days[-1], timeframe="1Min", seed=3)


def as_alpaca(server: ExchangeServer, secret_key: str = "secret") -> dict[str, str]:
    """The settings of a broker with which a session takes the embedded exchange for Alpaca."""
    return {
        "kind": "alpaca",
        "key_id": "key",
        "secret_key": secret_key,
        "trading_url": server.url,
        "data_url": server.url,
        "trading_stream_url": server.trading_stream_url,
        "data_stream_url": server.data_stream_url,
    }


async def goes_on(server: ExchangeServer, after_s: float = 1.0, pace_s: float = 0.05) -> None:
    """Let an exchange's market move by itself until its bars end."""
    await asyncio.sleep(after_s)
    while not server.call(lambda: server.exchange.is_over):
        await asyncio.to_thread(server.call, server.exchange.advance)
        await asyncio.sleep(pace_s)


async def goes_on_once_agreed(server: ExchangeServer, path: Path, times: int = 1) -> None:
    """Let the market move as soon as a session's books have agreed with the account's so many times."""
    await asyncio.to_thread(wait_for, lambda: times_agreed(path) >= times, 120)
    await goes_on(server, after_s=0.0)


def times_agreed(path: Path) -> int:
    """How many reconciliations a journal holds that found no difference."""
    if not journal_exists(path):
        return 0
    with open_journal(path) as journal:
        return sum(event.payload.ok for event in journal.read(types=[Reconciled]))  # type: ignore[attr-defined]


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run work beside what a test awaits, to its end at most; where the work fails, the test fails at once."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(work)
        try:
            yield
        finally:
            task.cancel()


def new_session_run(tmp_path: Path) -> RunFolder:
    """The folder of a simulated session that is about to begin."""
    run = RunStore(tmp_path / "runs").create("paper")
    run.write_params({"kind": "paper", "parameters": {"broker": "simulated", "profile": None}})
    return run


def wait_for(found: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until something is so; a journal whose first page is being written does not say yet."""
    ends = time.monotonic() + seconds
    while True:
        with suppress(BadData):
            if found():
                return
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.1)


def holds(run: RunFolder) -> bool:
    """Whether a session that runs in another process holds something by now."""
    try:
        return (run.path / "session.lock").stat().st_size > 0 and bool(session_status(run.journal).positions)
    except Exception:  # not begun, or the journal's first page is being written
        return False
