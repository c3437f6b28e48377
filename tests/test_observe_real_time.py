"""A session at a real market, in real time, shows what a simulated one cannot: rate limits, ages, streams."""

import asyncio
from pathlib import Path

import pytest

from tests.observed import families, observed_session, observed_settings
from tests.venue import as_alpaca, beside, goes_on, recent_minutes
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.session.spec import SessionSpec

pytestmark = pytest.mark.usefixtures("quiet")


async def test_a_session_at_alpaca_shows_limits_ages_and_streams(tmp_path: Path) -> None:
    bars = recent_minutes()
    spec = SessionSpec(params={"fast": 2, "slow": 4}, symbols=("AAPL", "IBM"), timeframe="1Min", bars_max=10)
    with ExchangeServer(Exchange(bars, bars.n - 60), key_id="key", secret_key="secret") as server:
        settings = observed_settings(broker=as_alpaca(server))
        async with asyncio.timeout(90), beside(goes_on(server)):
            result, seen = await observed_session(tmp_path, settings, spec=spec)
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
