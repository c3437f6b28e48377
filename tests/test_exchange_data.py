"""The market data side of the exchange: every operation that Alpaca publishes, and nothing that is yet to happen."""

import asyncio
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import msgpack
import numpy as np
import pandas as pd
import pytest
from alpaca.data.historical import CryptoHistoricalDataClient, StockHistoricalDataClient
from alpaca.data.historical.corporate_actions import CorporateActionsClient
from alpaca.data.historical.screener import ScreenerClient
from alpaca.data.live import StockDataStream
from alpaca.data.requests import (
    CorporateActionsRequest,
    CryptoBarsRequest,
    MarketMoversRequest,
    StockBarsRequest,
    StockLatestQuoteRequest,
    StockQuotesRequest,
    StockSnapshotRequest,
    StockTradesRequest,
)
from alpaca.data.timeframe import TimeFrame, TimeFrameUnit
from starlette.applications import Starlette
from websockets.asyncio.client import connect

from trader_lib.clock.ids import SeededIds
from trader_lib.clock.sessions import NEW_YORK, TradingCalendar
from trader_lib.exchange.closed import MarketView
from trader_lib.exchange.data_endpoints import DataEndpoints
from trader_lib.exchange.data_streams import STOCK_CHANNELS, Moment, build_data_streams
from trader_lib.exchange.endpoints import Service
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer, build_app
from trader_lib.exchange.streams import Keys
from trader_lib.market.actions import Announced
from trader_lib.market.bars import Bars, Provenance
from trader_lib.market.resample import BarLength, bin_starts
from trader_lib.market.synthetic import synthetic_bars

KEYS = Keys("key", "secret")
HEADERS = {"APCA-API-KEY-ID": "key", "APCA-API-SECRET-KEY": "secret"}
PAIR, CONTRACT, FROM = "BTC/USD", "AAPL241220C00300000", "start=2024-03-01"

