"""Bugs on purpose: parts that each get one thing wrong. The simulation has to catch every one of them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any

from tests.simulation.disk import WatchedJournal
from tests.simulation.world import Keeper
from trader_lib.agents.execution import ExecutionAgent
from trader_lib.agents.portfolio import PortfolioAgent
from trader_lib.agents.risk import RiskAgent, RiskMemory
from trader_lib.agents.tracking import LocalState, OrderTrack
from trader_lib.bus.bus import InProcessBus
from trader_lib.errors.taxonomy import Misconfigured, OutcomeUnknown, Rejected, Retryable, TraderError
from trader_lib.session.recovery import RecordedBroker
from trader_lib.session.session import Session
from trader_lib.session.wiring import Agents
from trader_lib.trading.events import Event, FillRecorded, OrderIntended, Payload, TradeUpdated
from trader_lib.trading.orders import Order, OrderRequest, OrderStatus
from trader_lib.trading.portfolio import Fill


class ResendsOnTimeout(ExecutionAgent):
    """A timeout is taken for a refusal: the order goes out again under its own id."""

    async def _resolve(self, event: Event, track: OrderTrack, reason: str) -> None:
        request = self._requests[track.client_order_id]
        try:
            await self._acknowledge(event, track, await self._broker.submit(request))
        except (Rejected, OutcomeUnknown, Retryable):
            await super()._resolve(event, track, reason)

    async def _place(self, event: Event, request: OrderRequest, decided_at: datetime) -> None:
        self._requests = getattr(self, "_requests", {}) | {request.client_order_id: request}
        await super()._place(event, request, decided_at)


class ResendsUnderANewName(ExecutionAgent):
    """A timeout is answered with the same order under another client order id."""

    async def _place(self, event: Event, request: OrderRequest, decided_at: datetime) -> None:
        await super()._place(event, request, decided_at)
        track = self.book.get(request.client_order_id)
        if track is not None and track.absent and not request.client_order_id.endswith("-again"):
            again = request.model_copy(update={"client_order_id": f"{request.client_order_id}-again"})
            await super()._place(event, again, decided_at)


class TakesUnknownForRejected(ExecutionAgent):
    """What was not answered is taken for not sent, and never looked up."""

    async def _resolve(self, event: Event, track: OrderTrack, reason: str) -> None:
        track.state = LocalState.NOT_SENT
        await self._fail(event, track.client_order_id, reason, "not_sent")


class DropsUnknowns(ExecutionAgent):
    """What was not answered is said to be unknown, and forgotten."""

    async def _resolve(self, event: Event, track: OrderTrack, reason: str) -> None:
        track.state = LocalState.UNKNOWN
        await self._fail(event, track.client_order_id, reason, "unknown")
        self.book._open[track.strategy, track.symbol].pop(track.client_order_id, None)


class GivesUpLateOrders(ExecutionAgent):
    """What the broker did not have at first is never looked for again, and left alone when it appears."""

    def __init__(self, *parts, **more) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*parts, **more)
        self._patience.looks_max = 0

    async def _on_trade_update(self, event: Event) -> None:
        assert isinstance(event.payload, TradeUpdated)
        track = self.book.find(event.payload.order)
        if track is None or track.state is not LocalState.NOT_SENT:
            await super()._on_trade_update(event)


class SkipsTheWriteAhead(ExecutionAgent):
    """The intent is published, and reaches the disk whenever it happens to."""

    def __init__(self, *parts, **more) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*parts, **more)
        self._commit = lambda: None


class IntendsAfterwards(ExecutionAgent):
    """The order goes out first; the intent is written when the answer is there."""

    async def publish(self, payload, cause=None, correlation_id=""):  # type: ignore[no-untyped-def]
        if isinstance(payload, OrderIntended):
            self._held = payload
            return None
        held, self._held = getattr(self, "_held", None), None
        if held is not None:
            await super().publish(held, cause, correlation_id)
        return await super().publish(payload, cause, correlation_id)


class CountsDoublesTwice(ExecutionAgent):
    """A fill that is told twice is counted twice."""

    async def _on_trade_update(self, event: Event) -> None:
        await super()._on_trade_update(event)
        update = event.payload
        assert isinstance(update, TradeUpdated)
        track = self.book.find(update.order)
        if update.execution_id is None or update.qty is None or update.price is None or track is None:
            return
        seen = self.__dict__.setdefault("_seen", set())
        if update.execution_id in seen:
            again = f"{update.execution_id}:{len(seen)}"
            await self._record(event, track, update.order.id, again, update.qty, update.price, update.timestamp)
        seen.add(update.execution_id)


class TrustsTheStream(ExecutionAgent):
    """The stream tells everything: nothing is asked at a tick, nothing repaired."""

    async def _on_tick(self, event: Event) -> None:
        pass


class TakesCumulativeForIncremental(ExecutionAgent):
    """The quantity filled so far is booked as the quantity of this fill."""

    async def _on_trade_update(self, event: Event) -> None:
        update = event.payload
        assert isinstance(update, TradeUpdated)
        if update.qty is not None:
            wrong = update.model_copy(update={"qty": update.order.filled_qty})
            event = event.model_copy(update={"payload": wrong})
        await super()._on_trade_update(event)


class RepairsAtOnce(ExecutionAgent):
    """A repair is booked beside the message that it replaces, when that comes late."""

    async def _repair(self, event: Event, track: OrderTrack) -> None:
        await super()._repair(event, track)
        track.repaired_qty = Decimal(0)
        track.reported_qty = Decimal(10**9)
        track.behind_since = None


class CancelsAndForgets(ExecutionAgent):
    """A cancel that was asked for is taken for done; what fills meanwhile belongs to nobody."""

    async def _cancel(self, event: Event, track: OrderTrack) -> None:
        if track.order_id is not None:
            with suppress(TraderError):
                await self._broker.cancel(track.order_id)
        track.state = OrderStatus.CANCELED
        self.book._open[track.strategy, track.symbol].pop(track.client_order_id, None)


class TradesBlindly(ExecutionAgent):
    """What the broker says is filled, and no fill has told yet, stops no order."""

    def _is_blind(self, request: OrderRequest) -> bool:
        return False


class DropsFillsAfterTheEnd(ExecutionAgent):
    """Messages about an order that is over are thrown away, fills that come late with them."""

    async def _on_trade_update(self, event: Event) -> None:
        assert isinstance(event.payload, TradeUpdated)
        track = self.book.find(event.payload.order)
        if track is None or track.is_open:
            await super()._on_trade_update(event)
        elif track is not None:
            track.reported_qty = track.filled_qty
            track.behind_since = None


class TurnsTimeBack(ExecutionAgent):
    """States do not absorb: a report that comes late reopens an order that is over."""

    async def _on_trade_update(self, event: Event) -> None:
        assert isinstance(event.payload, TradeUpdated)
        await super()._on_trade_update(event)
        track = self.book.find(event.payload.order)
        if track is not None:
            track.state = event.payload.order.status
            self.book._enter(track)

    async def _refresh(self, event: Event, track: OrderTrack, reason: str = "") -> None:
        if track.order_id is None:
            await super()._refresh(event, track, reason)


class BelievesTheFirstNo(ExecutionAgent):
    """One "no such order" is proof enough."""

    async def _refresh(self, event: Event, track: OrderTrack, reason: str = "") -> None:
        if track.is_unresolved:
            track.absent = self._patience.attempts
        await super()._refresh(event, track, reason)


class BooksTheOrderAsFilled(ExecutionAgent):
    """A market order that was accepted is booked as filled, at the price of the answer or of a dollar."""

    async def _acknowledge(self, event: Event, track: OrderTrack, order: Order) -> None:
        await super()._acknowledge(event, track, order)
        if order.filled_qty == 0 and order.qty is not None and order.type.value == "market":
            fill = Fill(
                execution_id=f"hoped:{order.id}",
                order_id=order.id,
                client_order_id=track.client_order_id,
                symbol=order.symbol,
                side=order.side,
                qty=order.qty,
                price=Decimal(1),
                timestamp=event.time,
            )
            await self.publish(FillRecorded(fill=fill), event)


class SendsAgainAfterARestart(RecordedBroker):
    """What was intended before the process died is sent again without being looked for."""

    async def _submit_now(self, request: OrderRequest) -> Order:
        await self._bus.hold()
        return await self._broker.submit(request)


class ForgetsWhatWasAnswered(RecordedBroker):
    """After a restart the broker is asked for what it has answered before, orders included."""

    def _answer(self) -> Payload | None:
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


class LeavesEntriesOpen(Session):
    """A session whose disk is full ends and leaves its orders where they are."""

    async def leave(self, agents: Agents) -> str:
        return ""


class SnapshotsWithoutOrders(Keeper):
    """A snapshot leaves out the orders that changed since the last one."""

    def _add_orders(self) -> None:
        self._book.changed()
        super()._add_orders()


class SnapshotsInTheMiddle(InProcessBus):
    """A snapshot is taken while agents are at work."""

    @property
    def is_idle(self) -> bool:
        return True


class SnapshotsWithoutTheOpenOrders(RiskAgent):
    """Risk forgets over a restart what is on its way."""

    def _recall(self, memory: RiskMemory) -> None:
        books = {owner: replace(book, working={}, leaving={}, open={}) for owner, book in memory.books.items()}
        super()._recall(replace(memory, books=books))


@dataclass(frozen=True)
class Mutation:
    """A part with a bug, where it is put, and the seed that is played first, because it noticed."""

    part: type
    where: tuple[str, ...]
    seed: int = 0

    @property
    def name(self) -> str:
        """Of the bug."""
        return self.part.__name__

    @property
    def patches(self) -> dict[str, Any]:
        """What it takes the place of."""
        return dict.fromkeys(self.where, self.part)


EXECUTION = ("trader_lib.session.wiring.ExecutionAgent", "trader_lib.session.replay.ExecutionAgent")
JOURNAL = ("tests.simulation.world.WatchedJournal",)
MUTATIONS: tuple[Mutation, ...] = (
    Mutation(ResendsOnTimeout, EXECUTION),
    Mutation(ResendsUnderANewName, EXECUTION),
    Mutation(TakesUnknownForRejected, EXECUTION),
    Mutation(DropsUnknowns, EXECUTION),
    Mutation(GivesUpLateOrders, EXECUTION, 54),
    Mutation(SkipsTheWriteAhead, EXECUTION),
    Mutation(IntendsAfterwards, EXECUTION),
    Mutation(CountsDoublesTwice, EXECUTION),
    Mutation(TrustsTheStream, EXECUTION),
    Mutation(TakesCumulativeForIncremental, EXECUTION[:1]),  # its repairs heal it; the replay does not
    Mutation(RepairsAtOnce, EXECUTION),
    Mutation(CancelsAndForgets, EXECUTION),
    Mutation(TradesBlindly, EXECUTION, 137),
    Mutation(DropsFillsAfterTheEnd, EXECUTION),
    Mutation(TurnsTimeBack, EXECUTION),
    Mutation(BelievesTheFirstNo, EXECUTION),
    Mutation(BooksTheOrderAsFilled, EXECUTION),
    Mutation(SendsAgainAfterARestart, ("trader_lib.session.wiring.RecordedBroker",), 44),
    Mutation(ForgetsWhatWasAnswered, ("trader_lib.session.wiring.RecordedBroker",), 2),
    Mutation(ForgetsTheFills, ("trader_lib.session.wiring.PortfolioAgent",)),
    Mutation(IgnoresTheFullDisk, JOURNAL),
    Mutation(CommitsNowAndThen, JOURNAL),
    Mutation(LeavesEntriesOpen, ("trader_lib.session.session.Session",), 193),
    Mutation(SnapshotsWithoutOrders, ("trader_lib.session.wiring.SnapshotKeeper",), 6),
    Mutation(SnapshotsInTheMiddle, ("trader_lib.session.wiring.InProcessBus",), 44),
    Mutation(SnapshotsWithoutTheOpenOrders, ("trader_lib.session.wiring.RiskAgent",), 12),
)
