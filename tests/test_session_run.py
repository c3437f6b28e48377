"""A session begins in order, repeats itself exactly, stops when asked, and leaves a journal that says how it was."""

import asyncio
import os
import signal
import socket
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trader_lib.broker.in_process import InProcessBroker
from trader_lib.config.settings import Settings, load_settings
from trader_lib.errors.taxonomy import BadData, InvariantBroken, Misconfigured, Misused, Retryable
from trader_lib.exchange.costs import Costs
from trader_lib.exchange.engine import Exchange
from trader_lib.journal.journal import SqliteJournal
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.replay.replay import replay
from trader_lib.session.session import SessionResult, run_session, stop_on_signals
from trader_lib.session.spec import SessionSpec
from trader_lib.strategy.contract import Strategy
from trader_lib.trading.events import (
    AgentFailed,
    FillRecorded,
    OrderAcknowledged,
    OrderAdopted,
    Reconciled,
    SessionEnded,
    TradingStateChanged,
)
from trader_lib.trading.orders import Order, OrderRequest, OrderSide, OrderStatus
from trader_lib.trading.portfolio import Position

SPEC = SessionSpec(params={"fast": 5, "slow": 15}, start=date(2005, 1, 3), end=date(2005, 3, 31))


pytestmark = pytest.mark.usefixtures("quiet")


def settings(**sections: dict[str, Any]) -> Settings:
    given = {"broker": {"transport": "in_process"}} | sections
    return load_settings(environ={}, env_file=None, overrides=given)


async def run(folder: Path, spec: SessionSpec = SPEC, **more: Any) -> SessionResult:
    os.makedirs(folder, exist_ok=True)
    given = {"settings": settings(), "journal_path": folder / "journal.sqlite"} | more
    return await run_session(spec, **given)


def payloads(result: SessionResult, kind: Any) -> list[Any]:
    with SqliteJournal(result.journal_path, read_only=True) as journal:
        return [event.payload for event in journal.read(types=[kind])]


def journal_of(folder: Path) -> SqliteJournal:
    return SqliteJournal(folder / "journal.sqlite", read_only=True)


# ---- repeating


@pytest.mark.parametrize("transport", ["in_process", "http"])
async def test_two_runs_write_the_same_journal_byte_for_byte(transport: str, tmp_path: Path) -> None:
    wire = settings(broker={"transport": transport})
    one = await run(tmp_path / "a", settings=wire)
    other = await run(tmp_path / "b", settings=wire)
    assert one.journal_path.read_bytes() == other.journal_path.read_bytes()
    with SqliteJournal(one.journal_path, read_only=True) as journal:
        assert journal.verify().ok and journal.last_seq > 200


@pytest.mark.parametrize("transport", ["in_process", "http"])
async def test_open_market_repeats_byte_for_byte_too(transport: str, tmp_path: Path) -> None:
    bars = synthetic_bars(("AAPL", "IBM", "MSFT"), "2010-03-08", "2010-03-10", timeframe="15Min", seed=5)
    spec = SessionSpec(
        strategy="rsi_reversion",
        params={"period": 5},
        timeframe="15Min",
        start=date(2010, 3, 9),
        end=date(2010, 3, 10),
        costs=Costs(volume_share=0.002),
    )
    wire = settings(broker={"transport": transport})
    one = await run(tmp_path / "a", spec, settings=wire, bars=bars)
    other = await run(tmp_path / "b", spec, settings=wire, bars=bars)
    assert one.orders and one.journal_path.read_bytes() == other.journal_path.read_bytes()


async def test_another_seed_is_another_session(tmp_path: Path) -> None:
    one = await run(tmp_path / "a")
    other = await run(tmp_path / "b", SPEC.model_copy(update={"seed": 1}))
    assert one.session_id != other.session_id and one.order_list_hash == other.order_list_hash