# operationId of Alpaca's market-data-api.json, address, and what is served: data, nothing (well-formed), or "" for 404
OPERATIONS = [
    ("SubscribeToCorporateActionsEventsSSE", "/v1beta1/events/corporate-actions", ""),
    ("FixedIncomeLatestPrices", "/v1beta1/fixed_income/latest/prices?isins=US912797KJ59", "nothing prices"),
    ("FixedIncomeLatestQuotes", "/v1beta1/fixed_income/latest/quotes?isins=US912797KJ59", "nothing quotes"),
    ("LatestRates", "/v1beta1/forex/latest/rates?currency_pairs=USDJPY", "nothing rates"),
    ("Rates", "/v1beta1/forex/rates?currency_pairs=USDJPY", "nothing rates"),
    ("Logos", "/v1beta1/logos/IBM", "picture"),
    ("News", "/v1beta1/news?symbols=IBM", "nothing news"),
    ("optionBars", f"/v1beta1/options/bars?symbols={CONTRACT}&timeframe=1Day", "nothing bars"),
    ("OptionMetaConditions", "/v1beta1/options/meta/conditions/trade", "data"),
    ("OptionMetaExchanges", "/v1beta1/options/meta/exchanges", "data"),
    ("OptionLatestQuotes", f"/v1beta1/options/quotes/latest?symbols={CONTRACT}", "nothing quotes"),
    ("OptionSnapshots", f"/v1beta1/options/snapshots?symbols={CONTRACT}", "nothing snapshots"),
    ("OptionChain", "/v1beta1/options/snapshots/IBM", "nothing snapshots"),
    ("OptionTrades", f"/v1beta1/options/trades?symbols={CONTRACT}", "nothing trades"),
    ("OptionLatestTrades", f"/v1beta1/options/trades/latest?symbols={CONTRACT}", "nothing trades"),
    ("Movers", "/v1beta1/screener/stocks/movers", "data"),
    ("MostActives", "/v1beta1/screener/stocks/most-actives", "data most_actives"),
    ("CryptoBars", f"/v1beta3/crypto/us/bars?symbols={PAIR}&timeframe=1Hour&{FROM}", "data bars"),
    ("CryptoLatestBars", f"/v1beta3/crypto/us/latest/bars?symbols={PAIR}", "data bars"),
    ("CryptoLatestOrderbooks", f"/v1beta3/crypto/us/latest/orderbooks?symbols={PAIR}", "data orderbooks"),
    ("CryptoLatestQuotes", f"/v1beta3/crypto/us/latest/quotes?symbols={PAIR}", "data quotes"),
    ("CryptoLatestTrades", f"/v1beta3/crypto/us/latest/trades?symbols={PAIR}", "data trades"),
    ("CryptoQuotes", f"/v1beta3/crypto/us/quotes?symbols={PAIR}&{FROM}", "data quotes"),
    ("CryptoSnapshots", f"/v1beta3/crypto/us/snapshots?symbols={PAIR}", "data snapshots"),
    ("CryptoTrades", f"/v1beta3/crypto/us/trades?symbols={PAIR}&{FROM}", "data trades"),
    ("CorporateActions", "/v1/corporate-actions?start=2024-03-01&end=2024-12-31", "data corporate_actions"),
    ("StockAuctionSingle", f"/v2/stocks/IBM/auctions?{FROM}", "data auctions"),
    ("StockBarSingle", f"/v2/stocks/IBM/bars?timeframe=1Day&{FROM}", "data bars"),
    ("StockLatestBarSingle", "/v2/stocks/IBM/bars/latest", "data bar"),
    ("StockQuoteSingle", f"/v2/stocks/IBM/quotes?{FROM}", "data quotes"),
    ("StockLatestQuoteSingle", "/v2/stocks/IBM/quotes/latest", "data quote"),
    ("StockSnapshotSingle", "/v2/stocks/IBM/snapshot", "data dailyBar"),
    ("StockTradeSingle", f"/v2/stocks/IBM/trades?{FROM}", "data trades"),
    ("StockLatestTradeSingle", "/v2/stocks/IBM/trades/latest", "data trade"),
    ("StockAuctions", f"/v2/stocks/auctions?symbols=IBM,MSFT&{FROM}", "data auctions"),
    ("StockBars", f"/v2/stocks/bars?symbols=IBM,MSFT&timeframe=30Min&{FROM}", "data bars"),
    ("StockLatestBars", "/v2/stocks/bars/latest?symbols=IBM,MSFT", "data bars"),
    ("StockMetaConditions", "/v2/stocks/meta/conditions/trade?tape=A", "data"),
    ("StockMetaExchanges", "/v2/stocks/meta/exchanges", "data"),
    ("StockQuotes", f"/v2/stocks/quotes?symbols=IBM,MSFT&{FROM}", "data quotes"),
    ("StockLatestQuotes", "/v2/stocks/quotes/latest?symbols=IBM,MSFT", "data quotes"),
    ("StockSnapshots", "/v2/stocks/snapshots?symbols=IBM,MSFT", "data IBM"),
    ("StockTrades", f"/v2/stocks/trades?symbols=IBM,MSFT&{FROM}", "data trades"),
    ("StockLatestTrades", "/v2/stocks/trades/latest?symbols=IBM,MSFT", "data trades"),
]
NEXT_WEEK = "end=2024-03-18"  # after the last bar of all
ASKED = [
    *(address for _, address, served in OPERATIONS if served and served != "picture"),
    *(
        f"/v2/stocks/bars?symbols=IBM,MSFT,NOPE&timeframe={timeframe}&{FROM}&{NEXT_WEEK}&adjustment={adjustment}"
        for timeframe in ("15Min", "1Hour", "4Hour", "1Day", "1Week", "1Month", "12Month")
        for adjustment in ("raw", "split", "all")
    ),
    *(
        f"/v2/stocks/{name}?symbols=IBM,MSFT&{FROM}&{NEXT_WEEK}&timeframe=15Min&sort=desc&limit=5"
        for name in ("bars", "trades", "quotes", "auctions")
    ),
    "/v2/stocks/bars/latest?symbols=IBM&feed=delayed_sip",
    "/v1/corporate-actions?start=2024-01-01&end=2030-01-01&sort=desc",
]


