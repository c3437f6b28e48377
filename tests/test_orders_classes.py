"""Brackets, trailing stops and every time in force, from a proposal to the broker and back, torn and replayed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.test_session_resume import cut, fresh, settings, torn_rows
from trader_lib.agents.contract import Reaction
from trader_lib.agents.strategy import StrategyAgent
from trader_lib.exchange.costs import Costs
from trader_lib.journal.journal import SqliteJournal
from trader_lib.replay import fresh as replay_module
from trader_lib.replay.replay import replay
from trader_lib.session import wiring
from trader_lib.session.session import SessionResult, run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.trading.events import (
    BarsClosed,
    CancelIntended,
    CancelProposed,
    FillRecorded,
    OrderAcknowledged,
    OrderAdopted,
    OrderFailed,
    OrderIntended,
    OrderProposed,
    Payload,
    ReplaceIntended,
    ReplaceProposed,
)
from trader_lib.trading.orders import OrderRequest, OrderStatus, ReplaceRequest, decimal_text

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
