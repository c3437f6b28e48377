"""Brackets, trailing stops and every time in force, from a proposal to the broker and back, torn and replayed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from alpaca.trading.client import TradingClient

from tests.test_session_resume import cut, fresh, settings, torn_rows
from trader_lib.agents.contract import Reaction, drive
from trader_lib.agents.execution import Cancel, ExecutionState, FindOrder, Patience, on_command, on_trading_state
from trader_lib.agents.risk import RiskAgent, judge, open_order
from trader_lib.agents.strategy import StrategyAgent
from trader_lib.agents.tracking import has_life
from trader_lib.broker.alpaca import AlpacaBroker
from trader_lib.broker.connection import AlpacaAccess
from trader_lib.bus.bus import InProcessBus
from trader_lib.clock.clock import VirtualClock
from trader_lib.clock.ids import SeededIds
from trader_lib.exchange.costs import Costs
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.journal.journal import SqliteJournal
from trader_lib.market.sample import sample_bars
from trader_lib.recovery.rebuild import Rebuild, request_of
from trader_lib.replay import fresh as replay_module
from trader_lib.replay.replay import replay
from trader_lib.risk.limits import Limits
from trader_lib.session import wiring
from trader_lib.session.session import SessionResult, run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.trading.events import (
    BarsClosed,
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
    OrderProposed,
    Payload,
    ReplaceIntended,
    ReplaceProposed,
    RiskDecided,
    TradingState,
    TradingStateChanged,
)
from trader_lib.trading.orders import Order, OrderRequest, OrderStatus, OrderType, ReplaceRequest, decimal_text

pytestmark = pytest.mark.usefixtures("quiet")

SPEC = SessionSpec(
    strategy="sma_cross", symbols=("IBM",), start=date(2005, 1, 3), end=date(2005, 1, 21), costs=Costs.none()
)
Wish = Mapping[str, Any] | str | tuple[str, Mapping[str, Any]]  # an order's fields; what to cancel; what to move, how
Script = Mapping[int, Sequence[Wish]]  # by the number of the bar
FIELDS = {"limit_price", "stop_price", "take_profit_price", "stop_loss_price", "stop_loss_limit_price"}


class Scripted(StrategyAgent):
    """Proposes what a script says; prices are given as multiples of the close."""

    emits = (*StrategyAgent.emits, ReplaceProposed)
    script: ClassVar[Script] = {}

    def reactions(self) -> Mapping[type[Payload], Reaction]:
        return {
            BarsClosed: lambda event: self.act(event.payload),
            OrderAcknowledged: lambda event: self.note(event.payload),
        }

    def act(self, closed: BarsClosed) -> Iterator[Payload]:
        before = self.bars.n
        self.take(closed, self.rules.planner.columns)
        close = closed.bars["IBM"].close
        number = before - self.first
        for n, wish in enumerate(self.script.get(number, ())):
            if isinstance(wish, str):
                yield CancelProposed(client_order_id=self.name_of(wish), reason="as written", decided_at=closed.at)
                continue
            if isinstance(wish, tuple):
                moved = ReplaceRequest.model_validate(
                    self.priced(wish[1], close) | {"client_order_id": f"{number}-{n}"}
                )
                about = {"client_order_id": self.name_of(wish[0]), "reason": "as written", "decided_at": closed.at}
                yield ReplaceProposed(request=moved, **about)
                continue
            priced = self.priced(wish, close)
            request = OrderRequest.model_validate(
                {"symbol": "IBM", "side": "buy", "qty": 10, "client_order_id": f"{number}-{n}"} | priced
            )
            yield OrderProposed(request=request, reference_price=close, decided_at=closed.at)

    @staticmethod
    def priced(wish: Mapping[str, Any], close: float) -> dict[str, Any]:
        return {
            name: Decimal(str(round(value * close, 2))) if name in FIELDS else value for name, value in wish.items()
        }

    def name_of(self, wish: str) -> str:
        """The client order id of an order; "leg" and "target" are those of the last group that was acknowledged."""
        return self.state.parents.get(wish, wish)

    def note(self, acknowledged: OrderAcknowledged) -> None:
        for leg in acknowledged.order.legs:
            self.state.parents["target" if leg.stop_price is None else "leg"] = leg.client_order_id

    @property
    def first(self) -> int:
        if not hasattr(self, "_first"):
            self._first = self.bars.n
        return self._first


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Script], None]:
    built = wiring.build_strategy_agent

    def put(script: Script) -> None:
        def build(*parts: Any, **more: Any) -> StrategyAgent:
            kind = type("Acts", (Scripted,), {"script": script})
            agent = built(*parts, **more | {"kind": kind, "played": None})
            agent.first  # the bars before the session's first
            return agent

        for module in (wiring, replay_module):
            monkeypatch.setattr(module, "build_strategy_agent", build)

    return put


async def play(folder: Path, transport: str = "in_process", spec: SessionSpec = SPEC, **more: Any) -> SessionResult:
    return await run_session(spec, settings(transport), journal_path=folder / "journal.sqlite", **more)


def said(result: SessionResult, kind: type[Payload]) -> list[Any]:
    with SqliteJournal(result.journal_path, read_only=True) as journal:
        return [event.payload for event in journal.read(types=[kind])]


def shown(result: SessionResult) -> list[tuple[str, str, str, str]]:
    """Purpose, type, status and shares filled of every order of the order list."""
    return [(row.purpose, row.type.value, row.status.value, decimal_text(row.filled_qty)) for row in result.orders]


BRACKET = {"order_class": "bracket", "time_in_force": "gtc", "take_profit_price": 1.5, "stop_loss_price": 0.99}


@pytest.mark.parametrize("transport", ["in_process", "http"])
async def test_a_bracket_is_sent_as_one_order_and_its_stop_ends_its_target(
    transport: str, tmp_path: Path, scripted: Callable[[Script], None]
) -> None:
    scripted({1: [BRACKET]})
    result = await play(fresh(tmp_path / "one"), transport)
    assert result.status == "completed", [h.reason for h in result.health]
    assert result.reconciliation.ok and not result.reconciliation.discrepancies
    assert shown(result) == [
        ("entry", "market", "filled", "10"),
        ("exit", "limit", "canceled", "0"),
        ("exit", "stop", "filled", "10"),
    ]
    assert [request.request.client_order_id for request in said(result, OrderIntended)] == ["1-0"]
    entry, stopped = (fill.fill for fill in said(result, FillRecorded))
    assert (entry.purpose, entry.parent, stopped.purpose, stopped.parent) == ("entry", "", "exit", "1-0")
    assert not said(result, OrderAdopted) and not said(result, OrderFailed)
    with SqliteJournal(result.journal_path, read_only=True) as journal:
        assert (await replay(journal)).agrees


async def test_a_bracket_gives_the_same_orders_over_http(tmp_path: Path, scripted: Callable[[Script], None]) -> None:
    scripted({1: [BRACKET], 6: [BRACKET | {"type": "limit", "limit_price": 0.999, "stop_loss_limit_price": 0.98}]})
    one, other = await play(fresh(tmp_path / "near")), await play(fresh(tmp_path / "far"), "http")
    assert one.order_list_hash == other.order_list_hash and one.equity_end == other.equity_end


async def test_torn_anywhere_a_session_with_a_bracket_gives_the_same_orders(
    tmp_path: Path, scripted: Callable[[Script], None]
) -> None:
    scripted({1: [BRACKET], 6: [BRACKET | {"side": "sell", "take_profit_price": 0.5, "stop_loss_price": 1.01}]})
    one = await play(fresh(tmp_path / "whole"))
    assert len(one.orders) == 6
    for rows in torn_rows(one, 5):
        folder = cut(one, rows, tmp_path / "torn")
        other = await play(folder, resume=True)
        assert other.order_list_hash == one.order_list_hash and other.reconciliation.ok, rows
        assert (other.equity_end, other.cash_end) == (one.equity_end, one.cash_end), rows
        names = [intent.request.client_order_id for intent in said(other, OrderIntended)]
        assert names == ["1-0", "6-0"] and not said(other, OrderAdopted), rows


MOVES = {
    1: [{}],
    2: [{"side": "sell", "type": "stop", "stop_price": 0.95, "time_in_force": "gtc", "purpose": "exit"}],
    4: [("2-0", {"stop_price": 0.96})],
    5: [("2-0", {"stop_price": 1.2})],  # above the price: the stop is touched at once
}


@pytest.mark.parametrize("transport", ["in_process", "http"])
async def test_an_exit_is_moved_by_a_replacement_and_fills_under_its_first_name(
    transport: str, tmp_path: Path, scripted: Callable[[Script], None]
) -> None:
    scripted(MOVES)
    result = await play(fresh(tmp_path / "one"), transport)
    assert result.status == "completed", [h.reason for h in result.health]
    assert result.reconciliation.ok and not result.reconciliation.discrepancies
    assert shown(result) == [
        ("entry", "market", "filled", "10"),
        ("exit", "stop", "replaced", "0"),
        ("exit", "stop", "replaced", "0"),
        ("exit", "stop", "filled", "10"),
    ]
    fills = [fill.fill for fill in said(result, FillRecorded)]
    assert [(fill.client_order_id, fill.purpose, fill.parent) for fill in fills] == [
        ("1-0", "entry", ""),
        ("2-0", "exit", ""),
    ]
    assert [intent.client_order_id for intent in said(result, ReplaceIntended)] == ["2-0", "2-0"]
    assert not said(result, OrderFailed) and not said(result, OrderAdopted) and not said(result, CancelIntended)
    with SqliteJournal(result.journal_path, read_only=True) as journal:
        assert (await replay(journal)).agrees


async def test_torn_anywhere_a_session_that_moves_exits_gives_the_same_orders(
    tmp_path: Path, scripted: Callable[[Script], None]
) -> None:
    group = {
        7: [BRACKET | {"stop_loss_price": 0.9}],
        9: [("leg", {"stop_price": 0.92})],
        10: [("leg", {"stop_price": 1.1})],
    }
    scripted(MOVES | group)
    one = await play(fresh(tmp_path / "whole"))
    assert [row.status for row in one.orders][-2:] == [OrderStatus.REPLACED, OrderStatus.FILLED]
    for rows in torn_rows(one, 5):
        other = await play(cut(one, rows, tmp_path / "torn"), resume=True)
        assert other.order_list_hash == one.order_list_hash and other.reconciliation.ok, rows
        assert (other.equity_end, other.cash_end) == (one.equity_end, one.cash_end), rows
        names = [intent.request.client_order_id for intent in said(other, ReplaceIntended)]
        assert len(names) == len(set(names)) and not said(other, OrderAdopted), rows


async def test_every_kind_of_order_goes_through_a_session(tmp_path: Path, scripted: Callable[[Script], None]) -> None:
    exit_ = {"side": "sell", "purpose": "exit"}
    scripted(
        {
            1: [{"time_in_force": "ioc"}],
            3: [{**exit_, "type": "trailing_stop", "trail_percent": "0.2", "time_in_force": "gtc"}],
            6: [{"order_class": "oto", "time_in_force": "gtc", "take_profit_price": 0.9}],
            8: [{"time_in_force": "fok", "type": "limit", "limit_price": 0.5}],
            9: [{"time_in_force": "opg"}, {"type": "limit", "limit_price": 0.5, "extended_hours": True}],
        }
    )
    result = await play(fresh(tmp_path / "one"))
    assert result.status == "completed" and result.reconciliation.ok and not result.reconciliation.discrepancies
    assert shown(result) == [
        ("entry", "market", "filled", "10"),
        ("exit", "trailing_stop", "filled", "10"),
        ("entry", "market", "filled", "10"),
        ("exit", "limit", "filled", "10"),
        ("entry", "limit", "canceled", "0"),
        ("entry", "limit", "expired", "0"),
    ]
    (refused,) = [decision for decision in said(result, RiskDecided) if not decision.approved]
    assert refused.request.time_in_force.value == "opg"  # it is four o'clock: so would the broker
    with SqliteJournal(result.journal_path, read_only=True) as journal:
        assert (await replay(journal)).agrees


async def test_a_leg_is_canceled_by_its_own_name_and_its_pair_goes_with_it(
    tmp_path: Path, scripted: Callable[[Script], None]
) -> None:
    scripted({1: [BRACKET | {"stop_loss_price": 0.5}], 4: ["target"], 6: [{"side": "sell", "purpose": "exit"}]})
    result = await play(fresh(tmp_path / "one"))
    assert result.reconciliation.ok and not result.reconciliation.discrepancies
    assert shown(result) == [
        ("entry", "market", "filled", "10"),
        ("exit", "limit", "canceled", "0"),
        ("exit", "stop", "canceled", "0"),
        ("exit", "market", "filled", "10"),
    ]


async def test_the_end_of_a_session_takes_the_legs_along(tmp_path: Path, scripted: Callable[[Script], None]) -> None:
    waits = {"type": "limit", "limit_price": 0.5, "stop_loss_price": 0.4}
    scripted({1: [BRACKET | {"stop_loss_price": 0.5}], 3: [BRACKET | waits]})
    result = await play(fresh(tmp_path / "one"))
    assert result.reconciliation.ok and not result.reconciliation.discrepancies
    assert [row[2] for row in shown(result)] == ["filled", "canceled", "canceled", *["canceled"] * 3]


# ---- what an operator and a threshold do to a group

NOW = datetime(2005, 1, 3, 21, tzinfo=UTC)
EVENT = Event(
    id="e-1",
    seq=1,
    time=NOW,
    recorded_at=NOW,
    correlation_id="the bar's",
    source="test",
    session_id="a session",
    payload=ClockTicked(at=NOW),
)


def group(name: str, status: str, filled: int, legs: str) -> tuple[OrderRequest, Order]:
    """A bracket as it was asked for, and the broker's record of it."""
    request = OrderRequest.model_validate(
        {"symbol": "IBM", "side": "buy", "qty": 10, "client_order_id": name, "order_class": "bracket"}
        | {"take_profit_price": "110", "stop_loss_price": "90"}
    )
    about = {"symbol": "IBM", "qty": 10, "submitted_at": NOW, "order_class": "bracket"}
    halves = [
        about | {"id": f"{name}-{n}", "client_order_id": f"{name} {n}", "side": "sell", "status": legs} for n in (1, 2)
    ]
    price = {"filled_avg_price": 100} if filled else {}
    own = {"id": name, "client_order_id": name, "side": "buy", "status": status, "filled_qty": filled, "legs": halves}
    return request, Order.model_validate(about | own | price)


