"""Alpaca's history through the real client, when the other side misbehaves, and the store in front of it."""

import json
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlparse
from uuid import UUID

import pytest
from alpaca.data.historical.corporate_actions import CorporateActionsClient
from alpaca.data.historical.stock import StockHistoricalDataClient

from tests.given import Given
from trader_lib.clock.sessions import NEW_YORK
from trader_lib.errors.taxonomy import BadData, Rejected, Retryable, TraderError, Unauthorized
from trader_lib.exchange.costs import Costs
from trader_lib.market.history import alpaca_history, load_bars
from trader_lib.market.sample import sample_bars
from trader_lib.market.store import BarStore
from trader_lib.research.backtest import backtest


class Exchange(ThreadingHTTPServer):
    """Answers /v2/stocks/bars with the bundled bars, or with `failure` (status, body).

    /v1/corporate-actions: with those of AAPL and IBM early in 2005, or with `no_actions` (a status).
    """

    no_actions: int = 0
    failure: tuple[int, bytes] | None = None
    queries: list[dict[str, str]]


class Handler(BaseHTTPRequestHandler):
    server: Exchange

    def do_GET(self) -> None:
        query = {name: values[0] for name, values in parse_qs(urlparse(self.path).query).items()}
        self.server.queries.append(query)
        if urlparse(self.path).path == "/v1/corporate-actions":
            status, data = (self.server.no_actions, b"{}") if self.server.no_actions else (200, self.actions(query))
        else:
            status, data = self.server.failure or (200, self.bars(query))
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def bars(self, query: dict[str, str]) -> bytes:
        page: dict[str, list[dict[str, object]]] = {}
        rows = sample_bars(adjustment="raw" if query["adjustment"] == "raw" else "all").to_frame()
        stamps = rows["timestamp"].dt.strftime("%Y-%m-%dT%H:%M:%S+00:00")
        wanted = rows["symbol"].isin(query["symbols"].split(",")) & stamps.between(query["start"], query["end"])
        for row, stamp in zip(rows[wanted].itertuples(), stamps[wanted], strict=True):
            bar = {"t": stamp, "o": row.open, "h": row.high, "l": row.low, "c": row.close, "v": row.volume}
            page.setdefault(str(row.symbol), []).append({**bar, "n": 1, "vw": row.close})
        return json.dumps({"bars": page, "next_page_token": None}).encode()

    def actions(self, query: dict[str, str]) -> bytes:
        what = {"cusip": "0", "process_date": "2005-02-28", "id": str(UUID(int=1))}
        split = {**what, "symbol": "AAPL", "new_rate": 2, "old_rate": 1, "ex_date": "2005-02-28"}
        paid = {**what, "symbol": "IBM", "rate": 0.18, "special": False, "foreign": False, "ex_date": "2005-02-08"}
        wanted = [
            one
            for one in (split, paid)
            if one["symbol"] in query["symbols"] and query["start"] <= str(one["ex_date"]) <= query["end"]
        ]
        kinds = {"forward_splits": [one for one in wanted if "new_rate" in one]}
        kinds["cash_dividends"] = [one for one in wanted if "rate" in one]
        return json.dumps({"corporate_actions": kinds, "next_page_token": None}).encode()

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


@pytest.fixture
def actions(exchange: Exchange) -> CorporateActionsClient:
    client = CorporateActionsClient("key", "secret", url_override=f"http://127.0.0.1:{exchange.server_port}")
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


FEBRUARY = ("1Day", "2005-02-01", "2005-03-31")


def test_raw_history_comes_with_its_splits(client: StockHistoricalDataClient, actions: CorporateActionsClient) -> None:
    bars = alpaca_history(client, ["AAPL", "IBM"], *FEBRUARY, adjustment="raw", actions=actions)
    here = sample_bars(["AAPL", "IBM"], start="2005-02-01", end="2005-03-31", adjustment="raw")
    assert bars.actions is not None and here.actions is not None
    assert (bars.actions.split == here.actions.split).all() and bars.actions.volume == "traded"
    assert bars.action_counts == {"splits": 1, "dividends": 1}
    held = backtest(Given(weights=((1.0, 0.0),) * bars.n), bars, costs=Costs.none(), check=False)
    assert held.corporate_actions[0].startswith("AAPL split 2 for 1 after the close of 2005-02-25")
    assert held.statistics["total_return"] == pytest.approx(0.07, abs=0.01)


def test_prices_before_a_split_are_adjusted_for_it(
    client: StockHistoricalDataClient, actions: CorporateActionsClient
) -> None:
    """They end before the split, were fetched after it, and so are halved: fees a share count half of the shares."""
    later = datetime(2005, 6, 1, 12, tzinfo=NEW_YORK)
    bars = alpaca_history(client, ["AAPL"], "1Day", "2005-02-01", "2005-02-18", as_of=later, actions=actions)
    assert bars.actions is not None and set(bars.actions.factor[:, 0]) == {0.5} and bars.actions.volume == "adjusted"
    then = datetime(2005, 2, 18, 20, tzinfo=NEW_YORK)
    bars = alpaca_history(client, ["AAPL"], "1Day", "2005-02-01", "2005-02-18", as_of=then, actions=actions)
    assert bars.actions is not None and set(bars.actions.factor[:, 0]) == {1.0}


def test_a_split_on_the_day_where_two_fetches_meet_is_kept(
    client: StockHistoricalDataClient, actions: CorporateActionsClient, tmp_path: Path
) -> None:
    store = BarStore(tmp_path)
    for start, end in (("2005-02-01", "2005-02-28"), ("2005-02-28", "2005-03-31")):
        store.write(alpaca_history(client, ["AAPL"], "1Day", start, end, adjustment="raw", actions=actions))
    kept, whole = store.read("AAPL"), alpaca_history(client, ["AAPL"], *FEBRUARY, adjustment="raw", actions=actions)
    assert kept.content_hash == whole.content_hash and kept.actions_hash == whole.actions_hash
    assert kept.action_counts["splits"] == 1


def test_a_store_in_front_keeps_splits(
    client: StockHistoricalDataClient, actions: CorporateActionsClient, exchange: Exchange, tmp_path: Path
) -> None:
    store = BarStore(tmp_path)
    span = {"start": "2005-02-01", "end": "2005-03-31", "adjustment": "raw", "store": store}
    fetched = load_bars("alpaca", "AAPL", client=client, actions=actions, **span)
    asked = len(exchange.queries)
    again = load_bars("alpaca", "AAPL", client=client, actions=actions, **span)
    assert len(exchange.queries) == asked and again.actions_hash == fetched.actions_hash
    assert again.action_counts["splits"] == 1


def test_a_server_without_splits_still_has_bars(
    client: StockHistoricalDataClient, actions: CorporateActionsClient, exchange: Exchange
) -> None:
    exchange.no_actions = 404
    bars = alpaca_history(client, ["IBM"], *FEBRUARY, actions=actions)
    assert bars.actions is None and bars.action_counts == {"splits": None, "dividends": None}
    exchange.no_actions = 500
    with pytest.raises(Retryable):
        alpaca_history(client, ["IBM"], *FEBRUARY, actions=actions)
