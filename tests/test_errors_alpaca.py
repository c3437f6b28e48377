"""Every failure that alpaca-py can raise, provoked one by one: its own client against a server on loopback."""

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from alpaca.common.exceptions import APIError
from alpaca.data.historical import StockHistoricalDataClient
from alpaca.data.requests import StockLatestTradeRequest
from alpaca.trading.client import TradingClient
from alpaca.trading.enums import OrderSide, TimeInForce
from alpaca.trading.requests import MarketOrderRequest
from pydantic import ValidationError

from trader_lib.errors.alpaca import from_alpaca
from trader_lib.errors.taxonomy import (
    BadData,
    Misconfigured,
    NotFound,
    OutcomeUnknown,
    RateLimited,
    Rejected,
    Retryable,
    TraderError,
    Unauthorized,
)

SECRET = "s3cret-of-the-test"
ORDER = {
    "id": "11111111-1111-4111-8111-111111111111",
    "client_order_id": "mine",
    "created_at": "2026-01-05T15:00:00Z",
    "updated_at": "2026-01-05T15:00:00Z",
    "submitted_at": "2026-01-05T15:00:00Z",
    "symbol": "IBM",
    "qty": "1",
    "filled_qty": "0",
    "side": "buy",
    "order_class": "",
    "order_type": "market",
    "type": "market",
    "time_in_force": "day",
    "status": "new",
    "extended_hours": False,
}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    status = 200
    body: object = ""
    headers: dict[str, str]
    behaviour = "answer"
    received: list[str]


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def _any(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.received.append(self.command)
        self.close_connection = True
        if self.server.behaviour == "mute":
            threading.Event().wait(0.5)
            return
        if self.server.behaviour == "drop":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        if self.server.behaviour == "half":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
            return
        if self.server.behaviour == "garbage":
            self.wfile.write(b"not HTTP at all\r\n\r\n")
            return
        body = self.server.body if isinstance(self.server.body, str) else json.dumps(self.server.body)
        self.send_response(self.server.status)
        for name, value in {
            "Content-Length": str(len(body.encode())),
            "Connection": "close",
            **self.server.headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    do_GET = do_POST = do_DELETE = _any  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


class Adapter(requests.adapters.HTTPAdapter):
    def send(self, request: requests.PreparedRequest, **options: object) -> requests.Response:
        return super().send(request, **{**options, "timeout": 0.2})


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.received, running.headers = [], {}
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def trading(url: str, timeout: bool = False) -> TradingClient:
    client = TradingClient("PK", SECRET, paper=True, url_override=url)
    client._retry = 0
    client._session.trust_env = False
    if timeout:
        client._session.mount("http://", Adapter())
    return client


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def failure(call: Callable[..., object], *arguments: object) -> BaseException:
    try:
        call(*arguments)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def order() -> MarketOrderRequest:
    return MarketOrderRequest(
        symbol="IBM", qty=1, side=OrderSide.BUY, time_in_force=TimeInForce.DAY, client_order_id="mine"
    )


def both(client: TradingClient) -> tuple[TraderError, TraderError]:
    """What a read and what an order's POST become."""
    read = from_alpaca(failure(client.get_account))
    post = from_alpaca(failure(client.submit_order, order()), order_post=True)
    for error in (read, post):
        assert SECRET not in f"{error} {error.context}"
        assert "<" not in str(error)
    return read, post


HTML = "<html><body>Bad Gateway</body></html>"
ANSWERS = {
    "keys": (401, {"message": "unauthorized."}, Unauthorized, Unauthorized),
    "forbidden": (403, {"message": "forbidden."}, Unauthorized, Unauthorized),
    "buying power": (403, {"code": 40310000, "message": "insufficient buying power"}, Rejected, Rejected),
    "wash trade": (403, {"code": 40310000, "message": "potential wash trade detected."}, Rejected, Rejected),
    "qty": (403, {"code": 40310000, "message": "insufficient qty available for order"}, Rejected, Rejected),
    "not found": (404, {"code": 40410000, "message": "order not found"}, NotFound, NotFound),
    "sub-penny": (422, {"code": 42210000, "message": "invalid limit_price 290.123."}, Rejected, Rejected),
    "fraction": (422, {"code": 42210000, "message": "fractional orders must be DAY orders"}, Rejected, Rejected),
    "qty missing": (422, {"code": 40010001, "message": "qty or notional is required"}, Rejected, Rejected),
    "known id": (422, {"code": 40010001, "message": "client_order_id must be unique"}, Rejected, OutcomeUnknown),
    "bad request": (400, "", Rejected, Rejected),
    "rate": (429, {"code": 42910000, "message": "rate limit exceeded"}, RateLimited, RateLimited),
    "rate, no code": (429, {"message": "too many requests."}, RateLimited, OutcomeUnknown),
    "request timeout": (408, "", Retryable, OutcomeUnknown),
    "500": (500, {"code": 50010000, "message": "internal server error"}, Retryable, OutcomeUnknown),
    "502 in HTML": (502, HTML, Retryable, OutcomeUnknown),
    "503": (503, "", Retryable, OutcomeUnknown),
    "504": (504, {"message": "gateway timeout"}, Retryable, OutcomeUnknown),
    "200 in HTML": (200, HTML, Retryable, OutcomeUnknown),
    "200, empty": (200, "", BadData, OutcomeUnknown),
    "200, a list": (200, [1, 2], BadData, OutcomeUnknown),
    "200, half an object": (200, {"id": "x"}, BadData, OutcomeUnknown),
    "redirect": (302, HTML, Retryable, OutcomeUnknown),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_becomes_what_to_do(server, name):
    server.status, server.body, read_kind, post_kind = ANSWERS[name]
    read, post = both(trading(url(server)))
    assert (type(read), type(post)) == (read_kind, post_kind)
    assert server.received == ["GET", "POST"]
    if isinstance(post, Rejected) and server.body:
        assert (post.code, post.reason) == (server.body["code"], server.body["message"])


def test_an_order_accepted_in_a_state_that_is_not_known_is_in_doubt_not_lost(server):
    server.body = {**ORDER, "status": "invented_yesterday"}
    raised = failure(trading(url(server)).submit_order, order())
    assert isinstance(raised, ValidationError)
    assert isinstance(from_alpaca(raised, order_post=True), OutcomeUnknown)
    raised = failure(trading(url(server)).get_order_by_client_id, "mine")
    assert isinstance(from_alpaca(raised), BadData)


@pytest.mark.parametrize("behaviour", ["mute", "drop", "half", "garbage"])
def test_an_answer_that_does_not_come_leaves_the_order_in_doubt(server, behaviour):
    server.behaviour = behaviour
    read, post = both(trading(url(server), timeout=True))
    assert (type(read), type(post)) == (Retryable, OutcomeUnknown)
    assert server.received == ["GET", "POST"]


def test_a_refused_connection_carried_nothing():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    read, post = both(trading(f"http://127.0.0.1:{port}"))
    assert (type(read), type(post)) == (Retryable, Retryable)
    assert "nothing was sent" in str(post)


def test_an_unknown_host_carried_nothing():
    assert type(both(trading("http://no-such-host.invalid"))[1]) is Retryable


def test_an_untrusted_or_impossible_address_is_configuration(server):
    client = trading(url(server).replace("http", "https"), timeout=True)
    assert type(from_alpaca(failure(client.get_account))) in (Misconfigured, Retryable)
    assert type(both(trading("nowhere"))[0]) is Misconfigured


def test_the_servers_wish_for_a_pause_is_kept(server):
    server.status, server.body = 429, {"message": "too many requests."}
    server.headers = {"Retry-After": "11"}
    client = StockHistoricalDataClient("PK", SECRET, url_override=url(server))
    client._retry = 0
    client._session.trust_env = False
    error = from_alpaca(failure(client.get_stock_latest_trade, StockLatestTradeRequest(symbol_or_symbols="IBM")))
    assert isinstance(error, RateLimited)
    assert error.retry_after == 11.0


def test_what_the_mapping_protects_from(server):
    """The traps of alpaca-py's own accessors; when they go, the mapping may become shorter."""
    server.status, server.body = 401, {"message": "unauthorized."}
    raised = failure(trading(url(server)).get_account)
    assert isinstance(raised, APIError)
    assert isinstance(failure(lambda: raised.code), KeyError)
    server.status, server.body = 502, HTML
    raised = failure(trading(url(server)).get_account)
    assert isinstance(failure(lambda: raised.code), ValueError)


def test_an_accepted_order_raises_nothing(server):
    server.body = ORDER
    assert trading(url(server)).submit_order(order()).client_order_id == "mine"