def quarters(*, seed_after: int = 1, split_after: bool = False) -> Bars:
    """Quarter hours of a week; of IBM a split on the second day, and whatever is asked from the fourth on."""
    past, future = (
        synthetic_bars(["IBM", "MSFT", PAIR], "2024-03-05", "2024-03-11", "15Min", seed=s) for s in (1, seed_after)
    )
    whole = np.stack([past.open, past.high, past.low, past.close, past.volume])
    later = past.times_ns >= pd.Timestamp("2024-03-08", tz=NEW_YORK).value
    whole[:, later] = np.stack([future.open, future.high, future.low, future.close, future.volume])[:, later]
    known = [
        Announced("IBM", datetime(2024, 3, 6).date(), ratio=1.2),
        Announced("MSFT", datetime(2024, 3, 7).date(), dividend=0.5),
    ]
    if split_after:
        known += [
            Announced("MSFT", datetime(2024, 3, 8).date(), ratio=1.2),
            Announced("IBM", datetime(2024, 3, 11).date(), dividend=1.0),
        ]
    origin = Provenance("synthetic", "synthetic", past.timeframe, "raw", synthetic=True)
    return Bars(*whole, past.index, past.symbols, origin).with_actions(known)


class Client:
    """Asks an application without a port."""

    def __init__(self, app: Starlette, headers: dict[str, str] | None = None) -> None:
        self._app, self._headers = app, headers

    def get(self, address: str, params: dict[str, str] | None = None) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://here", headers=self._headers) as client:
                return await client.get(address, params=params)

        return asyncio.run(ask())


DAY_ROWS = 26
START = 2 * DAY_ROWS + 4  # an hour into the third day


@pytest.fixture(scope="module")
def exchange() -> Exchange:
    return Exchange(quarters(), START)


@pytest.fixture(scope="module")
def client(exchange: Exchange) -> Client:
    return Client(build_app(exchange, KEYS, SeededIds("s")), headers=HEADERS)


# ---- what is served


@pytest.mark.parametrize(("name", "address", "served"), OPERATIONS, ids=[row[0] for row in OPERATIONS])
def test_every_published_operation(client: Client, name: str, address: str, served: str) -> None:
    answer = client.get(address)
    if not served:
        assert (answer.status_code, answer.json()) == (404, {"code": 40410000, "message": "endpoint not found."})
        return
    kind, _, field = served.partition(" ")
    assert answer.status_code == 200, answer.text
    if kind == "picture":
        assert answer.headers["content-type"] == "image/png" and answer.content.startswith(b"\x89PNG")
        return
    body = answer.json()
    if kind == "nothing":
        assert body.pop(field) in ({}, []) and body in ({}, {"next_page_token": None})
    else:
        assert body[field] if field else body, "there is data of it"


def test_the_list_of_operations_is_whole() -> None:
    assert len(OPERATIONS) == len({row[0] for row in OPERATIONS}) == 44
    assert sum(bool(row[2]) for row in OPERATIONS) == 43


def test_the_documentation_lists_every_operation_and_address() -> None:
    page = (Path(__file__).parent.parent / "docs/market-data.md").read_text(encoding="utf-8")
    rows = [
        row.split("|")
        for row in page.partition("## Streams")[0].splitlines()
        if row.startswith("| ") and row.count("|") == 4 and "`/v" in row
    ]
    listed = {name.strip(): "not served" not in row[3] for row in rows for name in row[1].split(",")}
    assert listed == {name: bool(served) for name, _, served in OPERATIONS}
    addresses = {address for row in rows if "not served" not in row[3] for address in re.findall("`([^`]+)`", row[2])}
    data = DataEndpoints(Exchange(quarters()))
    assert addresses == {path for _, path, _ in data.table()} | {route.path for route in data.public_routes()}
    streams = page.partition("## Streams")[2]
    assert all(f"`{path}`" in streams for path in build_data_streams(Exchange(quarters()), KEYS))


