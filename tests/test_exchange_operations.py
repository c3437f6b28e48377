"""Every operation of Alpaca's trading API, asked of the exchange: served as Alpaca serves it, or 404 in its form."""

from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import httpx
import pytest

from trader_lib.clock.ids import SeededIds, generator
from trader_lib.exchange.desk import Desk
from trader_lib.exchange.endpoints import Service
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.moving import open_for_trading
from trader_lib.exchange.quota import Quota
from trader_lib.exchange.server import build_app
from trader_lib.exchange.streams import Keys
from trader_lib.market.bars import Bars

HEADERS = {"APCA-API-KEY-ID": "key", "APCA-API-SECRET-KEY": "secret"}
MARKET = {"symbol": "IBM", "side": "buy", "type": "market", "time_in_force": "day", "qty": "10"}
RESTING = MARKET | {"type": "limit", "limit_price": "1", "time_in_force": "gtc"}

# verb, path, status; {…} is filled in from what the test has made. In the order of the OpenAPI document 2.0.1.
SERVED = """
GET /v2/account 200
GET /v2/account/activities 200
GET /v2/account/activities/FILL 200
GET /v2/account/configurations 200
PATCH /v2/account/configurations 200
GET /v2/account/portfolio/history 200
GET /v2/assets 200
GET /v2/assets/IBM 200
GET /v2/calendar 200
GET /v2/clock 200
GET /v2/corporate_actions/announcements?ca_types=dividend&since=2012-01-01&until=2012-03-01 200
GET /v2/corporate_actions/announcements/none 404
DELETE /v2/orders/{resting} 204
GET /v2/orders 200
POST /v2/orders 200
GET /v2/orders/{filled} 200
PATCH /v2/orders/{replaceable} 200
GET /v2/orders:by_client_order_id?client_order_id=filled 200
DELETE /v2/orders 207
GET /v2/positions 200
GET /v2/positions/IBM 200
DELETE /v2/positions/IBM 200
DELETE /v2/positions 207
GET /v2/watchlists 200
POST /v2/watchlists 200
GET /v2/watchlists/{watchlist} 200
POST /v2/watchlists/{watchlist} 200
PUT /v2/watchlists/{watchlist} 200
DELETE /v2/watchlists/{watchlist}/IBM 200
GET /v2/watchlists:by_name?name=named 200
POST /v2/watchlists:by_name?name=named 200
PUT /v2/watchlists:by_name?name=named 200
DELETE /v2/watchlists:by_name?name=named 204
DELETE /v2/watchlists/{watchlist} 204
GET /v3/calendar/NYSE 200
GET /v3/clock 200
"""
BODIES: dict[str, object] = {
    "POST /v2/orders": RESTING,
    "PATCH /v2/orders/{replaceable}": {"qty": "2"},
    "PATCH /v2/account/configurations": {"no_shorting": False},
    "POST /v2/watchlists": {"name": "third", "symbols": ["IBM"]},
    "POST /v2/watchlists/{watchlist}": {"symbol": "IBM"},
    "PUT /v2/watchlists/{watchlist}": {"name": "other", "symbols": ["AAPL", "IBM"]},
    "POST /v2/watchlists:by_name?name=named": {"symbol": "MSFT"},
    "PUT /v2/watchlists:by_name?name=named": {"symbols": ["AAPL"]},
}
NOT_SERVED = """
GET /v1/locates
POST /v1/locates
GET /v1/locates/1
GET /v1/locates/quotes
GET /v2beta1/events/activities
GET /v2/options/contracts
GET /v2/options/contracts/1
POST /v2/positions/1/do-not-exercise
POST /v2/positions/1/exercise
POST /v2/tokenization/mint
GET /v2/tokenization/requests
GET /v2/tokenization/requests/1
GET /v2/tokenization/requests:by_client_request_id
GET /v2/wallets
GET /v2/wallets/fees/estimate
GET /v2/wallets/transfers
GET /v2/wallets/transfers/1
GET /v2/wallets/travel-rule/vasps
GET /v2/wallets/whitelists
POST /v2/wallets/whitelists
DELETE /v2/wallets/whitelists/1
PATCH /v2/wallets/whitelists/1/travel-rule-info
"""
TABLE = [line.rsplit(" ", 1) for line in SERVED.split("\n") if line]


