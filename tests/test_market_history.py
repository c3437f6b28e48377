"""Alpaca's history through the real client, when the other side misbehaves, and the store in front of it."""

import json
from collections.abc import Iterator
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlparse

import pytest
from alpaca.data.historical.stock import StockHistoricalDataClient

from trader_lib.clock.sessions import NEW_YORK
from trader_lib.errors.taxonomy import BadData, Rejected, Retryable, TraderError, Unauthorized
from trader_lib.market.history import alpaca_history, load_bars
from trader_lib.market.sample import sample_bars
from trader_lib.market.store import BarStore


class Exchange(ThreadingHTTPServer):
    """Answers /v2/stocks/bars with the bundled bars, or with `failure` (status, body)."""

    failure: tuple[int, bytes] | None = None
    queries: list[dict[str, str]]


class Handler(BaseHTTPRequestHandler):
    server: Exchange

    def do_GET(self) -> None:
        query = {name: values[0] for name, values in parse_qs(urlparse(self.path).query).items()}
        self.server.queries.append(query)
        status, data = self.server.failure or (200, self.bars(query))
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def bars(self, query: dict[str, str]) -> bytes:
        page: dict[str, list[dict[str, object]]] = {}
        rows = sample_bars().to_frame()
        stamps = rows["timestamp"].dt.strftime("%Y-%m-%dT%H:%M:%S+00:00")
        wanted = rows["symbol"].isin(query["symbols"].split(",")) & stamps.between(query["start"], query["end"])
        for row, stamp in zip(rows[wanted].itertuples(), stamps[wanted], strict=True):
            bar = {"t": stamp, "o": row.open, "h": row.high, "l": row.low, "c": row.close, "v": row.volume}
            page.setdefault(str(row.symbol), []).append({**bar, "n": 1, "vw": row.close})
        return json.dumps({"bars": page, "next_page_token": None}).encode()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    server = Exchange(("127.0.0.1", 0), Handler)
    server.queries = []
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(exchange: Exchange) -> StockHistoricalDataClient:
    client = StockHistoricalDataClient("key", "secret", url_override=f"http://127.0.0.1:{exchange.server_port}")
    client._session.trust_env = False
    client._retry = 0
    return client


def test_history_equals_what_alpaca_sent(client: StockHistoricalDataClient) -> None:
    got = load_bars("alpaca", "AAPL,IBM", start="2005-01-03", end="2005-12-30", warmup=20, client=client)
    here = load_bars("sample", "AAPL,IBM", start="2005-01-03", end="2005-12-30", warmup=20)
    assert got.content_hash == here.content_hash
    assert got.day(20) == date(2005, 1, 3)


def test_store_in_front_is_widened_and_then_asked_first(
    client: StockHistoricalDataClient, exchange: Exchange, tmp_path: Path
) -> None:
    store = BarStore(tmp_path)
    load_bars("alpaca", "IBM", start="2005-01-03", end="2005-06-30", client=client, store=store)
    load_bars("alpaca", "IBM", start="2005-03-01", end="2005-12-30", client=client, store=store)
    assert len(exchange.queries) == 2
    assert exchange.queries[1]["start"] == "2005-01-03T05:00:00+00:00"  # all of it anew, so one adjustment holds
    bars = load_bars("alpaca", "IBM", start="2005-02-01", end="2005-12-30", warmup=5, client=client, store=store)
    assert len(exchange.queries) == 2
    assert bars.content_hash == sample_bars("IBM").between("2005-02-01", "2005-12-30", 5).content_hash


def test_broken_store_is_reported_not_overwritten(client: StockHistoricalDataClient, tmp_path: Path) -> None:
    store = BarStore(tmp_path)
    load_bars("alpaca", "IBM", start="2005-01-03", end="2005-06-30", client=client, store=store)
    path = store.file("IBM", "1Day", "iex", "all")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadData, match="Delete the file"):
        load_bars("alpaca", "IBM", start="2005-01-03", end="2005-06-30", client=client, store=store)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        ((401, b'{"message": "unauthorized."}'), Unauthorized),
        ((403, b'{"message": "subscription does not permit querying recent SIP data"}'), TraderError),
        ((422, b'{"code": 42210000, "message": "invalid symbol"}'), Rejected),
        ((429, b'{"message": "too many requests."}'), Retryable),
        ((502, b"<html>bad gateway</html>"), Retryable),
    ],
)
def test_failed_request_is_sorted_by_what_to_do(
    client: StockHistoricalDataClient, exchange: Exchange, failure: tuple[int, bytes], kind: type[TraderError]
) -> None:
    exchange.failure = failure
    with pytest.raises(kind):
        alpaca_history(client, ["IBM"], "1Day", "2005-01-03", "2005-12-30")


def test_nobody_listening_may_be_tried_again(client: StockHistoricalDataClient, exchange: Exchange) -> None:
    exchange.shutdown()
    exchange.server_close()
    with pytest.raises(Retryable):
        alpaca_history(client, ["IBM"], "1Day", "2005-01-03", "2005-12-30")


def test_day_that_is_not_over_is_left_out(client: StockHistoricalDataClient) -> None:
    noon = sample_bars("IBM", "2005-06-30", "2005-06-30").at(0).astimezone(NEW_YORK) + timedelta(hours=12)
    for as_of, last in ((noon, date(2005, 6, 29)), (noon + timedelta(hours=4), date(2005, 6, 30))):
        bars = alpaca_history(client, ["IBM"], "1Day", "2005-06-01", "2005-12-30", as_of=as_of)
        assert bars.day(-1) == last
