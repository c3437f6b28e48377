"""A strategy agent that sends brackets, lets stops follow the price, and leaves positions by trailing stops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from trader_lib.agents.contract import Agent, Reaction
from trader_lib.agents.strategy import StrategyAgent
from trader_lib.trading.events import (
    BarsClosed,
    CancelProposed,
    FillRecorded,
    OrderAcknowledged,
    OrderFailed,
    OrderProposed,
    Payload,
    ReplaceProposed,
    RiskDecided,
    TradeUpdated,
)
from trader_lib.trading.orders import (
    TERMINAL,
    Order,
    OrderRequest,
    OrderStatus,
    Purpose,
    ReplaceRequest,
    client_order_id,
)

QTY = 200
PATIENCE = 3  # bars that an entry may wait
KINDS: tuple[dict[str, Any], ...] = (
    {"order_class": "bracket"},
    {"order_class": "bracket", "type": "limit"},
    {"order_class": "bracket", "type": "stop", "limited": True},
    {"order_class": "oto"},
    {"time_in_force": "ioc"},
    {"time_in_force": "fok"},
    {},
)


@dataclass(slots=True)
class Working:
    """An order, or a leg, that may be at the broker."""

    symbol: str
    role: str  # entry, target, stop or exit
    since: int = 0  # number of the bar


@dataclass(slots=True)
class GroupState:
    """What the agent knows."""

    bars: int = 0
    held: dict[str, Decimal] = field(default_factory=dict)  # shares, signed, by symbol
    working: dict[str, Working] = field(default_factory=dict)  # by client order id
    over: set[str] = field(default_factory=set)  # client order ids

    def of(self, symbol: str) -> dict[str, str]:
        """Return client order ids by role."""
        return {work.role: name for name, work in self.working.items() if work.symbol == symbol}


def cents(price: float) -> Decimal:
    return Decimal(str(round(price, 2)))


def entry_fields(mood: int, close: float) -> dict[str, Any]:
    """Return what an entry is, by a mood and the close."""
    fields = dict(KINDS[mood % len(KINDS)])
    sign, limited = 1 if mood % 2 else -1, fields.pop("limited", False)
    fields |= {"side": "buy" if sign > 0 else "sell", "qty": QTY}
    if fields.get("type") == "limit":
        fields["limit_price"] = cents(close * (1 - sign * 0.0003))
    if fields.get("type") == "stop":
        fields["stop_price"] = cents(close * (1 + sign * 0.0003))
    if "order_class" in fields:
        fields |= {"time_in_force": "gtc", "stop_loss_price": cents(close * (1 - sign * 0.001))}
    if fields.get("order_class") == "bracket":
        fields["take_profit_price"] = cents(close * (1 + sign * 0.001))
    if limited:
        fields["stop_loss_limit_price"] = cents(close * (1 - sign * 0.002))
    return fields


class Grouping(StrategyAgent):
    """Follows nothing but the prices, like `Restless`, and says it in groups of orders."""

    emits = (*StrategyAgent.emits, ReplaceProposed)
    state_kind = TypeAdapter(GroupState)  # type: ignore[assignment]
    state: GroupState  # type: ignore[assignment]

    def __init__(self, *parts: Any, **more: Any) -> None:
        super().__init__(*parts, **more)
        self.state = GroupState()

    def restore(self, snapshot: bytes) -> None:
        Agent.restore(self, snapshot)

    def reactions(self) -> Mapping[type[Payload], Reaction]:
        return {
            BarsClosed: lambda event: self.act(event.payload),
            RiskDecided: lambda event: self.on_risk(event.payload),
            OrderFailed: lambda event: self.on_failed(event.payload),
            OrderAcknowledged: lambda event: self.on_record(event.payload.client_order_id, event.payload.order),
            TradeUpdated: lambda event: self.on_record(event.payload.order.client_order_id, event.payload.order),
            FillRecorded: lambda event: self.on_fill_recorded(event.payload),
        }

    def on_risk(self, decision: RiskDecided) -> None:
        if not decision.approved:
            self.state.working.pop(decision.request.client_order_id, None)

    def on_failed(self, failure: OrderFailed) -> None:
        if failure.outcome != "unknown":
            self.state.working.pop(failure.client_order_id, None)

    def on_record(self, name: str, order: Order) -> None:
        """Note which legs an entry has brought, and what is over."""
        work = self.state.working.get(name)
        for leg in order.legs if work is not None and work.role == "entry" else ():
            role = "target" if leg.stop_price is None else "stop"
            if leg.client_order_id not in self.state.over and role not in self.state.of(order.symbol):
                self.state.working[leg.client_order_id] = Working(order.symbol, role, self.state.bars)
        for known, part in ((name, order), *((leg.client_order_id, leg) for leg in order.legs)):
            if part.status in TERMINAL and part.status is not OrderStatus.REPLACED:
                self.state.working.pop(known, None)
                self.state.over.add(known)

    def on_fill_recorded(self, recorded: FillRecorded) -> None:
        fill = recorded.fill
        self.state.held[fill.symbol] = self.state.held.get(fill.symbol, Decimal(0)) + fill.signed_qty

    def act(self, closed: BarsClosed) -> Iterator[Payload]:
        self.take(closed, self.rules.planner.columns)
        self.state.bars += 1
        if closed.late:
            return
        for symbol in self.rules.planner.symbols:
            if symbol in closed.bars:
                yield from self.decide(symbol, closed.bars[symbol].close, closed)

    def decide(self, symbol: str, close: float, closed: BarsClosed) -> Iterator[Payload]:
        """Decide about one symbol."""
        state, held, roles = self.state, self.state.held.get(symbol, Decimal(0)), self.state.of(symbol)
        mood = int(np.round(close * 100) + self.rules.strategy.seed) // 3 % 17  # type: ignore[attr-defined]
        entry = roles.get("entry")
        if entry is not None and state.bars - state.working[entry].since >= PATIENCE:
            yield CancelProposed(client_order_id=entry, reason="it has waited", decided_at=closed.at)
        elif entry is None and held and not roles:
            yield from self.leave(symbol, held, mood, closed, close)
        elif held and not entry and mood % 5 == 0:
            name = roles.get("stop") or roles.get("target") or roles["exit"]
            yield CancelProposed(client_order_id=name, reason="another exit", decided_at=closed.at)
        elif held and mood % 2 and ("stop" in roles or "exit" in roles):
            yield from self.move(symbol, roles, 1 if held > 0 else -1, mood, closed, close)
        elif not held and not roles and mood < 12:
            yield self.propose(symbol, "entry", entry_fields(mood, close), closed, close)

    def leave(self, symbol: str, held: Decimal, mood: int, closed: BarsClosed, close: float) -> Iterator[Payload]:
        """Leave a position that nothing protects."""
        fields: dict[str, Any] = {"side": "sell" if held > 0 else "buy", "qty": abs(held)}
        if mood % 3:
            trail = {"trail_percent": "0.1"} if mood % 2 else {"trail_price": "0.05"}
            fields |= {"type": "trailing_stop", "time_in_force": "gtc", **trail}
        yield self.propose(symbol, "exit", fields, closed, close)

    def move(
        self, symbol: str, roles: dict[str, str], sign: int, mood: int, closed: BarsClosed, close: float
    ) -> Iterator[Payload]:
        """Let a stop follow the price, or a trail become shorter."""
        name = self.order_name(symbol, "exit", closed, 1)
        change: dict[str, Any] = {"stop_price": cents(close * (1 - sign * 0.0001 * (4 + mood)))}
        about = roles.get("stop")
        if about is None:
            about, change = roles["exit"], {"trail": Decimal(mood + 1) / 100}
        request = ReplaceRequest(client_order_id=name, **change)
        yield ReplaceProposed(client_order_id=about, request=request, reason="it follows", decided_at=closed.at)

    def propose(
        self, symbol: str, purpose: Purpose, fields: dict[str, Any], closed: BarsClosed, close: float
    ) -> OrderProposed:
        name = self.order_name(symbol, purpose, closed, 0)
        about = {"symbol": symbol, "client_order_id": name, "purpose": purpose}
        request = OrderRequest.model_validate(about | fields)
        self.state.working[name] = Working(symbol, purpose, self.state.bars)
        return OrderProposed(request=request, reference_price=close, decided_at=closed.at)

    def order_name(self, symbol: str, purpose: Purpose, closed: BarsClosed, n: int) -> str:
        return client_order_id(self.rules.session_id, "grouping", symbol, closed.at, purpose, n)
