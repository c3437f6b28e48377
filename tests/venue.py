"""A market of recent minutes behind Alpaca's protocol, for sessions that follow the wall clock."""

import asyncio
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from trader_lib.clock.sessions import NEW_YORK, TradingCalendar
from trader_lib.exchange.server import ExchangeServer
from trader_lib.market.bars import Bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.runs.store import RunFolder, RunStore
from trader_lib.session.status import session_status


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


def new_session_run(tmp_path: Path) -> RunFolder:
    """The folder of a simulated session that is about to begin."""
    run = RunStore(tmp_path / "runs").create("paper")
    run.write_params({"kind": "paper", "parameters": {"broker": "simulated", "profile": None}})
    return run


def wait_for(found: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until something is so."""
    ends = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.1)


def holds(run: RunFolder) -> bool:
    """Whether a session that runs in another process holds something by now."""
    try:
        return (run.path / "session.lock").stat().st_size > 0 and bool(session_status(run.journal).positions)
    except Exception:  # not begun, or the journal's first page is being written
        return False
