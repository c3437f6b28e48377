"""A session that dies anywhere and is resumed gives the orders that it would have given, and sends none twice."""

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from datetime import date, datetime
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest

from tests.venue import as_alpaca, beside, goes_on, recent_minutes
from trader_lib.broker.in_process import InProcessBroker
from trader_lib.config.settings import Settings, load_settings
from trader_lib.errors.taxonomy import BadData, InvariantBroken, Misused
from trader_lib.exchange.costs import Costs
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.journal.journal import SqliteJournal
from trader_lib.market.bars import Bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.replay.replay import replay
from trader_lib.session.drivers import STOPPED
from trader_lib.session.session import SessionResult, run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.strategy.rsi_reversion import RsiReversion
from trader_lib.trading.events import (
    AccountReported,
    BarsClosed,
    CancelIntended,
    OperatorCommand,
    OrderIntended,
    SessionEnded,
    TradeUpdated,
)
from trader_lib.trading.order_list import order_list_hash
from trader_lib.trading.orders import OrderStatus

DAILY = SessionSpec(
    strategy="rsi_reversion",
    params={"period": 3, "entry": 45.0, "exit": 65.0, "stop_loss": 0.02, "take_profit": 0.03},
    symbols=("AAPL", "IBM"),
    start=date(2005, 1, 3),
    end=date(2005, 2, 18),
    costs=Costs(commission_per_share=0.01, slippage_bps=2.0),
)


pytestmark = pytest.mark.usefixtures("quiet")


def settings(transport: str = "in_process") -> Settings:
    return load_settings(environ={}, env_file=None, overrides={"broker": {"transport": transport}})


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


async def whole(folder: Path, spec: SessionSpec = DAILY, transport: str = "in_process") -> SessionResult:
    return await run_session(spec, settings(transport), journal_path=fresh(folder) / "journal.sqlite")


async def resumed(folder: Path, spec: SessionSpec = DAILY, transport: str = "in_process") -> SessionResult:
    return await run_session(spec, settings(transport), journal_path=folder / "journal.sqlite", resume=True)


def cut(result: SessionResult, rows: int, folder: Path) -> Path:
    """The journal as it is after `rows` events, each of them committed."""
    fresh(folder)
    with (
        SqliteJournal(result.journal_path, read_only=True) as journal,
        SqliteJournal(folder / "journal.sqlite") as torn,
    ):
        for event in journal.read():
            if event.seq <= rows:
                torn.append(event)
    return folder


def check(one: SessionResult, other: SessionResult, rows: int) -> None:
    """The same orders, fills and money; every order once; a whole journal that goes on where it broke off."""
    assert other.order_list_hash == one.order_list_hash, rows
    assert other.status == one.status and other.reconciliation.ok, rows
    assert (other.equity_end, other.cash_end, other.bars) == (one.equity_end, one.cash_end, one.bars), rows
    with SqliteJournal(one.journal_path, read_only=True) as left, SqliteJournal(other.journal_path) as right:
        assert right.verify().ok, rows
        names = [event.payload.request.client_order_id for event in right.read(types=[OrderIntended])]  # type: ignore[attr-defined]
        assert len(names) == len(set(names)), rows
        for kind in (OrderIntended, TradeUpdated):
            assert [event.payload for event in left.read(types=[kind])] == [
                event.payload for event in right.read(types=[kind])
            ], rows
        kept = [event.to_json() for event in left.read() if event.seq <= rows]
        assert kept == [event.to_json() for event in right.read() if event.seq <= rows]


def rows_of(result: SessionResult) -> int:
    with SqliteJournal(result.journal_path, read_only=True) as journal:
        return journal.last_seq


def torn_rows(result: SessionResult, step: int) -> list[int]:
    """Where to tear a journal: every `step` events, and densely at both ends; every event with RESUME_EVERY=1."""
    last = rows_of(result)
    step = int(os.environ.get("RESUME_EVERY", step))
    return sorted({*range(1, last, step), *range(1, 5), *range(max(last - 6, 1), last)})


async def test_torn_anywhere_a_daily_session_with_exits_gives_the_same_orders(tmp_path: Path) -> None:
    one = await whole(tmp_path / "whole", DAILY)
    assert len(one.orders) > 10 and any(order.purpose == "exit" for order in one.orders)
    for rows in torn_rows(one, 41):
        check(one, await resumed(cut(one, rows, tmp_path / "torn"), DAILY), rows)