async def test_result_reads_back_from_the_journal(tmp_path: Path) -> None:
    seen: list[tuple[int, datetime]] = []
    result = await run(tmp_path, progress=lambda count, at: seen.append((count, at)))
    assert [count for count, _ in seen] == list(range(1, result.bars + 1))
    assert len(result.equity) == result.bars and result.curve["cash"].iloc[-1] == float(result.cash_end)
    assert result.status == "completed" and result.data is not None and result.data.source == "sample"
    assert {agent.agent for agent in result.health} > {"risk", "execution", "strategy"}
    ended = payloads(result, SessionEnded)
    assert [end.equity for end in ended] == [result.equity_end]
    assert not [order for order in result.orders if order.status in {OrderStatus.NEW, OrderStatus.ACCEPTED}]


# ---- stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signal_stops_in_good_order(number: signal.Signals, tmp_path: Path) -> None:
    def interrupt(count: int, at: datetime) -> None:
        if count == 30:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    result = await run(tmp_path, progress=interrupt)
    assert result.status == "interrupted" and 30 <= result.bars < 40
    assert result.reconciliation.ok and signal.getsignal(number) is before
    assert all(order.status is not OrderStatus.ACCEPTED for order in result.orders)
    with journal_of(tmp_path) as journal:
        assert journal.verify().ok
    assert len(payloads(result, SessionEnded)) == 1


async def test_a_second_signal_changes_nothing_and_a_third_does_not_wait() -> None:
    stop, began = asyncio.Event(), []
    with pytest.raises(asyncio.CancelledError):
        with stop_on_signals(stop):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.wait_for(stop.wait(), 5)
                await asyncio.sleep(0.01)
            began.append("third")
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(5)
    assert began


async def test_signals_are_left_alone_off_the_main_thread() -> None:
    async def within() -> bool:
        with stop_on_signals(asyncio.Event()):
            return True

    before = signal.getsignal(signal.SIGINT)
    assert await asyncio.to_thread(lambda: asyncio.run(within()))
    assert signal.getsignal(signal.SIGINT) is before


# ---- beginning


def with_account(monkeypatch: pytest.MonkeyPatch, prepare: Any) -> None:
    """Let an account have a past before the session's exchange is handed over."""
    begin = Exchange.__init__

    def made(exchange: Exchange, *arguments: Any, **named: Any) -> None:
        begin(exchange, *arguments, **named)
        prepare(exchange)

    monkeypatch.setattr(Exchange, "__init__", made)


async def test_position_that_is_there_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def buy(exchange: Exchange) -> None:
        exchange._ledger.fill(1, 100.0, 95.0, 0.0)

    with_account(monkeypatch, buy)
    result = await run(tmp_path)
    first = payloads(result, FillRecorded)[0].fill
    assert (first.execution_id, first.qty, first.price) == ("opening:IBM", 100, 95)
    assert result.reconciliation.ok, result.reconciliation.differences


def by_hand(name: str, **fields: Any) -> OrderRequest:
    given = {"symbol": "IBM", "side": OrderSide.BUY, "qty": Decimal(7), "client_order_id": name}
    return OrderRequest(**(given | fields))