def client_of(exchange: Exchange, service: Service | None = None) -> httpx.AsyncClient:
    """A client of an exchange without a port."""
    app = build_app(exchange, Keys("key", "secret"), SeededIds("test"), service)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://exchange", headers=HEADERS)


@pytest.fixture
def live(daily_bars: Bars) -> Exchange:
    """An exchange in the middle of a day's trading."""
    exchange = Exchange(daily_bars, start_index=5, continuous=True)
    open_for_trading(exchange)
    return exchange


@pytest.fixture
async def client(live: Exchange) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(live) as client:
        yield client


async def made(client: httpx.AsyncClient) -> dict[str, str]:
    """Something of every kind that an operation needs: orders that filled and that rest, watchlists."""
    orders = {
        name: (await client.post("/v2/orders", json=body | {"client_order_id": name})).json()["id"]
        for name, body in {"filled": MARKET, "resting": RESTING, "replaceable": RESTING}.items()
    }
    listed = (await client.post("/v2/watchlists", json={"name": "mine"})).json()
    await client.post("/v2/watchlists", json={"name": "named"})
    return orders | {"watchlist": listed["id"]}


async def test_every_operation_answers_as_it_should(client: httpx.AsyncClient) -> None:
    names = await made(client)
    wrong = []
    for operation, status in TABLE:
        verb, path = operation.split(" ")
        if operation.startswith("DELETE /v2/positions") and operation.endswith("s"):
            await client.post("/v2/orders", json=MARKET)
        answer = await client.request(verb, path.format(**names), json=BODIES.get(operation))
        if answer.status_code != int(status) or (
            answer.status_code != 204 and not answer.json() and "ca_types" not in path
        ):
            wrong.append((operation, answer.status_code, answer.text[:200]))
    assert wrong == []


@pytest.mark.parametrize("operation", [line for line in NOT_SERVED.split("\n") if line])
async def test_what_is_not_served_is_not_found_in_alpacas_form(client: httpx.AsyncClient, operation: str) -> None:
    verb, path = operation.split(" ")
    answer = await client.request(verb, path)
    assert answer.status_code in (404, 405) and set(answer.json()) == {"code", "message"}


def test_the_table_names_every_operation_once() -> None:
    served = [operation.split("?")[0] for operation, _ in TABLE]
    assert len(served) == len(set(served)) == 36 and len([line for line in NOT_SERVED.split("\n") if line]) == 22


def test_the_documentation_shows_the_same_table() -> None:
    from pathlib import Path

    page = (Path(__file__).parents[1] / "docs" / "exchange.md").read_text()
    exchange_paths = {(verb, path) for verb, path, _ in Desk.operations(_without_exchange())}
    for verb, path in exchange_paths:
        assert f"`{verb} {path}`" in page, f"{verb} {path}"
    for line in NOT_SERVED.split("\n"):
        if line:
            assert line.split(" ")[1].split("/")[2] in page


def _without_exchange() -> Desk:
    return Desk.__new__(Desk)


# ---- what Alpaca says when it refuses

REFUSED: list[tuple[dict[str, object], int, int, str]] = [
    ({"qty": None}, 422, 40010001, "qty or notional is required"),
    ({"type": "limit"}, 422, 40010001, "limit orders require a limit price"),
    ({"type": None}, 422, 40010001, "type is required"),
    ({"symbol": "NOPE"}, 422, 42210000, 'asset "NOPE" not found'),
    ({"qty": "1000000"}, 403, 40310000, "insufficient buying power"),
    ({"qty": "1.5", "time_in_force": "gtc"}, 422, 42210000, "fractional orders must be DAY orders"),
    ({"qty": None, "notional": "0.5"}, 403, 40310000, "cost basis must be >= minimal amount of order 1"),
    ({"qty": None, "notional": "10.123"}, 422, 42210000, "notional value must be limited to 2 decimal places"),
    ({"type": "limit", "limit_price": "10.123"}, 422, 42210000, "sub-penny increment does not fulfill"),
    ({"qty": "1E+1000000"}, 422, 40010001, "invalid qty"),
    ({"stop_loss": "90"}, 422, 40010001, "stop_loss must be an object"),
    ({"order_class": "mleg"}, 422, 42210000, "invalid order_class"),
    ({"side": "sell", "time_in_force": "cls", "qty": "5", "type": "stop", "stop_price": "1"}, 422, 40010001, "auction"),
]


