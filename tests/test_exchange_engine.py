"""The exchange over real bars: symbols that are born late, pairs, and books that always balance."""

from decimal import Decimal

import numpy as np
import pytest

from trader_lib.clock.ids import generator
from trader_lib.errors.taxonomy import Rejected
from trader_lib.exchange.book import OrderEvent
from trader_lib.exchange.costs import Costs
from trader_lib.exchange.engine import Exchange
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars
from trader_lib.trading.orders import OrderRequest, OrderSide, OrderStatus

BUY, SELL = OrderSide.BUY, OrderSide.SELL


def order(name: str, symbol: str = "IBM", side: OrderSide = BUY, qty: int = 10, **fields: object) -> OrderRequest:
    return OrderRequest.model_validate({"symbol": symbol, "side": side, "qty": qty, "client_order_id": name} | fields)


@pytest.fixture(scope="module")
def listing() -> Bars:
    """IBM, and FB from its first day, 2012-05-18."""
    return sample_bars(["FB", "IBM"], start="2012-05-14", end="2012-05-25")


def test_a_symbol_trades_from_its_first_bar_on(listing: Bars) -> None:
    exchange = Exchange(listing, start_index=1)
    told: list[tuple[str, ...]] = []
    exchange.on_bars(lambda at, rows: told.append(tuple(rows)))
    with pytest.raises(Rejected, match="not active"):
        exchange.submit(order("early", "FB"))
    born = int(np.flatnonzero(~np.isnan(listing.close[:, 0]))[0])
    while exchange.index < born:
        exchange.advance()
    assert told == [("IBM",)] * (born - 1) + [("FB", "IBM")]
    known = exchange.history()
    assert np.count_nonzero(~np.isnan(known.close), axis=0).tolist() == [1, born + 1]
    bought = exchange.submit(order("now", "FB"))
    exchange.advance()
    assert exchange.order(bought.id).filled_avg_price == Decimal(str(listing.open[born + 1, 0]))
    assert exchange.lastday_close("FB") == Decimal(str(listing.close[born, 0]))


def test_a_pair_may_rest_beside_an_opposite_order(listing: Bars) -> None:
    exchange = Exchange(listing, start_index=1)
    exchange.submit(order("entry"))
    exchange.advance()
    pair = {"type": "limit", "order_class": "oco", "limit_price": 9999, "stop_loss_price": 1, "time_in_force": "gtc"}
    exit_order = exchange.submit(order("exit", side=SELL, **pair))
    more = exchange.submit(order("more", type="limit", limit_price=1, time_in_force="gtc"))
    exchange.cancel(exit_order.legs[0].id)
    assert exchange.order(exit_order.id).status is OrderStatus.CANCELED
    assert [waiting.id for waiting in exchange.orders()] == [more.id]


@pytest.mark.parametrize("seed", range(5))
def test_books_balance_whatever_is_ordered(seed: int, daily_bars: Bars) -> None:
    """Fills account for every position and every cent; nobody ever owes more than the account may borrow."""
    rng = generator(seed, "orders")
    costs = Costs(commission_per_share=0.01, slippage_bps=5, volume_share=0.0001)
    plain = daily_bars.without_actions()
    exchange = Exchange(plain, start_index=5, costs=costs, starting_cash=Decimal(50_000), multiplier=4)
    events: list[OrderEvent] = []
    exchange.on_order_event(events.append)
    accepted = 0
    refused: set[int | None] = set()
    while not exchange.is_over:
        for n in range(int(rng.integers(0, 5))):
            symbol = str(rng.choice(daily_bars.symbols))
            side = BUY if rng.random() < 0.5 else SELL
            kind = str(rng.choice(["market", "limit", "stop", "oco"]))
            price = float(exchange.mark(symbol))
            near = round(price * float(rng.uniform(0.98, 1.02)), 2)
            fields: dict[str, object] = {"time_in_force": str(rng.choice(["day", "gtc"]))}
            if kind == "limit":
                fields |= {"type": "limit", "limit_price": near}
            elif kind == "stop":
                fields |= {"type": "stop", "stop_price": near}
            elif kind == "oco":
                away = 0.02 if side is SELL else -0.02
                prices = {"limit_price": round(price * (1 + away), 2), "stop_loss_price": round(price * (1 - away), 2)}
                fields |= {"type": "limit", "order_class": "oco"} | prices
            try:
                exchange.submit(order(f"{exchange.index}-{n}", symbol, side, int(rng.integers(1, 200)), **fields))
                accepted += 1
            except Rejected as error:
                refused.add(error.code)
        if rng.random() < 0.2 and (working := exchange.orders()):
            exchange.cancel(working[0].id)
        step = exchange.advance()
        assert step.trade_updates == len(events)
        assert exchange.account().buying_power >= 0
    exchange.close_out()

    assert refused <= {40310000, 42210000}
    assert accepted > 20 and not exchange.orders()
    held: dict[str, Decimal] = {}
    cash = Decimal(50_000)
    ids = set()
    for event in events:
        if event.execution_id is None:
            continue
        assert event.qty is not None and event.price is not None and event.execution_id not in ids
        ids.add(event.execution_id)
        signed = event.qty if event.order.side is BUY else -event.qty
        held[event.order.symbol] = held.get(event.order.symbol, Decimal(0)) + signed
        assert held[event.order.symbol] == event.position_qty
        cash -= (signed * event.price).quantize(Decimal("0.01"), "ROUND_HALF_UP")
        cash -= (event.qty * Decimal("0.01")).quantize(Decimal("0.01"), "ROUND_HALF_UP")
    assert {position.symbol: position.qty for position in exchange.positions()} == {
        symbol: qty for symbol, qty in held.items() if qty
    }
    half_cents = Decimal("0.01") * len(ids)  # a tie may round either way in float64, the same way in both engines
    assert abs(exchange.account().cash - cash) <= half_cents
    for ended in exchange.orders(open_only=False):
        assert not ended.is_open
        pair_filled = ended.filled_qty + sum((leg.filled_qty for leg in ended.legs), Decimal(0))
        assert ended.qty is not None and pair_filled <= ended.qty
