"""What every broker does the same, shown over each adapter with the embedded exchange behind it."""

import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from trader_lib.broker.alpaca import AlpacaBroker
from trader_lib.broker.connection import AlpacaAccess
from trader_lib.broker.in_process import InProcessBroker
from trader_lib.broker.inbox import BarArrived, InboxItem
from trader_lib.broker.port import Broker, MarketData, SimulationControl
from trader_lib.broker.simulation import HttpSimulation, InProcessSimulation
from trader_lib.clock.clock import WallClock
from trader_lib.errors.taxonomy import BadData, Misused, NotFound, OutcomeUnknown, Rejected, TraderError
from trader_lib.exchange.book import Step
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.market.bars import Bars
from trader_lib.trading.events import TradeUpdated
from trader_lib.trading.orders import Order, OrderRequest, OrderSide, OrderStatus, ReplaceRequest

BUY, SELL = OrderSide.BUY, OrderSide.SELL


@dataclass
class Venue:
    broker: Broker
    control: SimulationControl

    async def advance(self) -> tuple[Step, list[InboxItem]]:
        step = await self.control.advance()
        return step, await self.pump()

    async def pump(self) -> list[InboxItem]:
        counts = await self.control.state()
        return await self.broker.inbox.pump(trade_updates=counts.trade_updates, bars=counts.bars, timeout_s=5)


@pytest.fixture(params=["in_process", "http"])
async def venue(request: pytest.FixtureRequest) -> AsyncIterator[Venue]:
    if request.param == "in_process":
        exchange: Exchange = request.getfixturevalue("exchange")
        venue = Venue(InProcessBroker(exchange), InProcessSimulation(exchange))
    else:
        server: ExchangeServer = request.getfixturevalue("exchange_server")
        access: AlpacaAccess = request.getfixturevalue("alpaca_access")
        broker = AlpacaBroker(access, symbols=server.exchange.symbols, timeframe="1Day", clock=WallClock())
        venue = Venue(broker, HttpSimulation(server.url, access.key_id, access.secret_key))
    await venue.broker.start()
    yield venue
    await venue.broker.stop()


def order(name: str, symbol: str = "IBM", side: OrderSide = BUY, qty: Any = 10, **fields: Any) -> OrderRequest:
    return OrderRequest.model_validate(
        {"symbol": symbol, "side": side, "qty": str(qty), "client_order_id": name} | fields
    )


def updates(items: list[InboxItem]) -> list[tuple[str, str]]:
    return [(item.event, item.order.client_order_id) for item in items if isinstance(item, TradeUpdated)]


async def refusal(venue: Venue, request: OrderRequest) -> TraderError:
    with pytest.raises(TraderError) as caught:
        await venue.broker.submit(request)
    return caught.value


async def test_adapters_fulfil_the_contracts(venue: Venue) -> None:
    assert isinstance(venue.broker, Broker) and isinstance(venue.broker, MarketData)
    assert isinstance(venue.control, SimulationControl)


async def test_an_order_fills_at_the_next_open_and_both_streams_say_so(venue: Venue, daily_bars: Bars) -> None:
    accepted = await venue.broker.submit(order("a"))
    assert (accepted.status, accepted.client_order_id, accepted.qty) == (OrderStatus.ACCEPTED, "a", 10)
    step, items = await venue.advance()
    assert (step.index, step.trade_updates, step.bars) == (5, 2, 3)
    assert updates(items) == [("new", "a"), ("fill", "a")]
    bars = {item.symbol: item for item in items if isinstance(item, BarArrived)}
    assert set(bars) == set(daily_bars.symbols)
    assert bars["IBM"].at == daily_bars.at(5) and bars["IBM"].row.close == daily_bars.close[5, 1]

    fill = next(item for item in items if isinstance(item, TradeUpdated) and item.event == "fill")
    assert fill.price == Decimal(str(daily_bars.open[5, 1])) and fill.qty == fill.position_qty == 10
    assert fill.execution_id and fill.order.status is OrderStatus.FILLED
    assert fill.timestamp == fill.order.filled_at
    found = await venue.broker.order_by_client_id("a")
    assert found is not None
    assert found == fill.order
    (position,) = await venue.broker.positions()
    assert (position.symbol, position.qty, position.avg_entry_price) == ("IBM", 10, fill.price)