@pytest.mark.parametrize(("changes", "status", "code", "words"), REFUSED, ids=[case[3] for case in REFUSED])
async def test_orders_are_refused_in_alpacas_words(
    client: httpx.AsyncClient, changes: dict[str, object], status: int, code: int, words: str
) -> None:
    answer = await client.post("/v2/orders", json=MARKET | changes)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert words in answer.json()["message"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v2/calendar?start=1980-01-01&end=1980-12-31", 200),
        ("/v2/calendar?start=2500-01-01&end=2500-12-31", 400),
        ("/v2/calendar?date_type=MOON", 400),
        ("/v2/account/portfolio/history?period=1Y", 422),
        ("/v2/account/portfolio/history?period=3M&timeframe=1Min", 422),
        ("/v2/orders?status=odd", 422),
        ("/v2/orders?after_order_id=nobody", 404),
        ("/v2/orders/nobody", 404),
        ("/v2/assets/NOPE", 404),
        ("/v2/positions/AAPL", 404),
        ("/v2/watchlists:by_name?name=nobody", 404),
    ],
)
async def test_odd_questions_have_clear_answers(client: httpx.AsyncClient, path: str, status: int) -> None:
    answer = await client.get(path)
    assert answer.status_code == status, answer.text
    assert status == 200 or answer.json()["message"]


async def test_closing_by_quantity_or_share_takes_one_of_them(client: httpx.AsyncClient) -> None:
    await client.post("/v2/orders", json=MARKET)
    both = await client.delete("/v2/positions/IBM?qty=1&percentage=50")
    assert (both.status_code, both.json()["message"]) == (422, "qty and percentage cannot both be set")
    for wrong in ("percentage=Infinity", "percentage=1e400", "percentage=sNaN", "percentage=101", "qty=0"):
        assert (await client.delete(f"/v2/positions/IBM?{wrong}")).status_code == 422
    assert (await client.delete("/v2/positions/IBM?percentage=50")).json()["qty"] == "5"
    assert (await client.get("/v2/positions/IBM")).json()["qty"] == "5"


async def test_profits_of_the_day_begin_at_todays_own_price(client: httpx.AsyncClient, live: Exchange) -> None:
    await client.post("/v2/orders", json=MARKET)
    live.step()
    held = (await client.get("/v2/positions/IBM")).json()
    assert held["unrealized_intraday_pl"] == held["unrealized_pl"] and live.lastday_close("IBM") != live.mark("IBM")
    resting = await client.post("/v2/orders", json=RESTING | {"side": "sell", "limit_price": "9999"})
    refused = (await client.post("/v2/orders", json=MARKET | {"side": "sell"})).json()
    assert refused["related_orders"] == [resting.json()["id"]] and refused["held_for_orders"] == "10"


# ---- orders of every kind

BRACKET = MARKET | {
    "order_class": "bracket",
    "time_in_force": "gtc",
    "take_profit": {"limit_price": "9999"},
    "stop_loss": {"stop_price": "1"},
}


async def order_of(client: httpx.AsyncClient, order_id: str) -> Any:
    return (await client.get(f"/v2/orders/{order_id}")).json()


async def test_a_brackets_exits_wait_for_its_entry_and_end_each_other(
    client: httpx.AsyncClient, live: Exchange
) -> None:
    entry = (await client.post("/v2/orders", json=BRACKET | {"type": "limit", "limit_price": "2"})).json()
    assert [leg["status"] for leg in entry["legs"]] == ["held", "held"] and entry["order_class"] == "bracket"
    await client.delete(f"/v2/orders/{entry['legs'][0]['id']}")
    gone = await order_of(client, entry["id"])
    assert [gone["status"], *(leg["status"] for leg in gone["legs"])] == ["canceled"] * 3

    sent = (await client.post("/v2/orders", json=BRACKET)).json()
    entered = await order_of(client, sent["id"])
    assert (entered["status"], [leg["status"] for leg in entered["legs"]]) == ("filled", ["new", "held"])
    assert [leg["side"] for leg in entered["legs"]] == ["sell", "sell"] and entered["legs"][0]["qty"] == "10"
    assert [order["id"] for order in (await client.get("/v2/orders")).json()] == [leg["id"] for leg in entered["legs"]]
    assert (await client.get("/v2/positions/IBM")).json()["qty_available"] == "0"

    near = live.mark("IBM") - 1  # a stop that the day's range touches, in a pair of its own
    await client.delete("/v2/positions?cancel_orders=true")
    sent = (await client.post("/v2/orders", json=BRACKET | {"stop_loss": {"stop_price": str(round(near, 2))}})).json()
    while (await order_of(client, sent["id"]))["legs"][1]["status"] == "held":
        live.step()
    ended = await order_of(client, sent["id"])
    assert [leg["status"] for leg in ended["legs"]] == ["canceled", "filled"]
    assert (await client.get("/v2/positions")).json() == []


