"""The guards and the cache around the Alpaca adapter, with real sockets."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import pytest
from loguru import logger

from trader_lib.broker.alpaca import AlpacaBroker
from trader_lib.broker.connection import AlpacaAccess
from trader_lib.broker.simulation import HttpSimulation
from trader_lib.clock.clock import WallClock
from trader_lib.config.sections import ResilienceSettings
from trader_lib.errors.taxonomy import OutcomeUnknown, RateLimited, Retryable
from trader_lib.exchange.server import ExchangeServer
from trader_lib.market.bars import Bars
from trader_lib.resilience.breaker import CircuitOpen
from trader_lib.trading.events import TradeUpdated
from trader_lib.trading.orders import OrderRequest, OrderSide


def order(name: str, **fields: Any) -> OrderRequest:
    return OrderRequest(
        **({"symbol": "IBM", "side": OrderSide.BUY, "qty": Decimal(1), "client_order_id": name} | fields)
    )


@contextmanager
def server_that_says(*answers: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """Gives the answers one by one, the last one for ever; and keeps what it was asked."""
    asked: list[bytes] = []
    left = list(answers)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                asked.append(connection.recv(65536).split(b"\r\n")[0])
                connection.sendall(left.pop(0) if len(left) > 1 else left[0])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
    listener.close()


def answer(status: str, body: bytes = b"{}", **headers: object) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\n{lines}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def broker_at(url: str, **changes: Any) -> AlpacaBroker:
    patience = ResilienceSettings(**({"reads_attempts": 1, "cancels_attempts": 1, "wait_s": 0.2} | changes))
    access = AlpacaAccess("key", "secret", trading_url=url, data_url=url, resilience=patience, simulated=True)
    return AlpacaBroker(access, symbols=["IBM"], timeframe="1Day")


async def test_the_limit_is_learnt_from_the_answers_headers() -> None:
    headers = {"X_RateLimit_Limit": 100, "X_RateLimit_Remaining": 0, "X_RateLimit_Reset": 1104710430}
    date = {"Date": "Mon, 03 Jan 2005 00:00:00 GMT"}
    with server_that_says(answer("200 OK", b"[]", **headers, **date)) as (url, asked):
        broker = broker_at(url)
        assert await broker.positions() == ()
        limit = broker.guards.trading_limit
        assert limit is not None and limit.limit == 100 and 25 < limit.wait_s() <= 30
        with pytest.raises(RateLimited):
            await broker.submit(order("a"))
        assert len(asked) == 1, "what is over the limit is not sent"
        data = broker.guards.data_limit
        assert data is not None and data.limit == 180
        await broker.stop()


async def test_after_a_429_nobody_calls_until_the_time_it_named() -> None:
    with server_that_says(answer("429 Too Many Requests", b'{"code": 42910000}', Retry_After=30)) as (url, asked):
        broker = broker_at(url)
        for call in (broker.account, broker.positions):
            with pytest.raises(RateLimited):
                await call()
        assert len(asked) == 1
        assert [guard.limited for guard in broker.guards.health()] == [0, 0, 2, 0]
        await broker.stop()


async def test_when_orders_fail_no_more_are_sent_and_cancels_still_are() -> None:
    with server_that_says(*[answer("500 Internal Server Error")] * 3, answer("204 No Content", b"")) as (url, asked):
        broker = broker_at(url, breaker_failures=3)
        for number in range(3):
            with pytest.raises(OutcomeUnknown):
                await broker.submit(order(f"{number}"))
        with pytest.raises(CircuitOpen):
            await broker.submit(order("refused"))
        await broker.cancel("61e69015-8549-4bfd-b9c3-01e75843f47d")
        assert [line.split()[0] for line in asked] == [b"POST"] * 3 + [b"DELETE"]
        orders, cancels, *_ = broker.guards.health()
        assert (orders.state, orders.broken, cancels.state, cancels.answered) == ("down", 1, "ok", 1)
        (trouble,) = broker.troubles()
        assert trouble.startswith("Calls for orders are down. CircuitOpen: ")
        await broker.stop()


async def test_an_answer_in_drops_ends_with_the_guards_timeout() -> None:
    """requests counts its timeout between two bytes, and would wait for ever."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while not done.wait(0.05):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    broker = broker_at(f"http://127.0.0.1:{listener.getsockname()[1]}", orders_timeout_s=0.5)
    with pytest.raises(OutcomeUnknown, match=r"within 0\.5 s"):
        await broker.submit(order("a"))
    assert broker.guards.orders.health().timed_out == 1
    done.set()
    thread.join()
    listener.close()
    await broker.stop()