async def test_account_reports_what_the_fill_changed(venue: Venue, daily_bars: Bars) -> None:
    before = await venue.broker.account()
    assert (before.cash, before.equity, before.buying_power, before.multiplier) == (100_000, 100_000, 200_000, 2)
    await venue.broker.submit(order("a", qty=100))
    reserved = await venue.broker.account()
    assert reserved.buying_power == 200_000 - 100 * Decimal(str(daily_bars.close[4, 1]))
    await venue.advance()
    after = await venue.broker.account()
    spent, worth = (100 * Decimal(str(price[5, 1])) for price in (daily_bars.open, daily_bars.close))
    assert after.cash == 100_000 - spent.quantize(Decimal("0.01"))
    assert after.equity == after.cash + worth.quantize(Decimal("0.01"))
    assert after.long_market_value == worth.quantize(Decimal("0.01")) and after.short_market_value == 0
    assert after.last_equity == 100_000 and not after.trading_blocked and after.status == "ACTIVE"


async def test_after_a_refresh_the_broker_is_asked_and_a_broker_that_answers_has_no_troubles(venue: Venue) -> None:
    before = await venue.broker.account()
    venue.broker.refresh()
    assert await venue.broker.account() == before
    assert venue.broker.troubles() == ()


async def test_limit_waits_and_a_day_order_expires(venue: Venue) -> None:
    await venue.broker.submit(order("day", type="limit", limit_price="1"))
    await venue.broker.submit(order("gtc", type="limit", limit_price="1", time_in_force="gtc"))
    _, items = await venue.advance()
    assert updates(items) == [("new", "day"), ("new", "gtc"), ("expired", "day")]
    assert [waiting.client_order_id for waiting in await venue.broker.orders()] == ["gtc"]
    assert [ended.client_order_id for ended in await venue.broker.orders("closed")] == ["day"]
    assert [any_.client_order_id for any_ in await venue.broker.orders("all")] == ["gtc", "day"]


async def test_cancel_is_confirmed_by_the_stream(venue: Venue) -> None:
    accepted = await venue.broker.submit(order("a", type="limit", limit_price="1"))
    await venue.broker.cancel(accepted.id)
    assert updates(await venue.pump()) == [("canceled", "a")]
    assert await venue.broker.orders() == ()
    with pytest.raises(Rejected) as caught:
        await venue.broker.cancel(accepted.id)
    assert caught.value.reason == 'order is already in "canceled" state'
    with pytest.raises(NotFound):
        await venue.broker.cancel("00000000-0000-8000-a000-000000000000")


async def test_one_cancels_other(venue: Venue, daily_bars: Bars) -> None:
    await venue.broker.submit(order("entry"))
    await venue.advance()
    low, high = float(daily_bars.low[6, 1]), float(daily_bars.high[6, 1])
    stop = f"{(low + high) / 2:.2f}"
    exit_fields = {"type": "limit", "order_class": "oco", "limit_price": "9999", "stop_loss_price": stop}
    pair = await venue.broker.submit(order("exit", side=SELL, time_in_force="gtc", purpose="exit", **exit_fields))
    assert pair.limit_price == 9999 and [leg.stop_price for leg in pair.legs] == [Decimal(stop)]
    (listed,) = await venue.broker.orders()
    assert listed == pair
    _, items = await venue.advance()
    events = [item for item in items if isinstance(item, TradeUpdated)]
    assert [event.event for event in events] == ["new", "fill", "canceled"]
    assert events[1].order.id == pair.legs[0].id and events[2].order.id == pair.id
    assert events[1].position_qty == 0 and await venue.broker.positions() == ()


@pytest.mark.parametrize("kind", ["stop", "stop_limit"])
async def test_stops(venue: Venue, kind: str) -> None:
    limit = {"limit_price": "9999"} if kind == "stop_limit" else {}
    accepted = await venue.broker.submit(order("a", type=kind, stop_price="1", **limit))
    assert accepted.stop_price == 1 and accepted.type.value == kind
    _, items = await venue.advance()
    assert updates(items) == [("new", "a"), ("fill", "a")]