@pytest.mark.parametrize(
    ("address", "status", "words"),
    [
        ("/v2/stocks/bars?timeframe=1Day", 400, "symbols is required"),
        ("/v2/stocks/bars?symbols=IBM", 400, "timeframe is required"),
        ("/v2/stocks/bars?symbols=IBM&timeframe=2Day", 400, "invalid timeframe: 2Day"),
        ("/v2/stocks/bars?symbols=IBM&timeframe=1Min", 400, "invalid timeframe: 1Min. Bars of 1Min cannot be built"),
        ("/v2/stocks/bars?symbols=IBM&timeframe=20Min", 400, "invalid timeframe: 20Min. Bars of 20Min cannot be built"),
        ("/v2/stocks/bars?symbols=IBM&timeframe=1Day&adjustment=x", 400, "invalid adjustment: x"),
        ("/v2/stocks/bars?symbols=IBM&timeframe=1Day&limit=0", 400, "invalid limit"),
        ("/v2/stocks/bars?symbols=IBM&timeframe=1Day&sort=up", 400, "invalid sort: up"),
        ("/v2/stocks/bars?symbols=IBM&timeframe=1Day&start=2024-03-08&end=2024-03-07", 400, "end should not be before"),
        ("/v2/stocks/bars?symbols=BTC/USD&timeframe=1Day", 400, "invalid symbol: BTC/USD"),
        ("/v2/stocks/bars?symbols=IBM&timeframe=1Day&page_token=no", 400, "invalid page_token"),
        ("/v2/stocks/bars?symbols=IBM&timeframe=1Day&currency=EUR", 400, "invalid currency"),
        ("/v2/stocks/bars?symbols=IBM&timeframe=1Day&asof=now", 400, "invalid asof"),
        ("/v2/stocks/trades/latest?symbols=IBM&feed=moon", 400, "invalid feed: moon"),
        ("/v2/stocks/auctions?symbols=IBM&feed=iex", 400, "invalid feed: iex"),
        ("/v2/stocks/NOPE/quotes/latest", 404, "no quote found for NOPE"),
        ("/v2/stocks/NOPE/snapshot", 404, "no snapshot found for NOPE"),
        ("/v2/stocks/meta/conditions/trade", 400, "tape is required"),
        ("/v1beta3/crypto/us/bars?symbols=IBM&timeframe=1Day", 400, "invalid symbol: IBM does not match"),
        ("/v1beta3/crypto/moon/latest/bars?symbols=BTC/USD", 400, "Invalid location: moon"),
        ("/v1beta1/screener/bonds/movers", 400, "invalid market_type: bonds"),
        ("/v1beta1/screener/stocks/most-actives?top=101", 400, "invalid top"),
        ("/v1beta1/options/bars?symbols=IBM&timeframe=1Day", 400, "invalid symbol: IBM"),
        ("/v1/corporate-actions?types=gift", 400, "invalid type: gift"),
        ("/v1beta1/news?limit=51", 400, "invalid limit"),
    ],
)
def test_refusals_have_words_and_no_code(client: Client, address: str, status: int, words: str) -> None:
    answer = client.get(address)
    assert answer.status_code == status and list(answer.json()) == ["message"] and words in answer.json()["message"]


def test_stocks_need_keys_and_crypto_none(exchange: Exchange) -> None:
    stranger = Client(build_app(exchange, KEYS, SeededIds("s")))
    for name, address, served in OPERATIONS:
        answer = stranger.get(address).status_code
        assert answer == (404 if not served else 200 if name.startswith("Crypto") else 401), name