async def test_torn_around_a_split_it_gives_the_same_orders(tmp_path: Path) -> None:
    """AAPL split 2 for 1 on 28 February 2005: the position, what rests and what is known of it are split once."""
    spec = DAILY.model_copy(
        update={
            "adjustment": "raw",
            "params": {"period": 3, "entry": 99.0, "exit": 99.5, "stop_loss": 0.2},
            "start": date(2005, 2, 14),
            "end": date(2005, 3, 4),
        }
    )
    one = await whole(tmp_path / "whole", spec)
    assert one.corporate_actions == ("AAPL split 2 for 1 after the close of 2005-02-25.",)
    with SqliteJournal(one.journal_path, read_only=True) as journal:
        bars = [event for event in journal.read(types=[BarsClosed]) if isinstance(event.payload, BarsClosed)]
        split = next(event.seq for event in bars if event.payload.actions)
        after = next(event.seq for event in bars if event.seq > split)
    assert any(order.symbol == "AAPL" and order.status is OrderStatus.EXPIRED for order in one.orders)
    for rows in (split - 1, split, (split + after) // 2):
        check(one, await resumed(cut(one, rows, tmp_path / "torn"), spec), rows)
    with SqliteJournal(one.journal_path, read_only=True) as journal:
        again = await replay(journal)
    assert again.agrees, again.sentence()


async def test_torn_anywhere_in_two_bars_of_decisions_and_fills(tmp_path: Path) -> None:
    one = await whole(tmp_path / "whole", DAILY)
    with SqliteJournal(one.journal_path, read_only=True) as journal:
        busy = next(event.seq for event in journal.read(types=[CancelIntended]))
    for rows in range(busy - 6, busy + 5):
        check(one, await resumed(cut(one, rows, tmp_path / "torn"), DAILY), rows)


async def test_torn_inside_an_open_market_it_gives_the_same_orders(tmp_path: Path) -> None:
    bars = synthetic_bars(("AAPL", "IBM"), "2010-03-08", "2010-03-10", timeframe="15Min", seed=5)
    spec = SessionSpec(
        strategy="rsi_reversion",
        params={"period": 5},
        symbols=("AAPL", "IBM"),
        timeframe="15Min",
        start=date(2010, 3, 9),
        end=date(2010, 3, 10),
        costs=Costs(volume_share=0.002),  # fills come in parts
    )
    path = fresh(tmp_path / "whole") / "journal.sqlite"
    one = await run_session(spec, settings(), bars=bars, journal_path=path)
    assert any(len(order.fills) > 1 for order in one.orders)
    for rows in torn_rows(one, 71):
        folder = cut(one, rows, tmp_path / "torn")
        other = await run_session(spec, settings(), bars=bars, journal_path=folder / "journal.sqlite", resume=True)
        check(one, other, rows)


async def test_over_http_too(tmp_path: Path) -> None:
    one = await whole(tmp_path / "whole", DAILY, "http")
    for rows in torn_rows(one, 131):
        check(one, await resumed(cut(one, rows, tmp_path / "torn"), DAILY, "http"), rows)


async def test_dying_again_and_again_changes_nothing(tmp_path: Path) -> None:
    one = await whole(tmp_path / "whole", DAILY)
    last, rows = rows_of(one), 3
    folder = cut(one, rows, tmp_path / "torn")
    while rows < last:
        other = await resumed(folder, DAILY)
        rows = max(rows + 40, 1)
        if rows < rows_of(other):
            folder = cut(other, rows, tmp_path / f"torn-{rows}")
        else:
            break
    check(one, other, 3)


# ---- real deaths

DIE = """
import asyncio, os, signal, sys
from pathlib import Path
from trader_lib.journal.journal import SqliteJournal
sys.path.insert(0, {tests!r})
from test_session_resume import DAILY, settings
from trader_lib.market.bars import Bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.session.drivers import STOPPED
from trader_lib.session.session import run_session

append, last = SqliteJournal.append, [0]

def deadly(self, event):
    append(self, event)
    last[0] += 1
    if last[0] == {rows}:
        os.kill(os.getpid(), signal.SIGKILL)

SqliteJournal.append = deadly
asyncio.run(run_session(DAILY, settings({transport!r}), journal_path=Path({path!r}), resume=True))
"""


@pytest.mark.parametrize("transport", ["in_process", "http"])
async def test_killed_processes_are_resumed(transport: str, tmp_path: Path) -> None:
    one = await whole(tmp_path / "whole", DAILY, transport)
    path = fresh(tmp_path / "killed") / "journal.sqlite"
    for rows in (100, 60):  # killed, and its successor too
        script = DIE.format(tests=str(Path(__file__).parent), rows=rows, transport=transport, path=str(path))
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stderr=subprocess.DEVNULL)
        assert await process.wait() == -signal.SIGKILL
    with SqliteJournal(path) as journal:
        assert journal.verify().ok and journal.last_seq > 100
    check(one, await resumed(path.parent, DAILY, transport), 1)


# ---- refusals


async def test_session_that_ended_gives_its_result_again(tmp_path: Path) -> None:
    one = await whole(tmp_path / "whole")
    before = rows_of(one)
    other = await resumed(tmp_path / "whole")
    check(one, other, before)
    assert rows_of(other) == before and other.reason == one.reason