async def test_the_halves_of_a_bracket_are_replaced_one_by_one(client: httpx.AsyncClient, live: Exchange) -> None:
    waiting = (await client.post("/v2/orders", json=BRACKET | {"type": "limit", "limit_price": "2"})).json()
    entered = (await client.post("/v2/orders", json=BRACKET | {"symbol": "AAPL"})).json()
    for sent, status in ((waiting, "held"), (entered, "new")):
        target, stop = (await order_of(client, sent["id"]))["legs"]
        higher = await client.patch(f"/v2/orders/{target['id']}", json={"limit_price": "8888"})
        assert (higher.json()["limit_price"], higher.json()["replaces"]) == ("8888", target["id"]), higher.text
        lower = (await client.patch(f"/v2/orders/{stop['id']}", json={"stop_price": "1.5"})).json()
        legs = (await order_of(client, sent["id"]))["legs"]
        assert [leg["id"] for leg in legs] == [higher.json()["id"], lower["id"]] and legs[0]["status"] == status
        assert (await order_of(client, target["id"]))["replaced_by"] == higher.json()["id"]
        assert (await order_of(client, target["id"]))["replaced_at"] is not None
    for order, changes, words in [
        (legs[0], {"qty": "5"}, "only the limit_price"),
        (legs[1], {"stop_price": "8888"}, "0.01 apart"),
        (legs[1], {"stop_price": "1.234"}, "sub-penny"),
        (legs[1], {"stop_price": "1.2", "client_order_id": legs[0]["client_order_id"]}, "unique"),
    ]:
        refused = await client.patch(f"/v2/orders/{order['id']}", json=changes)
        assert refused.status_code == 422 and words in refused.json()["message"]
    await client.delete(f"/v2/orders/{legs[1]['id']}")
    assert [leg["status"] for leg in (await order_of(client, entered["id"]))["legs"]] == ["canceled", "canceled"]
    assert live.position("AAPL").qty == 10


@pytest.mark.parametrize("order_class", ["bracket", "oco"])
async def test_a_stop_loss_with_a_limit_waits_for_its_price(
    client: httpx.AsyncClient, live: Exchange, order_class: str
) -> None:
    column, row = live.symbols.index("IBM"), live.index + 1
    low, opened = float(live.bars.low[row, column]), float(live.mark("IBM"))
    stop, limit = str(round((low + opened) / 2, 2)), str(round((low + opened) / 2 - 0.01, 2))
    legs = {"take_profit": {"limit_price": "9999"}, "stop_loss": {"stop_price": stop, "limit_price": limit}}
    if order_class == "oco":
        await client.post("/v2/orders", json=MARKET)
        body = MARKET | {"side": "sell", "type": "limit", "order_class": "oco", "time_in_force": "gtc"} | legs
    else:
        body = BRACKET | legs
    sent = (await client.post("/v2/orders", json=body)).json()
    leg = (await order_of(client, sent["id"]))["legs"][-1]
    assert (leg["type"], leg["stop_price"], leg["limit_price"]) == ("stop_limit", stop, limit)
    live.step()
    filled = await order_of(client, leg["id"])
    assert filled["status"] == "filled" and float(filled["filled_avg_price"]) >= float(limit)


async def test_one_triggers_the_other(client: httpx.AsyncClient) -> None:
    body = MARKET | {"order_class": "oto", "stop_loss": {"stop_price": "1"}, "time_in_force": "gtc"}
    sent = (await client.post("/v2/orders", json=body)).json()
    (leg,) = (await order_of(client, sent["id"]))["legs"]
    assert (leg["type"], leg["status"], leg["side"]) == ("stop", "new", "sell")