async def test_short_sale_and_cover(venue: Venue) -> None:
    await venue.broker.submit(order("short", side=SELL))
    await venue.advance()
    (position,) = await venue.broker.positions()
    account = await venue.broker.account()
    assert position.qty == -10 and account.short_market_value is not None and account.short_market_value < 0
    await venue.broker.submit(order("cover"))
    await venue.advance()
    assert await venue.broker.positions() == ()


async def test_fractions_of_a_share(venue: Venue) -> None:
    await venue.broker.submit(order("a", qty="0.123456789"))
    _, items = await venue.advance()
    fill = items[1] if isinstance(items[1], TradeUpdated) else items[-1]
    assert isinstance(fill, TradeUpdated) and fill.qty == Decimal("0.123456789")
    (position,) = await venue.broker.positions()
    assert position.qty == Decimal("0.123456789")


async def test_refusals_have_alpacas_codes_and_words(venue: Venue) -> None:
    await venue.broker.submit(order("entry"))
    await venue.advance()
    for request, code, words in [
        (order("b", qty=100_000), 40310000, "insufficient buying power"),
        (
            order("b", side=SELL, qty=11),
            40310000,
            "insufficient qty available for order (requested: 11, available: 10)",
        ),
        (order("b", "NOPE"), 42210000, 'asset "NOPE" not found'),
        (order("b", "MSFT", SELL, qty="1.5"), 42210000, "fractional orders cannot be sold short"),
    ]:
        error = await refusal(venue, request)
        assert type(error) is Rejected
        assert (error.code, error.reason) == (code, words)
    await venue.broker.submit(order("resting", side=SELL, type="limit", limit_price="9999"))
    wash = await refusal(venue, order("c"))
    assert isinstance(wash, Rejected)
    assert (wash.code, wash.reason) == (40310000, "potential wash trade detected. use complex orders")


async def test_a_client_order_id_used_before_asks_for_a_look(venue: Venue) -> None:
    first = await venue.broker.submit(order("same"))
    assert isinstance(await refusal(venue, order("same", "MSFT")), OutcomeUnknown)
    found = await venue.broker.order_by_client_id("same")
    assert found == first
    assert await venue.broker.order_by_client_id("other") is None
    assert await venue.broker.order(first.id) == first
    assert await venue.broker.order("61e69015-8549-4bfd-b9c3-01e75843f47d") is None


async def test_refused_orders_leave_nothing_behind(venue: Venue) -> None:
    before = await venue.broker.account()
    await refusal(venue, order("b", qty=100_000))
    assert await venue.broker.orders("all") == () and await venue.broker.account() == before


async def test_history_ends_where_the_market_stands(venue: Venue, daily_bars: Bars) -> None:
    data = venue.broker
    assert isinstance(data, MarketData)
    known = await data.history(["MSFT", "AAPL"], "1Day", date(2012, 1, 1), date(2012, 12, 31))
    assert known.symbols == ("MSFT", "AAPL") and known.n == 5
    assert np.array_equal(known.close, daily_bars.sel(["MSFT", "AAPL"]).head(5).close)
    assert known.content_hash == daily_bars.sel(["MSFT", "AAPL"]).head(5).content_hash
    await venue.advance()
    two = await data.history(["IBM"], "1Day", daily_bars.day(4), daily_bars.day(5))
    assert two.n == 2 and two.at(1) == daily_bars.at(5)
    for wrong, error, words in (
        ({"adjustment": "split"}, Rejected, "invalid adjustment"),
        ({"timeframe": "1Min"}, Rejected, "invalid timeframe"),
        ({"symbols": ["NOPE"]}, (Rejected, BadData), "invalid symbol|no 1Day bars of 'NOPE'"),
    ):
        fields: dict[str, Any] = {"symbols": ["IBM"], "timeframe": "1Day", "adjustment": "all"} | wrong
        with pytest.raises(error, match=words):
            await data.history(
                fields["symbols"],
                fields["timeframe"],
                date(2012, 1, 1),
                date(2012, 2, 1),
                adjustment=fields["adjustment"],
            )