async def test_session_that_ended_is_worth_what_it_was_worth_then(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Found by seed 51558: what the account has become since is not the session's doing."""
    one, answer = await whole(tmp_path / "whole"), InProcessBroker.account

    async def richer(self: InProcessBroker) -> AccountReported:
        account = await answer(self)
        return account.model_copy(update={"equity": account.equity + 7, "cash": account.cash + 7})

    monkeypatch.setattr(InProcessBroker, "account", richer)
    other = await resumed(tmp_path / "whole")
    assert (other.equity_end, other.cash_end) == (one.equity_end, one.cash_end)


async def test_session_that_did_not_end_is_not_started_over(tmp_path: Path) -> None:
    torn = cut(await whole(tmp_path / "whole"), 50, tmp_path / "torn")
    with pytest.raises(Misused, match="holds a session already"):
        await run_session(DAILY, settings(), journal_path=torn / "journal.sqlite")
    with pytest.raises(Misused, match="other parameters"):
        await resumed(torn, DAILY.model_copy(update={"seed": 3}))


async def test_session_that_ended_in_a_failure_is_not_resumed(tmp_path: Path) -> None:
    one = await whole(tmp_path / "whole")
    torn = cut(one, 50, tmp_path / "torn")
    with SqliteJournal(torn / "journal.sqlite") as journal:
        last = list(journal.read())[-1]
        end = SessionEnded(reason="Retryable: nobody answered.")
        journal.append(last.model_copy(update={"seq": 51, "id": "end", "source": "session", "payload": end}))
    with pytest.raises(Misused, match="ended in a failure: Retryable: nobody answered"):
        await resumed(torn)


async def test_session_that_was_asked_to_stop_only_stops(tmp_path: Path) -> None:
    one = await whole(tmp_path / "whole")
    torn = cut(one, 120, tmp_path / "torn")
    with SqliteJournal(torn / "journal.sqlite") as journal:
        last = list(journal.read())[-1]
        stop = OperatorCommand(action="cancel_all", reason=STOPPED, by="session")
        journal.append(last.model_copy(update={"seq": 121, "id": "stop", "source": "session", "payload": stop}))
    result = await resumed(torn)
    assert result.status == "interrupted" and result.bars < one.bars and result.reconciliation.ok
    assert order_list_hash(result.orders) == result.order_list_hash


async def test_edited_journal_is_not_resumed(tmp_path: Path) -> None:
    torn = cut(await whole(tmp_path / "whole"), 50, tmp_path / "torn")
    connection = sqlite3.connect(torn / "journal.sqlite")
    connection.execute("UPDATE events SET payload = replace(payload, '1', '2') WHERE seq = 20")
    connection.commit()
    connection.close()
    with pytest.raises(BadData, match="event 20 was changed"):
        await resumed(torn)


class Other(RsiReversion):
    """The same name and parameters, and a different mind."""

    name: ClassVar[str] = "rsi_reversion"

    def targets(self, bars: Bars) -> pd.DataFrame:
        return super().targets(bars) * 0.5


async def test_another_version_of_a_strategy_does_not_go_on(tmp_path: Path) -> None:
    torn = cut(await whole(tmp_path / "whole"), 200, tmp_path / "torn")
    path = torn / "journal.sqlite"
    with pytest.raises(InvariantBroken, match="The strategy agent published targets_decided"):
        await run_session(DAILY, settings(), strategy=Other(**DAILY.params), journal_path=path, resume=True)
    with SqliteJournal(path) as journal:
        assert journal.last_seq == 200  # nothing was sent, nothing was written


# ---- at Alpaca, whose record outlives us


@pytest.mark.slow
async def test_session_at_alpaca_goes_on_where_it_died(tmp_path: Path) -> None:
    bars = recent_minutes()
    path = fresh(tmp_path / "live") / "journal.sqlite"
    with ExchangeServer(Exchange(bars, bars.n - 80), key_id="key", secret_key="secret") as server:
        broker = as_alpaca(server)
        wire = load_settings(environ={}, env_file=None, overrides={"broker": broker})
        spec = SessionSpec(params={"fast": 2, "slow": 4}, symbols=("AAPL", "IBM"), timeframe="1Min", bars_max=14)
        dead = asyncio.Event()

        def die(count: int, at: datetime) -> None:
            if count == 7:
                dead.set()

        async with asyncio.timeout(100):
            async with beside(goes_on(server)):
                first = asyncio.create_task(run_session(spec, wire, journal_path=path, progress=die))
                await dead.wait()
                first.cancel()  # no drain, no last word: as if it were killed
                await asyncio.gather(first, return_exceptions=True)
            for _ in range(3):  # what was open fills, and nobody hears of it
                await asyncio.to_thread(server.call, server.exchange.advance)
            async with beside(goes_on(server)):
                result = await run_session(spec, wire, journal_path=path, resume=True)
        sent = server.call(lambda: server.exchange.orders(open_only=False))
    assert result.bars >= 14 and result.reconciliation.ok, result.reconciliation.differences
    with SqliteJournal(path) as journal:
        assert journal.verify().ok
        intended = [event.payload.request.client_order_id for event in journal.read(types=[OrderIntended])]  # type: ignore[attr-defined]
    assert sorted(intended) == sorted(order.client_order_id for order in sent) and len(set(intended)) == len(intended)