def test_before_the_first_bar_there_is_nothing_and_it_is_well_formed() -> None:
    client = Client(build_app(Exchange(quarters()), KEYS, SeededIds("s")), headers=HEADERS)
    for name, address, served in OPERATIONS:
        answer = client.get(address)
        single = (name.endswith("Single") and "Latest" in name) or name == "StockSnapshotSingle"
        assert answer.status_code == (404 if single or not served else 200), (name, answer.text)
        assert name == "Logos" or not any(moments_in(answer.json())) or name in ("Movers", "MostActives")
    for symbol, reason in (
        ("symbols=IBM", {}),
        ("symbols=IBM&asof=2024-03-08&feed=iex&currency=USD", {"currency": "USD"}),
    ):
        empty = {"bars": {}, "next_page_token": None}
        assert client.get(f"/v2/stocks/bars?{symbol}&timeframe=1Week").json() == empty | reason


def test_odd_questions_never_make_it_fail(client: Client) -> None:
    rng = random.Random(1)
    names = (
        "symbols",
        "start",
        "end",
        "limit",
        "timeframe",
        "adjustment",
        "sort",
        "page_token",
        "feed",
        "asof",
        "top",
        "types",
    )
    values = [
        "",
        "IBM",
        "IBM,MSFT,NOPE",
        "0",
        "-1",
        "1e9",
        "9" * 40,
        "1Day",
        "1Hour",
        "all",
        "desc",
        "2024-03-06",
        "2024-13-45",
    ]
    values += [
        "0001-01-01",
        "9999-12-31T23:59:59Z",
        "2024-03-06T00:00:00+99:00",
        "\x00",
        "ü" * 200,
        "SUJN|1",
        "SUJNfDE=",
        "T0s=",
        "-",
    ]
    for _ in range(400):
        address = rng.choice(OPERATIONS)[1]
        query = {rng.choice(names): rng.choice(values) for _ in range(rng.randrange(4))}
        asked = dict(part.split("=") for part in address.partition("?")[2].split("&") if part)
        answer = client.get(address.partition("?")[0], params=asked | query)
        assert answer.status_code in (200, 400, 404), (address, query, answer.text)


# ---- longer bars


def test_longer_bars_are_what_pandas_makes_of_the_stored_ones(client: Client, exchange: Exchange) -> None:
    stored = exchange.history()
    frame = pd.DataFrame(
        {
            "open": stored.open[:, 0],
            "high": stored.high[:, 0],
            "low": stored.low[:, 0],
            "close": stored.close[:, 0],
            "volume": stored.volume[:, 0],
        }
    )
    how = {"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum"}
    for timeframe in ("15Min", "30Min", "1Hour", "2Hour", "23Hour", "1Day", "1Week", "1Month", "3Month"):
        expected = frame.groupby(bin_starts(stored.times_ns, BarLength.parse(timeframe), exchange.calendar)).agg(how)
        (bars,) = (
            client.get(f"/v2/stocks/bars?symbols=IBM&timeframe={timeframe}&start=2023-12-01").json()["bars"].values()
        )
        assert [pd.Timestamp(bar["t"]).value for bar in bars] == expected.index.tolist()
        assert [[bar[letter] for letter in "ohlcv"] for bar in bars] == expected.to_numpy().tolist()
        assert all(bar["l"] <= bar["vw"] <= bar["h"] and bar["n"] > 0 for bar in bars)


def test_pages_put_together_are_the_whole(client: Client) -> None:
    for sort in ("asc", "desc"):
        for name in ("bars", "trades", "quotes", "auctions"):
            address = f"/v2/stocks/{name}?symbols=MSFT,NOPE,IBM&{FROM}&timeframe=1Hour&sort={sort}"
            whole, pages, token = client.get(f"{address}&limit=10000").json(), dict[str, list[Any]](), ""
            while token is not None:
                answer = client.get(f"{address}&limit=3&page_token={token}").json()
                assert 0 < sum(map(len, answer[name].values())) <= 3
                for symbol, points in answer[name].items():
                    pages.setdefault(symbol, []).extend(points)
                token = answer["next_page_token"]
            assert pages == whole[name] and list(pages) == ["IBM", "MSFT"] and whole["next_page_token"] is None