async def test_clock_and_assets(venue: Venue, daily_bars: Bars) -> None:
    clock = await venue.broker.market_clock()
    assert not clock.is_open and clock.now < clock.next_open < clock.next_close
    assert clock.now.date() == daily_bars.day(4) and clock.next_open.date() == daily_bars.day(5)
    assets = await venue.broker.assets(["IBM", "MSFT"])
    assert assets["IBM"].tradable and assets["MSFT"].fractionable
    with pytest.raises(NotFound):
        await venue.broker.assets(["NOPE"])


async def test_close_out_cancels_and_the_end_is_said(venue: Venue, daily_bars: Bars) -> None:
    await venue.broker.submit(order("a", type="limit", limit_price="1", time_in_force="gtc"))
    for index in itertools.count(5):
        step, _ = await venue.advance()
        assert step.index == index
        if step.last:
            break
    assert step.index == daily_bars.n - 1
    counts = await venue.control.close_out()
    assert counts.last and updates(await venue.pump()) == [("canceled", "a")]
    with pytest.raises(Misused, match="last bar"):
        await venue.control.advance()


async def test_nothing_arrives_after_stop(venue: Venue) -> None:
    await venue.broker.stop()
    await venue.control.advance()
    assert await venue.broker.inbox.pump() == []


async def test_same_session_same_orders_over_every_adapter(
    daily_bars: Bars, alpaca_access: AlpacaAccess, exchange_server: ExchangeServer
) -> None:
    """A month of trading leaves the same orders, fills, ids and cash, in process and over the wire."""

    async def month(venue: Venue) -> tuple[list[Order], list[InboxItem], object]:
        await venue.broker.start()
        items: list[InboxItem] = []
        for day in range(20):
            side = BUY if day % 4 < 2 else SELL
            symbol = daily_bars.symbols[day % 3]
            if side is BUY or any(held.symbol == symbol for held in await venue.broker.positions()):
                await venue.broker.submit(order(f"{day}", symbol, side, 7))
            items += (await venue.advance())[1]
        found = (list(await venue.broker.orders("all")), items, await venue.broker.account())
        await venue.broker.stop()
        return found

    near = Exchange(daily_bars, start_index=5)
    far = AlpacaBroker(alpaca_access, symbols=daily_bars.symbols, timeframe="1Day")
    control = HttpSimulation(exchange_server.url, alpaca_access.key_id, alpaca_access.secret_key)
    one = await month(Venue(InProcessBroker(near), InProcessSimulation(near)))
    other = await month(Venue(far, control))
    await control.stop()
    assert one[0] == other[0] and one[2] == other[2]
    for kind in (TradeUpdated, BarArrived):
        assert [item for item in one[1] if isinstance(item, kind)] == [
            item for item in other[1] if isinstance(item, kind)
        ]


BRACKET = {"order_class": "bracket", "time_in_force": "gtc", "take_profit_price": "9999", "stop_loss_price": "1"}


async def test_a_bracket_brings_its_legs_and_they_work_once_it_has_filled(venue: Venue) -> None:
    entry = await venue.broker.submit(order("entry", **BRACKET, stop_loss_limit_price="0.9"))
    target, stop = entry.legs
    assert [leg.status for leg in entry.legs] == [OrderStatus.HELD, OrderStatus.HELD]
    assert (target.limit_price, stop.stop_price, stop.limit_price) == (9999, 1, Decimal("0.9"))
    assert await venue.broker.order_by_client_id("entry") == await venue.broker.order(entry.id)
    _, items = await venue.advance()
    assert updates(items) == [("new", "entry"), ("fill", "entry"), ("new", target.client_order_id)]
    filled = await venue.broker.order_by_client_id("entry")
    assert filled is not None and [leg.status for leg in filled.legs] == [OrderStatus.NEW, OrderStatus.HELD]
    assert [found.id for found in await venue.broker.orders()] == [target.id]
    found = await venue.broker.order_by_client_id(stop.client_order_id)
    assert found is not None and found.id == stop.id
    await venue.broker.cancel(target.id)
    assert [item[0] for item in updates(await venue.pump())] == ["canceled", "canceled"]
    assert await venue.broker.orders() == ()


