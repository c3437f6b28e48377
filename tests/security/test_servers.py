"""What strangers send to the exchange and to the page, and what it costs a session: nothing."""

import base64
import http.client
import json
import random
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from typing import Any

import msgpack
import orjson
import pytest

from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.market.bars import Bars

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
WORDS: list[Any] = ["", "buy", "IBM", "IBM,IBM", "ibm", "oco", "gtc", "limit", "\u202e", "x" * 10_000, "../..", "%00", None, 0]
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
TIMES = ["", "yesterday", "0001-01-01", "9999-12-31", "2012-01-03T25:00", "2012-13-01", "2012-W01-1", "9" * 5000, "0", "-1"]
TIMES += ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2012-01-03T00:00:00Z", "２０１２-01-03", "\x00"]
PARAMETERS = {
    "limit": ["0", "-1", "1", "9" * 5000, "٣", "1.5", "²", "NaN"],
    "symbols": ["IBM,IBM", ",,,", "IBM," * 3000, "*", "\u202e", "%ff", "NOPE"],
    "timeframe": ["1Day", "1Week", "", "9" * 5000],
    "start": TIMES,
    "end": TIMES,
    "after": TIMES,
    "until": TIMES,
    "page_token": ["x", "====", "SUJNfDk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5", "\u00e9", base64.b64encode(b"IBM|NaN").decode()],
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
TYPES = ["application/json", "text/plain", "application/msgpack", "multipart/form-data; boundary=x", "\x80", ""]


def quoted(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())


def odd_request(rng: random.Random) -> bytes:
    """One request with the keys, some part of which is wrong."""
    method = rng.choice(["GET"] * 6 + ["POST"] * 4 + ["PATCH", "DELETE", "HEAD", "OPTIONS", "PUT", "\x7f"])
    path = rng.choice(PLACES if method != "POST" else ["/v2/orders"] * 9 + PLACES).format(rng.choice(PARTS)) + rng.choice([*[""] * 12, "/", "//", "?", "#", "%0a", "/../x"])
    names = rng.sample(sorted(PARAMETERS), rng.randrange(5))
    query = [f"{name}={quoted(rng.choice(PARAMETERS[name]))}" for name in names]
    query += rng.choice([[], [], ["&&&=&"], ["%"], ["a" * 2000], ["limit=1&limit=2"], ["%ff=%fe"]])
    headers = {"Host": rng.choice(["127.0.0.1", "127.0.0.1", "[", "evil.example", ""]), **HEADERS, "Connection": "close"}
    body = b""
    if method in ("POST", "PATCH", "PUT"):
        body = rng.choice(RAW_BODIES) if rng.random() < 0.3 else orjson.dumps(odd_order(rng))
        headers |= {"Content-Length": str(len(body)), "Content-Type": rng.choice(TYPES)}
    if rng.random() < 0.1:
        headers |= {name: value for name, value in UPGRADE.items() if rng.random() < 0.8}
    if rng.random() < 0.05:
        del headers["APCA-API-KEY-ID"]
        headers |= {"Authorization": rng.choice(["Basic", "Basic ====", "Basic \xe9", "Bearer x", "Basic " + "A" * 4000])}
    target = path + ("?" + "&".join(query) if query else "")
    return head(method, target, headers) + body


def odd_order(rng: random.Random) -> Any:
    """An order that nobody should want. What might by chance be a good one is too large to be bought."""
    order: dict[str, Any] = {"symbol": "IBM", "side": "buy", "type": "market", "time_in_force": "day", "qty": 10**7}
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice([*order, "notional", "limit_price", "stop_price", "order_class", "client_order_id", "extended_hours"])
        order[name] = rng.choice(NUMBERS if rng.random() < 0.5 else WORDS)
    if rng.random() < 0.3:
        leg = rng.choice(["take_profit", "stop_loss"])
        order |= {"order_class": "oco", leg: rng.choice([*WORDS, {"limit_price": rng.choice(NUMBERS)}, {"stop_price": []}])}
    return rng.choice([order, order, order, order, [order], rng.choice(NUMBERS)])


def test_no_request_makes_the_exchange_fail_and_none_moves_its_books(exchange_server: ExchangeServer) -> None:
    _attack_exchange(exchange_server, 600)


@pytest.mark.slow
def test_no_request_makes_the_exchange_fail_however_many_are_tried(exchange_server: ExchangeServer) -> None:
    _attack_exchange(exchange_server, 8_000)


def _attack_exchange(server: ExchangeServer, count: int) -> None:
    rng, answers = random.Random(SEED), dict[int, int]()
    for number in range(count):
        request = odd_request(rng)
        answer = say(server.port, request)
        status = status_of(answer)
        assert status < 500, (number, request[:3000], answer[:300])
        answers[status] = answers.get(status, 0) + 1
    assert {200, 400, 401, 404, 405, 422} <= set(answers), answers
    cash, positions, _ = books(server)
    assert (cash, positions) == (100_000, ()), "odd requests moved the books"
    good = {"symbol": "MSFT", "side": "buy", "type": "market", "time_in_force": "day", "qty": 10, "client_order_id": "good"}
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)) as client:
        client.request("DELETE", "/v2/orders", headers=HEADERS)
        assert client.getresponse().read() is not None
        client.request("POST", "/v2/orders", json.dumps(good), HEADERS)
        assert client.getresponse().status == 200
    server.call(server.exchange.advance)
    assert [one.qty for one in server.call(server.exchange.positions)] == [10]


