"""A session that dies anywhere and is resumed gives the orders that it would have given, and sends none twice."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from trader_lib.config.settings import Settings, load_settings
from trader_lib.errors.taxonomy import BadData, InvariantBroken, Misused
from trader_lib.exchange.costs import Costs
from trader_lib.journal.journal import SqliteJournal
from trader_lib.session.session import SessionResult, run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.trading.events import OrderIntended, TradeUpdated

DAILY = SessionSpec(
    strategy="rsi_reversion",
    params={"period": 3, "entry": 45.0, "exit": 65.0, "stop_loss": 0.02, "take_profit": 0.03},
    symbols=("AAPL", "IBM"),
    start=date(2005, 1, 3),
    end=date(2005, 3, 31),
    costs=Costs(commission_per_share=0.01, slippage_bps=2.0),
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger.disable("trader_lib")
    yield
    logger.enable("trader_lib")


def settings(transport: str = "in_process") -> Settings:
    return load_settings(environ={}, env_file=None, overrides={"broker": {"transport": transport}})


async def whole(folder: Path, spec: SessionSpec = DAILY, transport: str = "in_process") -> SessionResult:
    folder.mkdir(parents=True, exist_ok=True)
    return await run_session(spec, settings(transport), journal_path=folder / "journal.sqlite")


async def resumed(folder: Path, spec: SessionSpec = DAILY, transport: str = "in_process") -> SessionResult:
    return await run_session(spec, settings(transport), journal_path=folder / "journal.sqlite", resume=True)


def cut(result: SessionResult, rows: int, folder: Path) -> Path:
    """The journal as it is after `rows` events, each of them committed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
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


async def test_every_torn_state_of_a_daily_session_is_resumed(tmp_path: Path) -> None:
    one = await whole(tmp_path / "whole")
    last = rows_of(one)
    assert len(one.orders) > 20 and any(order.purpose == "exit" for order in one.orders)
    first, step = int(os.environ.get("RESUME_FIRST", 1)), int(os.environ.get("RESUME_STEP", 7))
    for rows in sorted({*range(first, last, step), *range(1, 8), *range(last - 8, last)}):
        check(one, await resumed(cut(one, rows, tmp_path / "torn")), rows)