async def test_a_trailing_stop_follows_the_price(client: httpx.AsyncClient, live: Exchange) -> None:
    await client.post("/v2/orders", json=MARKET)
    body = MARKET | {"side": "sell", "type": "trailing_stop", "time_in_force": "gtc", "trail_percent": "3"}
    sent = (await client.post("/v2/orders", json=body)).json()
    assert (sent["type"], sent["trail_percent"], float(sent["hwm"])) == ("trailing_stop", "3", float(live.mark("IBM")))
    changed = (await client.patch(f"/v2/orders/{sent['id']}", json={"trail": "2"})).json()
    assert (changed["replaces"], changed["trail_percent"]) == (sent["id"], "2")
    stops = [float(changed["stop_price"])]
    while (await order_of(client, changed["id"]))["status"] == "new" and not live.is_over:
        live.step()
        stops.append(float((await order_of(client, changed["id"]))["stop_price"]))
    assert stops == sorted(stops) and len(set(stops)) > 1
    filled = await order_of(client, changed["id"])
    assert filled["status"] == "filled" and float(filled["filled_avg_price"]) <= stops[-1]


async def test_an_amount_of_money_buys_fractions(client: httpx.AsyncClient, live: Exchange) -> None:
    body = {name: value for name, value in MARKET.items() if name != "qty"} | {"notional": "100.50"}
    filled = await order_of(client, (await client.post("/v2/orders", json=body)).json()["id"])
    assert (filled["status"], filled["qty"], filled["notional"]) == ("filled", None, "100.5")
    assert 0 <= 100.5 - float(filled["filled_qty"]) * float(live.mark("IBM")) < 0.001
    live.step()
    waiting = (await client.post("/v2/orders", json=body)).json()
    live.step()
    later = await order_of(client, waiting["id"])
    assert later["status"] == "filled"
    assert 0 <= 100.5 - float(later["filled_qty"]) * float(live.mark("IBM")) < 0.001
    refused = await client.patch(f"/v2/orders/{waiting['id']}", json={"qty": "1"})
    assert refused.status_code == 422


async def test_immediate_orders_do_not_wait(client: httpx.AsyncClient, live: Exchange) -> None:
    async def ending(**changes: str) -> tuple[str, str]:
        order = await order_of(client, (await client.post("/v2/orders", json=MARKET | changes)).json()["id"])
        return order["status"], order["filled_qty"]

    limit = {"type": "limit", "limit_price": "1"}
    assert await ending(time_in_force="ioc", **limit) == await ending(time_in_force="fok", **limit) == ("canceled", "0")
    assert await ending(time_in_force="ioc") == await ending(time_in_force="fok") == ("filled", "10")
    live.step()
    assert await ending(time_in_force="ioc") == ("canceled", "0")  # the market is closed


async def test_auctions_fill_at_the_open_and_at_the_close(client: httpx.AsyncClient, live: Exchange) -> None:
    closing = (await client.post("/v2/orders", json=MARKET | {"time_in_force": "cls"})).json()
    assert (await order_of(client, closing["id"]))["status"] == "new"
    live.step()
    filled = await order_of(client, closing["id"])
    assert filled["status"] == "filled" and float(filled["filled_avg_price"]) == float(live.mark("IBM"))
    at_four = await client.post("/v2/orders", json=MARKET | {"time_in_force": "cls"})
    assert "3:50pm to 7:00pm" in at_four.json()["message"]
    live.move_to(live.now.replace(hour=1, day=live.now.day + 1))  # eight in the evening
    opening = [
        (await client.post("/v2/orders", json=MARKET | {"time_in_force": "opg"} | changes)).json()["id"]
        for changes in ({}, {"type": "limit", "limit_price": "1"})
    ]
    live.step()
    ended = [await order_of(client, order_id) for order_id in opening]
    assert [order["status"] for order in ended] == ["filled", "expired"]
    assert float(ended[0]["filled_avg_price"]) == float(live.mark("IBM"))


async def test_the_owner_of_the_account_is_obeyed(client: httpx.AsyncClient) -> None:
    await client.patch("/v2/account/configurations", json={"no_shorting": True})
    assert (await client.post("/v2/orders", json=MARKET | {"side": "sell"})).status_code == 403
    await client.patch("/v2/account/configurations", json={"suspend_trade": True})
    answer = await client.post("/v2/orders", json=MARKET)
    assert (answer.status_code, answer.json()["message"]) == (403, "new orders are rejected by user request")