def test_adjustments_follow_what_has_happened(client: Client, exchange: Exchange) -> None:
    def closes(symbol: str, adjustment: str) -> list[float]:
        query = f"symbols={symbol}&timeframe=1Day&{FROM}&adjustment={adjustment}"
        return [bar["c"] for bar in client.get(f"/v2/stocks/bars?{query}").json()["bars"][symbol]]

    raw, split = closes("IBM", "raw"), closes("IBM", "split")
    assert split == [round(raw[0] / 1.2, 6), *raw[1:]] and closes("IBM", "all") == split == closes(
        "IBM", "split,dividend"
    )
    paid, whole = closes("MSFT", "raw"), closes("MSFT", "dividend")
    assert whole == [round(price * (1 - 0.5 / paid[1]), 6) for price in paid[:2]] + paid[2:]
    answer = client.get(f"/v1/corporate-actions?{FROM}&end=2024-12-31").json()["corporate_actions"]
    assert {kind: [(one["symbol"], one["ex_date"]) for one in found] for kind, found in answer.items()} == {
        "forward_splits": [("IBM", "2024-03-06")],
        "cash_dividends": [("MSFT", "2024-03-07")],
    }


# ---- nothing from later


def moments_in(answer: object) -> Iterator[str]:
    """Every stamp of an answer."""
    if isinstance(answer, dict):
        for name, part in answer.items():
            if name in ("t", "last_updated"):
                yield part
            yield from moments_in(part)
    elif isinstance(answer, list):
        for part in answer:
            yield from moments_in(part)


def test_no_answer_depends_on_what_has_not_closed() -> None:
    """Two exchanges with one past and two futures (prices, splits, dividends) answer the same bytes; then no more."""
    twins = [Exchange(quarters(), START), Exchange(quarters(seed_after=2, split_after=True), START)]
    clients = [Client(build_app(twin, KEYS, SeededIds("s")), headers=HEADERS) for twin in twins]
    fork = 3 * DAY_ROWS  # the first bar that differs
    for last_closed in (START - 1, 2 * DAY_ROWS + 25, fork - 1):
        for twin in twins:
            while twin.index < last_closed:
                twin.advance()
        now = twins[0].now
        for address in ASKED:
            first, second = (client.get(address) for client in clients)
            assert first.content == second.content, address
            assert all(pd.Timestamp(at) <= now for at in moments_in(first.json())), address
    for twin in twins:
        twin.advance()
    assert sum(clients[0].get(address).content != clients[1].get(address).content for address in ASKED) > 30


def test_a_bar_is_there_once_it_has_closed_and_not_before() -> None:
    own = Exchange(quarters(), START)
    client = Client(build_app(own, KEYS, SeededIds("s")), headers=HEADERS)
    for _ in range(3):
        shown = client.get(f"/v2/stocks/IBM/bars?timeframe=15Min&{FROM}&{NEXT_WEEK}&sort=desc&limit=1").json()["bars"][
            0
        ]
        closed = datetime.fromisoformat(shown["t"]) + timedelta(minutes=15)
        assert closed == own.now and shown["c"] == own.bars.close[own.index, 0]
        latest = client.get("/v2/stocks/IBM/trades/latest").json()["trade"]
        assert datetime.fromisoformat(latest["t"]) < own.now and latest["p"] == shown["c"]
        own.advance()


# ---- clients that nobody here wrote


@pytest.fixture
def server() -> Iterator[ExchangeServer]:
    with ExchangeServer(
        Exchange(quarters(), START), key_id="key", secret_key="secret", service=Service(data_connections_max=1)
    ) as server:
        yield server


