"""What strangers send to the exchange and to the page, and what it costs a session: nothing."""

import asyncio
import base64
import http.client
import json
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, suppress
from typing import Any, Literal, get_args

import anyio
import msgpack
import orjson
import pytest
from alpaca.trading.client import TradingClient
from alpaca.trading.requests import LimitOrderRequest, MarketOrderRequest
from sse_starlette import ServerSentEvent

from tests.observed import observed_session, observed_settings
from trader_lib.config.settings import SETTING_NAMES, Settings, load_settings
from trader_lib.errors.taxonomy import Misconfigured
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.observe.address import monitor_url
from trader_lib.observe.page import PAUSE_S, STREAMS_MAX, WRONG_MAX, BoundedStream, WrongTokens, sender_of
from trader_lib.resilience.connections import Patience
from trader_lib.session.companions import SessionParts

KEY_ID, SECRET_KEY = "test-key", "test-secret"  # of the fixture exchange_server
HEADERS = {"APCA-API-KEY-ID": KEY_ID, "APCA-API-SECRET-KEY": SECRET_KEY}
SEED = 20_261_127
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": base64.b64encode(b"0123456789abcdef").decode(),
}


@pytest.fixture(autouse=True)
def nothing_breaks(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No server writes a traceback, nor more than a few lines, whatever a test sends to it."""
    yield
    records = caplog.get_records("call")
    assert not [record for record in records if record.exc_info], caplog.text[-4000:]
    assert len(records) < 50, caplog.text[-4000:]


def head(method: str, path: str, headers: dict[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def say(port: int, data: bytes, *, wait_s: float = 5.0, address: str = "127.0.0.1") -> bytes:
    """Send bytes on a connection of their own; return the one answer, or what there is of it when the server closes."""
    with socket.create_connection(("127.0.0.1", port), wait_s, (address, 0)) as line:
        answer = b""
        with suppress(ConnectionError):  # reset: closed with something still unread
            line.sendall(data)
            while not is_whole(answer, data) and (chunk := line.recv(65_536)):
                answer += chunk
        return answer


def is_whole(answer: bytes, request: bytes) -> bool:
    begin, found, body = answer.partition(b"\r\n\r\n")
    if found and (request.startswith(b"HEAD ") or status_of(answer) in (101, 204)):
        return True
    length = re.search(rb"\r\ncontent-length: (\d+)", begin, re.IGNORECASE)
    return length is not None and len(body) >= int(length[1])


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def books(server: ExchangeServer) -> tuple[Any, ...]:
    """What the exchange holds: cash, positions, orders."""
    exchange = server.exchange
    return server.call(
        lambda: (
            exchange.account().cash,
            tuple((one.symbol, one.qty) for one in exchange.positions()),
            tuple((one.id, one.status) for one in exchange.orders()),
        )
    )


# ---- requests that make no sense

NUMBERS: list[Any] = [
    "1e999999999",
    "-1e999999999",
    "1e-999999999",
    "9" * 5000,
    "NaN",
    "sNaN",
    "Infinity",
    "-inf",
    "1_0",
    "٣",
    "0x10",
    "",
    " ",
    "0",
    "-1",
    "-0",
    "1.0000000000000000000000000001",
    10**18,
    2**63,
    1e308,
    5e-324,
    True,
    [],
    [1],
    {},
    {"n": 1},
    "\x00",
    "💥" * 100,
]
WORDS: list[Any] = ["", "buy", "IBM", "IBM,IBM", "ibm", "oco", "gtc", "limit", "\u202e", "x" * 10_000, "../..", None, 0]
RAW_BODIES = [
    b"",
    b"{",
    b"[" * 20_000,
    b'{"a":' * 20_000,
    b'{"qty": NaN, "symbol": "IBM"}',
    b'{"qty": Infinity}',
    b'{"qty": ' + b"9" * 5000 + b"}",
    b'{"qty": 1e999999999}',
    b'{"symbol": "\\ud800"}',
    b'{"symbol": "\xff\xfe"}',
    b'"\\u0000"',
    b"null",
    b"true",
    b"\x00" * 100,
    b"\xef\xbb\xbf{}",
    b'{"symbol": "IBM", "symbol": "MSFT"}',
]
TIMES = ["", "yesterday", "0001-01-01", "9999-12-31", "2012-01-03T25:00", "2012-13-01", "2012-W01-1", "9" * 5000, "-1"]
TIMES += ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2012-01-03T00:00:00Z", "２０１２-01-03", "\x00"]
PARAMETERS = {
    "limit": ["0", "-1", "1", "9" * 5000, "٣", "1.5", "²", "NaN"],
    "symbols": ["IBM,IBM", ",,,", "IBM," * 3000, "*", "\u202e", "%ff", "NOPE"],
    "timeframe": ["1Day", "1Week", "", "9" * 5000],
    "start": TIMES,
    "end": TIMES,
    "after": TIMES,
    "until": TIMES,
    "page_token": [
        "x",
        "====",
        "\u00e9",
        *(base64.b64encode(one).decode() for one in (b"IBM|NaN", b"IBM|" + b"9" * 5000)),
    ],
    "status": ["all", "closed", "odd"],
    "side": ["buy", "odd"],
    "direction": ["asc", "odd"],
    "nested": ["true", "odd"],
    "sort": ["desc", "odd"],
    "qty": [str(one) for one in NUMBERS],
    "percentage": [str(one) for one in NUMBERS],
    "cancel_orders": ["odd"],
    "client_order_id": ["x" * 5000, "", "\x00"],
    "adjustment": ["all", "odd"],
    "feed": ["iex", "odd"],
}
PLACES = [
    "/v2/account",
    "/v2/assets",
    "/v2/assets/{}",
    "/v2/clock",
    "/v2/calendar",
    "/v2/orders",
    "/v2/orders:by_client_order_id",
    "/v2/orders/{}",
    "/v2/positions",
    "/v2/positions/{}",
    "/v2/stocks/bars",
    "/v2/stocks/{}/bars",
    "/simulation/state",
    "/stream",
    "/v2/iex",
]
PARTS = ["IBM", "NOPE", "%00", "%ff", "..%2f..", "%F0%9F%92%A5", "x" * 3000, ".", "..", "%", "%zz", "*"]
HOSTS = ["127.0.0.1", "127.0.0.1", "[", "evil.example", ""]
SECRETS = ["Basic", "Basic ====", "Basic \xe9", "Bearer x", "Basic " + "A" * 4000]
TYPES = ["application/json", "text/plain", "application/msgpack", "multipart/form-data; boundary=x", "\x80", ""]


def quoted(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())


def odd_request(rng: random.Random) -> bytes:
    """One request with the keys, some part of which is wrong."""
    method = rng.choice(["GET"] * 6 + ["POST"] * 4 + ["PATCH", "DELETE", "HEAD", "OPTIONS", "PUT", "\x7f"])
    path = rng.choice(PLACES if method != "POST" else ["/v2/orders"] * 9 + PLACES).format(rng.choice(PARTS))
    path += rng.choice([*[""] * 12, "/", "//", "?", "#", "%0a", "/../x"])
    names = rng.sample(sorted(PARAMETERS), rng.randrange(5))
    query = [f"{name}={quoted(rng.choice(PARAMETERS[name]))}" for name in names]
    query += rng.choice([[], [], ["&&&=&"], ["%"], ["a" * 2000], ["limit=1&limit=2"], ["%ff=%fe"]])
    headers = {"Host": rng.choice(HOSTS), **HEADERS, "Connection": "close"}
    body = b""
    if method in ("POST", "PATCH", "PUT"):
        body = rng.choice(RAW_BODIES) if rng.random() < 0.3 else orjson.dumps(odd_order(rng))
        headers |= {"Content-Length": str(len(body)), "Content-Type": rng.choice(TYPES)}
    if rng.random() < 0.1:
        headers |= {name: value for name, value in UPGRADE.items() if rng.random() < 0.8}
    if rng.random() < 0.05:
        del headers["APCA-API-KEY-ID"]
        headers |= {"Authorization": rng.choice(SECRETS)}
    target = path + ("?" + "&".join(query) if query else "")
    return head(method, target, headers) + body


MORE_FIELDS = ["notional", "limit_price", "stop_price", "order_class", "client_order_id", "extended_hours"]


def odd_order(rng: random.Random) -> Any:
    """An order that nobody should want. What might by chance be a good one is too large to be bought."""
    order: dict[str, Any] = {"symbol": "IBM", "side": "buy", "type": "market", "time_in_force": "day", "qty": 10**7}
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice([*order, *MORE_FIELDS])
        order[name] = rng.choice(NUMBERS if rng.random() < 0.5 else WORDS)
    if rng.random() < 0.3:
        leg = rng.choice(["take_profit", "stop_loss"])
        prices = [{"limit_price": rng.choice(NUMBERS)}, {"stop_price": []}]
        order |= {"order_class": "oco", leg: rng.choice([*WORDS, *prices])}
    return rng.choice([order, order, order, order, [order], rng.choice(NUMBERS)])


MARKET = {"symbol": "IBM", "side": "buy", "type": "market", "time_in_force": "day", "qty": 10}
NEARLY: list[tuple[str, str, dict[str, str]]] = [
    ("GET", "/v2/orders", {"status": "all"}),
    ("GET", "/v2/stocks/bars", {"symbols": "IBM", "timeframe": "1Hour"}),
    ("GET", "/v2/stocks/IBM/bars", {"timeframe": "1Hour"}),
    ("GET", "/v2/calendar", {"start": "2024-01-02", "end": "2024-01-10"}),
    ("GET", "/v2/orders:by_client_order_id", {"client_order_id": "held"}),
    ("DELETE", "/v2/positions/MSFT", {"percentage": "1"}),
    ("DELETE", "/v2/positions/MSFT", {"qty": "1"}),
    ("POST", "/v2/orders", {}),
    ("PATCH", "/v2/orders/{}", {}),
]


def nearly_good_request(rng: random.Random, order_id: str) -> bytes:
    """One request that would be answered but for one thing."""
    method, path, query = rng.choice(NEARLY)
    path, body = path.format(order_id), b""
    if query:
        more = ["limit", "page_token", "start", "end", "after", "until"] if method == "GET" else []
        name = rng.choice([*query, *query, *more])
        query = query | {name: rng.choice(PARAMETERS[name])}
        path += "?" + "&".join(f"{name}={quoted(value)}" for name, value in query.items())
    elif method == "POST":
        field = rng.choice([*MARKET, *MORE_FIELDS, "take_profit", "stop_loss"])
        kind = rng.choice([MARKET, MARKET | {"type": "limit", "limit_price": 1}, MARKET | {"order_class": "oco"}])
        body = orjson.dumps(kind | {"qty": 10**7, field: rng.choice(NUMBERS + WORDS)})
    else:
        field = rng.choice(["qty", "limit_price", "stop_price", "time_in_force", "client_order_id"])
        body = orjson.dumps({field: rng.choice(NUMBERS + WORDS)})
    return head(method, path, {"Host": "x", **HEADERS, "Connection": "close", "Content-Length": str(len(body))}) + body


@pytest.fixture
def busy_server() -> Iterator[ExchangeServer]:
    """An exchange in the midst of a day, with a position in MSFT."""
    bars = synthetic_bars(["IBM", "MSFT"], "2024-01-02", "2024-01-05", "1Hour", seed=1)
    with ExchangeServer(Exchange(bars), key_id=KEY_ID, secret_key=SECRET_KEY) as server:
        client = TradingClient(KEY_ID, SECRET_KEY, url_override=server.url)
        server.call(server.exchange.advance)
        client.submit_order(MarketOrderRequest(symbol="MSFT", qty=10, side="buy", time_in_force="day"))
        server.call(server.exchange.advance)
        yield server


def waiting_order(server: ExchangeServer) -> str:
    """The id of an open order for IBM, placed anew where the last one was canceled."""
    for order in server.call(lambda: server.exchange.orders(open_only=True)):
        if order.symbol == "IBM":
            return order.id
    order = LimitOrderRequest(symbol="IBM", qty=10, side="buy", time_in_force="gtc", limit_price=0.5)
    return str(TradingClient(KEY_ID, SECRET_KEY, url_override=server.url).submit_order(order).id)


def test_no_request_makes_the_exchange_fail_and_none_moves_its_books(busy_server: ExchangeServer) -> None:
    _attack_exchange(busy_server, 500)


@pytest.mark.slow
def test_no_request_makes_the_exchange_fail_however_many_are_tried(busy_server: ExchangeServer) -> None:
    _attack_exchange(busy_server, 4_000)


def _attack_exchange(server: ExchangeServer, count: int) -> None:
    rng, answers = random.Random(SEED), dict[int, int]()
    cash, positions, _ = books(server)
    assert [qty for _, qty in positions] == [10]
    for number in range(count):
        request = odd_request(rng) if rng.random() < 0.4 else nearly_good_request(rng, waiting_order(server))
        answer = say(server.port, request)
        status = status_of(answer)
        assert 0 < status < 500, (number, request[:3000], answer[:300])
        answers[status] = answers.get(status, 0) + 1
    assert {200, 400, 401, 404, 405, 422} <= set(answers), answers
    assert books(server)[:2] == (cash, positions), "odd requests moved the books"
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)) as client:
        client.request("DELETE", "/v2/orders", headers=HEADERS)
        assert client.getresponse().read() is not None
        client.request("POST", "/v2/orders", json.dumps(MARKET | {"symbol": "MSFT", "qty": 5}), HEADERS)
        assert client.getresponse().status == 200
    server.call(server.exchange.advance)
    assert [one.qty for one in server.call(server.exchange.positions)] == [15], "a good order is filled as ever"


@pytest.mark.parametrize(
    ("request_line", "body", "status"),
    [
        ("POST /v2/orders", orjson.dumps(MARKET | {"qty": "1e999999999"}), 422),
        ("POST /v2/orders", orjson.dumps(MARKET | {"qty": {"n": 1}}), 422),
        ("POST /v2/orders", b'{"symbol":"IBM","side":"buy","order_class":"oco","stop_loss":"47"}', 422),
        ("POST /v2/orders", b'{"symbol":"\\ud800"}', 400),
        ("POST /v2/orders", b'{"qty":NaN}', 400),
        ("GET /v2/orders?limit=" + "9" * 5000, b"", 422),
        ("GET /v2/stocks/bars?symbols=IBM,IBM&timeframe=1Day", b"", 200),
        ("GET /v2/stocks/bars?symbols=IBM&timeframe=1Day&end=9999-12-31", b"", 200),
        ("GET /v2/account/", b"", 404),
    ],
    ids=lambda value: str(value)[:40],
)
def test_each_request_that_failed_once_is_answered(
    exchange_server: ExchangeServer, request_line: str, body: bytes, status: int
) -> None:
    method, _, path = request_line.partition(" ")
    headers = {"Host": "[", **HEADERS, "Connection": "close", "Content-Length": str(len(body))}
    answer = say(exchange_server.port, head(method, path, headers) + body)
    assert status_of(answer) in ({status, 400} if status == 422 else {status}), answer


# ---- websockets


def frame(opcode: int, payload: bytes, *, mask: bool = True, flags: int = 0x80) -> bytes:
    length = len(payload)
    sizes = [length] if length < 126 else [126, *struct.pack("!H", length)]
    sizes[0] |= 0x80 if mask else 0
    return bytes([flags | opcode, *sizes]) + (b"\x00" * 4 if mask else b"") + payload  # a mask of zeros changes nothing


MESSAGES: list[Any] = [
    None,
    [],
    "auth",
    {},
    {"action": None},
    {"action": ["auth"]},
    {"action": "x" * 50_000},
    {"action": "auth"},
    {"action": "auth", "key": {"a": 1}, "secret": [[[]]]},
    {"action": "authenticate", "data": ["key"]},
    {"action": "authenticate", "data": {"key_id": None, "secret_key": 1e308}},
    {"action": "listen"},
    {"action": "listen", "data": {"streams": 7}},
    {"action": "listen", "data": {"streams": "trade_updates"}},
    {"action": "listen", "data": {"streams": [{}, ["trade_updates"]]}},
    {"action": "subscribe", "bars": 7},
    {"action": "subscribe", "bars": {"IBM": 1}},
    {"action": "subscribe", "dailyBars": [1, "IBM", None, {}]},
    {"action": "subscribe", "trades": ["x" * 5000]},
    {"action": "subscribe", "trades": [f"S{number}" for number in range(11_000)]},
    {"action": "unsubscribe", "bars": [[]]},
]
NESTED = b"[" * 5000


def odd_frames(rng: random.Random) -> bytes:
    """What a client sends once the websocket is open."""
    sent = b""
    for _ in range(rng.randrange(1, 6)):
        message = rng.choice(MESSAGES)
        payloads = [orjson.dumps(message), msgpack.packb(message), NESTED, b"\x91" * 5000, rng.randbytes(40), b""]
        payload = rng.choice(payloads)[:65_000]
        kind = rng.random()
        if kind < 0.7:
            sent += frame(rng.choice([1, 2]), payload)
        elif kind < 0.8:
            sent += frame(rng.choice([0, 8, 9, 10]), payload[:125], flags=rng.choice([0x80, 0x00]))
        elif kind < 0.9:  # not masked, reserved bits, reserved kinds, a length beyond all bounds
            endless = b"\x81\xff" + b"\x7f" * 8
            sent += rng.choice([frame(1, b"{}", mask=False), frame(1, b"{}", flags=0xF0), frame(11, b""), endless])
        else:
            sent += rng.randbytes(rng.randrange(60))
    return sent


KNOWN = {"action": "auth", "key": KEY_ID, "secret": SECRET_KEY}


def test_no_frame_makes_a_stream_fail(exchange_server: ExchangeServer) -> None:
    _attack_streams(exchange_server, 300)


@pytest.mark.slow
def test_no_frame_makes_a_stream_fail_however_many_are_tried(exchange_server: ExchangeServer) -> None:
    _attack_streams(exchange_server, 4_000)


def _attack_streams(server: ExchangeServer, count: int) -> None:
    rng = random.Random(SEED)
    before = books(server)
    for _ in range(count):
        path, packed = rng.choice(["/stream", "/v2/iex"]), rng.random() < 0.5
        kind = {"Content-Type": "application/msgpack"} if packed else {}
        first = msgpack.packb(KNOWN) if packed and path != "/stream" else orjson.dumps(KNOWN)
        hello = frame(2, first) if rng.random() < 0.6 else b""
        with socket.create_connection(("127.0.0.1", server.port), 5) as line, suppress(ConnectionError):
            line.sendall(head("GET", path, {"Host": "127.0.0.1", **UPGRADE, **kind}))
            assert status_of(line.recv(65_536)) == 101
            line.sendall(hello + odd_frames(rng) + frame(8, b""))
            with suppress(OSError):  # closed already
                line.shutdown(socket.SHUT_WR)  # where the last frame promises more than it has
            while line.recv(65_536):
                pass
    assert books(server) == before
    with socket.create_connection(("127.0.0.1", server.port), 5) as line:
        line.sendall(head("GET", "/stream", {"Host": "127.0.0.1", **UPGRADE}))
        assert status_of(line.recv(65_536)) == 101
        line.sendall(frame(2, orjson.dumps(KNOWN)))
        assert b'"status":"authorized"' in line.recv(65_536)


def test_a_message_without_an_end_is_refused(exchange_server: ExchangeServer) -> None:
    with socket.create_connection(("127.0.0.1", exchange_server.port), 5) as line:
        line.sendall(head("GET", "/v2/iex", {"Host": "127.0.0.1", **UPGRADE}))
        line.recv(65_536)
        answer = b""
        with suppress(ConnectionError):
            line.sendall(frame(1, b"x" * 60_000, flags=0) + frame(0, b"x" * 60_000, flags=0) * 10)
            while chunk := line.recv(65_536):
                answer += chunk
        assert struct.pack("!H", 1009) in answer, "too big"


# ---- connections that are held


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (head("POST", "/v2/orders", {"Host": "x", **HEADERS, "Content-Length": "99999999"}), 413),
        (head("POST", "/v2/orders", {"Host": "x", "Content-Length": "99999999"}), 401),
        (head("GET", "/v2/account", {"Host": "x", **HEADERS, "X": "y" * 600_000}), 400),
    ],
    ids=["body", "stranger's body", "head"],
)
def test_what_is_too_long_is_refused_unread(exchange_server: ExchangeServer, data: bytes, status: int) -> None:
    assert status_of(say(exchange_server.port, data)) == status


def test_a_body_in_pieces_has_an_end(exchange_server: ExchangeServer) -> None:
    chunked = head("POST", "/v2/orders", {"Host": "x", **HEADERS, "Transfer-Encoding": "chunked"})
    piece = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    assert status_of(say(exchange_server.port, chunked + piece * 5)) == 413


HASTY = Patience(head_s=0.8, body_s=0.8, idle_s=0.8, keys_s=0.8, stalled_s=0.8, known_idle_s=60)


@pytest.fixture
def hasty_server(exchange: Exchange) -> Iterator[ExchangeServer]:
    """The exchange with little patience."""
    with ExchangeServer(exchange, key_id=KEY_ID, secret_key=SECRET_KEY, patience=HASTY) as server:
        yield server


@pytest.mark.parametrize(
    ("begun", "drip"),
    [
        (b"", b""),
        (b"GET /v2/acc", b"x"),
        (head("POST", "/v2/orders", {"Host": "x", **HEADERS, "Content-Length": "100000"}), b"x"),
        (head("POST", "/v2/orders", {"Host": "x", **HEADERS, "Transfer-Encoding": "chunked"}), b"1\r\nx\r\n"),
        (head("GET", "/v2/account", {"Host": "x"}), b""),
        (head("GET", "/v2/account", {"Host": "x"}), head("GET", "/v2/account", {"Host": "x"})[:-2]),
        (head("GET", "/stream", {"Host": "x", **UPGRADE}), b""),
        (head("GET", "/v2/iex", {"Host": "x", **UPGRADE}), b"\x89\x80\0\0\0\0"),
    ],
    ids=["silence", "head", "body", "chunks", "one request", "half a second one", "websocket", "websocket with pings"],
)
def test_a_client_that_drips_is_closed_in_time(hasty_server: ExchangeServer, begun: bytes, drip: bytes) -> None:
    ends = time.monotonic() + 8
    with socket.create_connection(("127.0.0.1", hasty_server.port), 5) as line, suppress(ConnectionError):
        line.sendall(begun)
        line.settimeout(0.1)
        while time.monotonic() < ends:
            with suppress(TimeoutError):
                if drip:
                    line.sendall(drip)
                if not line.recv(65_536):
                    break
    assert time.monotonic() < ends, "it was never closed"


def test_a_client_that_asks_and_does_not_read_is_closed(hasty_server: ExchangeServer) -> None:
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect(("127.0.0.1", hasty_server.port))
        line.settimeout(8)
        with pytest.raises(OSError, match=r"reset|pipe"):
            while True:
                line.sendall(head("GET", "/v2/assets", {"Host": "x", **HEADERS}))


def test_a_known_client_stays_and_one_that_was_closed_places_its_next_order(exchange: Exchange) -> None:
    """An idle connection that the server closed is noticed by the client before it sends an order on it."""
    short = Patience(idle_s=0.2, known_idle_s=1.2)
    with ExchangeServer(exchange, key_id=KEY_ID, secret_key=SECRET_KEY, patience=short) as server:
        kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        for _ in range(2):
            kept.request("GET", "/v2/account", headers=HEADERS)
            assert kept.getresponse().read()
            used = kept.sock.getsockname()
            time.sleep(0.8)
        assert kept.sock.getsockname() == used, "known clients may be idle for longer"
        kept.close()
        client = TradingClient(KEY_ID, SECRET_KEY, url_override=server.url)
        for number in range(2):
            request = MarketOrderRequest(
                symbol="IBM", qty=1, side="buy", time_in_force="day", client_order_id=f"o{number}"
            )
            assert client.submit_order(request).status == "accepted"
            time.sleep(3.0)  # longer than it is kept
        assert len(server.call(server.exchange.orders)) == 2


SESSION = """
import asyncio, resource, sys, tempfile, time
from datetime import date
from pathlib import Path
from trader_lib.config.settings import load_settings
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec

resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
settings = load_settings(environ={}, env_file=None, overrides={"exchange": {"port": int(sys.argv[1])}})


async def trade(end):
    spec = SessionSpec(params={"fast": 5, "slow": 15}, start=date(2005, 1, 3), end=end)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        result = await run_session(spec, settings, journal_path=Path(folder) / "journal.sqlite")
        return result.status, result.bars, len(result.orders), time.monotonic() - begun


asyncio.run(trade(date(2005, 1, 31)))  # compiles what has to be compiled
print(*asyncio.run(trade(date(2006, 12, 29))))
"""
FLOOD = """
import resource, selectors, socket, sys, time

hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
address, held, most, ends = ("127.0.0.1", int(sys.argv[1])), [], 0, time.monotonic() + 120
while time.monotonic() < ends:  # a thousand that say nothing; those that are closed are opened again
    for line in list(held):
        try:
            if line.recv(1, socket.MSG_DONTWAIT) == b"":
                raise ConnectionError
        except BlockingIOError:
            continue
        except OSError:
            line.close()
            held.remove(line)
    while len(held) < 1000:
        try:
            held.append(socket.create_connection(address, 0.5))
        except OSError:
            break
    most = max(most, len(held))
    print(most, flush=True)
    time.sleep(0.5)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def session_at(port: int) -> tuple[list[str], str]:
    """A session in a process of its own that may have 1,024 descriptors: what it printed, and what it logged."""
    done = subprocess.run([sys.executable, "-c", SESSION, str(port)], capture_output=True, text=True, timeout=300)
    return done.stdout.split(), done.stderr


@pytest.mark.slow
def test_a_thousand_idle_sockets_do_not_hold_up_a_session() -> None:
    """Seen before: 12 events in 15 s, and a log of 17 MB."""
    port = free_port()
    quiet, usual = session_at(port)
    with subprocess.Popen([sys.executable, "-c", FLOOD, str(port)], stdout=subprocess.PIPE, text=True) as flood:
        try:
            flooded, log = session_at(port)
        finally:
            flood.kill()
        sockets = max(int(line) for line in (flood.stdout or []) if line.strip().isdigit())
    assert sockets > 100, "the flood was one"
    assert quiet[:3] == flooded[:3] and quiet[0] == "completed", (quiet, flooded)
    assert float(flooded[3]) < 2 * float(quiet[3]) + 1.0, (quiet, flooded)
    assert len(log.splitlines()) < len(usual.splitlines()) + 20, log[-4000:]
    assert "Traceback" not in log


# ---- the page, the probes and the figures of a session

TOKEN = "open-sesame"


@pytest.fixture(scope="module")
def monitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port at which a session is shown that has traded and whose loop still turns."""
    folder, found, done = tmp_path_factory.mktemp("monitored"), list[int](), threading.Event()
    shown = threading.Event()

    @asynccontextmanager
    async def stay(parts: SessionParts) -> AsyncIterator[None]:
        yield
        found.append(int((monitor_url(parts.run_folder) or "").rpartition(":")[2]))
        shown.set()
        await asyncio.to_thread(done.wait, 300)

    def trade() -> None:
        settings = observed_settings(monitoring={"port": 0, "token": TOKEN, "hosts": "trader.lan"})
        with asyncio.Runner() as runner:
            runner.run(observed_session(folder, settings, beside=[stay]))

    session = threading.Thread(target=trade, daemon=True)
    session.start()
    assert shown.wait(120)
    yield found[0]
    done.set()
    session.join(30)


def ask(port: int, path: str, method: str = "GET", body: bytes = b"", address: str = "127.0.0.1", **more: str) -> bytes:
    headers = {"Host": f"127.0.0.1:{port}"} | {name.replace("_", "-"): value for name, value in more.items()}
    if body:
        headers |= {"Content-Length": str(len(body)), "Origin": f"http://127.0.0.1:{port}"}
        headers.setdefault("Content-Type", "application/json")
    return say(port, head(method, path, {"Connection": "close"} | headers) + body, address=address)


def unlock(port: int, token: str, address: str = "127.0.0.1") -> int:
    return status_of(ask(port, "/api/unlock", "POST", orjson.dumps({"token": token}), address))


def test_idle_sockets_cost_no_probe_and_no_page(monitor: int) -> None:
    with ExitStack() as stack:
        for number in range(200):
            line = stack.enter_context(socket.create_connection(("127.0.0.1", monitor), 5))
            line.sendall((b"", b"GET / HT", b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")[number % 3])
        for path in ("/healthz", "/metrics", "/", "/api/session") * 4:
            begun = time.monotonic()
            answer = ask(monitor, path)
            assert status_of(answer) == 200, answer
            assert time.monotonic() - begun < 2.0, path


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/", "/api/session"])
def test_strangers_names_are_not_answered(monitor: int, path: str) -> None:
    for host, status in [
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("[", 421),
        ("", 421),
        ("10.1.2.3:8080", 200),  # as Kubernetes asks its probes: by the pod's address
        ("[fd00::1]:8080", 200),
        ("localhost", 200),
        ("trader.lan", 200),
    ]:
        answer = ask(monitor, path, Host=host)
        ready = (200, 503) if path == "/readyz" and status == 200 else (status,)  # this session has traded to its end
        assert status_of(answer) in ready, (host, answer)


def test_wrong_tokens_slow_down_their_sender_and_nobody_else(monitor: int) -> None:
    guessed = [unlock(monitor, f"guess-{number}", "127.0.0.2") for number in range(WRONG_MAX + 3)]
    assert guessed == [403] * WRONG_MAX + [429] * 3
    answer = ask(monitor, "/api/unlock", "POST", orjson.dumps({"token": TOKEN}), "127.0.0.2")
    assert status_of(answer) == 429 and b"retry-after: 30" in answer.lower(), "even with the right one, for a while"
    assert unlock(monitor, TOKEN) == 200, "the operator, from another address"


def test_the_table_of_senders_is_bounded_and_a_pause_ends() -> None:
    class Hand:
        now_s = 0.0

        def monotonic(self) -> float:
            return self.now_s

    hand = Hand()
    wrong: Any = WrongTokens(hand, most=10)  # type: ignore[arg-type]
    for number in range(1000):
        wrong.count(f"10.0.{number // 250}.{number % 250}")
    for _ in range(WRONG_MAX):
        wrong.count("10.9.9.9")
    assert wrong.are_too_many("10.9.9.9") and not wrong.are_too_many("10.0.0.1")
    hand.now_s = PAUSE_S + 1
    assert not wrong.are_too_many("10.9.9.9")
    wrong.count("10.9.9.9")
    assert not wrong.are_too_many("10.9.9.9"), "counting begins anew"


@pytest.mark.parametrize(
    ("address", "sender"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("fd00::1", "fd00::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_a_sender_is_an_address_or_a_network_of_ipv6(address: str, sender: str) -> None:
    from starlette.requests import Request

    assert sender_of(Request({"type": "http", "client": (address, 1), "headers": []})) == sender
    assert sender_of(Request({"type": "http", "client": None, "headers": []})) == ""


ODD_BODIES = [
    b'{"token": NaN}',
    b'{"token": "\\ud800"}',
    b'{"token": Infinity, "\\udfff": 1}',
    b'{"action": "halt", "by": "\\ud83d", "reason": "x", "flatten": NaN}',
    b'{"token": ' + b"[" * 3000,
    b'{"token": ' + b"9" * 3000 + b"}",
    b'{"token": "\xff"}',
    b"\xef\xbb\xbf{}",
    b"[]",
    b"null",
    b'"\\u0000"',
    b"{",
    b'{"token": 1e999}',
]


@pytest.mark.parametrize("path", ["/api/unlock", "/api/steer", "/api/lock"])
def test_bodies_that_are_no_text_and_no_number_are_the_senders_fault(monitor: int, path: str) -> None:
    for body in ODD_BODIES:
        status = status_of(ask(monitor, path, "POST", body, "127.0.0.3"))
        assert 400 <= status < 500 or (path == "/api/lock" and status == 200), (body, status)
    chunked = head("POST", path, {"Host": "127.0.0.1", "Transfer-Encoding": "chunked", "Origin": "http://127.0.0.1"})
    piece = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    assert status_of(say(monitor, chunked + piece * 6)) == 413


def test_what_a_refusal_says_is_not_what_it_was_sent(monitor: int) -> None:
    answer = ask(monitor, "/api/unlock", "POST", b'{"token": ["' + TOKEN.encode() + b'"]}', "127.0.0.4")
    assert status_of(answer) == 422 and TOKEN.encode() not in answer


def test_no_request_makes_the_page_fail(monitor: int) -> None:
    rng = random.Random(SEED)
    places = ["/", "/healthz", "/readyz", "/metrics", "/static/{}", "/api/session", "/api/decisions", "/api/log"]
    places += ["/api/operator", "/api/unlock", "/api/lock", "/api/steer", "/none"]
    cookies = ["trader_operator=x", "\xff", "a" * 4000, '="', "trader_operator_00000000=9.\xe9; ;;"]
    for number in range(600):
        method = rng.choice(["GET"] * 5 + ["POST"] * 3 + ["HEAD", "PUT", "DELETE", "OPTIONS", "\x7f"])
        path = rng.choice(places).format(rng.choice(PARTS)) + rng.choice([*[""] * 8, "/", "//", "#", "%0a", "/../x"])
        query = rng.choice(
            ["", "?", "?order=%ff", "?order=" + "x" * 5000, "?correlation=%00", "?&&=&", "?order=1&order=2"]
        )
        headers = {"Host": rng.choice(HOSTS), "Connection": "close"}
        headers |= rng.choice([{}, {"Origin": rng.choice(["null", "http://[", "http://127.0.0.1", "\xff", ""])}])
        headers |= rng.choice([{}, {"Sec-Fetch-Site": "same-origin"}, {"Cookie": rng.choice(cookies)}])
        body = rng.choice([*ODD_BODIES, *RAW_BODIES]) if method in ("POST", "PUT") else b""
        if body:
            headers |= {"Content-Length": str(len(body)), "Content-Type": rng.choice(TYPES)}
        request = head(method, path + query, headers) + body
        answer = say(monitor, request, address="127.0.0.5")
        not_ready = "/readyz" in path and b"why_not" in answer
        assert 200 <= status_of(answer) < 500 or not_ready, (number, request[:2000], answer[:300])
    assert status_of(ask(monitor, "/healthz")) == 200


def test_as_many_streams_as_promised_and_no_more(monitor: int) -> None:
    listen = head("GET", "/api/events", {"Host": "127.0.0.1"})

    def opened(line: socket.socket) -> int:
        line.sendall(listen)
        return status_of(line.recv(65_536))

    with ExitStack() as stack:
        lines = [socket.create_connection(("127.0.0.1", monitor), 10) for _ in range(STREAMS_MAX + 8)]
        for line in lines:
            stack.enter_context(line)
            line.sendall(listen)  # all at once: whoever counts after the answer has begun lets too many in
        statuses = [status_of(line.recv(65_536)) for line in lines]
        assert sorted(statuses) == [200] * STREAMS_MAX + [503] * 8
        refused = ask(monitor, "/api/events")
        assert status_of(refused) == 503 and b"retry-after:" in refused.lower()
        for path in ("/healthz", "/metrics", "/", "/api/session"):
            assert status_of(ask(monitor, path)) == 200
        for line in lines[:20]:
            line.close()
        ends = time.monotonic() + 10
        while status_of(refused) == 503 and time.monotonic() < ends:  # places of those who left are free again
            time.sleep(0.2)
            with socket.create_connection(("127.0.0.1", monitor), 10) as line:
                line.sendall(listen)
                refused = line.recv(65_536)
        assert status_of(refused) == 200


async def test_a_stream_that_nobody_reads_ends_and_gives_its_place_back() -> None:
    places, sent = anyio.Semaphore(1, max_value=1), []

    async def events() -> AsyncIterator[ServerSentEvent]:
        while True:
            yield ServerSentEvent(data="x")
            await asyncio.sleep(0)

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) > 2:
            await asyncio.Event().wait()

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    async with asyncio.timeout(5):
        await BoundedStream(events(), places, unread_s=0.1)(scope, receive, send)
    assert places.value == 1 and len(sent) == 3


# ---- settings that say none


def choices(annotation: Any) -> set[str]:
    """The words among which a setting chooses."""
    if getattr(annotation, "__origin__", None) is Literal:
        return set(get_args(annotation))
    if getattr(annotation, "__origin__", None) is dict:
        return set()
    return set().union(*(choices(one) for one in get_args(annotation)))


def field_of(name: str) -> Any:
    section, _, field = name.partition(".")
    info = Settings.model_fields[section]
    return info.annotation.model_fields[field] if field else info


def test_every_word_that_a_setting_names_can_be_set() -> None:
    tried = 0
    for name in SETTING_NAMES:
        for word in choices(field_of(name).annotation):
            variable = "TRADER_" + name.upper().replace(".", "__")
            keys = {"TRADER_BROKER__KEY_ID": "a-key", "TRADER_BROKER__SECRET_KEY": "a-secret"}
            settings = load_settings(environ=keys | {variable: word}, env_file=None)
            section, _, field = name.partition(".")
            found = getattr(getattr(settings, section), field) if field else getattr(settings, section)
            assert found == word, name
            tried += word == "none"
    assert tried, "no setting is left that knows the word none"


def test_none_still_means_nothing_where_a_setting_may_be_empty() -> None:
    for name in SETTING_NAMES:
        info = field_of(name)
        if type(None) in get_args(info.annotation) and "none" not in choices(info.annotation):
            variable = "TRADER_" + name.upper().replace(".", "__")
            settings = load_settings(environ={variable: "none"}, env_file=None)
            section, _, field = name.partition(".")
            assert (getattr(getattr(settings, section), field) if field else getattr(settings, section)) is None, name


def test_mail_without_encryption_is_for_servers_that_ask_for_no_password() -> None:
    plain = {"TRADER_NOTIFY__SMTP_SECURITY": "none", "TRADER_NOTIFY__SMTP_HOST": "127.0.0.1"}
    assert load_settings(environ=plain, env_file=None).notify.smtp_security == "none"
    with pytest.raises(Misconfigured, match="travel in the clear"):
        load_settings(environ=plain | {"TRADER_NOTIFY__SMTP_PASSWORD": "s3cret"}, env_file=None)