def held_groups() -> ExecutionState:
    """An entry that waits, and one that has filled and left its exits."""
    state = ExecutionState()
    for name, status, filled, legs in (("waits", "new", 0, "held"), ("filled", "filled", 10, "new")):
        request, order = group(name, status, filled, legs)
        track = state.book.plan(request, "the bar's")
        state.book.observe(track, order, NOW)
        track.filled_qty = track.reported_qty
        track.behind_since = None
    return state


def canceled(steps: list[Any]) -> list[str]:
    return [step.order_id for step in steps if isinstance(step, Cancel)]


def test_a_threshold_cancels_the_entry_that_waits_and_leaves_the_exits_of_the_other() -> None:
    state, halt = held_groups(), TradingStateChanged(state="HALTED", reason="a loss", exits_pass=True)
    gone = group("waits", "canceled", 0, "canceled")[1]
    steps = drive(on_trading_state(state, Patience(), halt, EVENT), {FindOrder: [gone]})
    assert canceled(steps) == ["waits"]  # its own exits end with it
    waits, filled = (state.book.get(name) for name in ("waits", "filled"))
    assert waits is not None and not has_life(waits) and filled is not None and has_life(filled)
    assert not drive(on_trading_state(state, Patience(), halt, EVENT))


@pytest.mark.parametrize("action", ["halt", "cancel_all", "flatten"])
def test_an_operator_cancels_whatever_is_open_the_exits_too(action: str) -> None:
    state, command = held_groups(), OperatorCommand(action=action, reason="a test", by="somebody")  # type: ignore[arg-type]
    gone = group("waits", "canceled", 0, "canceled")[1]
    legs = group("filled", "filled", 10, "canceled")[1].legs
    steps = drive(on_command(state, Patience(), command, EVENT), {FindOrder: [gone, *legs]})
    assert canceled(steps) == ["waits", "filled-1", "filled-2"] and not state.book.working()


