"""`trader exchange` and the pytest fixture, as unmodified clients meet them; faults, as they see them."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from alpaca.common.exceptions import APIError
from alpaca.trading.client import TradingClient
from alpaca.trading.enums import OrderClass, OrderSide, TimeInForce
from alpaca.trading.requests import (
    CreateWatchlistRequest,
    GetOrdersRequest,
    GetPortfolioHistoryRequest,
    LimitOrderRequest,
    MarketOrderRequest,
    ReplaceOrderRequest,
    StopLossRequest,
    TakeProfitRequest,
    TrailingStopOrderRequest,
    UpdateWatchlistRequest,
)
from websockets.asyncio.client import connect

from trader_lib.exchange.testing import AlpacaExchange, serve_sample

MAIN = "from trader_lib.app.cli import main; raise SystemExit(main())"
BUY, SELL, DAY, GTC = OrderSide.BUY, OrderSide.SELL, TimeInForce.DAY, TimeInForce.GTC


@pytest.fixture
def served() -> Iterator[AlpacaExchange]:
    with serve_sample() as server:
        yield AlpacaExchange(server)


@pytest.fixture
def client(served: AlpacaExchange) -> TradingClient:
    client = TradingClient(served.key_id, served.secret_key, url_override=served.url)
    client._retry = 0
    return client


def market(symbol: str = "IBM", side: OrderSide = BUY, qty: float = 10, **fields: Any) -> MarketOrderRequest:
    return MarketOrderRequest(symbol=symbol, side=side, qty=qty, time_in_force=DAY, **fields)


def test_a_bot_that_waits_for_the_open_trades_on_daily_bars(served: AlpacaExchange, client: TradingClient) -> None:
    served.step()
    while not client.get_clock().is_open:
        served.step()
    order = client.submit_order(market())
    assert client.get_order_by_id(order.id).status == "filled"
    clock = client.get_clock()
    assert clock.next_close > clock.timestamp and clock.next_open > clock.next_close


def test_unmodified_alpaca_py_reads_everything_it_knows(served: AlpacaExchange, client: TradingClient) -> None:
    pair = {"take_profit": TakeProfitRequest(limit_price=900), "stop_loss": StopLossRequest(stop_price=10)}
    entry = client.submit_order(market(order_class=OrderClass.BRACKET, **pair))
    assert [leg.status.value for leg in client.get_order_by_id(entry.id).legs] == ["new", "held"]
    client.submit_order(market("AAPL"))
    trail = client.submit_order(
        TrailingStopOrderRequest(symbol="AAPL", side=SELL, qty=5, time_in_force=GTC, trail_percent=5)
    )
    assert client.replace_order_by_id(trail.id, ReplaceOrderRequest(trail=4)).trail_percent == "4"
    spent = client.submit_order(MarketOrderRequest(symbol="MSFT", side=BUY, notional=100, time_in_force=DAY))
    assert client.get_order_by_id(spent.id).filled_qty != "0"
    assert len(client.get_orders(GetOrdersRequest(nested=True))) == 2

    settings = client.get_account_configurations()
    assert settings.suspend_trade is False
    settings.no_shorting = True
    assert client.set_account_configurations(settings).no_shorting
    client.close_position("MSFT")
    with pytest.raises(APIError, match="not allowed to short"):
        client.submit_order(LimitOrderRequest(symbol="MSFT", side=SELL, qty=1, time_in_force=DAY, limit_price=900))

    served.step()
    history = client.get_portfolio_history(GetPortfolioHistoryRequest(period="1M", timeframe="1D"))
    assert len(history.equity) == 1 and history.timeframe == "1D"
    made = client.create_watchlist(CreateWatchlistRequest(name="mine", symbols=["IBM"]))
    assert [asset.symbol for asset in client.add_asset_to_watchlist_by_id(made.id, "AAPL").assets] == ["IBM", "AAPL"]
    assert client.update_watchlist_by_id(made.id, UpdateWatchlistRequest(name="ours")).name == "ours"
    assert client.remove_asset_from_watchlist_by_id(made.id, "IBM").assets[0].symbol == "AAPL"
    client.delete_watchlist_by_id(made.id)
    assert client.get_watchlists() == []
    fills = client.get("/account/activities", {"activity_types": "FILL", "page_size": 2})
    assert len(fills) == 2 and fills[0]["transaction_time"] >= fills[1]["transaction_time"]


def test_faults_reach_the_client_and_the_exchange_stays_right(served: AlpacaExchange, client: TradingClient) -> None:
    served.misbehave([{"fault": "timeout_after", "endpoint": "POST /v2/orders", "times": 1}])
    with pytest.raises(APIError) as caught:
        client.submit_order(market(client_order_id="mine"))
    assert caught.value.status_code == 504 and client.get_order_by_client_id("mine").status == "filled"

    served.misbehave([{"fault": "bad_gateway", "symbol": "IBM"}])
    with pytest.raises(APIError):
        client.submit_order(market(client_order_id="other"))
    assert client.get_asset("AAPL").symbol == "AAPL"
    for fault, kinds in [
        ("reset", (requests.exceptions.ChunkedEncodingError, requests.ConnectionError)),
        ("truncated", (requests.exceptions.JSONDecodeError,)),
    ]:
        served.misbehave([{"fault": fault}])
        with pytest.raises(kinds):
            client.get_account()
    served.misbehave([{"fault": "mute"}])
    with pytest.raises(requests.ReadTimeout):
        requests.get(f"{served.url}/v2/clock", headers=_headers(), timeout=0.5)
    served.misbehave([{"fault": "clock_skew", "seconds": -60}])
    skewed = client.get_clock().timestamp
    served.misbehave([])
    assert (client.get_clock().timestamp - skewed).total_seconds() == 60
    assert len(client.get_orders(GetOrdersRequest(status="all"))) == 1


def _headers() -> dict[str, str]:
    return {"APCA-API-KEY-ID": "simulated", "APCA-API-SECRET-KEY": "simulated"}


async def test_a_stream_loses_and_doubles_what_the_rules_say(served: AlpacaExchange, client: TradingClient) -> None:
    async with connect(served.trading_stream_url) as socket:

        async def heard() -> Any:
            return json.loads(await asyncio.wait_for(socket.recv(), 5))

        await socket.send(json.dumps({"action": "auth", "key": "simulated", "secret": "simulated"}))
        assert (await heard())["data"]["status"] == "authorized"
        await socket.send(json.dumps({"action": "listen", "data": {"streams": ["trade_updates"]}}))
        assert (await heard())["data"]["streams"] == ["trade_updates"]
        served.misbehave([{"fault": "missing", "endpoint": "WS /stream", "nth": 1}, {"fault": "duplicate", "nth": 2}])
        for name in ("a", "b"):
            await asyncio.to_thread(client.submit_order, market(client_order_id=name))
        got = [(await heard())["data"] for _ in range(4)]
        told = [(update["event"], update["order"]["client_order_id"]) for update in got]
        assert told == [("fill", "a"), ("new", "b"), ("new", "b"), ("fill", "b")]


def test_time_passes_by_itself(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "exchange", "--symbols", "IBM", "--speed", "3600x", "--json"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines: list[str] = []
        while not lines or lines[-1] != "}\n":
            lines.append(process.stdout.readline())
            assert lines[-1], process.communicate()
        url = json.loads("".join(lines))["url"]
        seen: set[bool] = set()
        first = requests.get(f"{url}/v2/clock", headers=_headers(), timeout=10).json()["timestamp"]
        end = time.monotonic() + 30
        while seen != {True, False}:
            assert time.monotonic() < end
            now = requests.get(f"{url}/v2/clock", headers=_headers(), timeout=10)
            seen.add(now.json()["is_open"])
            time.sleep(0.3)
        assert now.json()["timestamp"] > first and now.headers["x-ratelimit-limit"] == "200"
        assert requests.post(f"{url}/simulation/step", headers=_headers(), timeout=10).status_code == 404
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_the_fixture_comes_with_the_package(tmp_path: Path) -> None:
    (tmp_path / "test_bot.py").write_text(
        "from alpaca.trading.client import TradingClient\n\n\n"
        "def test_my_bot(alpaca_exchange):\n"
        "    client = TradingClient('simulated', 'simulated', url_override=alpaca_exchange.url)\n"
        "    assert client.get_clock().is_open and len(client.get_all_assets()) == 3\n"
    )
    plugin = ("-p", "trader_lib.exchange.testing", "-p", "no:cacheprovider", "-q")
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *plugin, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert ended.returncode == 0 and "1 passed" in ended.stdout, ended.stdout + ended.stderr
