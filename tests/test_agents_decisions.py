"""The strategy and risk agents where the ordinary course of a session does not lead: refusals, late news, strangers."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trader_lib.agents.contract import Agent
from trader_lib.agents.risk import RiskAgent
from trader_lib.agents.strategy import StrategyAgent, StrategyRules, last_closes
from trader_lib.bus.bus import InProcessBus
from trader_lib.clock.clock import VirtualClock
from trader_lib.clock.ids import SeededIds
from trader_lib.errors.taxonomy import InvariantBroken
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars
from trader_lib.risk.limits import Limits
from trader_lib.strategy.contract import Strategy
from trader_lib.strategy.exits import ProtectiveExits
from trader_lib.strategy.planner import Planner
from trader_lib.trading.events import (
    AccountReported,
    AgentFailed,
    BarRow,
    BarsClosed,
    CancelProposed,
    Event,
    FillRecorded,
    OperatorCommand,
    OrderAcknowledged,
    OrderAdopted,
    OrderFailed,
    OrderProposed,
    Payload,
    RiskDecided,
    TradeUpdated,
)
from trader_lib.trading.orders import Order, OrderRequest, OrderSide
from trader_lib.trading.portfolio import Fill

NOW = datetime(2005, 1, 5, 21, tzinfo=UTC)
BARS = sample_bars(["AAPL", "IBM"], start="2005-01-03", end="2005-02-28")


class Stage:
    """One agent on a bus; `publish` returns what it answered."""

    def __init__(self) -> None:
        self.bus = InProcessBus(VirtualClock(NOW), SeededIds("stage"), None, "stage")
        self.answers: list[Payload] = []

    async def play(self, agent: Agent) -> None:
        await agent.start()
        self.bus.subscribe("test", [*agent.emits, AgentFailed], self.collect)

    async def collect(self, event: Event) -> None:
        self.answers.append(event.payload)

    async def publish(self, *payloads: Payload) -> list[Any]:
        self.answers.clear()
        for payload in payloads:
            await self.bus.publish(payload, source="test", correlation_id="test")
        await self.bus.idle()
        return list(self.answers)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    made = Stage()
    yield made
    await made.bus.close()


def account(cash: float = 100_000) -> AccountReported:
    return AccountReported.model_validate({"cash": cash, "equity": cash, "buying_power": cash, "multiplier": 2})


def closed(row: int, bars: Bars = BARS) -> BarsClosed:
    rows = {symbol: BarRow(**values._asdict()) for symbol, values in bars.rows(row).items()}
    return BarsClosed(at=bars.at(row), closed_at=bars.at(row), bars=rows)


def fill_of(request: OrderRequest, execution: str, qty: Decimal, **fields: Any) -> FillRecorded:
    given = {
        "execution_id": execution,
        "order_id": "o",
        "client_order_id": request.client_order_id,
        "symbol": request.symbol,
        "side": request.side,
        "qty": qty,
        "price": Decimal(50),
        "timestamp": NOW,
        "purpose": request.purpose,
    }
    return FillRecorded(fill=Fill.model_validate(given | fields))


def order_of(request: OrderRequest, status: str, **fields: Any) -> Order:
    given = {
        "id": f"at-broker-{request.client_order_id}",
        "client_order_id": request.client_order_id,
        "symbol": request.symbol,
        "side": request.side,
        "qty": request.qty,
        "status": status,
        "submitted_at": NOW,
    }
    return Order.model_validate(given | fields)


# ---- strategy


class Swing(Strategy):
    """In on the first of every four bars, out on the third."""

    stop: bool = True

    @property
    def warmup(self) -> int:
        return 1

    @property
    def exits(self) -> ProtectiveExits | None:
        return ProtectiveExits(stop_loss=0.2, take_profit=0.5) if self.stop else None

    def targets(self, bars: Bars) -> NDArray[np.float64]:
        rows = np.arange(bars.n) % 4
        return np.where(rows < 2, 0.4, 0.0)[:, None] * np.ones((1, len(bars.symbols)))


async def strategy_agent(stage: Stage, **parameters: Any) -> StrategyAgent:
    strategy = Swing(**parameters)
    planner = Planner(BARS.symbols, exits=strategy.exits)
    agent = StrategyAgent(stage.bus, VirtualClock(NOW), StrategyRules(strategy, planner, "stage"), BARS.head(0))
    await stage.play(agent)
    await stage.publish(account())
    return agent


def requests(answers: list[Any]) -> list[OrderRequest]:
    return [answer.request for answer in answers if isinstance(answer, OrderProposed)]


def approved(*decided: OrderRequest) -> list[RiskDecided]:
    return [RiskDecided(request=request, decided_at=NOW, approved=True) for request in decided]


async def test_order_that_failed_is_proposed_again_at_the_next_bar(stage: Stage) -> None:
    agent = await strategy_agent(stage)
    first = requests(await stage.publish(closed(0)))
    assert [request.symbol for request in first] == ["AAPL", "IBM"]
    await stage.publish(*approved(*first))
    gone = [OrderFailed(client_order_id=first[0].client_order_id, reason="test", outcome="not_sent")]
    lost = [OrderFailed(client_order_id=first[1].client_order_id, reason="test", outcome="unknown")]
    await stage.publish(*gone, *lost)
    assert [request.symbol for request in requests(await stage.publish(closed(1)))] == ["AAPL"]
    assert agent.health().state == "ok"


async def test_order_that_a_look_up_finds_closed_is_closed(stage: Stage) -> None:
    await strategy_agent(stage)
    first = requests(await stage.publish(closed(0)))
    await stage.publish(*approved(*first))
    found = OrderAcknowledged(client_order_id=first[0].client_order_id, order=order_of(first[0], "rejected"))
    there = OrderAcknowledged(client_order_id=first[1].client_order_id, order=order_of(first[1], "accepted"))
    await stage.publish(found, there)
    assert [request.symbol for request in requests(await stage.publish(closed(1)))] == ["AAPL"]


class Broken(Swing):
    """Swings, until it finds itself impossible."""

    def targets(self, bars: Bars) -> NDArray[np.float64]:
        if bars.n > 1:
            raise InvariantBroken("This strategy has lost its way.")
        return super().targets(bars)


async def test_strategy_that_gave_up_is_not_asked_again_and_its_position_is_protected(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = Broken()
    planner = Planner(BARS.symbols, exits=strategy.exits)
    agent = StrategyAgent(stage.bus, VirtualClock(NOW), StrategyRules(strategy, planner, "stage"), BARS.head(0))
    await stage.play(agent)
    await stage.publish(account())
    first = requests(await stage.publish(closed(0)))
    await stage.publish(*approved(*first))
    (failure,) = await stage.publish(closed(1))
    assert isinstance(failure, AgentFailed) and "lost its way" in failure.error
    assert agent.health().state == "down" and agent.state.protects_only
    assert first[0].qty is not None
    await stage.publish(fill_of(first[0], "x-1", first[0].qty, price=Decimal(str(round(BARS.close[1, 0], 2)))))
    answers = await stage.publish(closed(2))
    assert [(request.symbol, request.purpose) for request in requests(answers)] == [("AAPL", "exit")]
    assert not [answer for answer in answers if isinstance(answer, AgentFailed)], "it is not asked any more"

    def lost(*_: Any) -> None:
        raise ValueError("our own books are wrong")

    monkeypatch.setattr(planner, "plan", lost)
    (failure,) = await stage.publish(closed(3))
    assert "our own books" in failure.error and not agent.state.protects_only
    missed = agent.health().missed
    assert not await stage.publish(closed(4)) and agent.health().missed == missed + 1


async def test_target_that_turns_cancels_the_order_at_work(stage: Stage) -> None:
    await strategy_agent(stage, stop=False)
    first = requests(await stage.publish(closed(0)))
    await stage.publish(*approved(*first))
    await stage.publish(closed(1))
    part = fill_of(first[0], "x-1", Decimal(10))
    await stage.publish(part)
    answers = await stage.publish(closed(2))
    canceled = [answer.client_order_id for answer in answers if isinstance(answer, CancelProposed)]
    assert canceled == [request.client_order_id for request in first] and not requests(answers)


async def protected(stage: Stage) -> list[OrderRequest]:
    """Two positions, bought at the first close; the exits that the second close asks for, approved."""
    entries = requests(await stage.publish(closed(0)))
    paid = [Decimal(str(round(float(BARS.close[0, n]), 2))) for n in range(len(entries))]
    bought = [fill_of(entry, entry.symbol, entry.qty, price=price) for entry, price in zip(entries, paid, strict=True)]
    cost = float(sum(price * entry.qty for entry, price in zip(entries, paid, strict=True)))
    await stage.publish(*approved(*entries), *bought, account(100_000 - cost))
    exits = [request for request in requests(await stage.publish(closed(1))) if request.purpose == "exit"]
    await stage.publish(*approved(*exits))
    return exits


async def test_refused_or_failed_order_brings_the_exit_back(stage: Stage) -> None:
    await strategy_agent(stage)
    exits = await protected(stage)
    assert [request.symbol for request in exits] == ["AAPL", "IBM"]
    answers = await stage.publish(closed(2))
    canceled = [answer.client_order_id for answer in answers if isinstance(answer, CancelProposed)]
    assert canceled == [request.client_order_id for request in exits]
    aapl, ibm = requests(answers)
    refusal = RiskDecided(request=aapl, decided_at=NOW, approved=False)
    (back,) = requests(await stage.publish(refusal))
    assert (back.symbol, back.purpose, back.limit_price) == ("AAPL", "exit", exits[0].limit_price)
    assert not await stage.publish(refusal)  # once is enough
    await stage.publish(*approved(ibm))
    failure = OrderFailed(client_order_id=ibm.client_order_id, reason="test", outcome="rejected")
    assert [request.symbol for request in requests(await stage.publish(failure))] == ["IBM"]


async def test_exit_that_is_due_already_does_not_come_back(stage: Stage) -> None:
    agent = await strategy_agent(stage)
    await protected(stage)
    aapl, _ = requests(await stage.publish(closed(2)))
    agent.rules.planner.avg_entry[0] = 2 * float(BARS.close[2, 0])  # the stop would lie above the market
    assert not await stage.publish(RiskDecided(request=aapl, decided_at=NOW, approved=False))


async def test_fills_of_strangers_and_of_orders_past_move_positions_only(stage: Stage) -> None:
    agent = await strategy_agent(stage, stop=False)
    first = requests(await stage.publish(closed(0)))
    await stage.publish(*approved(*first))
    planner = agent.rules.planner
    at_work = planner.working_qty.copy()
    stranger = first[0].model_copy(update={"client_order_id": "somebody else's"})
    await stage.publish(fill_of(stranger, "x-1", Decimal(5)))
    await stage.publish(fill_of(stranger, "x-2", Decimal(5), symbol="GOOG"))
    assert planner.positions.tolist() == [5.0, 0.0] and np.array_equal(planner.working_qty, at_work)


async def test_leg_of_a_pair_counts_for_the_pair(stage: Stage) -> None:
    agent = await strategy_agent(stage)
    pair, other = await protected(stage)
    leg = order_of(pair, "held", id="leg", client_order_id="theirs")
    parent = OrderAcknowledged(client_order_id=pair.client_order_id, order=order_of(pair, "accepted", legs=(leg,)))
    part = fill_of(other, "x-8", Decimal(1))
    await stage.publish(parent, fill_of(pair, "x-9", pair.qty, client_order_id="theirs"), part)
    planner = agent.rules.planner
    assert planner.positions[0] == 0 and planner.exit_qty[0] == 0 and planner.blocked_sign[0] == 1
    assert other.qty is not None and planner.exit_qty[1] == other.qty - 1


def test_last_closes_skip_what_is_missing() -> None:
    assert np.isnan(last_closes(BARS.head(0))).all()
    both = sample_bars(["AAPL", "FB"], end="2012-01-31")
    assert not np.isnan(last_closes(both)[0]) and np.isnan(last_closes(both)[1])


# ---- risk


def propose(order_id: str, qty: int = 10, symbol: str = "IBM", **fields: Any) -> OrderProposed:
    given = {"symbol": symbol, "side": OrderSide.BUY, "qty": Decimal(qty), "client_order_id": order_id}
    return OrderProposed(request=OrderRequest(**(given | fields)), reference_price=50.0, decided_at=NOW)


async def judge(stage: Stage, **limits: Any) -> RiskAgent:
    agent = RiskAgent(stage.bus, VirtualClock(NOW), Limits(**limits), BARS.head(3))
    await stage.play(agent)
    await stage.publish(account())
    return agent


async def test_proposal_before_the_first_bar_is_a_bug_that_stops_the_agent(stage: Stage) -> None:
    agent = await judge(stage)
    (failure,) = await stage.publish(propose("c-1"))
    assert isinstance(failure, AgentFailed) and agent.health().state == "down"


async def test_what_is_on_its_way_counts_until_it_is_closed(stage: Stage) -> None:
    agent = await judge(stage, max_position_qty=15, duplicate_window_s=None)
    await stage.publish(closed(3))
    first = propose("c-1")
    (decided,) = await stage.publish(first)
    assert decided.approved
    (decided,) = await stage.publish(propose("c-2"))
    assert [check.name for check in decided.checks if not check.passed] == ["POSITION_QTY"]
    unknown = OrderFailed(client_order_id="c-1", reason="test", outcome="unknown")
    (decided,) = await stage.publish(unknown, propose("c-3"))
    assert not decided.approved
    ack = OrderAcknowledged(client_order_id="c-1", order=order_of(first.request, "accepted"))
    part = TradeUpdated(event="fill", order=order_of(first.request, "filled", filled_qty=10), timestamp=NOW)
    await stage.publish(ack, part, fill_of(first.request, "x-1", Decimal(4)))
    book = agent.state.books[""]
    assert book.qty.tolist() == [0.0, 4.0] and book.working["c-1"].remaining == 6
    await stage.publish(
        fill_of(first.request, "x-2", Decimal(6)), fill_of(first.request, "x-3", Decimal(1), symbol="GOOG")
    )
    assert not book.working and book.qty.tolist() == [
        0.0,
        10.0,
        1.0,
    ]  # others' symbols too
    for number, end in enumerate(("not_sent", "rejected", "acknowledged", "updated")):
        order = propose(f"e-{number}", 5)
        (decided,) = await stage.publish(order)
        assert decided.approved and book.working
        name = order.request.client_order_id
        gone: Payload
        if end == "acknowledged":
            gone = OrderAcknowledged(client_order_id=name, order=order_of(order.request, "expired"))
        elif end == "updated":
            gone = TradeUpdated(event="canceled", order=order_of(order.request, "canceled"), timestamp=NOW)
        else:
            gone = OrderFailed.model_validate({"client_order_id": name, "reason": "test", "outcome": end})
        await stage.publish(gone)
        assert not book.working


async def test_exit_is_approved_and_not_counted_as_on_its_way(stage: Stage) -> None:
    agent = await judge(stage)
    await stage.publish(closed(3), fill_of(propose("c-1").request, "x-1", Decimal(10)))
    (decided,) = await stage.publish(propose("c-2", side=OrderSide.SELL, purpose="exit"))
    assert decided.approved and not agent.state.books[""].working


async def test_operator_who_only_cancels_changes_no_state(stage: Stage) -> None:
    await judge(stage)
    assert not await stage.publish(OperatorCommand(action="cancel_all", reason="test", by="test"))


async def test_day_start_moves_with_the_session(stage: Stage) -> None:
    agent = await judge(stage)
    await stage.publish(closed(3), fill_of(propose("c-1").request, "x-1", Decimal(100)), account(90_000))
    assert agent.state.books[""].day_start == 100_000
    await stage.publish(closed(4))
    assert agent.state.books[""].day_start == 100_000 and agent.state.books[""].equity < 100_000
    equity = agent.state.books[""].equity
    await stage.publish(closed(5))
    assert agent.state.books[""].day_start == equity


async def test_order_of_somebody_else_counts_as_on_its_way_until_it_is_closed(stage: Stage) -> None:
    agent = await judge(stage, max_position_qty=15, duplicate_window_s=None)
    await stage.publish(closed(3))
    theirs = order_of(propose("by hand").request, "new")
    await stage.publish(OrderAdopted(order=theirs, remaining=Decimal(10)))
    (decided,) = await stage.publish(propose("c-1"))
    assert [check.name for check in decided.checks if not check.passed] == ["POSITION_QTY"]
    assert agent.state.books[""].working["by hand"].cost > 0
    await stage.publish(OrderAdopted(order=theirs, remaining=Decimal(0)))
    (decided,) = await stage.publish(propose("c-2"))
    assert decided.approved


async def test_order_of_somebody_else_over_an_amount_counts_by_the_last_close(stage: Stage) -> None:
    agent = await judge(stage)
    await stage.publish(closed(3))
    request = propose("by hand").request
    theirs = order_of(request, "new", qty=None, notional=Decimal(1000))
    await stage.publish(OrderAdopted(order=theirs, remaining=None))
    close = float(BARS.close[3, 1])
    assert agent.state.books[""].working["by hand"].remaining == pytest.approx(1000 / close)
    elsewhere = order_of(request, "new", symbol="FB", client_order_id="elsewhere")
    unpriced = order_of(request, "new", qty=None, client_order_id="unpriced")
    await stage.publish(
        OrderAdopted(order=elsewhere, remaining=Decimal(1)), OrderAdopted(order=unpriced, remaining=None)
    )
    assert list(agent.state.books[""].working) == ["by hand", "elsewhere"]


async def test_order_that_was_replaced_is_on_its_way_until_its_line_has_ended(stage: Stage) -> None:
    agent = await judge(stage)
    await stage.publish(closed(3), propose("c-1"))
    request = propose("c-1").request
    gone = order_of(request, "replaced", replaced_by="o-2")
    await stage.publish(TradeUpdated(event="replaced", order=gone, timestamp=NOW))
    assert "c-1" in agent.state.books[""].working
    follower = order_of(request, "filled", id="o-2", client_order_id="by hand", replaces=gone.id, filled_qty=6)
    await stage.publish(OrderAcknowledged(client_order_id="c-1", order=follower))
    assert "c-1" in agent.state.books[""].working
    await stage.publish(OrderAcknowledged(client_order_id="c-1", order=follower, settled=True))
    assert not agent.state.books[""].working