def test_alpacas_own_clients_read_all_of_it(server: ExchangeServer) -> None:
    bars, stocks = server.exchange.bars, StockHistoricalDataClient("key", "secret", url_override=server.url)
    both, start = ["IBM", "MSFT", "NOPE"], datetime(2024, 3, 1, tzinfo=UTC)
    for length in (TimeFrame(15, TimeFrameUnit.Minute), TimeFrame.Hour, TimeFrame.Day, TimeFrame.Week, TimeFrame.Month):
        found = stocks.get_stock_bars(StockBarsRequest(symbol_or_symbols=both, timeframe=length, start=start)).data
        assert set(found) == {"IBM", "MSFT"} and found["IBM"][-1].close == bars.close[START - 1, 0]
        assert (
            sum(bar.volume for bar in found["IBM"]) == bars.volume[:START, 0].sum() and found["IBM"][0].trade_count > 0
        )
    trades = stocks.get_stock_trades(StockTradesRequest(symbol_or_symbols="IBM", start=start)).data["IBM"]
    quotes = stocks.get_stock_quotes(StockQuotesRequest(symbol_or_symbols="IBM", start=start)).data["IBM"]
    assert len(trades) == len(quotes) == 4 * START and trades[-1].price == bars.close[START - 1, 0]
    assert all(quote.bid_price < trade.price < quote.ask_price for trade, quote in zip(trades, quotes, strict=True))
    quote = stocks.get_stock_latest_quote(StockLatestQuoteRequest(symbol_or_symbols=both))["MSFT"]
    assert quote.bid_price < bars.close[START - 1, 1] < quote.ask_price
    snapshot = stocks.get_stock_snapshot(StockSnapshotRequest(symbol_or_symbols=both))["IBM"]
    assert (
        snapshot.daily_bar.open == bars.open[2 * DAY_ROWS, 0]
        and snapshot.minute_bar.close == snapshot.latest_trade.price
    )
    assert snapshot.previous_daily_bar.close == bars.close[2 * DAY_ROWS - 1, 0]
    movers = ScreenerClient("key", "secret", url_override=server.url).get_market_movers(MarketMoversRequest())
    assert {mover.symbol for mover in movers.gainers + movers.losers} == {"IBM", "MSFT"}
    actions = CorporateActionsClient("key", "secret", url_override=server.url)
    known = actions.get_corporate_actions(CorporateActionsRequest(start=start.date(), end=datetime(2030, 1, 1).date()))
    assert [split.new_rate / split.old_rate for split in known.data["forward_splits"]] == [1.2]
    crypto = CryptoHistoricalDataClient(url_override=server.url)  # without keys
    pair = CryptoBarsRequest(symbol_or_symbols=PAIR, timeframe=TimeFrame.Day, start=start)
    assert len(crypto.get_crypto_bars(pair).data[PAIR]) == 3


def test_alpacas_own_stream_gets_every_channel(server: ExchangeServer) -> None:
    got: dict[str, list[Any]] = {name: [] for name in ("bars", "daily", "trades", "quotes")}
    stream, ready = StockDataStream("key", "secret", url_override=server.data_stream_url), threading.Event()
    dispatch = stream._dispatch

    def into(name: str) -> Callable[[Any], Any]:
        async def keep(message: Any) -> None:
            got[name].append(message)

        return keep

    async def listen(message: dict[str, Any]) -> None:
        await dispatch(message)
        if message.get("T") == "subscription":
            ready.set()

    stream._dispatch = listen  # type: ignore[method-assign]
    stream.subscribe_bars(into("bars"), "*")
    stream.subscribe_daily_bars(into("daily"), "IBM")
    stream.subscribe_trades(into("trades"), "IBM")
    stream.subscribe_quotes(into("quotes"), "MSFT")
    thread = threading.Thread(target=stream.run, daemon=True)
    thread.start()
    assert ready.wait(20)
    step = server.call(server.exchange.advance)
    end = time.monotonic() + 20
    while [len(got[name]) for name in ("bars", "daily", "trades", "quotes")] != [2, 1, 4, 4]:
        assert time.monotonic() < end, got
        time.sleep(0.005)
    bars = server.exchange.bars
    assert {bar.symbol: bar.close for bar in got["bars"]} == dict(
        zip(("IBM", "MSFT"), bars.close[step.index], strict=False)
    )
    assert got["daily"][0].open == bars.open[2 * DAY_ROWS, 0] and got["daily"][0].close == bars.close[step.index, 0]
    assert got["trades"][-1].price == bars.close[step.index, 0] and got["quotes"][0].symbol == "MSFT"
    assert all(message.timestamp < step.closed_at for message in got["trades"] + got["quotes"])
    stream.stop()
    thread.join(6)


