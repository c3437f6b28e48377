"""Bugs on purpose: parts that each get one thing wrong. The simulation has to catch every one of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any

from tests.simulation.disk import WatchedJournal
from tests.simulation.plan import GROUPS
from tests.simulation.world import Keeper
from trader_lib.agents import execution, tracking
from trader_lib.agents.contract import WAITS, Effect, Reaction, Steps
from trader_lib.agents.execution import ExecutionAgent
from trader_lib.agents.portfolio import PortfolioAgent
from trader_lib.agents.risk import RiskAgent
from trader_lib.agents.tracking import LocalState, OrderBook, OrderTrack, is_unresolved
from trader_lib.broker.port import Broker
from trader_lib.bus.bus import InProcessBus
from trader_lib.errors.taxonomy import Misconfigured, OutcomeUnknown, Rejected, Retryable, TraderError
from trader_lib.recovery.answers import RecordedBroker
from trader_lib.session.wiring import Agents
from trader_lib.trading.events import (
    Event,
    FillRecorded,
    OrderAcknowledged,
    OrderFailed,
    OrderIntended,
    Payload,
    TradeUpdated,
)
from trader_lib.trading.orders import Order, OrderRequest, OrderStatus
from trader_lib.trading.portfolio import Fill


def resends_on_timeout(state: Any, patience: Any, track: OrderTrack, event: Event, reason: str) -> Steps[None]:
    """A timeout is taken for a refusal: the order goes out again under its own id."""
    try:
        order = yield execution.Submit(SENT[track.client_order_id])
    except (Rejected, OutcomeUnknown, Retryable):
        yield from RIGHT["resolve"](state, patience, track, event, reason)
        return
    state.book.observe(track, order, event.recorded_at)
    yield OrderAcknowledged(client_order_id=track.client_order_id, order=order)


SENT: dict[str, OrderRequest] = {}


def noting_what_is_sent(
    state: Any, patience: Any, request: OrderRequest, decided_at: datetime, event: Event
) -> Steps[None]:
    SENT[request.client_order_id] = request
    yield from RIGHT["send"](state, patience, request, decided_at, event)


def resends_under_a_new_name(
    state: Any, patience: Any, request: OrderRequest, decided_at: datetime, event: Event
) -> Steps[None]:
    """A timeout is answered with the same order under another client order id."""
    yield from RIGHT["send"](state, patience, request, decided_at, event)
    track = state.book.get(request.client_order_id)
    if track is not None and track.absent and not request.client_order_id.endswith("-again"):
        again = request.model_copy(update={"client_order_id": f"{request.client_order_id}-again"})
        yield from RIGHT["send"](state, patience, again, decided_at, event)


def takes_unknown_for_rejected(state: Any, patience: Any, track: OrderTrack, event: Event, reason: str) -> Steps[None]:
    """What was not answered is taken for not sent, and never looked up."""
    track.state = LocalState.NOT_SENT
    yield execution.not_sent(track.client_order_id, reason)


def drops_unknowns(state: Any, patience: Any, track: OrderTrack, event: Event, reason: str) -> Steps[None]:
    """What was not answered is reported as unknown, and forgotten."""
    track.state = LocalState.UNKNOWN
    yield OrderFailed(client_order_id=track.client_order_id, reason=reason, outcome="unknown")
    state.book.alive[track.strategy, track.symbol].pop(track.client_order_id, None)


class GivesUpLateOrders(ExecutionAgent):
    """What the broker did not have at first is never looked for again, and left alone when it appears."""

    def __init__(self, *parts, **more) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*parts, **more)
        self.patience = replace(self.patience, looks_max=0)

    def reactions(self) -> Mapping[type[Payload], Reaction]:
        return {**super().reactions(), TradeUpdated: self._on_update}

    def _on_update(self, event: Event) -> Steps[None] | None:
        assert isinstance(event.payload, TradeUpdated)
        track = self.book.find(event.payload.order)
        if track is None or track.state is not LocalState.NOT_SENT:
            return execution.on_trade_update(self.state, self.patience, event.payload, event)
        return None


class SkipsTheWriteAhead(ExecutionAgent):
    """The intent is published, and reaches the disk whenever it happens to."""

    def __init__(self, bus, clock, broker, commit, *parts, **more) -> None:  # type: ignore[no-untyped-def]
        super().__init__(bus, clock, broker, lambda: None, *parts, **more)


class IntendsAfterwards(ExecutionAgent):
    """The order goes out first; the intent is written when the answer is there."""

    def perform_now(self, step, event):  # type: ignore[no-untyped-def]
        return WAITS  # so that everything goes by `publish`

    async def publish(self, payload, correlation_id, causation_id=None):  # type: ignore[no-untyped-def]
        if isinstance(payload, OrderIntended):
            self._held = payload
            return None
        held, self._held = getattr(self, "_held", None), None
        if held is not None:
            await super().publish(held, correlation_id, causation_id)
        return await super().publish(payload, correlation_id, causation_id)


class CountsDoublesTwice(ExecutionAgent):
    """A fill that is reported twice is counted twice."""

    def reactions(self) -> Mapping[type[Payload], Reaction]:
        return {**super().reactions(), TradeUpdated: self._on_update}

    def _on_update(self, event: Event) -> Steps[None]:
        update = event.payload
        assert isinstance(update, TradeUpdated)
        yield from execution.on_trade_update(self.state, self.patience, update, event)
        track = self.book.find(update.order)
        if update.execution_id is None or update.qty is None or update.price is None or track is None:
            return
        seen = self.__dict__.setdefault("_seen", set())
        if update.execution_id in seen:
            again, filled = f"{update.execution_id}:{len(seen)}", (update.qty, update.price)
            yield execution.recorded(track, update.order.id, again, filled, update.timestamp)
        seen.add(update.execution_id)


def trusts_the_stream(state: Any, patience: Any, event: Event) -> None:
    """The stream tells everything: nothing is asked at a tick, nothing repaired."""


class TakesCumulativeForIncremental(ExecutionAgent):
    """The quantity filled so far is booked as the quantity of this fill."""

    def reactions(self) -> Mapping[type[Payload], Reaction]:
        return {**super().reactions(), TradeUpdated: self._on_update}

    def _on_update(self, event: Event) -> Steps[None]:
        update = event.payload
        assert isinstance(update, TradeUpdated)
        if update.qty is not None:
            update = update.model_copy(update={"qty": update.order.filled_qty})
        return execution.on_trade_update(self.state, self.patience, update, event)


def repairs_at_once(state: Any, track: OrderTrack, event: Event) -> Steps[None]:
    """A repair is booked beside the message that it replaces, when that comes late."""
    yield from RIGHT["repair"](state, track, event)
    track.repaired_qty = Decimal(0)
    track.reported_qty = Decimal(10**9)
    track.behind_since = None


def cancels_and_forgets(state: Any, patience: Any, track: OrderTrack, event: Event) -> Steps[None]:
    """A cancel that was asked for is taken for done; what fills meanwhile belongs to nobody."""
    if track.order_id is not None:
        with suppress(TraderError):
            yield execution.Cancel(track.order_id)
    track.state = OrderStatus.CANCELED
    state.book.alive[track.strategy, track.symbol].pop(track.client_order_id, None)


def trades_blindly(book: OrderBook, request: OrderRequest) -> bool:
    """What the broker reports filled, and no fill has recorded yet, stops no order."""
    return False


def drops_fills_after_the_end(state: Any, patience: Any, update: TradeUpdated, event: Event) -> Steps[None]:
    """Messages about an order that is over are thrown away, fills that come late with them."""
    track = state.book.find(update.order)
    if track is None or track.is_open:
        yield from RIGHT["on_trade_update"](state, patience, update, event)
    elif track is not None:
        track.reported_qty = track.filled_qty
        track.behind_since = None


def turns_time_back(state: Any, patience: Any, update: TradeUpdated, event: Event) -> Steps[None]:
    """States do not absorb: a report that comes late reopens an order that is over."""
    yield from RIGHT["on_trade_update"](state, patience, update, event)
    track = state.book.find(update.order)
    if track is not None:
        track.state = update.order.status
        state.book.enter(track)


def looks_up_unknown_orders_only(
    state: Any, patience: Any, track: OrderTrack, event: Event, reason: str = ""
) -> Steps[None]:
    if track.order_id is None:
        yield from RIGHT["refresh"](state, patience, track, event, reason)


def believes_the_first_no(state: Any, patience: Any, track: OrderTrack, event: Event, reason: str = "") -> Steps[None]:
    """One "no such order" is proof enough."""
    if is_unresolved(track):
        track.absent = patience.attempts
    yield from RIGHT["refresh"](state, patience, track, event, reason)


class BooksTheOrderAsFilled(ExecutionAgent):
    """A market order that was accepted is booked as filled, at the price of the answer or of a dollar."""

    async def perform(self, step: Payload | Effect, event: Event) -> Any:
        outcome = await super().perform(step, event)
        if isinstance(step, execution.Submit):
            self._accepted = outcome
        order, self._accepted = getattr(self, "_accepted", None), None
        if isinstance(step, execution.Submit):
            self._accepted = order
        elif isinstance(step, OrderAcknowledged) and order is not None and order.id == step.order.id:
            await self._book(order, event)
        return outcome

    async def _book(self, order: Order, event: Event) -> None:
        if order.filled_qty == 0 and order.qty is not None and order.type.value == "market":
            fill = Fill(
                execution_id=f"hoped:{order.id}",
                order_id=order.id,
                client_order_id=order.client_order_id,
                symbol=order.symbol,
                side=order.side,
                qty=order.qty,
                price=Decimal(1),
                timestamp=event.time,
            )
            await super().perform(FillRecorded(fill=fill), event)


class SendsAgainAfterARestart(RecordedBroker):
    """What was intended before the process died is sent again without being looked for."""

    async def submit(self, request: OrderRequest) -> Order:
        if self.next_answer() is not None:
            return await super().submit(request)
        await self.bus.hold()
        return await self.broker.submit(request)


class ForgetsWhatWasAnswered(RecordedBroker):
    """After a restart the broker is asked for what it has answered before, orders included."""

    def next_answer(self) -> Payload | None:
        return None


class ForgetsTheFills(PortfolioAgent):
    """What is held is known from the fills of this life alone."""

    def _on_fill(self, fill: Fill) -> None:
        past = self._bus._past  # type: ignore[attr-defined]
        if past is None:
            super()._on_fill(fill)


class IgnoresTheFullDisk(WatchedJournal):
    """What cannot be written is not written, and nobody is told."""

    def append(self, event: Event) -> None:
        try:
            super().append(event)
        except Misconfigured:
            self._seq = event.seq

    def commit(self) -> None:
        with suppress(Misconfigured):
            super().commit()


class CommitsNowAndThen(WatchedJournal):
    """Only every tenth commit is one."""

    def commit(self) -> None:
        self._asked = getattr(self, "_asked", 0) + 1
        if self._asked % 10 == 0:
            super().commit()


async def leaves_entries_open(broker: Broker, agents: Agents) -> str:
    """A session whose disk is full ends and leaves its orders where they are."""
    return ""


class SnapshotsWithoutOrders(Keeper):
    """A snapshot leaves out the orders that changed since the last one."""

    async def take(self) -> None:
        self.book.changed()
        await super().take()


class SnapshotsInTheMiddle(InProcessBus):
    """A snapshot is taken while agents are at work."""

    @property
    def is_idle(self) -> bool:
        return True


class SnapshotsWithoutTheOpenOrders(RiskAgent):
    """Risk forgets over a restart what is on its way."""

    def restore(self, snapshot: bytes) -> None:
        super().restore(snapshot)
        for book in self.state.books.values():
            book.working, book.canceling, book.open = {}, {}, {}


def resends_a_bracket(state: Any, patience: Any, track: OrderTrack, event: Event, reason: str) -> Steps[None]:
    """A bracket whose answer was lost goes out again, legs and all."""
    yield from resends_on_timeout(state, patience, track, event, reason)


def adopts_a_leg_twice(track: OrderTrack, order: Order) -> OrderTrack:
    """A leg that the broker shows inside another one is entered once more, below that."""
    known = {member.order_id: member for member in track.family()}
    if order.id in known or order.replaces in known:
        return RIGHT_TRACKING["leg_of"](track, order)
    leg = tracking.related_track(track, order)
    leg.external, leg.parent, leg.purpose = track.external, track, tracking.leg_purpose(track)
    track.legs.append(leg)
    return leg


def counts_legs_as_entries(track: OrderTrack) -> Any:
    """What a leg fills is booked as if it worked towards the target."""
    return track.purpose


def takes_legs_for_strangers(track: OrderTrack, order: Order, now: datetime) -> None:
    """The legs in an order's record are not read: whoever hears of one takes it for somebody else's."""
    RIGHT_TRACKING["observe_record"](track, order.model_copy(update={"legs": ()}), now)


def leaves_legs_open(state: Any, patience: Any, track: OrderTrack, event: Event) -> Steps[None]:
    """Who cancels everything cancels the entries, and leaves the exits of those that have filled."""
    if track.is_open:
        yield from execution.cancel(state, patience, track, event)


MOVED: dict[str, OrderTrack] = {}


def noting_what_is_moved(state: Any, patience: Any, track: OrderTrack, request: Any, event: Event) -> Steps[None]:
    MOVED[request.client_order_id] = track
    yield from RIGHT["replace_order"](state, patience, track, request, event)


def moves_again_on_timeout(state: Any, patience: Any, request: Any, event: Event, reason: str) -> Steps[None]:
    """A replacement whose answer was lost is asked for again."""
    yield OrderFailed(client_order_id=request.client_order_id, reason=reason, outcome="unknown")
    with suppress(TraderError):
        order = yield execution.Replace(MOVED[request.client_order_id].current.order_id or "", request)
        yield from execution.take_replacement(state, order, event)


@dataclass(frozen=True)
class Mutation:
    """A part with a bug, where it is put, and the seed that is played first, because it noticed."""

    part: Any
    where: tuple[str, ...]
    seed: int = 0
    beside: Mapping[str, Any] = field(default_factory=dict)  # what else the bug needs, by where it is put
    seeds: range = range(300)  # that are played after it

    @property
    def name(self) -> str:
        """Of the bug."""
        return "".join(word[0].upper() + word[1:] for word in self.part.__name__.split("_"))

    @property
    def patches(self) -> dict[str, Any]:
        """What it takes the place of."""
        return {**dict.fromkeys(self.where, self.part), **self.beside}


def _of_execution(name: str) -> tuple[str, ...]:
    """Where a function of the execution agent is, for a session and its replay alike."""
    return (f"trader_lib.agents.execution.{name}",)


RIGHT = {
    name: getattr(execution, name)
    for name in ("resolve", "send", "refresh", "repair", "on_trade_update", "replace_order")
}
RIGHT_TRACKING = {name: getattr(tracking, name) for name in ("leg_of", "observe_record")}


def _of_groups(part: Any, where: str, beside: Mapping[str, Any] = MappingProxyType({})) -> Mutation:
    """A bug that only sessions with groups of orders can notice."""
    return Mutation(part, (f"trader_lib.agents.{where}",), GROUPS.start, beside, GROUPS)


EXECUTION = ("trader_lib.session.wiring.ExecutionAgent", "trader_lib.replay.fresh.ExecutionAgent")
JOURNAL = ("tests.simulation.world.WatchedJournal",)
MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        resends_on_timeout, _of_execution("resolve"), beside={"trader_lib.agents.execution.send": noting_what_is_sent}
    ),
    Mutation(resends_under_a_new_name, _of_execution("send")),
    Mutation(takes_unknown_for_rejected, _of_execution("resolve")),
    Mutation(drops_unknowns, _of_execution("resolve")),
    Mutation(GivesUpLateOrders, EXECUTION, 54),
    Mutation(SkipsTheWriteAhead, EXECUTION),
    Mutation(IntendsAfterwards, EXECUTION),
    Mutation(CountsDoublesTwice, EXECUTION),
    Mutation(trusts_the_stream, _of_execution("on_tick")),
    Mutation(TakesCumulativeForIncremental, EXECUTION[:1]),  # its repairs heal it; the replay does not
    Mutation(repairs_at_once, _of_execution("repair")),
    Mutation(cancels_and_forgets, _of_execution("cancel")),
    Mutation(trades_blindly, _of_execution("has_unknown_position"), 137),
    Mutation(drops_fills_after_the_end, _of_execution("on_trade_update")),
    Mutation(
        turns_time_back,
        _of_execution("on_trade_update"),
        beside={"trader_lib.agents.execution.refresh": looks_up_unknown_orders_only},
    ),
    Mutation(believes_the_first_no, _of_execution("refresh")),
    Mutation(BooksTheOrderAsFilled, EXECUTION),
    Mutation(SendsAgainAfterARestart, ("trader_lib.session.wiring.RecordedBroker",), 44),
    Mutation(ForgetsWhatWasAnswered, ("trader_lib.session.wiring.RecordedBroker",), 2),
    Mutation(ForgetsTheFills, ("trader_lib.session.wiring.PortfolioAgent",)),
    Mutation(IgnoresTheFullDisk, JOURNAL),
    Mutation(CommitsNowAndThen, JOURNAL),
    Mutation(leaves_entries_open, ("trader_lib.session.session.cancel_entries",), 193),
    Mutation(SnapshotsWithoutOrders, ("trader_lib.session.wiring.SnapshotKeeper",), 6),
    Mutation(SnapshotsInTheMiddle, ("trader_lib.session.wiring.InProcessBus",), 44),
    Mutation(SnapshotsWithoutTheOpenOrders, ("trader_lib.session.wiring.RiskAgent",), 12),
    _of_groups(resends_a_bracket, "execution.resolve", {"trader_lib.agents.execution.send": noting_what_is_sent}),
    _of_groups(adopts_a_leg_twice, "tracking.leg_of"),
    _of_groups(counts_legs_as_entries, "tracking.leg_purpose"),
    _of_groups(takes_legs_for_strangers, "tracking.observe_record"),
    _of_groups(leaves_legs_open, "execution.cancel_group"),
    _of_groups(
        moves_again_on_timeout,
        "execution.find_replacement",
        {"trader_lib.agents.execution.replace_order": noting_what_is_moved},
    ),
)