@pytest.mark.parametrize(
    ("request_line", "body", "status"),
    [
        ("POST /v2/orders", b'{"symbol":"IBM","side":"buy","type":"market","time_in_force":"day","qty":"1e999999999"}', 422),
        ("POST /v2/orders", b'{"symbol":"IBM","side":"buy","type":"market","time_in_force":"day","qty":{"n":1}}', 422),
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
    sizes = [length] if length < 126 else [126, *struct.pack("!H", length)] if length < 65_536 else [127, *struct.pack("!Q", length)]
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
        payload = rng.choice([orjson.dumps(message), msgpack.packb(message), NESTED, b"\x91" * 5000, rng.randbytes(40), b""])
        kind = rng.random()
        if kind < 0.7:
            sent += frame(rng.choice([1, 2]), payload)
        elif kind < 0.8:
            sent += frame(rng.choice([0, 8, 9, 10]), payload[:125], flags=rng.choice([0x80, 0x00]))
        elif kind < 0.9:  # not masked, reserved bits, reserved kinds, a length beyond all bounds
            sent += rng.choice([frame(1, b"{}", mask=False), frame(1, b"{}", flags=0xF0), frame(11, b""), b"\x81\xff" + b"\x7f" * 8])
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
def test_what_is_too_long_is_refused_before_it_is_read(exchange_server: ExchangeServer, data: bytes, status: int) -> None:
    assert status_of(say(exchange_server.port, data)) == status


def test_a_body_in_pieces_has_an_end(exchange_server: ExchangeServer) -> None:
    chunked = head("POST", "/v2/orders", {"Host": "x", **HEADERS, "Transfer-Encoding": "chunked"})
    piece = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    assert status_of(say(exchange_server.port, chunked + piece * 5)) == 413


@pytest.mark.slow
def test_drips_and_silence_end_in_time_and_known_clients_stay(exchange_server: ExchangeServer) -> None:
    """Heads and bodies that come byte by byte, sockets that say nothing, websockets without keys."""
    port = exchange_server.port
    order = head("POST", "/v2/orders", {"Host": "x", **HEADERS, "Content-Length": "100"})
    opened = [b"", b"GET /v2/acc", order, head("GET", "/stream", {"Host": "x", **UPGRADE})]
    kept = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    kept.request("GET", "/v2/account", headers=HEADERS)
    assert kept.getresponse().read()
    used = kept.sock.getsockname()
    with ExitStack() as stack:
        lines = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 5)) for _ in opened]
        for line, begun in zip(lines, opened, strict=True):
            line.sendall(begun)
            line.settimeout(0.01)
        ends, open_lines = time.monotonic() + 20, set(lines)
        while open_lines and time.monotonic() < ends:
            for line in list(open_lines):
                try:
                    if line is not lines[0] and line is not lines[3]:
                        line.sendall(b"x")
                    if not line.recv(65_536):
                        open_lines.discard(line)
                except TimeoutError:
                    pass
                except ConnectionError:
                    open_lines.discard(line)
            time.sleep(0.2)
        assert not open_lines, [lines.index(line) for line in open_lines]
    kept.request("GET", "/v2/account", headers=HEADERS)
    assert kept.getresponse().status == 200 and kept.sock.getsockname() == used
    kept.close()