@pytest.mark.parametrize("transport", ["in_process", "http"])
async def test_orders_of_somebody_else_are_adopted_counted_and_left_alone(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanges: list[Exchange] = []

    def order(exchange: Exchange) -> None:
        exchanges.append(exchange)
        exchange.submit(by_hand("to be filled"))
        rests = {"type": "limit", "limit_price": Decimal(1), "time_in_force": "gtc"}
        exchange.submit(by_hand("to rest", **rests))

    with_account(monkeypatch, order)
    result = await run(tmp_path, settings=settings(broker={"transport": transport}))
    first = payloads(result, Reconciled)[0]
    assert first.ok and {(one.kind, one.resolution) for one in first.discrepancies} == {("external_order", "adopted")}
    assert [told.order.client_order_id for told in payloads(result, OrderAdopted)][:2] == ["to rest", "to be filled"]
    fills = [said.fill for said in payloads(result, FillRecorded) if said.fill.client_order_id == "to be filled"]
    assert [fill.qty for fill in fills] == [7]
    left = exchanges[0].order_by_client_order_id("to rest")
    assert left.status is OrderStatus.EXPIRED and not exchanges[0].orders(), "after 90 days, and canceled by nobody"
    assert result.reconciliation.ok and not result.reconciliation.discrepancies
    held = {position.symbol: position.qty for position in result.positions}
    assert held == {position.symbol: position.qty for position in exchanges[0].positions()}


async def test_session_cancels_its_protective_exits_at_its_end_and_nothing_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanges: list[Exchange] = []

    def order(exchange: Exchange) -> None:
        exchanges.append(exchange)
        rests = {"type": "stop", "stop_price": Decimal(10_000), "time_in_force": "gtc"}
        exchange.submit(by_hand("theirs", **rests))

    with_account(monkeypatch, order)

    def look(count: int, at: datetime) -> None:
        seen.append([left.order_class.value or left.type.value for left in exchanges[0].orders() if is_exit(left)])

    def is_exit(left: Order) -> bool:
        return "-exit-" in left.client_order_id

    seen: list[list[str]] = []
    spec = SPEC.model_copy(update={"strategy": "rsi_reversion", "params": {"period": 3}, "end": date(2005, 6, 30)})
    result = await run(tmp_path, spec, progress=look)
    assert any(seen) and result.positions, "the session never held a protected position"
    theirs = exchanges[0].order_by_client_order_id("theirs")
    assert theirs.status is OrderStatus.EXPIRED and not exchanges[0].orders(), "after 90 days, and canceled by nobody"
    assert result.reconciliation.ok


async def test_stop_that_a_person_moves_is_followed_under_our_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanges: list[Exchange] = []
    with_account(monkeypatch, exchanges.append)
    moved: list[str] = []

    def move(count: int, at: datetime) -> None:
        for resting in exchanges[0].orders():
            if not moved and resting.status is OrderStatus.NEW and resting.stop_price is not None:
                nearer = (resting.stop_price * Decimal("1.07")).quantize(Decimal("0.01"))
                exchanges[0].replace(resting.id, {"stop_price": nearer})
                moved.append(resting.client_order_id)

    spec = SPEC.model_copy(
        update={
            "strategy": "rsi_reversion",
            "params": {"period": 3, "stop_loss": 0.08, "take_profit": None, "entry": 40.0, "exit": 99.0},
            "end": date(2006, 6, 30),
        }
    )
    result = await run(tmp_path, spec, progress=move)
    assert moved, "no stop rested"
    told = [ack for ack in payloads(result, OrderAcknowledged) if ack.order.replaces is not None]
    fills = [said.fill for said in payloads(result, FillRecorded) if said.fill.client_order_id == moved[0]]
    assert told and {ack.client_order_id for ack in told} == set(moved) and told[-1].settled
    assert [fill.purpose for fill in fills] == ["exit"] * len(fills)
    assert fills or told[-1].order.status is OrderStatus.CANCELED
    assert not payloads(result, OrderAdopted) and not payloads(result, AgentFailed)
    assert all(one.ok and not one.discrepancies for one in payloads(result, Reconciled))
    assert (await replay(journal_of(tmp_path))).agrees


async def test_books_are_compared_after_so_many_bars(tmp_path: Path) -> None:
    result = await run(tmp_path, settings=settings(session={"reconcile_bars": 10}))
    found = payloads(result, Reconciled)
    assert len(found) == 2 + result.bars // 10 and all(one.ok and not one.discrepancies for one in found)
    assert (
        result.reconciled_at is not None and result.order_list_hash == (await run(tmp_path / "plain")).order_list_hash
    )


async def test_fill_that_no_message_told_is_found_at_the_end_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def order(exchange: Exchange) -> None:
        tell = exchange._floor._tell

        def silent(event: str, order: Any, *more: Any, **named: Any) -> None:
            if order.client_order_id != "unheard":
                tell(event, order, *more, **named)

        exchange._floor._tell = silent
        exchange.submit(by_hand("unheard"))

    with_account(monkeypatch, order)
    result = await run(tmp_path)
    repaired = [said.fill for said in payloads(result, FillRecorded) if said.fill.client_order_id == "unheard"]
    assert [fill.qty for fill in repaired] == [7] and repaired[0].execution_id.startswith("repair:")
    kinds = [(one.kind, one.resolution) for one in result.reconciliation.discrepancies]
    assert result.reconciliation.ok and ("missed_fill", "repaired") in kinds


async def test_start_at_the_first_bar_needs_no_history(tmp_path: Path) -> None:
    result = await run(tmp_path, SPEC.model_copy(update={"start": None, "end": date(2000, 3, 31)}))
    assert result.orders and result.reconciliation.ok


async def test_port_in_use_is_a_readable_refusal(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        wire = settings(broker={"transport": "http"}, exchange={"port": port})
        with pytest.raises(Misconfigured, match=f"cannot listen on 127.0.0.1:{port}"):
            await run(tmp_path, settings=wire)


async def test_unwritable_journal_is_a_readable_refusal(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="journal"):
        await run_session(SPEC, settings(), journal_path=tmp_path / "missing" / "journal.sqlite")


async def test_bars_cannot_be_played_at_alpaca(tmp_path: Path) -> None:
    real = settings(broker={"kind": "alpaca", "key_id": "k", "secret_key": "s"})
    with pytest.raises(Misused, match="embedded exchange only"):
        await run(tmp_path, settings=real, bars=sample_bars(["IBM"]))


@pytest.mark.parametrize("wrong", [{"symbols": ("XXXX",)}, {"end": date(2030, 1, 2)}, {"strategy": "sma_corss"}])
async def test_what_is_not_there_is_refused_before_anything_is_written(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises((BadData, Misused)):
        await run(tmp_path, SPEC.model_copy(update=wrong))
    assert not os.listdir(tmp_path)


# ---- failing on the way


class Faltering(Strategy):
    """Buys and holds, but chokes on every tenth bar."""

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars: Bars) -> NDArray[np.float64]:
        if bars.n % 10 == 0:
            raise ZeroDivisionError("no opinion today")
        return np.full((bars.n, len(bars.symbols)), 0.3)


async def test_strategy_that_raises_is_isolated_and_the_session_ends_in_order(tmp_path: Path) -> None:
    result = await run(tmp_path, SPEC.model_copy(update={"end": date(2005, 2, 15)}), strategy=Faltering())
    strategy = next(agent for agent in result.health if agent.agent == "strategy")
    assert strategy.state == "degraded" and strategy.failed == 3 and "no opinion today" in strategy.reason
    assert result.status == "completed" and result.orders and result.reconciliation.ok
    assert len(payloads(result, AgentFailed)) == 3


async def test_execution_that_fails_stops_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send, calls = InProcessBroker.submit, []

    async def submit(broker: InProcessBroker, request: OrderRequest) -> Order:
        order = await send(broker, request)
        calls.append(request)
        if len(calls) == 3:
            raise TypeError("an answer that cannot be read")
        return order

    monkeypatch.setattr(InProcessBroker, "submit", submit)
    result = await run(tmp_path)
    changed = payloads(result, TradingStateChanged)
    assert [change.state.value for change in changed] == ["REDUCING"] and "execution" in changed[0].reason
    bought_after = [no for no in result.refusals if "TRADING_STATE" in no.checks]
    assert bought_after and result.reconciliation.ok
    assert len({request.client_order_id for request in calls}) == len(calls)


async def test_broken_feed_ends_the_session_in_order_and_is_raised(tmp_path: Path) -> None:
    bars_seen: list[int] = []

    def sabotage(count: int, at: datetime) -> None:
        bars_seen.append(count)
        if count == 20:
            raise InvariantBroken("the progress bar burst")

    with pytest.raises(InvariantBroken, match="burst"):
        await run(tmp_path, progress=sabotage)
    with journal_of(tmp_path) as journal:
        ended = [event.payload for event in journal.read(types=[SessionEnded])]
        assert journal.verify().ok
    assert len(bars_seen) == 20 and len(ended) == 1 and isinstance(ended[0], SessionEnded)
    assert "burst" in ended[0].reason


async def test_end_that_fails_as_well_does_not_hide_the_first_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = False

    async def positions_or_not(broker: InProcessBroker) -> tuple[Position, ...]:
        if broken:
            raise Retryable("the broker is gone")
        return await positions(broker)

    def sabotage(count: int, at: datetime) -> None:
        nonlocal broken
        broken = True
        raise InvariantBroken("the progress bar burst")

    positions = InProcessBroker.positions
    monkeypatch.setattr(InProcessBroker, "positions", positions_or_not)
    with pytest.raises(InvariantBroken, match="burst") as raised:
        await run(tmp_path, progress=sabotage)
    assert any("the broker is gone" in note for note in raised.value.__notes__)
    monkeypatch.setattr(InProcessBroker, "positions", positions)

    async def gone(broker: InProcessBroker) -> tuple[Position, ...]:
        if broker._exchange.is_over:
            raise Retryable("the broker is gone")
        return await positions(broker)

    monkeypatch.setattr(InProcessBroker, "positions", gone)
    with pytest.raises(Retryable, match="gone"):
        await run(tmp_path / "again")
    with journal_of(tmp_path / "again") as journal:
        assert journal.verify().ok


async def test_what_does_not_reconcile_at_the_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def more(broker: InProcessBroker) -> tuple[Position, ...]:
        held = await positions(broker)
        return (*held, Position(symbol="FB", qty=Decimal(7))) if broker._exchange.is_over else held

    positions = InProcessBroker.positions
    monkeypatch.setattr(InProcessBroker, "positions", more)
    result = await run(tmp_path)
    assert not result.reconciliation.ok
    assert "the broker holds 7 FB, our fills add up to 0" in result.reconciliation.differences[0]


# ---- in a notebook


@pytest.mark.slow
async def test_interrupt_in_a_kernel_stops_in_good_order(tmp_path: Path) -> None:
    from jupyter_client.manager import AsyncKernelManager

    manager = AsyncKernelManager(kernel_name="python3")
    await manager.start_kernel(cwd=str(tmp_path))
    client = manager.client()
    client.start_channels()
    said: list[str] = []
    try:
        await client.wait_for_ready(timeout=60)
        code = (
            "from trader_lib import SessionSpec, run_session, load_settings\n"
            "from datetime import date\n"
            "settings = load_settings(environ={}, env_file=None, overrides={'broker': {'transport': 'http'}})\n"
            "spec = SessionSpec(params={'fast': 5, 'slow': 15}, start=date(2005, 1, 3), end=date(2012, 12, 31))\n"
            "say = lambda count, at: print('bar', count, flush=True)\n"
            "result = await run_session(spec, settings, journal_path='journal.sqlite', progress=say)\n"
            "print('ended', result.status, result.reconciliation.ok)\n"
        )
        client.execute(code)
        interrupted = False
        async with asyncio.timeout(120):
            while not any("ended interrupted" in text or "ended completed" in text for text in said):
                message = await client.get_iopub_msg()
                if message["msg_type"] == "stream":
                    said.append(message["content"]["text"])
                assert message["msg_type"] != "error", message["content"]["traceback"]
                if not interrupted and any("bar 20" in text for text in said):
                    interrupted = True
                    await manager.interrupt_kernel()
    finally:
        client.stop_channels()
        await manager.shutdown_kernel(now=True)
    assert "ended interrupted True" in "".join(said)
    with journal_of(tmp_path) as journal:
        assert journal.verify().ok
