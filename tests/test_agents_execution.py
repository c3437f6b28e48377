"""The execution agent against a broker that fails in every way: at most one order, every fill once."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from trader_lib.agents.execution import DUPLICATE_CODE, REPLACEMENTS_MAX, ExecutionAgent, Patience
from trader_lib.agents.tracking import LocalState, is_unresolved
from trader_lib.bus.bus import InProcessBus
from trader_lib.clock.clock import VirtualClock
from trader_lib.clock.ids import SeededIds
from trader_lib.errors.taxonomy import OutcomeUnknown, RateLimited, Rejected, Retryable
from trader_lib.trading.events import (
    AgentFailed,
    CancelIntended,
    CancelProposed,
    ClockTicked,
    Event,
    FillRecorded,
    OperatorCommand,
    OrderAcknowledged,
    OrderAdopted,
    OrderFailed,
    OrderIntended,
    OrdersReported,
    Payload,
    RiskDecided,
    TradeUpdated,
    TradingState,
    TradingStateChanged,
)
from trader_lib.trading.orders import Order, OrderRequest, OrderSide, OrderStatus
from trader_lib.trading.portfolio import Position

BAR = datetime(2005, 1, 3, 5, tzinfo=UTC)
NOW = datetime(2005, 1, 3, 21, tzinfo=UTC)
PATIENCE = Patience(attempts=3, base_s=1.0, cap_s=2.0, grace_s=5.0)


def request(order_id: str = "c-1", symbol: str = "IBM", **fields: Any) -> OrderRequest:
    given = {"symbol": symbol, "side": OrderSide.BUY, "qty": Decimal(10), "client_order_id": order_id}
    return OrderRequest(**(given | fields))


def record(order_id: str = "c-1", status: str = "accepted", filled: float = 0, **fields: Any) -> Order:
    given: dict[str, Any] = {
        "id": f"at-broker-{order_id}",
        "client_order_id": order_id,
        "symbol": "IBM",
        "side": "buy",
        "qty": 10,
        "filled_qty": filled,
        "filled_avg_price": 100 if filled else None,
        "status": status,
        "submitted_at": NOW,
    }
    return Order.model_validate(given | fields)


class ScriptedBroker:
    """Answers what the test has laid out; raises what is an exception; remembers what it was asked."""

    def __init__(self) -> None:
        self.submitted: list[OrderRequest] = []
        self.canceled: list[str] = []
        self.looked_up: list[str] = []
        self.listed = 0
        self.answers: list[Order | BaseException] = []
        self.cancels: list[BaseException | None] = []
        self.records: list[Order | BaseException | None] = []
        self.open: list[Order] | BaseException = []
        self.before_submit: Callable[[], None] = lambda: None
        self.trouble: tuple[str, ...] = ()

    def troubles(self) -> tuple[str, ...]:
        return self.trouble

    async def submit(self, order: OrderRequest) -> Order:
        self.before_submit()
        self.submitted.append(order)
        answer = self.answers.pop(0) if self.answers else record(order.client_order_id)
        return _given(answer)

    async def cancel(self, order_id: str) -> None:
        self.canceled.append(order_id)
        answer = self.cancels.pop(0) if self.cancels else None
        if answer is not None:
            raise answer

    async def order_by_client_id(self, client_order_id: str) -> Order | None:
        self.looked_up.append(client_order_id)
        answer = self.records.pop(0) if self.records else None
        return None if answer is None else _given(answer)

    async def order(self, order_id: str) -> Order | None:
        self.looked_up.append(order_id)
        answer = self.records.pop(0) if self.records else None
        return None if answer is None else _given(answer)

    async def orders(self, status: str = "open") -> tuple[Order, ...]:
        self.listed += 1
        if isinstance(self.open, BaseException):
            raise self.open
        return tuple(self.open)


def _given(answer: Order | BaseException) -> Order:
    if isinstance(answer, BaseException):
        raise answer
    return answer


class Stage:
    """An execution agent between a scripted broker and a bus whose events are written down."""

    def __init__(self) -> None:
        self.clock = VirtualClock(NOW)
        self.bus = InProcessBus(self.clock, SeededIds("stage"), None, "stage")
        self.broker = ScriptedBroker()
        self.commits: list[int] = []  # the last event's number at every commit
        self.events: list[Event] = []
        self.agent = self.build_agent()

    def build_agent(self, **parts: Any) -> ExecutionAgent:
        given: dict[str, Any] = {"commit": lambda: self.commits.append(self.bus.last_seq), "patience": PATIENCE}
        return ExecutionAgent(self.bus, self.clock, self.broker, **given | parts)  # type: ignore[arg-type]

    async def replace_agent(self, **parts: Any) -> None:
        await self.agent.stop()
        self.agent = self.build_agent(**parts)
        self.agent.name = "another execution"
        await self.agent.start()

    async def collect(self, event: Event) -> None:
        self.events.append(event)

    async def publish(self, *payloads: Payload) -> None:
        for payload in payloads:
            await self.bus.publish(payload, source="test", correlation_id="the bar's")
        idle = asyncio.ensure_future(self.bus.idle())
        for _ in range(10_000):
            await asyncio.sleep(0)
            if idle.done():
                break
            if self.clock.next_wake is not None:
                self.clock.advance_to(self.clock.next_wake)
        await idle

    async def approve(self, order: OrderRequest | None = None) -> None:
        await self.publish(RiskDecided(request=order or request(), decided_at=BAR, approved=True))

    async def fill(self, execution: str | None, qty: int, total: int, order_id: str = "c-1", **fields: Any) -> None:
        status = "filled" if total == 10 else "partially_filled"
        order = record(order_id, status, total, **fields)
        update = TradeUpdated(
            event="fill", order=order, execution_id=execution, qty=Decimal(qty), price=Decimal(100), timestamp=NOW
        )
        await self.publish(update)

    async def report(self, status: str, event: str = "new", order_id: str = "c-1", **fields: Any) -> None:
        await self.publish(TradeUpdated(event=event, order=record(order_id, status, **fields), timestamp=NOW))

    def published(self, kind: type[Payload]) -> list[Any]:
        return [event.payload for event in self.events if isinstance(event.payload, kind)]

    @property
    def outcomes(self) -> list[str]:
        return [failure.outcome for failure in self.published(OrderFailed)]

    @property
    def filled(self) -> Decimal:
        return sum((fill.fill.qty for fill in self.published(FillRecorded)), Decimal(0))


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    made = Stage()
    made.bus.subscribe("test", [], made.collect)
    await made.agent.start()
    yield made
    await made.bus.close()


# ---- placing


async def test_intent_is_committed_before_the_wire(stage: Stage) -> None:
    at_the_wire: list[int] = []
    stage.broker.before_submit = lambda: at_the_wire.append(stage.commits[-1])
    await stage.approve()
    intent = next(event for event in stage.events if isinstance(event.payload, OrderIntended))
    assert at_the_wire[0] >= intent.seq
    assert intent.correlation_id == "the bar's"
    assert [ack.order.id for ack in stage.published(OrderAcknowledged)] == ["at-broker-c-1"]


async def test_a_refused_decision_sends_nothing(stage: Stage) -> None:
    await stage.publish(RiskDecided(request=request(), decided_at=BAR, approved=False))
    assert not stage.broker.submitted


async def test_the_same_decision_twice_sends_one_order(stage: Stage) -> None:
    await stage.approve()
    await stage.approve()
    assert len(stage.broker.submitted) == 1


async def test_journal_that_cannot_commit_keeps_the_order_off_the_wire(stage: Stage) -> None:
    def fail() -> None:
        raise OSError("disk full")

    await stage.replace_agent(commit=fail)
    await stage.approve()
    assert not stage.broker.submitted
    track = stage.agent.book.get("c-1")
    assert track is not None and track.state is LocalState.NOT_SENT
    assert "disk full" in stage.published(AgentFailed)[0].error


async def test_rejection_is_final_and_carries_the_code(stage: Stage) -> None:
    stage.broker.answers = [Rejected("no", code=40310000, reason="insufficient buying power")]
    await stage.approve()
    failure = stage.published(OrderFailed)[0]
    assert (failure.outcome, failure.code, failure.reason) == ("rejected", 40310000, "insufficient buying power")
    assert len(stage.broker.submitted) == 1 and not stage.agent.book.working()


async def test_rate_limit_waits_as_long_as_asked_then_sends(stage: Stage) -> None:
    stage.broker.answers = [RateLimited("slow down", retry_after=7.0)]
    await stage.approve()
    assert len(stage.broker.submitted) == 2 and stage.clock.monotonic() == 7.0
    assert not stage.outcomes


async def test_rate_limit_without_end_is_given_up_as_not_sent(stage: Stage) -> None:
    stage.broker.answers = [RateLimited("slow down")] * 3
    await stage.approve()
    assert len(stage.broker.submitted) == 3 and stage.outcomes == ["not_sent"]
    assert not stage.agent.book.working()


async def test_timeout_after_acceptance_sends_no_second_order(stage: Stage) -> None:
    stage.broker.answers = [OutcomeUnknown("timed out")]
    stage.broker.records = [Retryable("busy"), record()]
    await stage.approve()
    assert len(stage.broker.submitted) == 1 and stage.broker.looked_up == ["c-1", "c-1"]
    assert stage.outcomes == ["unknown"] and len(stage.published(OrderAcknowledged)) == 1
    assert stage.clock.monotonic() == 3.0  # 1 s, then 2 s


async def test_order_that_no_look_up_finds_was_not_sent(stage: Stage) -> None:
    stage.broker.answers = [OutcomeUnknown("timed out")]
    await stage.approve()
    assert len(stage.broker.submitted) == 1 and stage.outcomes == ["unknown", "not_sent"]
    assert stage.broker.looked_up == ["c-1"] * 3


async def test_order_stays_unknown_while_the_broker_does_not_answer_and_is_found_at_a_tick(stage: Stage) -> None:
    stage.broker.answers = [OutcomeUnknown("timed out")]
    stage.broker.records = [Retryable("down")] * 3
    await stage.approve()
    track = stage.agent.book.get("c-1")
    assert track is not None and track.state is LocalState.UNKNOWN and is_unresolved(track)
    assert stage.outcomes == ["unknown"]
    stage.broker.records = [record(status="new")]
    await stage.publish(ClockTicked(at=NOW))
    assert track.state is OrderStatus.NEW and len(stage.broker.submitted) == 1


async def test_unexpected_error_of_the_adapter_counts_as_unknown_and_fails_the_agent(stage: Stage) -> None:
    stage.broker.answers = [TypeError("cannot read the answer")]
    stage.broker.records = [record()]
    await stage.approve()
    assert stage.outcomes == ["unknown"] and len(stage.published(OrderAcknowledged)) == 1
    assert "cannot read the answer" in stage.published(AgentFailed)[0].error
    assert len(stage.broker.submitted) == 1


async def test_refusal_of_a_known_client_order_id_is_a_look_up(stage: Stage) -> None:
    stage.broker.answers = [Rejected("no", code=DUPLICATE_CODE, reason="client_order_id must be unique")]
    stage.broker.records = [record(status="new")]
    await stage.approve()
    track = stage.agent.book.get("c-1")
    assert track is not None and track.state is OrderStatus.NEW and stage.outcomes == ["unknown"]


async def test_order_believed_not_sent_that_shows_up_is_canceled(stage: Stage) -> None:
    stage.broker.answers = [OutcomeUnknown("timed out")]
    await stage.approve()
    stage.broker.records = [record(status="canceled")]
    await stage.report("new")
    assert stage.broker.canceled == ["at-broker-c-1"] and len(stage.broker.submitted) == 1


async def test_halted_sends_nothing_and_resumes(stage: Stage) -> None:
    await stage.publish(TradingStateChanged(state=TradingState.HALTED, reason="test"))
    await stage.approve()
    assert not stage.broker.submitted and stage.outcomes == ["not_sent"]
    await stage.publish(TradingStateChanged(state=TradingState.ACTIVE, reason="test"))
    await stage.approve(request("c-2"))
    assert len(stage.broker.submitted) == 1


async def test_halt_of_one_strategy_leaves_the_others_to_trade(stage: Stage) -> None:
    await stage.publish(TradingStateChanged(state=TradingState.HALTED, reason="test", strategy="one of several"))
    await stage.approve()
    assert len(stage.broker.submitted) == 1


def protection(client_order_id: str) -> OrderRequest:
    return request(client_order_id).model_copy(update={"purpose": "exit", "side": OrderSide.SELL})


async def test_halt_by_a_threshold_withdraws_entries_and_spares_exits(stage: Stage) -> None:
    await stage.approve()
    await stage.approve(protection("c-2"))
    await stage.report("new", order_id="by-hand")  # somebody else's
    stage.broker.records = [record(status="canceled")]
    await stage.publish(TradingStateChanged(state=TradingState.HALTED, reason="drawdown", exits_pass=True))
    assert stage.broker.canceled == ["at-broker-c-1"]
    await stage.approve(request("c-3"))
    await stage.approve(protection("c-4"))
    assert [order.client_order_id for order in stage.broker.submitted] == ["c-1", "c-2", "c-4"]
    await stage.publish(OperatorCommand(action="halt", reason="test", by="an operator"))
    await stage.publish(TradingStateChanged(state=TradingState.HALTED, reason="published before", exits_pass=True))
    await stage.approve(protection("c-5"))
    assert len(stage.broker.submitted) == 3


async def test_a_strategy_s_threshold_withdraws_its_own_entries_only(stage: Stage) -> None:
    await stage.approve(request("c-1").model_copy(update={"strategy": "one"}))
    await stage.approve(request("c-2").model_copy(update={"strategy": "other"}))
    stage.broker.records = [record(status="canceled")]
    halted = TradingStateChanged(state=TradingState.HALTED, reason="drawdown", exits_pass=True, strategy="one")
    await stage.publish(halted)
    assert stage.broker.canceled == ["at-broker-c-1"]
    await stage.approve(request("c-3"))
    assert len(stage.broker.submitted) == 3


# ---- fills


async def test_doubled_and_reordered_fills_are_counted_once(stage: Stage) -> None:
    await stage.approve()
    await stage.fill("x-2", 6, 10)
    await stage.fill("x-1", 4, 4)
    await stage.fill("x-2", 6, 10)
    await stage.fill("x-1", 4, 4)
    assert [fill.fill.execution_id for fill in stage.published(FillRecorded)] == ["x-2", "x-1"]
    assert stage.filled == 10 and not stage.agent.book.working()


async def test_fill_without_execution_id_is_named_by_its_cumulative_quantity(stage: Stage) -> None:
    await stage.approve()
    await stage.fill(None, 4, 4)
    await stage.fill(None, 4, 4)
    assert [fill.fill.execution_id for fill in stage.published(FillRecorded)] == ["at-broker-c-1:4"]


async def test_terminal_state_absorbs(stage: Stage) -> None:
    await stage.approve()
    await stage.fill("x-1", 10, 10)
    await stage.report("new")
    track = stage.agent.book.get("c-1")
    assert track is not None and track.state is OrderStatus.FILLED


async def test_order_of_somebody_else_is_counted_and_left_alone(stage: Stage) -> None:
    await stage.fill("x-9", 3, 3, order_id="theirs")
    assert stage.filled == 3 and not stage.broker.canceled and not stage.agent.book.working()
    await stage.publish(OperatorCommand(action="cancel_all", reason="test", by="test"))
    assert not stage.broker.canceled


async def test_fill_of_a_leg_belongs_to_the_leg(stage: Stage) -> None:
    leg = record("theirs", "held", type="stop", stop_price=90)
    stage.broker.answers = [record(legs=(leg,), type="limit", limit_price=110)]
    await stage.approve(request(purpose="exit"))
    await stage.fill("x-1", 10, 10, order_id="theirs")
    fill = stage.published(FillRecorded)[0].fill
    assert (fill.client_order_id, fill.purpose) == ("theirs", "exit")


# ---- cancels


def cancel(order_id: str = "c-1") -> CancelProposed:
    return CancelProposed(client_order_id=order_id, reason="test", decided_at=BAR)


async def test_cancel_is_confirmed_before_the_next_order_goes_out(stage: Stage) -> None:
    await stage.approve()
    stage.broker.records = [record(status="pending_cancel"), record(status="canceled")]
    order = request("c-2", side=OrderSide.SELL)
    await stage.publish(cancel(), RiskDecided(request=order, decided_at=BAR, approved=True))
    assert stage.broker.canceled == ["at-broker-c-1"] and stage.broker.looked_up == ["c-1", "c-1"]
    assert [sent.client_order_id for sent in stage.broker.submitted] == ["c-1", "c-2"]
    intents = [event.type for event in stage.events if isinstance(event.payload, CancelIntended | OrderIntended)]
    assert intents == ["order_intended", "cancel_intended", "order_intended"]


async def test_order_decided_in_ignorance_of_a_fill_is_dropped(stage: Stage) -> None:
    await stage.approve(request(purpose="exit"))
    stage.broker.cancels = [Rejected("closed", code=42210000, reason='order is already in "filled" state')]
    stage.broker.records = [record(status="filled", filled=10)]
    order = request("c-2", side=OrderSide.SELL)
    await stage.publish(cancel(), RiskDecided(request=order, decided_at=BAR, approved=True))
    assert len(stage.broker.submitted) == 1 and stage.outcomes == ["not_sent"]
    other = request("c-3", symbol="AAPL")
    later = RiskDecided(request=request("c-4"), decided_at=BAR + timedelta(days=1), approved=True)
    await stage.publish(RiskDecided(request=other, decided_at=BAR, approved=True))
    await stage.fill("x-1", 10, 10)
    await stage.publish(later)
    assert [sent.client_order_id for sent in stage.broker.submitted] == ["c-1", "c-3", "c-4"]


async def test_order_is_dropped_when_the_one_before_had_filled_already(stage: Stage) -> None:
    await stage.approve(request(purpose="exit"))
    await stage.fill("x-1", 10, 10)
    await stage.publish(cancel(), RiskDecided(request=request("c-2"), decided_at=BAR, approved=True))
    assert not stage.broker.canceled and len(stage.broker.submitted) == 1


@pytest.mark.parametrize(
    ("side", "purpose", "goes_out"),
    [("sell", "entry", False), ("buy", "entry", False), ("sell", "exit", False), ("buy", "exit", True)],
)
async def test_order_waits_for_the_fills_that_the_broker_reports_and_nobody_has_told(
    stage: Stage, side: str, purpose: str, goes_out: bool
) -> None:
    """Found by seed 51311: the exit had sold 473 of 1,060 shares, and the next one was for 1,060 again."""
    await stage.approve(request(side=OrderSide.SELL, purpose="exit"))
    await stage.report("canceled", "canceled", filled=4, side="sell")
    await stage.approve(request("c-2", side=OrderSide(side), purpose=purpose))
    assert len(stage.broker.submitted) == 1 + goes_out
    if not goes_out:
        assert "filled more IBM than was known" in stage.published(OrderFailed)[0].reason
    await stage.approve(request("c-3", "AAPL"))
    await stage.approve(request("c-4", strategy="another"))
    await stage.fill("x-1", 4, 4, side="sell")
    await stage.approve(request("c-5", side=OrderSide(side), purpose=purpose))
    assert [order.client_order_id for order in stage.broker.submitted[-3:]] == ["c-3", "c-4", "c-5"]


async def test_order_is_dropped_when_the_cancel_is_not_confirmed_in_time(stage: Stage) -> None:
    await stage.approve()
    stage.broker.records = [record(status="pending_cancel"), Retryable("busy"), None]
    await stage.publish(cancel(), RiskDecided(request=request("c-2"), decided_at=BAR, approved=True))
    assert len(stage.broker.submitted) == 1
    assert "could not be canceled yet" in stage.published(OrderFailed)[0].reason


@pytest.mark.parametrize(
    ("leaving", "purpose", "goes_out"),
    [("entry", "entry", False), ("exit", "entry", False), ("exit", "exit", False), ("entry", "exit", True)],
)
async def test_order_waits_while_the_one_before_may_still_fill_at_later_bars_too(
    stage: Stage, leaving: str, purpose: str, goes_out: bool
) -> None:
    """Not confirmed canceled, it lies at the broker; an exit may go out beside an entry."""
    await stage.approve(request(purpose=leaving))
    stage.broker.records = [Retryable("busy")] * 3
    await stage.publish(cancel())

    async def decide(order: OrderRequest) -> None:
        await stage.publish(RiskDecided(request=order, decided_at=BAR + timedelta(days=1), approved=True))

    await decide(request("c-2", purpose=purpose))
    assert len(stage.broker.submitted) == 1 + goes_out
    if not goes_out:
        assert "could not be canceled yet" in stage.published(OrderFailed)[0].reason
    await decide(request("c-3", "AAPL"))
    await decide(request("c-4", strategy="another"))
    await stage.report("canceled", "canceled")
    await decide(request("c-5", purpose=purpose))
    assert [order.client_order_id for order in stage.broker.submitted[-3:]] == ["c-3", "c-4", "c-5"]


async def test_order_waits_while_one_that_is_to_be_canceled_is_unknown(stage: Stage) -> None:
    stage.broker.answers = [OutcomeUnknown("timed out")]
    stage.broker.records = [Retryable("down")] * 3
    await stage.approve()
    await stage.publish(cancel())
    await stage.publish(RiskDecided(request=request("c-2"), decided_at=BAR + timedelta(days=1), approved=True))
    assert len(stage.broker.submitted) == 1
    stage.broker.records = [record(status="canceled")]
    await stage.report("new")
    await stage.publish(RiskDecided(request=request("c-3"), decided_at=BAR + timedelta(days=2), approved=True))
    assert [order.client_order_id for order in stage.broker.submitted] == ["c-1", "c-3"]


async def test_cancel_is_repeated_when_it_may_not_have_arrived(stage: Stage) -> None:
    await stage.approve()
    stage.broker.cancels = [Retryable("busy"), OutcomeUnknown("timed out"), None]
    stage.broker.records = [record(status="canceled")]
    await stage.publish(cancel())
    assert len(stage.broker.canceled) == 3 and len(stage.published(CancelIntended)) == 1


async def test_cancel_that_never_gets_through_is_tried_again_at_a_tick(stage: Stage) -> None:
    await stage.approve()
    stage.broker.cancels = [Retryable("down")] * 3
    await stage.publish(cancel())
    stage.broker.open = [record()]
    stage.broker.records = [record(status="new"), record(status="canceled")]
    await stage.publish(ClockTicked(at=NOW))
    assert len(stage.broker.canceled) == 4 and not stage.agent.book.working()


async def test_cancel_of_an_unknown_order_waits_until_it_is_found(stage: Stage) -> None:
    stage.broker.answers = [OutcomeUnknown("timed out")]
    stage.broker.records = [Retryable("down")] * 3
    await stage.approve()
    await stage.publish(cancel())
    assert not stage.broker.canceled
    stage.broker.records = [record(status="canceled")]
    await stage.report("new")
    assert stage.broker.canceled == ["at-broker-c-1"]


async def test_order_found_after_its_cancel_was_wanted_is_canceled(stage: Stage) -> None:
    stage.broker.answers = [OutcomeUnknown("timed out")]
    track = None

    async def look_up(client_order_id: str) -> Order | None:
        found = stage.agent.book.get(client_order_id)
        assert found is not None
        found.cancel_wanted = True
        return record(status="canceled" if stage.broker.canceled else "new")

    stage.broker.order_by_client_id = look_up  # type: ignore[method-assign]
    await stage.approve()
    track = stage.agent.book.get("c-1")
    assert track is not None and track.state is OrderStatus.CANCELED and stage.broker.canceled


async def test_cancel_of_nothing_does_nothing(stage: Stage) -> None:
    await stage.publish(cancel("never seen"))
    assert not stage.broker.canceled


@pytest.mark.parametrize("action", ["cancel_all", "halt", "flatten"])
async def test_operator_cancels_everything_that_is_open(stage: Stage, action: Any) -> None:
    await stage.approve()
    await stage.approve(request("c-2"))
    await stage.fill("x-1", 10, 10, order_id="c-2")
    await stage.approve(request("c-3"))
    filled_not_recorded = record("c-3", "filled", 10)
    await stage.publish(TradeUpdated(event="fill", order=filled_not_recorded, timestamp=NOW))
    stage.broker.records = [record(status="canceled")]
    await stage.publish(OperatorCommand(action=action, reason="test", by="test"))
    assert stage.broker.canceled == ["at-broker-c-1"]


async def test_operator_who_flattens_closes_every_position_once(stage: Stage) -> None:
    held = (Position(symbol="IBM", qty=Decimal(7)), Position(symbol="AAPL", qty=Decimal(-2)))
    for _ in range(2):  # received twice, under the same correlation
        await stage.publish(OperatorCommand(action="flatten", reason="test", by="test", positions=held))
    sent = [(order.symbol, order.side, order.qty) for order in stage.broker.submitted]
    assert sent == [("IBM", OrderSide.SELL, 7), ("AAPL", OrderSide.BUY, 2)]
    assert len(stage.published(OrderIntended)) == 2


async def test_order_approved_before_risk_heard_of_the_halt_is_not_sent(stage: Stage) -> None:
    await stage.publish(OperatorCommand(action="halt", reason="test", by="test"))
    await stage.publish(TradingStateChanged(state=TradingState.REDUCING, reason="published before"))
    await stage.approve()
    assert not stage.broker.submitted and stage.published(OrderFailed)[0].outcome == "not_sent"
    await stage.publish(TradingStateChanged(state=TradingState.ACTIVE, reason="an operator"))
    await stage.approve(request("c-2"))
    assert [order.client_order_id for order in stage.broker.submitted] == ["c-2"]


async def test_order_is_not_sent_once_an_operator_has_stopped_the_session_from_outside(stage: Stage) -> None:
    stopped = [True, False]
    await stage.replace_agent(is_stopped=lambda: stopped.pop(0))
    await stage.approve()
    await stage.approve(request("c-2"))
    assert [order.client_order_id for order in stage.broker.submitted] == ["c-2"]


async def test_operator_who_reduces_cancels_nothing(stage: Stage) -> None:
    await stage.approve()
    await stage.publish(OperatorCommand(action="reduce", reason="test", by="test"))
    assert not stage.broker.canceled


# ---- what the stream left out


async def test_tick_without_open_orders_asks_nobody(stage: Stage) -> None:
    await stage.publish(ClockTicked(at=NOW))
    assert stage.broker.listed == 0


async def test_tick_leaves_alone_what_is_as_it_should_be(stage: Stage) -> None:
    await stage.approve()
    stage.broker.open = [record()]
    await stage.publish(ClockTicked(at=NOW))
    assert stage.broker.listed == 1 and not stage.broker.looked_up


async def test_tick_survives_a_broker_that_does_not_answer(stage: Stage) -> None:
    await stage.approve()
    stage.broker.open = Retryable("down")
    await stage.publish(ClockTicked(at=NOW))
    assert not stage.published(AgentFailed)


async def test_fill_that_the_stream_lost_is_repaired_from_the_record_after_a_grace(stage: Stage) -> None:
    await stage.approve()
    await stage.fill("x-1", 4, 4)
    whole = record(status="filled", filled=10, filled_avg_price=103, filled_at=NOW)
    stage.broker.records = [whole]
    await stage.publish(ClockTicked(at=NOW))  # sees that the order is no longer open
    assert stage.filled == 4
    stage.clock.advance_to(stage.clock.now() + timedelta(seconds=PATIENCE.grace_s))
    stage.broker.records = [Retryable("busy")]
    await stage.publish(ClockTicked(at=NOW))
    assert stage.filled == 4
    stage.broker.records = [whole]
    await stage.publish(ClockTicked(at=NOW))
    repaired = stage.published(FillRecorded)[-1].fill
    assert (repaired.qty, repaired.price) == (6, Decimal(105)) and repaired.execution_id.startswith("repair:")
    await stage.fill("x-2", 6, 10)  # the original, late
    assert stage.filled == 10 and not stage.agent.book.working()


async def test_repair_finds_nothing_to_repair(stage: Stage) -> None:
    await stage.approve()
    await stage.report("partially_filled", "restated", filled=4)
    stage.clock.advance_to(stage.clock.now() + timedelta(seconds=PATIENCE.grace_s))
    stage.broker.open = [record(status="partially_filled", filled=4)]
    stage.broker.records = [None]
    await stage.publish(ClockTicked(at=NOW))
    assert stage.filled == 0
    stage.broker.records = [record(status="partially_filled", filled=0)]
    await stage.publish(ClockTicked(at=NOW))
    assert stage.filled == 0
    stage.broker.records = [record(status="partially_filled", filled=4)]
    await stage.publish(ClockTicked(at=NOW))
    assert stage.filled == 4


async def test_order_that_stays_unanswered_for_is_given_up_once_the_broker_has_said_often_enough_that_it_has_none(
    stage: Stage,
) -> None:
    stage.broker.answers = [OutcomeUnknown("timed out")]
    stage.broker.records = [None, Retryable("down"), Retryable("down")]
    await stage.approve()
    assert stage.outcomes == ["unknown"]
    for _ in range(2):
        await stage.publish(ClockTicked(at=NOW))
    assert stage.outcomes == ["unknown", "not_sent"] and not stage.agent.book.working()
    assert len(stage.broker.submitted) == 1


async def test_order_that_arrives_after_it_was_given_up_is_found_at_a_tick_and_canceled(stage: Stage) -> None:
    stage.broker.answers = [OutcomeUnknown("timed out")]
    await stage.approve()
    assert stage.outcomes[-1] == "not_sent"
    await stage.publish(ClockTicked(at=NOW))  # still not there
    stage.broker.records = [record(status="new"), record(status="canceled")]
    await stage.publish(ClockTicked(at=NOW))
    assert stage.broker.canceled == ["at-broker-c-1"] and not stage.agent.book.working()


async def test_fills_of_an_order_that_arrived_after_it_was_given_up_are_repaired(stage: Stage) -> None:
    stage.broker.answers = [OutcomeUnknown("timed out")]
    await stage.approve()
    whole = record(status="filled", filled=10)
    stage.broker.records = [whole]
    await stage.publish(ClockTicked(at=NOW))
    stage.clock.advance_to(stage.clock.now() + timedelta(seconds=PATIENCE.grace_s))
    stage.broker.records = [whole]
    await stage.publish(ClockTicked(at=NOW))
    assert stage.filled == 10 and not stage.broker.canceled


async def test_message_that_a_repair_has_replaced_does_not_take_the_place_of_a_later_fill(stage: Stage) -> None:
    await stage.approve()
    await stage.report("partially_filled", "restated", filled=4)  # the fills themselves are under way
    stage.clock.advance_to(stage.clock.now() + timedelta(seconds=PATIENCE.grace_s))
    stage.broker.open = [record(status="partially_filled", filled=4)]
    stage.broker.records = [record(status="partially_filled", filled=4)]
    await stage.publish(ClockTicked(at=NOW))
    assert stage.filled == 4
    await stage.report("filled", "restated", filled=10)
    await stage.fill("x-1", 4, 4)  # late: what was repaired
    assert stage.filled == 4
    await stage.fill("x-2", 6, 10)
    assert stage.filled == 10 and [fill.fill.qty for fill in stage.published(FillRecorded)] == [4, 6]


async def test_repaired_price_is_as_exact_as_the_brokers_average(stage: Stage) -> None:
    await stage.approve()
    await stage.fill("x-1", 7, 7)
    whole = record(status="filled", filled=10, filled_avg_price=Decimal("100.333333"), filled_at=NOW)
    stage.broker.records = [whole]
    await stage.publish(ClockTicked(at=NOW))
    stage.clock.advance_to(stage.clock.now() + timedelta(seconds=PATIENCE.grace_s))
    stage.broker.records = [whole]
    await stage.publish(ClockTicked(at=NOW))
    assert stage.published(FillRecorded)[-1].fill.price == Decimal("101.111110")


# ---- orders that others placed


async def test_order_of_somebody_else_is_told_with_what_is_left_of_it(stage: Stage) -> None:
    await stage.report("new", order_id="theirs")
    await stage.fill("x-9", 3, 3, order_id="theirs")
    await stage.report("canceled", "canceled", order_id="theirs", filled=3)
    assert [adopted.remaining for adopted in stage.published(OrderAdopted)] == [10, 7, 0]
    assert [track.client_order_id for track in stage.agent.book.externals()] == []


async def test_order_of_somebody_else_over_an_amount_says_that_nobody_knows_what_is_left(stage: Stage) -> None:
    await stage.report("new", order_id="theirs", qty=None, notional=500)
    assert [adopted.remaining for adopted in stage.published(OrderAdopted)] == [None]


async def test_report_of_an_open_order_of_somebody_else_counts_it_from_there(stage: Stage) -> None:
    half = record("theirs", "partially_filled", 4)
    await stage.publish(OrdersReported(orders=(half,), counted=True))
    assert stage.filled == 0 and stage.published(OrderAdopted)[0].remaining == 6
    await stage.fill("x-2", 2, 6, order_id="theirs")
    assert stage.filled == 2 and stage.published(OrderAdopted)[-1].remaining == 4
    assert not stage.broker.canceled and not stage.published(OrderAcknowledged)


async def test_report_of_an_order_that_others_placed_meanwhile_counts_all_of_it(stage: Stage) -> None:
    whole = record("theirs", "filled", 10)
    await stage.publish(OrdersReported(orders=(whole,)))
    await stage.fill("x-1", 10, 10, order_id="theirs")  # the message itself, late
    assert [fill.fill.qty for fill in stage.published(FillRecorded)] == [10]
    assert stage.published(FillRecorded)[0].fill.execution_id == "repair:at-broker-theirs:10"


async def test_report_of_a_fill_that_was_missed_is_repaired_once(stage: Stage) -> None:
    await stage.approve()
    whole = record(status="filled", filled=10)
    await stage.publish(OrdersReported(orders=(whole,)), OrdersReported(orders=(whole,)))
    assert stage.filled == 10 and not stage.agent.book.working()


async def test_report_of_an_order_that_was_given_up_cancels_it(stage: Stage) -> None:
    stage.broker.answers = [OutcomeUnknown("timed out")]
    await stage.approve()
    assert stage.outcomes[-1] == "not_sent"
    stage.broker.records = [record(status="canceled")]
    await stage.publish(OrdersReported(orders=(record(status="new"),)))
    assert stage.broker.canceled == ["at-broker-c-1"] and not stage.agent.book.working()


async def test_bracket_of_somebody_else_is_followed_leg_by_leg(stage: Stage) -> None:
    profit = record("profit", "held", side="sell", type="limit", limit_price=110)
    stop = record("stop", "held", side="sell", type="stop", stop_price=90)
    await stage.report("new", order_id="theirs", order_class="bracket", legs=(profit, stop))
    await stage.fill("x-1", 10, 10, order_id="theirs", order_class="bracket", legs=(profit, stop))
    for leg in ("profit", "stop"):
        await stage.report("new", order_id=leg, side="sell")
    await stage.fill("x-2", 4, 4, order_id="profit", side="sell")
    await stage.fill("x-3", 6, 10, order_id="profit", side="sell")
    await stage.report("canceled", "canceled", order_id="stop", side="sell")
    fills = [(fill.fill.client_order_id, fill.fill.side.value, fill.fill.qty) for fill in stage.published(FillRecorded)]
    assert fills == [("theirs", "buy", 10), ("profit", "sell", 4), ("profit", "sell", 6)]
    assert not stage.agent.book.externals() and not stage.broker.canceled


# ---- orders that others replaced


def successor(status: str = "new", filled: float = 0, **fields: Any) -> Order:
    return record("by-hand", status, filled, replaces="at-broker-c-1", **fields)


def replaced(filled: float = 0, **fields: Any) -> Order:
    return record(status="replaced", filled=filled, replaced_by="at-broker-by-hand", **fields)


async def test_order_that_was_replaced_goes_on_under_our_name(stage: Stage) -> None:
    await stage.approve()
    await stage.fill("x-1", 4, 4)
    await stage.publish(TradeUpdated(event="replaced", order=replaced(4), timestamp=NOW))
    await stage.publish(TradeUpdated(event="new", order=successor(filled=4), timestamp=NOW))
    track = stage.agent.book.get("c-1")
    assert track is not None and track.is_open and stage.agent.book.working() == [track]
    last = {"order": successor("filled", 10, filled_avg_price=Decimal(100)), "qty": Decimal(6), "price": Decimal(100)}
    update = TradeUpdated(event="fill", execution_id="x-2", timestamp=NOW, **last)
    await stage.publish(update, update)
    fills = [(fill.fill.client_order_id, fill.fill.qty) for fill in stage.published(FillRecorded)]
    assert fills == [("c-1", 4), ("c-1", 6)] and not stage.agent.book.working()
    assert [answer.client_order_id for answer in stage.published(OrderAcknowledged)] == ["c-1"] * 4


async def test_replacement_that_the_stream_lost_is_found_at_a_tick_and_its_fills_are_repaired(stage: Stage) -> None:
    await stage.approve()
    await stage.fill("x-1", 4, 4)
    whole = successor("filled", 10, filled_avg_price=Decimal("98.5"), filled_at=NOW)
    stage.broker.records = [replaced(4), whole]
    await stage.publish(ClockTicked(at=NOW))
    assert stage.broker.looked_up == ["c-1", "at-broker-by-hand"]
    stage.clock.advance_to(stage.clock.now() + timedelta(seconds=PATIENCE.grace_s))
    stage.broker.records = [whole]
    await stage.publish(ClockTicked(at=NOW))
    repaired = stage.published(FillRecorded)[-1].fill
    assert (repaired.client_order_id, repaired.qty, repaired.price) == ("c-1", 6, Decimal("97.5"))
    assert stage.filled == 10 and not stage.agent.book.working()


async def test_successor_that_is_open_is_left_alone(stage: Stage) -> None:
    await stage.approve()
    stage.broker.records = [replaced(), successor()]
    await stage.publish(ClockTicked(at=NOW))
    stage.broker.open = [successor()]
    await stage.publish(ClockTicked(at=NOW))
    assert stage.broker.looked_up == ["c-1", "at-broker-by-hand"] and not stage.broker.canceled
    stage.broker.open, stage.broker.records = [], [successor("canceled")]
    await stage.publish(ClockTicked(at=NOW))
    assert stage.broker.looked_up[-1] == "at-broker-by-hand" and not stage.agent.book.working()


async def test_fill_of_a_successor_is_not_repaired_before_its_predecessor_is_known_to_have_ended(stage: Stage) -> None:
    await stage.approve()
    await stage.publish(TradeUpdated(event="new", order=successor("partially_filled", 4), timestamp=NOW))
    stage.clock.advance_to(stage.clock.now() + timedelta(seconds=PATIENCE.grace_s))
    stage.broker.open = [record(), successor("partially_filled", 4)]
    stage.broker.records = [successor("partially_filled", 4)]
    await stage.publish(ClockTicked(at=NOW))
    assert stage.filled == 0  # the four may be the first one's
    stage.broker.open = [successor("partially_filled", 4)]
    stage.broker.records = [replaced(4), successor("partially_filled", 4), record(status="replaced", filled=4)]
    await stage.publish(ClockTicked(at=NOW))
    stage.clock.advance_to(stage.clock.now() + timedelta(seconds=PATIENCE.grace_s))
    stage.broker.records = [record(status="replaced", filled=4)]
    await stage.publish(ClockTicked(at=NOW))
    assert [fill.fill.order_id for fill in stage.published(FillRecorded)] == ["at-broker-c-1"] and stage.filled == 4


async def test_cancel_that_meets_a_replacement_cancels_the_successor(stage: Stage) -> None:
    await stage.approve()
    stage.broker.cancels = [Rejected("gone", code=42210000, reason='order is already in "replaced" state')]
    stage.broker.records = [replaced(), successor(), successor("canceled")]
    await stage.publish(cancel())
    assert stage.broker.canceled == ["at-broker-c-1", "at-broker-by-hand"]
    assert not stage.agent.book.working() and len(stage.published(CancelIntended)) == 1


async def test_replacement_without_an_end_is_followed_a_bounded_number_of_times(stage: Stage) -> None:
    await stage.approve()
    stage.broker.records = [replaced()]
    stage.broker.records += [
        record(
            f"n-{n}", "replaced", id=f"n-{n}", replaces=f"n-{n - 1}" if n else "at-broker-c-1", replaced_by=f"n-{n + 1}"
        )
        for n in range(20)
    ]
    stage.broker.records[1] = record(
        "n-0", "replaced", id="at-broker-by-hand", replaces="at-broker-c-1", replaced_by="n-1"
    )
    stage.broker.records[2] = record("n-1", "replaced", id="n-1", replaces="at-broker-by-hand", replaced_by="n-2")
    await stage.publish(ClockTicked(at=NOW))
    assert len(stage.broker.looked_up) == REPLACEMENTS_MAX and stage.agent.book.working()


async def test_stop_leg_that_was_moved_by_hand_still_belongs_to_its_pair(stage: Stage) -> None:
    leg = record("stop", "held", type="stop", stop_price=90)
    stage.broker.answers = [record(legs=(leg,), type="limit", limit_price=110, order_class="oco")]
    await stage.approve(request(purpose="exit"))
    gone = record("stop", "replaced", type="stop", stop_price=90, replaced_by="moved")
    moved = record("moved", "held", id="moved", type="stop", stop_price=95, replaces="at-broker-stop")
    await stage.publish(TradeUpdated(event="replaced", order=gone, timestamp=NOW))
    await stage.report("new", legs=(moved,), type="limit", limit_price=110, order_class="oco")
    await stage.fill("x-1", 10, 10, order_id="moved", id="moved", replaces="at-broker-stop")
    fill = stage.published(FillRecorded)[0].fill
    assert (fill.client_order_id, fill.purpose, fill.order_id) == ("stop", "exit", "moved")


async def test_leg_that_fills_in_parts_and_ends_the_pair(stage: Stage) -> None:
    leg = record("stop", "held", type="stop", stop_price=90)
    stage.broker.answers = [record(legs=(leg,), type="limit", limit_price=110, order_class="oco")]
    await stage.approve(request(purpose="exit"))
    await stage.report("new", order_id="stop", type="stop", stop_price=90)
    await stage.fill("x-1", 4, 4, order_id="stop")
    await stage.fill("x-2", 6, 10, order_id="stop")
    await stage.report("canceled", "canceled", type="limit", limit_price=110)
    assert stage.filled == 10 and not stage.agent.book.working()


async def test_pair_of_which_a_person_cancels_a_leg_ends(stage: Stage) -> None:
    leg = record("stop", "held", type="stop", stop_price=90)
    stage.broker.answers = [record(legs=(leg,), type="limit", limit_price=110, order_class="oco")]
    await stage.approve(request(purpose="exit"))
    await stage.report("canceled", "canceled", order_id="stop")
    assert stage.agent.book.working()
    await stage.report("canceled", "canceled")
    assert not stage.agent.book.working() and stage.filled == 0


async def test_patience_doubles_up_to_its_cap_and_obeys_the_broker() -> None:
    assert [PATIENCE.pause(attempt).seconds for attempt in range(3)] == [1.0, 2.0, 2.0]
    assert PATIENCE.pause(0, 9.0).seconds == 9.0


async def test_an_agent_that_does_not_reach_the_broker_is_degraded(stage: Stage) -> None:
    assert stage.agent.health().state == "ok"
    stage.broker.trouble = ("Calls for orders are down.", "Calls for reads are down.")
    health = stage.agent.health()
    assert (health.state, health.reason) == ("degraded", "Calls for orders are down. Calls for reads are down.")
    stage.broker.trouble = ()
    assert stage.agent.health().state == "ok"
