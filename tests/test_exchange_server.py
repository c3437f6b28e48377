"""The embedded exchange as alpaca-py's own, unmodified clients see it, and as anybody else does."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import pytest
import requests
from alpaca.common.enums import Sort
from alpaca.common.exceptions import APIError
from alpaca.data.enums import Adjustment
from alpaca.data.historical import StockHistoricalDataClient
from alpaca.data.live import StockDataStream
from alpaca.data.models import BarSet
from alpaca.data.requests import StockBarsRequest
from alpaca.data.timeframe import TimeFrame
from alpaca.trading.client import TradingClient
from alpaca.trading.enums import OrderClass, OrderSide, QueryOrderStatus, TimeInForce
from alpaca.trading.requests import (
    ClosePositionRequest,
    GetAssetsRequest,
    GetCalendarRequest,
    GetOrdersRequest,
    LimitOrderRequest,
    MarketOrderRequest,
    ReplaceOrderRequest,
    StopLossRequest,
    TakeProfitRequest,
)
from alpaca.trading.stream import TradingStream
from websockets.asyncio.client import connect

from trader_lib.clock.sessions import TradingCalendar
from trader_lib.errors.taxonomy import Misconfigured
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.market.bars import Bars
from trader_lib.market.synthetic import synthetic_bars

DAY, GTC = TimeInForce.DAY, TimeInForce.GTC
BUY, SELL = OrderSide.BUY, OrderSide.SELL
KEYS = ("test-key", "test-secret")
HEADERS = dict(zip(("APCA-API-KEY-ID", "APCA-API-SECRET-KEY"), KEYS, strict=True))


@pytest.fixture
def client(exchange_server: ExchangeServer) -> TradingClient:
    return TradingClient(*KEYS, url_override=exchange_server.url)


def confirmed(stream: StockDataStream) -> threading.Event:
    """Set as soon as the server has said that it knows what the stream subscribes to."""
    told, dispatch = threading.Event(), stream._dispatch

    async def listen(message: dict[str, Any]) -> None:
        await dispatch(message)
        if message.get("T") == "subscription":
            told.set()

    stream._dispatch = listen  # type: ignore[method-assign]
    return told


def eventually(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Wait until something that another thread does has happened."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def market(symbol: str = "IBM", side: OrderSide = BUY, qty: float = 10, **fields: Any) -> MarketOrderRequest:
    return MarketOrderRequest(symbol=symbol, side=side, qty=qty, time_in_force=DAY, **fields)


def refused(call: Callable[[], object]) -> tuple[int, int, str]:
    with pytest.raises(APIError) as caught:
        call()
    return caught.value.status_code, caught.value.code, caught.value.message


def test_a_whole_session_through_unmodified_clients(
    client: TradingClient, exchange_server: ExchangeServer, daily_bars: Bars
) -> None:
    """Streams run as their authors meant them to: each in a thread of its own, by `run`."""
    updates: list[Any] = []
    bars: list[Any] = []

    async def on_update(update: Any) -> None:
        updates.append(update)

    async def on_bar(bar: Any) -> None:
        bars.append(bar)

    trading = TradingStream(*KEYS, url_override=exchange_server.trading_stream_url)
    data = StockDataStream(*KEYS, url_override=exchange_server.data_stream_url)
    trading.subscribe_trade_updates(on_update)
    data.subscribe_daily_bars(on_bar, "IBM", "MSFT")
    subscribed = confirmed(data)
    threads = [threading.Thread(target=stream.run, daemon=True) for stream in (trading, data)]
    for thread in threads:
        thread.start()
    eventually(lambda: trading._running)
    assert subscribed.wait(20)

    order = client.submit_order(market(client_order_id="mine"))
    exchange_server.call(exchange_server.exchange.advance)
    eventually(lambda: len(updates) == 2 and len(bars) == 2)
    assert [update.event for update in updates] == ["new", "fill"]
    assert updates[1].order.id == order.id and updates[1].position_qty == 10
    assert {bar.symbol: bar.close for bar in bars} == {
        "IBM": daily_bars.close[5, 1],
        "MSFT": daily_bars.close[5, 2],
    }
    assert bars[0].timestamp == daily_bars.at(5)
    assert client.get_order_by_client_id("mine").status == "filled"
    for stream in (trading, data):
        stream.stop()
    exchange_server.stop()
    for thread in threads:
        thread.join(6)


def test_account_clock_calendar_assets(client: TradingClient) -> None:
    account = client.get_account()
    assert (account.cash, account.equity, account.buying_power) == ("100000", "100000", "200000")
    assert account.status == "ACTIVE" and account.shorting_enabled
    clock = client.get_clock()
    assert not clock.is_open and clock.timestamp < clock.next_open < clock.next_close
    july = client.get_calendar(GetCalendarRequest(start=date(2012, 7, 2), end=date(2012, 7, 6)))
    assert [day.date.day for day in july] == [2, 3, 5, 6]
    assert [day.close.hour for day in july] == [16, 13, 16, 16]
    assert client.get_calendar()[0].date == date(1990, 1, 2)
    assert client.get_calendar(GetCalendarRequest(start=date(2012, 7, 2), end=date(2012, 7, 1))) == []
    assert refused(lambda: client.get_calendar(GetCalendarRequest(end=date(2990, 1, 1))))[0] == 400
    assets = client.get_all_assets()
    assert [asset.symbol for asset in assets] == ["AAPL", "IBM", "MSFT"]
    assert client.get_all_assets(GetAssetsRequest(status="inactive")) == []
    assert client.get_asset("IBM") == client.get_asset(assets[1].id)
    assert refused(lambda: client.get_asset("NOPE")) == (404, 40410000, "asset not found for NOPE")


def test_orders_are_listed_as_alpaca_lists_them(client: TradingClient, exchange_server: ExchangeServer) -> None:
    client.submit_order(market("IBM"))
    exchange_server.call(exchange_server.exchange.advance)
    pair = LimitOrderRequest(
        symbol="IBM",
        qty=10,
        side=SELL,
        time_in_force=GTC,
        order_class=OrderClass.OCO,
        take_profit=TakeProfitRequest(limit_price=9999.0),
        stop_loss=StopLossRequest(stop_price=1.0),
    )
    oco = client.submit_order(pair)
    assert oco.order_class == OrderClass.OCO and oco.limit_price == "9999"
    client.submit_order(market("AAPL", qty=1))

    def listed(**filters: Any) -> list[Any]:
        return [(order.symbol, order.type.value) for order in client.get_orders(GetOrdersRequest(**filters))]

    everything = [("AAPL", "market"), ("IBM", "limit"), ("IBM", "stop"), ("IBM", "market")]
    assert listed(status=QueryOrderStatus.ALL) == everything
    assert listed(status=QueryOrderStatus.ALL, direction=Sort.ASC) == everything[::-1]
    assert listed() == everything[:3] and listed(nested=True) == everything[:2]
    assert listed(limit=1) == everything[:1]
    assert listed(status=QueryOrderStatus.CLOSED) == everything[3:]
    assert listed(symbols=["AAPL"]) == everything[:1] and listed(side=SELL) == everything[1:3]
    filled = client.get_orders(GetOrdersRequest(status=QueryOrderStatus.CLOSED))[0]
    assert listed(status=QueryOrderStatus.ALL, after=filled.submitted_at) == everything[:3]
    assert listed(status=QueryOrderStatus.ALL, until=oco.submitted_at) == everything[3:]
    assert client.get_order_by_id(oco.id).legs[0].status == "held"
    answers = client.cancel_orders()
    assert [answer.status for answer in answers] == [200, 200] and client.get_orders() == []


def test_an_order_is_canceled_or_replaced_by_id(exchange_server: ExchangeServer) -> None:
    hours = synthetic_bars(["IBM"], "2024-01-02", "2024-01-03", "1Hour", seed=1)
    with ExchangeServer(Exchange(hours), key_id=KEYS[0], secret_key=KEYS[1]) as server:
        client = TradingClient(*KEYS, url_override=server.url)
        server.call(server.exchange.advance)
        assert client.get_clock().is_open
        waiting = client.submit_order(
            LimitOrderRequest(symbol="IBM", qty=10, side=BUY, time_in_force=DAY, limit_price=0.5)
        )
        assert waiting.status == "pending_new"
        better = client.replace_order_by_id(waiting.id, ReplaceOrderRequest(limit_price=0.75, qty=5))
        assert (better.limit_price, better.qty, better.replaces) == ("0.75", "5", waiting.id)
        assert client.get_order_by_id(waiting.id).status == "replaced"
        client.cancel_order_by_id(better.id)
        assert refused(lambda: client.cancel_order_by_id(better.id)) == (
            422,
            42210000,
            'order is already in "canceled" state',
        )
        assert refused(lambda: client.replace_order_by_id(better.id, ReplaceOrderRequest(qty=6)))[1] == 42210000


def test_positions_are_read_and_closed(client: TradingClient, exchange_server: ExchangeServer) -> None:
    for symbol, side in (("AAPL", BUY), ("IBM", SELL), ("MSFT", BUY)):
        client.submit_order(market(symbol, side))
    exchange_server.call(exchange_server.exchange.advance)
    held = {position.symbol: position for position in client.get_all_positions()}
    assert {symbol: position.qty for symbol, position in held.items()} == {"AAPL": "10", "IBM": "-10", "MSFT": "10"}
    assert held["IBM"].side == "short" and client.get_open_position("IBM") == held["IBM"]
    half = client.close_position("AAPL", ClosePositionRequest(percentage="50"))
    assert (half.side, half.qty) == (SELL, "5")
    assert client.get_open_position("AAPL").qty_available == "5"
    part = client.close_position("AAPL", ClosePositionRequest(qty="2"))
    assert part.qty == "2"
    answers = {answer.symbol: answer for answer in client.close_all_positions()}
    assert {symbol: answer.status for symbol, answer in answers.items()} == {"AAPL": 403, "IBM": 200, "MSFT": 200}
    again = client.close_all_positions(cancel_orders=True)
    assert [answer.status for answer in again] == [200, 200, 200]
    exchange_server.call(exchange_server.exchange.advance)
    assert client.get_all_positions() == []
    assert refused(lambda: client.close_position("IBM")) == (404, 40410000, "position does not exist")
    assert refused(lambda: client.get_open_position("NOPE"))[0] == 404


def test_bars_come_in_pages_and_are_put_together(exchange_server: ExchangeServer, daily_bars: Bars) -> None:
    client = StockHistoricalDataClient(*KEYS, url_override=exchange_server.url)

    def closes(**fields: Any) -> dict[str, list[float]]:
        request = StockBarsRequest(symbol_or_symbols=["MSFT", "IBM"], timeframe=TimeFrame.Day, **fields)
        answer = client.get_stock_bars(request)
        assert isinstance(answer, BarSet)
        return {symbol: [bar.close for bar in bars] for symbol, bars in answer.data.items()}

    known = {"IBM": list(daily_bars.close[:5, 1]), "MSFT": list(daily_bars.close[:5, 2])}
    begin = daily_bars.at(0)
    assert closes() == {name: row[4:] for name, row in known.items()}  # since the day began
    assert closes(adjustment=Adjustment.ALL, start=begin) == closes(start=begin) == known
    assert closes(adjustment=Adjustment.RAW, start=begin) == known  # the prices at which this exchange trades
    assert closes(start=daily_bars.at(1), end=daily_bars.at(3)) == {name: row[1:4] for name, row in known.items()}
    assert closes(limit=7, start=begin) == {"IBM": known["IBM"], "MSFT": known["MSFT"][:2]}
    assert closes(sort=Sort.DESC, start=begin) == {name: row[::-1] for name, row in known.items()}
    with pytest.raises(APIError, match="invalid adjustment"):
        closes(adjustment=Adjustment.SPLIT, start=begin)

    def page(path: str, **query: Any) -> Any:
        return requests.get(f"{exchange_server.url}/v2/stocks/{path}", query, headers=HEADERS, timeout=5)

    first = page("bars", symbols="IBM,MSFT", timeframe="1Day", limit=3, start="2012-01-01").json()
    assert len(first["bars"]["IBM"]) == 3 and first["next_page_token"]
    single = page("IBM/bars", timeframe="1Day", start="2012-01-04", end="2012-01-05").json()
    assert [bar["c"] for bar in single["bars"]] == known["IBM"][1:3] and single["symbol"] == "IBM"
    for wrong, words in [
        ({}, "symbols is required"),
        ({"symbols": "IBM"}, "timeframe is required"),
        ({"symbols": "IBM", "timeframe": "1Day", "feed": "moon"}, "invalid feed"),
        ({"symbols": "IBM", "timeframe": "1Day", "limit": "0"}, "invalid limit"),
        ({"symbols": "IBM", "timeframe": "1Min"}, "invalid timeframe"),
        ({"symbols": "BTC/USD", "timeframe": "1Day"}, "invalid symbol: BTC/USD"),
    ]:
        answer = page("bars", **wrong)
        assert answer.status_code == 400 and words in answer.json()["message"]


def test_strangers_and_wrong_addresses_are_told_so(exchange_server: ExchangeServer) -> None:
    url = exchange_server.url
    wrong = HEADERS | {"APCA-API-SECRET-KEY": "wrong"}
    for headers in (None, wrong, {"Authorization": "Basic not-base64!"}):
        answer = requests.get(f"{url}/v2/account", headers=headers, timeout=5)
        assert (answer.status_code, answer.json()) == (401, {"message": "unauthorized."})
    assert requests.get(f"{url}/v2/account", auth=KEYS, timeout=5).status_code == 200
    assert requests.post(f"{url}/simulation/advance", headers=wrong, timeout=5).status_code == 401
    assert requests.get(f"{url}/v2/moon", headers=HEADERS, timeout=5).json()["code"] == 40410000
    assert requests.put(f"{url}/v2/orders", headers=HEADERS, timeout=5).status_code == 405
    broken = requests.post(f"{url}/v2/orders", data="{", headers=HEADERS, timeout=5)
    assert (broken.status_code, broken.json()["code"]) == (400, 40010001)
    status = requests.get(f"{url}/v2/orders", {"status": "odd"}, headers=HEADERS, timeout=5)
    assert status.status_code == 422 and "invalid status" in status.json()["message"]


def test_the_reins_over_http(exchange_server: ExchangeServer, daily_bars: Bars) -> None:
    def post(path: str) -> Any:
        return requests.post(f"{exchange_server.url}/simulation/{path}", headers=HEADERS, timeout=5)

    for _ in range(5, daily_bars.n):
        step = post("advance").json()
    assert step["last"] and step["index"] == daily_bars.n - 1
    over = post("advance")
    assert over.status_code == 409 and "last bar" in over.json()["message"]
    state = requests.get(f"{exchange_server.url}/simulation/state", headers=HEADERS, timeout=5).json()
    assert state == post("close").json() and state["last"]


async def test_other_clients_may_speak_json(exchange_server: ExchangeServer) -> None:
    async with connect(exchange_server.data_stream_url) as socket:

        async def heard() -> Any:
            return json.loads(await asyncio.wait_for(socket.recv(), 5))[0]

        assert (await heard())["msg"] == "connected"
        await socket.send(json.dumps({"action": "auth", "key": KEYS[0], "secret": KEYS[1]}))
        assert (await heard())["msg"] == "authenticated"
        await socket.send(json.dumps({"action": "subscribe", "dailyBars": ["*"]}))
        assert (await heard())["dailyBars"] == ["*"]
        exchange_server.call(exchange_server.exchange.advance)
        bar = await heard()
        assert (bar["T"], bar["S"]) == ("d", "AAPL") and bar["t"].endswith("Z")


def test_stopping_is_quick_with_clients_connected(exchange_server: ExchangeServer, client: TradingClient) -> None:
    client.get_account()
    begun = time.monotonic()
    exchange_server.stop()
    assert time.monotonic() - begun < 2.0
    with pytest.raises(requests.ConnectionError):
        client.get_account()


def test_a_port_in_use_is_a_readable_refusal(exchange_server: ExchangeServer, exchange: Exchange) -> None:
    with pytest.raises(Misconfigured, match=f"{exchange_server.port}.*Choose another port"):
        ExchangeServer(exchange, port=exchange_server.port).start()
    with pytest.raises(Misconfigured, match="cannot listen"):
        ExchangeServer(exchange, port=70_000).start()


def test_a_server_waits_until_it_is_stopped(exchange: Exchange) -> None:
    server = ExchangeServer(exchange)
    server.wait()  # not started: nothing to wait for
    with server:
        waiting = threading.Thread(target=server.wait)
        waiting.start()
        assert waiting.is_alive()
    waiting.join(5)
    assert not waiting.is_alive()


def test_intraday_bars_travel_on_the_bars_channel() -> None:
    minutes = synthetic_bars(["IBM"], "2024-01-02", "2024-01-02", "5Min", seed=1)
    assert TradingCalendar().is_open(minutes.at(0))
    with ExchangeServer(Exchange(minutes), key_id=KEYS[0], secret_key=KEYS[1]) as server:
        got: list[Any] = []
        stream = StockDataStream(*KEYS, url_override=server.data_stream_url)

        async def on_bar(bar: Any) -> None:
            got.append(bar)

        stream.subscribe_bars(on_bar, "IBM")
        subscribed = confirmed(stream)
        thread = threading.Thread(target=stream.run, daemon=True)
        thread.start()
        assert subscribed.wait(20)
        server.call(server.exchange.advance)
        eventually(lambda: len(got) == 1)
        assert got[0].timestamp == minutes.at(0)
        stream.stop()
    thread.join(6)