# ---- who asks, and how often


async def test_a_bearer_token_opens_the_account(live: Exchange) -> None:
    async with client_of(live) as client:
        client.headers.clear()
        for token, status in (("secret", 200), ("wrong", 401)):
            answer = await client.get("/v2/account", headers={"Authorization": f"Bearer {token}"})
            assert answer.status_code == status


async def test_more_than_the_quota_is_refused_with_alpacas_headers(live: Exchange) -> None:
    async with client_of(live, Service(quota=Quota(most=3))) as client:
        answers = [await client.get("/v2/clock") for _ in range(3)] + [await client.get("/v2/orders/nobody")]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["2", "1", "0", "0"]
        assert answers[-1].json() == {"code": 42910000, "message": "rate limit exceeded"}
        assert (await client.get("/simulation/state")).status_code == 200


async def test_without_control_nobody_moves_the_market(live: Exchange) -> None:
    async with client_of(live, Service(control=False)) as client:
        for path in ("advance", "step", "close"):
            assert (await client.post(f"/simulation/{path}")).status_code == 404
    async with client_of(live) as client:
        assert (await client.post("/simulation/step")).json()["is_open"] is False
        assert (await client.put("/simulation/faults", json="storm")).json()[0]["fault"] == "rate_limited"
        assert (await client.put("/simulation/faults", json="stormy")).status_code == 422
        assert (await client.put("/simulation/faults", json=[])).json() == []
        while not live.is_over:
            live.step()
        assert (await client.post("/simulation/step")).status_code == 409


async def test_the_control_endpoint_jumps_and_is_near(live: Exchange) -> None:
    async with client_of(live, Service(control_near=True)) as client:
        jumped = (await client.post("/simulation/jump", json={"to": "2012-01-12T15:00:00Z"})).json()
        assert jumped["timestamp"] == "2012-01-12T10:00:00-05:00" and jumped["is_open"]
        assert (await client.post("/simulation/jump", json={"to": "2012-01-11"})).status_code == 409
        for wrong in ({}, {"to": 5}, [], {"to": "soon"}):
            assert (await client.post("/simulation/jump", json=wrong)).status_code in (400, 422)
    app = build_app(live, Keys("key", "secret"), SeededIds("far"), Service(control_near=True))
    far = httpx.ASGITransport(app, client=("203.0.113.5", 1))
    async with httpx.AsyncClient(transport=far, base_url="http://exchange", headers=HEADERS) as client:
        assert (await client.post("/simulation/step")).status_code == 404
        assert (await client.get("/v2/clock")).status_code == 200


async def test_a_session_moves_bar_by_bar_and_takes_the_same_orders(exchange: Exchange) -> None:
    async with client_of(exchange) as client:
        assert (await client.post("/simulation/step")).status_code == 409
        entry = (await client.post("/v2/orders", json=BRACKET)).json()
        assert [leg["status"] for leg in entry["legs"]] == ["held", "held"]
        at_once = (await client.post("/v2/orders", json=MARKET | {"time_in_force": "ioc"})).json()
        await client.post("/simulation/advance")
        assert [(await order_of(client, sent["id"]))["status"] for sent in (entry, at_once)] == ["filled", "filled"]
        assert [leg["status"] for leg in (await order_of(client, entry["id"]))["legs"]] == ["new", "held"]


# ---- whatever arrives, and in whatever order

ODD: list[object] = [
    None,
    "",
    0,
    -1,
    1e308,
    "NaN",
    "sNaN",
    "Infinity",
    "1E+1000000",
    "٥",
    "\0",
    "a" * 5_000,
    [],
    {},
    [1, None],
]
ODD += [True, "2012-13-45", "9999-12-31", "0001-01-01", "1e400", "-0", "0.00001", "99999999999999999999", "all"]
FIELDS = ("symbol", "side", "type", "time_in_force", "qty", "notional", "limit_price", "stop_price", "trail_price")
FIELDS += ("trail_percent", "trail", "extended_hours", "order_class", "take_profit", "stop_loss", "client_order_id")
FIELDS += (
    "position_intent",
    "name",
    "symbols",
    "no_shorting",
    "max_margin_multiplier",
    "status",
    "limit",
    "after",
    "until",
)
FIELDS += (
    "start",
    "end",
    "period",
    "timeframe",
    "page_token",
    "page_size",
    "date",
    "percentage",
    "direction",
    "markets",
    "time",
)


