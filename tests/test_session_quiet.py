"""Bars that pass together: the same events, orders and limits as one by one, in fewer rows; and a death among them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from trader_lib import SessionSpec, SmaCross, load_settings, run_session, synthetic_bars
from trader_lib.journal.journal import SqliteJournal
from trader_lib.market.bars import Bars
from trader_lib.replay.replay import replay
from trader_lib.session.companions import SessionParts
from trader_lib.session.session import SessionResult
from trader_lib.strategy.contract import Strategy
from trader_lib.trading.events import SLICED, BarsClosed, BarsSlice, Event, TradingStateChanged

SETTINGS = load_settings(overrides={"broker": {"kind": "simulated", "transport": "in_process"}}, env_file=None)
SPEC: dict[str, Any] = {"strategy": "sma_cross", "symbols": ["SYN"], "timeframe": "1Min"}

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def bars() -> Bars:
    return synthetic_bars(["SYN"], date(2010, 1, 4), date(2010, 1, 29), "1Min", seed=1).head(3_000)


@asynccontextmanager
async def listening(parts: SessionParts) -> AsyncIterator[None]:
    """Somebody who wants to hear of every bar by itself."""
    parts.bus.subscribe("listening", (BarsClosed,), lambda event: None)
    yield


def run(
    folder: Path, bars: Bars, *, one_by_one: bool = False, strategy: Strategy | None = None, **more: Any
) -> SessionResult:
    """A session over the bars; journal in the folder."""
    folder.mkdir(exist_ok=True)
    options = {name: more.pop(name) for name in ("progress", "resume") if name in more}
    return asyncio.run(
        run_session(
            SessionSpec.model_validate(SPEC | more),
            SETTINGS,
            bars=bars,
            strategy=strategy or SmaCross(fast=10, slow=50),
            journal_path=folder / "journal.sqlite",
            companions=[listening] if one_by_one else [],
            check=False,
            **options,
        )
    )


def told(path: Path) -> list[tuple[str, str, datetime, bytes]]:
    with SqliteJournal(path, read_only=True) as journal:
        return [(one.source, one.type, one.recorded_at, one.payload.to_json()) for one in journal.read()]


def rows(path: Path) -> int:
    with SqliteJournal(path, read_only=True) as journal:
        assert journal.verify().ok
        return journal.last_seq


def slices(path: Path) -> list[Event]:
    with SqliteJournal(path, read_only=True) as journal:
        return list(journal.read(types=[BarsSlice]))


def test_the_journal_says_the_same_in_fewer_rows(tmp_path: Path, bars: Bars) -> None:
    one, many = run(tmp_path / "one", bars, one_by_one=True), run(tmp_path / "many", bars)
    assert one.order_list_hash == many.order_list_hash and len(one.orders) > 50
    assert told(one.journal_path) == told(many.journal_path)
    assert rows(many.journal_path) < 0.8 * rows(one.journal_path)
    assert sum(len(each.payload.at_ns) for each in slices(many.journal_path)) > 1_000
    assert one.curve.equals(many.curve) and one.bars == many.bars == bars.n
    assert not slices(one.journal_path)


@pytest.mark.parametrize(
    "limits", [{"max_drawdown": 0.004}, {"max_daily_loss": 0.002}, {"max_drawdown": 0.01, "max_daily_loss": 0.001}]
)
def test_a_limit_on_losses_acts_at_the_same_bar(limits: Mapping[str, float], tmp_path: Path, bars: Bars) -> None:
    costs = {"volume_share": 1.0}
    one = run(tmp_path / "one", bars, one_by_one=True, limits=limits, costs=costs)
    many = run(tmp_path / "many", bars, limits=limits, costs=costs)
    assert told(one.journal_path) == told(many.journal_path) and slices(many.journal_path)
    with SqliteJournal(many.journal_path, read_only=True) as journal:
        assert list(journal.read(types=[TradingStateChanged]))


class Protected(SmaCross):
    """The crossover with a stop below each position."""

    @property
    def exits(self) -> Any:
        from trader_lib.strategy.exits import ProtectiveExits

        return ProtectiveExits(trailing_stop=0.002)


def test_a_resting_exit_meets_every_bar(tmp_path: Path, bars: Bars) -> None:
    strategy, costs = Protected(fast=10, slow=50), {"volume_share": 1.0}
    one = run(tmp_path / "one", bars, one_by_one=True, strategy=strategy, costs=costs)
    many = run(tmp_path / "many", bars, strategy=strategy, costs=costs)
    assert told(one.journal_path) == told(many.journal_path) and slices(many.journal_path)
    assert any(order.purpose == "exit" for order in many.orders)


def test_several_symbols_and_a_bar_that_is_missing(tmp_path: Path) -> None:
    bars = synthetic_bars(["ANT", "BEE"], date(2010, 1, 4), date(2010, 1, 29), "1Min", seed=2).head(2_000)
    more = {"symbols": ["ANT", "BEE"], "costs": {"volume_share": 1.0}}
    strategy = SmaCross(fast=60, slow=300)
    one = run(tmp_path / "one", bars, one_by_one=True, strategy=strategy, **more)
    many = run(tmp_path / "many", bars, strategy=strategy, **more)
    assert told(one.journal_path) == told(many.journal_path) and slices(many.journal_path)


def test_replay_decides_the_same_at_every_single_bar(tmp_path: Path, bars: Bars) -> None:
    result = run(tmp_path / "many", bars, costs={"volume_share": 1.0})
    with SqliteJournal(result.journal_path, read_only=True) as journal:
        found = asyncio.run(replay(journal, strategy=SmaCross(fast=10, slow=50)))
    assert found.agrees and found.compared["targets_decided"] == found.compared["portfolio_changed"] == result.bars


class Died(BaseException):
    """The session is gone."""


@pytest.mark.parametrize("bar", [400, 1_500, 2_700])
def test_a_session_that_dies_goes_on_and_orders_the_same(bar: int, tmp_path: Path, bars: Bars) -> None:
    whole = run(tmp_path / "whole", bars)

    def die(count: int, at: datetime) -> None:
        if count == bar:
            raise Died

    with pytest.raises(Died):
        run(tmp_path / "broken", bars, progress=die)
    other = run(tmp_path / "broken", bars, resume=True)
    assert other.order_list_hash == whole.order_list_hash and other.curve.equals(whole.curve)
    assert slices(other.journal_path) and rows(other.journal_path)


def test_a_reader_asks_for_single_events_and_gets_them(tmp_path: Path, bars: Bars) -> None:
    result = run(tmp_path / "many", bars.head(1_200), costs={"volume_share": 1.0})
    with SqliteJournal(result.journal_path, read_only=True) as journal:
        closed = list(journal.read(types=[BarsClosed]))
        assert len(closed) == result.bars and all(isinstance(each.payload, BarsClosed) for each in closed)
        last = {kind.type: journal.last([kind])[0] for kind in SLICED}
        assert last["bars_closed"] == closed[-1]
        assert [each.payload for each in journal.last([BarsClosed], 3)] == [each.payload for each in closed[-3:]]
