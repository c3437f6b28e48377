"""A session at a real market, in real time, shows what a simulated one cannot: rate limits, ages, streams."""

import asyncio
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from loguru import logger

from tests.observed import families, observed_session, observed_settings
from trader_lib.clock.sessions import NEW_YORK, TradingCalendar
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.session.spec import SessionSpec


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger.disable("trader_lib")
    yield
    logger.enable("trader_lib")


async def test_a_session_at_alpaca_shows_limits_ages_and_streams(tmp_path: Path) -> None:
    today = datetime.now(NEW_YORK).date()
    days = TradingCalendar().sessions(today - timedelta(days=20), today - timedelta(days=1))[-3:]
    bars = synthetic_bars(("AAPL", "IBM"), days[0].date, days[-1].date, timeframe="1Min", seed=3)
    spec = SessionSpec(params={"fast": 2, "slow": 4}, symbols=("AAPL", "IBM"), timeframe="1Min", bars_max=10)
    with ExchangeServer(Exchange(bars, bars.n - 60), key_id="key", secret_key="secret") as server:
        settings = observed_settings(
            broker={
                "kind": "alpaca",
                "key_id": "key",
                "secret_key": "secret",
                "trading_url": server.url,
                "data_url": server.url,
                "trading_stream_url": server.trading_stream_url,
                "data_stream_url": server.data_stream_url,
            }
        )

        async def market() -> None:
            await asyncio.sleep(1.0)
            while not server.call(lambda: server.exchange.is_over):
                await asyncio.to_thread(server.call, server.exchange.advance)
                await asyncio.sleep(0.05)

        feed = asyncio.create_task(market())
        try:
            async with asyncio.timeout(90):
                result, seen = await observed_session(tmp_path, settings, spec=spec)
        finally:
            feed.cancel()
    shown = families(seen.answers["metrics"].text)

    def figure(name: str, **labels: str) -> float:
        (found,) = [sample.value for sample in shown[name].samples if sample.labels == labels]
        return found

    assert result.orders and result.reconciliation.ok
    limit, left = (figure(f"trader_rate_limit_{name}", limit="trading") for name in ("calls", "headroom_calls"))
    assert limit == settings.resilience.trading_per_minute and 0 < left < limit
    assert figure("trader_session_info", strategy="sma_cross", stage="paper", timeframe="1Min") == 1
    assert figure("trader_stream_connected", stream="data") == 1
    assert 0 <= figure("trader_stream_age_seconds", stream="data") < 60
    assert 0 <= figure("trader_reconciliation_age_seconds") < 60
    assert figure("trader_broker_attempts_total", endpoint="orders") == len(result.orders)
    assert seen.answers["readyz"].json()["why_not"] == [f"session: ended: {result.reason}"]