async def test_no_more_calls_at_once_than_allowed_and_the_rest_wait() -> None:
    slow = 0.05
    most, now = [0], [0]

    def count(*_: object) -> list[object]:
        now[0] += 1
        most.append(now[0])
        threading.Event().wait(slow)
        now[0] -= 1
        return []

    broker = broker_at("http://127.0.0.1:9", reads_concurrent=2, positions_ttl_s=0, wait_s=5.0)
    broker._client.get_all_positions = count  # type: ignore[method-assign,assignment]
    assert await asyncio.gather(*[broker.positions() for _ in range(6)]) == [()] * 6
    assert max(most) == 2
    await broker.stop()


async def test_what_is_kept_is_never_older_than_a_message_about_it(
    exchange_server: ExchangeServer, alpaca_access: AlpacaAccess, daily_bars: Bars
) -> None:
    """After each bar, each fill and each order of ours the account is the exchange's; between, it is kept."""
    broker = AlpacaBroker(alpaca_access, symbols=daily_bars.symbols, timeframe="1Day", clock=WallClock())
    control = HttpSimulation(exchange_server.url, alpaca_access.key_id, alpaca_access.secret_key)

    async def check() -> None:
        for _ in range(3):
            account, positions = await asyncio.gather(broker.account(), broker.positions())
            assert account.equity == exchange_server.call(exchange_server.exchange.account).equity
            assert account.buying_power == exchange_server.call(exchange_server.exchange.account).buying_power
            held = {position.symbol: position.qty for position in positions}
            assert held == {p.symbol: p.qty for p in exchange_server.call(exchange_server.exchange.positions)}

    await broker.start()
    fills = 0
    for day in range(8):
        side = OrderSide.BUY if day % 3 < 2 else OrderSide.SELL
        await broker.submit(order(f"{day}", side=side, qty=Decimal(7)))
        await check()
        step = await control.advance()
        items = await broker.inbox.pump(trade_updates=step.trade_updates, bars=step.bars, timeout_s=5)
        fills += sum(isinstance(item, TradeUpdated) and item.event == "fill" for item in items)
        await check()
    assert fills == 8
    stats = broker.cache.stats()
    assert stats.saved >= 2 * 2 * 8 * 2, "two of three checks asked nobody"
    assert broker.guards.reads.health().calls == stats.misses
    await broker.stop()
    await control.stop()


async def test_the_markets_clock_runs_on_until_it_opens_or_closes() -> None:
    body = b"""{"timestamp": "2005-01-03T09:29:59-05:00", "is_open": %s, "next_open": "2005-01-03T09:3%d:00-05:00",
        "next_close": "2005-01-03T16:00:00-05:00"}"""
    answers = [answer("200 OK", body % (b"false", 0)), answer("200 OK", body % (b"true", 9))]
    with server_that_says(*answers) as (url, asked):
        broker = broker_at(url)
        first, second = await broker.market_clock(), await broker.market_clock()
        assert not first.is_open and first.now < second.now and len(asked) == 1
        await asyncio.sleep(1.0)
        assert (await broker.market_clock()).is_open and len(asked) == 2
        await broker.stop()


async def test_nothing_is_kept_where_the_settings_say_so() -> None:
    with server_that_says(answer("200 OK", b"[]")) as (url, asked):
        broker = broker_at(url, positions_ttl_s=0)
        for _ in range(3):
            await broker.positions()
        assert len(asked) == 3
        await broker.stop()


async def test_a_refused_connection_is_an_error_of_the_host_and_leaves_no_order_in_doubt() -> None:
    broker = broker_at("http://127.0.0.1:9", breaker_failures=1)
    with pytest.raises(Retryable):
        await broker.submit(order("a"))
    with pytest.raises(CircuitOpen):
        await broker.submit(order("a"))
    assert broker.guards.orders.health().sent == 1
    await broker.stop()


async def test_the_log_says_at_the_end_how_the_calls_went(alpaca_access: AlpacaAccess) -> None:
    said: list[str] = []
    sink = logger.add(said.append, format="{message}", level="INFO")
    broker = AlpacaBroker(alpaca_access, symbols=["AAPL"], timeframe="1Day")
    try:
        await broker.account()
    finally:
        await broker.stop()
        await broker.stop()
        logger.remove(sink)
    told = [line for line in said if line.startswith("Calls for ")]
    assert told == [
        "Calls for reads: 1 asked for, 1 attempts sent, 0 of them again; 0 not answered, 0 of them too late; "
        "turned away: 0 for the rate limit, 0 for want of a place, 0 by the breaker.\n"
    ]