async def test_canceling_an_entry_that_waits_cancels_its_legs(venue: Venue) -> None:
    entry = await venue.broker.submit(order("entry", type="limit", limit_price="2", **BRACKET))
    await venue.advance()
    await venue.broker.cancel(entry.id)
    gone = await venue.broker.order(entry.id)
    assert gone is not None and {part.status for part in (gone, *gone.legs)} == {OrderStatus.CANCELED}


async def test_trailing_stops_and_orders_for_extended_hours_come_back_as_they_were_sent(venue: Venue) -> None:
    await venue.broker.submit(order("entry"))
    await venue.advance()
    by_percent = order("percent", side=SELL, qty=4, type="trailing_stop", time_in_force="gtc", trail_percent="50")
    by_price = order("price", side=SELL, qty=4, type="trailing_stop", time_in_force="gtc", trail_price="5")
    early = order("early", type="limit", limit_price="1", extended_hours=True)
    for request in (by_percent, by_price, early):
        sent = await venue.broker.submit(request)
        assert (sent.trail_percent, sent.trail_price) == (request.trail_percent, request.trail_price)
        assert sent.extended_hours == request.extended_hours and sent.hwm == (None if request is early else sent.hwm)
        assert await venue.broker.order(sent.id) == sent


async def test_an_order_is_replaced_under_a_name_of_our_choosing(venue: Venue) -> None:
    await venue.broker.submit(order("entry"))
    await venue.advance()
    stop = await venue.broker.submit(order("stop", side=SELL, type="stop", stop_price="1", time_in_force="gtc"))
    trail = await venue.broker.submit(
        order("trail", "MSFT", SELL, 5, type="trailing_stop", time_in_force="gtc", trail_percent="50")
    )
    higher = ReplaceRequest(client_order_id="higher", stop_price=Decimal("1.5"))
    with pytest.raises(Rejected, match="accepted"):  # it waits for the session
        await venue.broker.replace(stop.id, higher)
    await venue.advance()
    moved = await venue.broker.replace(stop.id, higher)
    assert (moved.client_order_id, moved.stop_price, moved.replaces) == ("higher", Decimal("1.5"), stop.id)
    assert updates(await venue.pump()) == [("replaced", "stop"), ("new", "higher")]
    before = await venue.broker.order(stop.id)
    assert before is not None and (before.status, before.replaced_by) == (OrderStatus.REPLACED, moved.id)
    assert await venue.broker.order_by_client_id("higher") == moved
    with pytest.raises(OutcomeUnknown):  # the order of that name may be the very one that we meant
        await venue.broker.replace(moved.id, higher.model_copy(update={"stop_price": Decimal(2)}))
    with pytest.raises(Rejected, match="replaced"):
        await venue.broker.replace(stop.id, higher.model_copy(update={"client_order_id": "again"}))
    tight = await venue.broker.replace(trail.id, ReplaceRequest(client_order_id="tight", trail=Decimal(40)))
    assert tight.trail_percent == 40 and tight.hwm is not None


async def test_orders_for_one_price_meet_the_next_open_and_end(venue: Venue) -> None:
    for name, time_in_force, limit in (("at once", "ioc", None), ("whole", "fok", None), ("too low", "ioc", "2")):
        fields = {} if limit is None else {"type": "limit", "limit_price": limit}
        await venue.broker.submit(order(name, time_in_force=time_in_force, **fields))
    _, items = await venue.advance()
    ends = [update for update in updates(items) if update[0] != "new"]
    assert ends == [("fill", "at once"), ("fill", "whole"), ("canceled", "too low")]
    early = await refusal(venue, order("auction", time_in_force="opg"))
    assert isinstance(early, Rejected) and early.reason == "opg orders are not accepted from 9:28am to 7:00pm ET"
    near = await refusal(venue, order("near", **BRACKET | {"stop_loss_price": "9998"}))
    assert isinstance(near, Rejected) and near.code == 42210000
    assert near.reason == "stop_loss.stop_price must be <= base_price - 0.01"