def sent_by(exchange: Exchange) -> list[list[Any]]:
    """What all channels send of all symbols, bar by bar, until the first bar in which the twins differ."""
    market, sent = MarketView(exchange), list[list[Any]]()

    def keep(at: datetime, rows: Any) -> None:
        moment = Moment(at, rows, market.closed(), binary=False)
        sent.append([part for channel in STOCK_CHANNELS for name in rows for part in moment.messages(channel, name)])
        assert all(pd.Timestamp(message["t"]) < exchange.now for message in sent[-1])

    exchange.on_bars(keep)
    while exchange.index < 3 * DAY_ROWS:
        exchange.advance()
    return sent


def test_no_stream_sends_what_has_not_closed() -> None:
    """Two streams over one past and two futures send the same until the futures begin."""
    sent = [sent_by(Exchange(quarters(), START)), sent_by(Exchange(quarters(seed_after=2, split_after=True), START))]
    same = [first == second for first, second in zip(*sent, strict=True)]
    assert len(same) > 20 and all(same[:-1]) and not same[-1] and all(len(messages) > 10 for messages in sent[0])


async def test_a_second_connection_to_one_address_is_refused(server: ExchangeServer) -> None:
    async def hear(socket: Any) -> Any:
        return msgpack.unpackb(await asyncio.wait_for(socket.recv(), 5), timestamp=3)[0]

    packed = {"additional_headers": {"Content-Type": "application/msgpack"}}
    auth = msgpack.packb({"action": "auth", "key": "key", "secret": "secret"})
    async with connect(server.data_stream_url, **packed) as first, connect(server.data_stream_url, **packed) as second:
        for socket, answer in ((first, "authenticated"), (second, "connection limit exceeded")):
            assert (await hear(socket))["msg"] == "connected"
            await socket.send(auth)
            assert (await hear(socket))["msg"] == answer
        await first.send(msgpack.packb({"action": "subscribe", "trades": ["IBM"], "orderbooks": []}))
        assert (await hear(first))["cancelErrors"] == ["IBM"]
        server.call(server.exchange.advance)
        trade = await hear(first)
        assert (trade["T"], trade["S"], trade["t"]) == ("t", "IBM", server.exchange.bars.at(START))


# ---- half days


def test_a_half_day_and_the_change_of_the_clocks() -> None:
    calendar = TradingCalendar()
    for first, last, hours in [
        ("2024-11-29", "2024-11-29", ["14", "15", "16", "17"]),  # 9:30 to 13:00, winter
        (
            "2024-03-08",
            "2024-03-11",
            ["14", "15", "16", "17", "18", "19", "20", "13", "14", "15", "16", "17", "18", "19"],
        ),
    ]:
        bars = synthetic_bars(["IBM"], first, last, "30Min", seed=1)
        client = Client(build_app(Exchange(bars, bars.n - 1, calendar=calendar), KEYS, SeededIds("s")), headers=HEADERS)
        found = client.get(f"/v2/stocks/IBM/bars?timeframe=1Hour&start={first}").json()["bars"]
        assert [bar["t"][11:13] for bar in found] == hours
        days = client.get(f"/v2/stocks/IBM/bars?timeframe=1Day&start={first}").json()["bars"]
        assert [bar["t"][:16] for bar in days] == [f"{first}T05:00", f"{last}T04:00"][: len(days)]