async def test_whatever_arrives_is_answered_without_an_error_of_the_servers(
    client: httpx.AsyncClient, live: Exchange
) -> None:
    names, dice = await made(client), generator(0, "odd requests")

    def some(choices: Any) -> Any:
        return choices[int(dice.integers(len(choices)))]

    for number in range(250):
        verb, path = some(TABLE)[0].split(" ")
        path = path.split("?")[0]
        for name in ("IBM", "NYSE", "FILL", *names):
            path = path.replace(f"{{{name}}}", str(some(["x", "%00", "%ff", "a" * 300, *names.values()])))
        odd = {str(some(FIELDS)): some(ODD) for _ in range(3)}
        shape = some([MARKET, RESTING, BRACKET, {}])
        body: object = some(ODD) if number % 20 == 0 else shape | odd
        query = {name: str(value) for name, value in odd.items()}
        answer = await client.request(verb, path, params=query, json=body if verb in ("POST", "PUT", "PATCH") else None)
        assert answer.status_code < 500, (verb, path, odd, body)
        if number % 40 == 0 and not live.is_over:
            live.step()


async def played(bars: Bars, seed: int) -> tuple[list[str], Exchange]:
    """A drawn life of an account: what was reported, as text, and the exchange at its end."""
    exchange, dice, told = Exchange(bars, 5, continuous=True), generator(seed, "orders"), list[str]()
    events: dict[str, list[Any]] = {}

    def on_event(event: Any) -> None:
        told.append(f"{event.event} {event.order.id} {event.qty} {event.price} {event.position_qty}")
        events.setdefault(event.order.id, []).append(event)
        if event.execution_id is not None and event.price is not None:
            column, row = bars.symbols.index(event.order.symbol), exchange.index
            days = slice(row, row + 2)  # the day that closed last, or closes now, and the one after it
            assert float(bars.low[days, column].min()) <= float(event.price) <= float(bars.high[days, column].max())

    exchange.on_order_event(on_event)
    open_for_trading(exchange)
    async with client_of(exchange) as client:
        while not exchange.is_over:
            for _ in range(3):
                price = round(float(exchange.mark("IBM")) * float(dice.uniform(0.98, 1.02)), 2)
                kind = (
                    {},
                    {"type": "limit", "limit_price": price},
                    {"type": "stop", "stop_price": price},
                    {"notional": 50},
                )
                pick = kind[int(dice.integers(4))]
                body = (
                    MARKET
                    | {"side": ("buy", "sell")[int(dice.integers(2))], "qty": str(int(dice.integers(1, 200)))}
                    | pick
                )
                if "notional" in pick:
                    del body["qty"]
                if dice.random() < 0.2:
                    low, high = str(round(price * 0.97, 2)), str(round(price * 1.03, 2))
                    body = BRACKET | {"take_profit": {"limit_price": high}, "stop_loss": {"stop_price": low}}
                await client.post("/v2/orders", json=body)
                assert exchange.account().buying_power >= 0
            if dice.random() < 0.2:
                await client.delete("/v2/orders")
            exchange.step()
    for of_one in events.values():
        filled = [event.order.filled_qty for event in of_one]
        assert filled == sorted(filled)
        assert all(event.order.is_open for event in of_one[:-1])  # nothing follows an end
    return told, exchange


@pytest.mark.parametrize("seed", range(2))
async def test_an_account_is_conserved_through_any_sequence_of_orders(daily_bars: Bars, seed: int) -> None:
    told, exchange = await played(daily_bars, seed)
    fills = [line.split(" ") for line in told if line.split(" ")[0] in ("fill", "partial_fill")]
    sides = {order.id: order.side.value for order in exchange.orders(open_only=False)}
    sides |= {leg.id: leg.side.value for order in exchange.orders(open_only=False) for leg in order.legs}
    cash = Decimal(100_000)
    for _, order_id, qty, price, _ in fills:
        amount = round(float(qty) * float(price) + 1e-9, 2)
        cash += Decimal(str(-amount if sides[order_id] == "buy" else amount))
    assert len(fills) > 10 and abs(cash - exchange.account().cash) < Decimal("0.01") * len(fills)
    assert told == (await played(daily_bars, seed))[0]
