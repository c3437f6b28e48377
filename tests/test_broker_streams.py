"""The alpaca-py adapter when the other side misbehaves, and the library's private parts that it relies on."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from alpaca.data.models import Bar

from trader_lib.broker.alpaca import SETTLE_S, AlpacaBroker
from trader_lib.broker.connection import AlpacaAccess
from trader_lib.broker.inbox import BarArrived
from trader_lib.broker.streams import (
    FAILURES_MAX,
    RECONNECT_CAP_S,
    StreamThread,
    WatchedDataStream,
    WatchedTradingStream,
)
from trader_lib.clock.clock import VirtualClock
from trader_lib.clock.ids import generator
from trader_lib.config.sections import ResilienceSettings
from trader_lib.errors.taxonomy import Misconfigured, OutcomeUnknown, Retryable, TraderError, Unauthorized
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.messages import trade_update_json
from trader_lib.exchange.server import ExchangeServer
from trader_lib.trading.events import TradeUpdated
from trader_lib.trading.orders import OrderRequest, OrderSide

ORDER = OrderRequest(symbol="IBM", side=OrderSide.BUY, qty=Decimal(1), client_order_id="once")


@contextmanager
def http_server(answer: bytes | None) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives every request the same answer, or none; and what it was asked."""
    asked: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    def talk(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(65536):
                if data.startswith((b"GET", b"POST", b"DELETE")):
                    asked.append(data)
                    if answer is not None:
                        connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
    listener.close()


def http_answer(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def broker_at(url: str, *, timeout_s: float = 0.2, read_attempts: int = 1, **changes: Any) -> AlpacaBroker:
    times = {f"{kind}_timeout_s": timeout_s for kind in ("orders", "cancels", "reads", "data")}
    patience = ResilienceSettings(reads_attempts=read_attempts, **(times | changes))
    access = AlpacaAccess("key", "secret", trading_url=url, data_url=url, resilience=patience, simulated=True)
    return AlpacaBroker(access, symbols=["IBM"], timeframe="1Day")


async def test_a_mute_server_is_not_waited_for_and_leaves_the_order_unknown() -> None:
    with http_server(None) as (url, asked):
        broker = broker_at(url)
        begun = time.monotonic()
        with pytest.raises(OutcomeUnknown):
            await broker.submit(ORDER)
        assert time.monotonic() - begun < 2.0 and len(asked) == 1
        with pytest.raises(Retryable):
            await broker.account()
        await broker.stop()


@pytest.mark.parametrize("status", ["504 Gateway Timeout", "502 Bad Gateway", "500 Internal Server Error"])
async def test_one_submission_is_one_post_whatever_the_server_says(status: str) -> None:
    """Fails when a new alpaca-py retries by other means."""
    with http_server(http_answer(status, b"<html>")) as (url, asked):
        broker = broker_at(url, timeout_s=2.0)
        with pytest.raises(OutcomeUnknown):
            await broker.submit(ORDER)
        assert len([request for request in asked if request.startswith(b"POST")]) == 1
        await broker.stop()


async def test_an_accepted_order_that_cannot_be_read_is_unknown() -> None:
    body = b'{"id": "61e69015-8549-4bfd-b9c3-01e75843f47d", "status": "a_new_word"}'
    with http_server(http_answer("200 OK", body)) as (url, _):
        broker = broker_at(url, timeout_s=2.0)
        with pytest.raises(OutcomeUnknown):
            await broker.submit(ORDER)
        await broker.stop()


async def test_reads_are_repeated() -> None:
    with http_server(http_answer("503 Service Unavailable", b"{}")) as (url, asked):
        broker = broker_at(url, timeout_s=2.0, read_attempts=3)
        with pytest.raises(Retryable):
            await broker.positions()
        assert len(asked) == 3
        await broker.stop()


async def test_a_server_that_is_not_there_got_nothing() -> None:
    broker = broker_at("http://127.0.0.1:9")
    with pytest.raises(Retryable):
        await broker.submit(ORDER)
    await broker.stop()


async def test_start_gives_up_when_the_streams_do_not_connect(alpaca_access: AlpacaAccess) -> None:
    with http_server(None) as (url, _):
        mute = url.replace("http", "ws")
        access = replace(alpaca_access, data_stream_url=mute, resilience=ResilienceSettings(reads_timeout_s=1.5))
        broker = AlpacaBroker(access, symbols=["IBM"], timeframe="1Day")
        with pytest.raises(Retryable, match="streams did not connect"):
            await broker.start()


async def test_wrong_keys_for_a_stream_end_the_start(alpaca_access: AlpacaAccess) -> None:
    for kind in (WatchedTradingStream, WatchedDataStream):
        access = replace(alpaca_access, secret_key="wrong")
        thread = StreamThread("wrong-keys", _maker(kind, access), lambda error: None)
        thread.start()
        with pytest.raises(Unauthorized):
            await asyncio.wait_for(asyncio.wrap_future(thread.connected), 5)
        thread.stop()


async def test_a_refused_subscription_ends_the_start(
    alpaca_access: AlpacaAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(self: Any) -> None:
        await self._dispatch({"T": "error", "code": 409, "msg": "insufficient subscription"})

    monkeypatch.setattr(WatchedDataStream, "_send_subscribe_msg", refuse)
    broker = AlpacaBroker(alpaca_access, symbols=["IBM"], timeframe="1Day")
    with pytest.raises(Misconfigured, match="insufficient subscription"):
        await broker.start()


def _maker(kind: Any, access: AlpacaAccess) -> Callable[[Any], Any]:
    async def ignore(message: Any) -> None: ...

    def make(watcher: Any) -> Any:
        stream = kind(access, watcher)
        if kind is WatchedTradingStream:
            stream.subscribe_trade_updates(ignore)
        else:
            stream.subscribe_daily_bars(ignore, "IBM")
        return stream

    return make


async def test_stopping_takes_a_moment(alpaca_access: AlpacaAccess) -> None:
    broker = AlpacaBroker(alpaca_access, symbols=["IBM"], timeframe="1Day")
    await broker.start()
    begun = time.monotonic()
    await broker.stop()
    assert time.monotonic() - begun < 1.0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("alpaca-")]


async def test_stop_before_start_does_nothing(alpaca_access: AlpacaAccess) -> None:
    await AlpacaBroker(alpaca_access, symbols=["IBM"], timeframe="1Day").stop()


@asynccontextmanager
async def quick_to_reconnect(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    for kind in (WatchedTradingStream, WatchedDataStream):
        monkeypatch.setattr(kind, "_reconnect_delay", lambda self, retries: self._watcher.pause(retries) * 0.01)
    yield


async def test_a_lost_connection_comes_back_and_is_counted(
    exchange: Exchange, exchange_server: ExchangeServer, alpaca_access: AlpacaAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with quick_to_reconnect(monkeypatch):
        broker = AlpacaBroker(alpaca_access, symbols=["IBM"], timeframe="1Day")
        await broker.start()
        port = exchange_server.port
        await asyncio.to_thread(exchange_server.stop)
        keys = {"key_id": alpaca_access.key_id, "secret_key": alpaca_access.secret_key}
        with ExchangeServer(exchange, port=port, **keys) as again:
            async with asyncio.timeout(10):
                while broker.reconnects < 2:  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.02)
            counts = exchange.counts()
            await broker.submit(ORDER)
            step = again.call(exchange.advance)
            items = await broker.inbox.pump(
                trade_updates=step.trade_updates - counts.trade_updates, bars=1, timeout_s=5
            )
            assert len(items) == 3
            await broker.stop()


async def test_an_unreadable_trade_update_is_counted_and_goes_no_further(
    exchange_server: ExchangeServer, alpaca_access: AlpacaAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, broken = trade_update_json, True
    monkeypatch.setattr(
        "trader_lib.exchange.streams.trade_update_json",
        lambda event: {"stream": "trade_updates", "data": {"event": "new"}} if broken else told(event),
    )
    broker = AlpacaBroker(alpaca_access, symbols=["IBM"], timeframe="1Day")
    await broker.start()
    await broker.submit(ORDER)
    exchange_server.call(exchange_server.exchange.advance)
    await until(lambda: broker.streams()["trading"].failures == 2)
    broken = False
    await broker.submit(ORDER.model_copy(update={"client_order_id": "another"}))
    exchange_server.call(exchange_server.exchange.advance)
    items = await broker.inbox.pump(trade_updates=1, timeout_s=5)  # bars among them
    assert any(isinstance(item, TradeUpdated) for item in items)
    assert broker.streams()["trading"].reconnects == 0
    await broker.stop()


async def test_a_stream_of_which_nothing_can_be_read_reaches_the_session(alpaca_access: AlpacaAccess) -> None:
    told: list[TraderError] = []
    thread = StreamThread("unreadable", _maker(WatchedTradingStream, alpaca_access), told.append)
    thread.ready()
    for _ in range(FAILURES_MAX - 1):
        thread.unreadable(Retryable("what is this?"))
    thread.heard()
    thread.unreadable(Retryable("what is this?"))
    assert not told and thread.counters().failures == FAILURES_MAX
    for _ in range(FAILURES_MAX - 1):
        thread.unreadable(Retryable("what is this?"))
    assert len(told) == 1


async def until(happened: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not happened():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def test_pauses_before_connecting_again_are_drawn_from_the_seed_and_bounded(alpaca_access: AlpacaAccess) -> None:
    def pauses(seed: int) -> list[float]:
        random = generator(seed, "pauses")
        make = _maker(WatchedTradingStream, alpaca_access)
        thread = StreamThread("pauses", make, lambda error: None, random=random)
        return [thread.pause(retries) for retries in range(1, 40)]

    assert pauses(1) == pauses(1) != pauses(2) and len(set(pauses(1))) > 30
    assert max(pauses(1)[:1]) <= 2.0 and max(pauses(1)) <= RECONNECT_CAP_S


async def test_a_broken_stream_comes_back_without_the_session_doing_anything(
    exchange: Exchange, exchange_server: ExchangeServer, alpaca_access: AlpacaAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with quick_to_reconnect(monkeypatch):
        broker = AlpacaBroker(alpaca_access, symbols=["IBM"], timeframe="1Day")
        await broker.start()
        assert all(found.connected and not found.reconnects for found in broker.streams().values())
        broker._streams[1].restart()
        await until(lambda: broker.streams()["data"].reconnects == 1)
        found = broker.streams()
        assert (found["data"].stale, found["trading"].stale, found["trading"].reconnects) == (1, 0, 0)
        exchange_server.call(exchange.advance)
        await broker.inbox.pump(bars=1, timeout_s=5)
        await broker.stop()


@contextmanager
def mute_between(port: int) -> Iterator[tuple[str, threading.Event]]:
    """A way to a port on which, once it is told to, nothing comes back any more, while the connection stands."""
    listener, mute = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def carry(source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if not (is_answer and mute.is_set()):
                    target.sendall(data)
        with suppress(OSError):
            target.close()

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                for pair in ((client, server, False), (server, client, True)):
                    threading.Thread(target=carry, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"ws://127.0.0.1:{listener.getsockname()[1]}", mute
    listener.close()


@pytest.mark.slow
async def test_a_mute_socket_is_noticed_by_its_pings(
    exchange_server: ExchangeServer, alpaca_access: AlpacaAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mute_between(exchange_server.port) as (url, mute):
        patience = ResilienceSettings(stream_ping_s=1.5)
        access = replace(alpaca_access, trading_stream_url=f"{url}/stream", resilience=patience)
        async with quick_to_reconnect(monkeypatch):
            broker = AlpacaBroker(access, symbols=["IBM"], timeframe="1Day")
            await broker.start()
            mute.set()
            await until(lambda: not broker.streams()["trading"].connected, 20)
            mute.clear()
            await until(lambda: broker.streams()["trading"].reconnects > 0, 20)
            await broker.stop()


async def test_bars_that_stay_away_while_the_market_is_open_mean_a_new_connection(
    alpaca_access: AlpacaAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with quick_to_reconnect(monkeypatch):
        clock = VirtualClock(datetime(2026, 11, 27, 14, 20, tzinfo=UTC))  # ten minutes before the open
        access = replace(alpaca_access, resilience=ResilienceSettings(stream_silent_s=150, reads_timeout_s=5))
        broker = AlpacaBroker(access, symbols=["IBM"], timeframe="1Min", clock=clock)
        await broker.start()

        async def pass_(seconds: float) -> None:
            ends = clock.now() + timedelta(seconds=seconds)
            while clock.now() < ends:
                clock.advance_to(min(ends, clock.now() + timedelta(seconds=15)))
                await asyncio.sleep(0.005)

        await pass_(700)  # the market has been open for 100 s
        assert broker.streams()["data"].stale == 0
        await pass_(80)
        assert broker.streams()["data"].stale == 1
        await until(lambda: broker.streams()["data"].reconnects == 1)
        await pass_(200)
        assert broker.streams()["data"].stale == 1  # more patient than before
        await pass_(160)
        assert broker.streams()["data"].stale == 2
        await broker.stop()


async def test_a_stream_that_is_down_is_a_trouble(alpaca_access: AlpacaAccess, exchange_server: ExchangeServer) -> None:
    broker = AlpacaBroker(alpaca_access, symbols=["IBM"], timeframe="1Day")
    await broker.start()
    assert broker.troubles() == ()
    await asyncio.to_thread(exchange_server.stop)
    await until(lambda: len(broker.troubles()) == 2)
    assert "The data stream is not connected." in broker.troubles()
    await broker.stop()


async def test_a_daily_bar_of_the_day_arrives_after_the_close(alpaca_access: AlpacaAccess) -> None:
    """Alpaca's bar of the day so far is held, and given out a moment after the close when none follows."""
    close = datetime(2026, 11, 27, 18, tzinfo=UTC)  # a half day
    clock = VirtualClock(close - timedelta(hours=1))
    broker = AlpacaBroker(alpaca_access, symbols=["IBM"], timeframe="1Day", clock=clock)
    await broker.start()

    def so_far(price: float) -> Bar:
        raw = {"t": datetime(2026, 11, 27, 5, tzinfo=UTC), "o": 1, "h": 9, "l": 1, "c": price, "v": 1, "n": 1, "vw": 1}
        return Bar("IBM", raw)

    for price in (2.0, 3.0):
        await broker._receive_daily(so_far(price))
    assert await broker.inbox.pump() == []
    await asyncio.sleep(0.01)  # the watch over the close goes to sleep
    clock.advance_to(close + timedelta(seconds=SETTLE_S))
    (bar,) = await broker.inbox.pump(bars=1, timeout_s=5)
    assert isinstance(bar, BarArrived) and bar.row.close == 3.0
    await broker._receive_daily(so_far(4.0))
    assert broker.inbox.bars == 1
    await broker.stop()


async def test_minute_bars_pass_as_they_come(alpaca_access: AlpacaAccess) -> None:
    broker = AlpacaBroker(alpaca_access, symbols=["IBM"], timeframe="1Min")
    await broker.start()
    raw = {"t": datetime(2026, 11, 27, 15, tzinfo=UTC), "o": 1, "h": 1, "l": 1, "c": 1, "v": 1, "n": 1, "vw": 1}
    await broker._receive_bar(Bar("IBM", raw))
    assert broker.inbox.bars == 1
    await broker.stop()