# ---- what risk sees


def judged(fields: Mapping[str, Any], **world: Any) -> list[str]:
    """Why risk refuses an order at a last price of 100."""
    bars = sample_bars(["IBM"], end="2005-01-31")
    agent = RiskAgent(InProcessBus(VirtualClock(NOW), SeededIds("risk"), None, "s"), VirtualClock(NOW), Limits(), bars)
    agent.state.market.mark[0], agent.state.market.time_s[0] = 100.0, NOW.timestamp()
    book = agent.state.books[""]
    book.cash = book.equity = book.peak = book.day_start = 10_000.0
    for name, value in world.items():
        setattr(book, name, value)
    request = OrderRequest.model_validate(
        {"symbol": "IBM", "side": "buy", "qty": 10, "client_order_id": "a"} | dict(fields)
    )
    outcomes, costs = judge(agent.rules, agent.state, request, NOW)
    assert costs[""] == (1_000.0 if request.side.value == "buy" else 0.0)
    return [outcome.name for outcome in outcomes if not outcome.passed]


def test_a_bracket_costs_and_exposes_what_its_entry_does() -> None:
    legs = {"order_class": "bracket", "take_profit_price": "110", "stop_loss_price": "90"}
    assert judged(legs) == judged({}) == []
    assert judged(legs | {"stop_loss_price": "100"}) == ["CAPABILITY"]  # a stop at the last price
    assert judged(legs, state=TradingState.REDUCING) == judged({}, state=TradingState.REDUCING) == ["TRADING_STATE"]
    assert judged(legs, equity=900.0, cash=900.0) == judged({}, equity=900.0, cash=900.0)


def test_groups_and_trailing_stops_rest_beside_opposite_orders() -> None:
    resting = OrderRequest(symbol="IBM", side="sell", qty=1, type="limit", limit_price="99", client_order_id="r")
    trailing = resting.model_copy(update={"type": OrderType.TRAILING_STOP})
    legs = {"order_class": "bracket", "take_profit_price": "110", "stop_loss_price": "90"}
    assert judged({}, open={"r": open_order(resting, 0, 1.0)}) == ["WASH_TRADE"]
    assert judged(legs, open={"r": open_order(resting, 0, 1.0)}) == []
    assert judged({}, open={"r": open_order(trailing, 0, 1.0)}) == []
    sell = {"side": "sell", "type": "trailing_stop", "trail_percent": "1", "purpose": "exit"}
    entry = OrderRequest(symbol="IBM", side="buy", qty=1, type="limit", limit_price="99", client_order_id="r")
    assert judged(sell, qty=np.array([10.0]), open={"r": open_order(entry, 0, 1.0)}) == []


# ---- what the broker says of a group


async def test_legs_that_an_answer_leaves_out_are_asked_for(
    alpaca_access: AlpacaAccess, exchange_server: ExchangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = AlpacaBroker(alpaca_access, symbols=exchange_server.exchange.symbols, timeframe="1Day")
    await broker.start()
    request = group("entry", "new", 0, "held")[0].model_copy(
        update={"take_profit_price": Decimal(9999), "stop_loss_price": Decimal(1)}
    )
    sent = await broker.submit(request)
    asked = TradingClient.get_order_by_client_id

    def bare(client: TradingClient, name: str) -> Any:
        return asked(client, name).model_copy(update={"legs": None})  # type: ignore[union-attr]

    monkeypatch.setattr(TradingClient, "get_order_by_client_id", bare)
    found = await broker.order_by_client_id("entry")
    await broker.stop()
    assert found == sent and len(found.legs) == 2


def test_an_order_of_somebody_else_is_asked_for_again_as_it_was() -> None:
    exchange = Exchange(sample_bars(["IBM"], end="2005-01-31"), 3)
    for fields in (
        {"order_class": "bracket", "take_profit_price": "999", "stop_loss_price": "9", "stop_loss_limit_price": "8"},
        {"order_class": "oto", "take_profit_price": "999"},
        {"type": "trailing_stop", "trail_price": "3", "time_in_force": "gtc"},
        {"type": "limit", "limit_price": "9", "extended_hours": True},
    ):
        about = {"symbol": "IBM", "side": "buy", "qty": 10, "client_order_id": str(len(exchange.orders()))}
        request = OrderRequest.model_validate(about | fields)
        assert request_of(Rebuild(exchange, iter(()), None, 0), exchange.submit(request)) == request
