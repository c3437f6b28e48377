"""How long a session that has died takes to trade again, by the length of its journal; with a snapshot and without."""

from __future__ import annotations

import asyncio
import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.simulation import world as world_module
from tests.simulation.plan import WARMUP, Death, Plan, Restless, calendar, plan_of
from tests.simulation.world import Outcome, World, play
from trader_lib.broker.faults import Faults
from trader_lib.exchange.costs import Costs
from trader_lib.journal.journal import SqliteJournal
from trader_lib.market.bars import Bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.risk.limits import Limits

SYMBOLS = ("AAA", "BBB", "CCC", "DDD", "EEE", "FFF", "GGG", "HHH", "III", "JJJ")
LEVELS = np.array([0.0, 0.08, -0.06, 0.04, 0.0, 0.09])
EVENTS_A_DAY = 15_000  # fewer than there are
WRITES_AN_EVENT = 1.45  # appends and commits, by which a death is counted
SNAPSHOT_EVENTS = 2_000  # as by default


class Busy(Restless):
    """Wants something else of about half of the symbols at every bar."""

    def targets(self, bars: Bars) -> np.ndarray:
        mood = np.round(bars.close * 100).astype(np.int64) // 3 % 17
        return LEVELS[mood % len(LEVELS)]


class LongWorld(World):
    """A session of many days on a good connection; it dies, and what follows is timed."""

    def played(self) -> Bars:
        days = self.plan.bars // 390 + 5
        bars = synthetic_bars(SYMBOLS, "2012-03-05", "2012-12-31", "1Min", 1, volatility=0.5, calendar=calendar())
        return bars.head(WARMUP + days * 390)

    async def run(self) -> Outcome:
        self.timed: list[tuple[str, float, float]] = []
        self.began = 0.0, 0.0
        return await super().run()

    async def _live_on(self) -> None:
        self._died = asyncio.Event()
        began = time.perf_counter(), time.process_time()
        await self._live()
        self._note("played", began)
        with SqliteJournal(self.path, read_only=True) as journal:
            began = time.perf_counter(), time.process_time()
            assert journal.verify().ok
            self._note("chain checked", began)
        for name, events in (("resumed with a snapshot", SNAPSHOT_EVENTS), ("resumed by living through it", 0)):
            kept = self.path.parent.with_suffix(".kept")
            shutil.copytree(self.path.parent, kept)
            self._died = asyncio.Event()
            gc.collect()
            self.began = time.perf_counter(), time.process_time()
            try:
                await self.session(snapshot_events=events)
            except Trades:
                self._note(name, self.began)
            self._bury()
            shutil.rmtree(self.path.parent)
            kept.rename(self.path.parent)

    def on_the_wire(self, wire: Any, request: Any) -> None:
        """Nothing is checked: the second resumption knows nothing of the first, and its exchange does."""

    def _note(self, name: str, began: tuple[float, float]) -> None:
        self.timed.append((name, time.perf_counter() - began[0], time.process_time() - began[1]))

    def storm(self) -> None:
        """Called when the session's driver begins to follow the market."""
        if self.began[0]:
            raise Trades


class Trades(BaseException):
    """The session has recovered."""


def _plan(events: int) -> Plan:
    return replace(
        plan_of(1),
        faults=Faults(),
        strategy=Busy(seed=1),
        costs=Costs(),
        limits=Limits(max_orders=100_000),
        very_late=False,
        deaths=(Death("start", round(events * WRITES_AN_EVENT), 0, True, 0.0),),
        full=(),
        jumps=(),
        bars=390 * (events // EVENTS_A_DAY + 1),
        symbols=SYMBOLS,
        snapshot_events=SNAPSHOT_EVENTS,
    )


def recovering(row: Callable[..., Any], events: int) -> list[Any]:
    """What a resumption takes after a journal of at least so many events, from the process's own code to the first bar.

    Time is virtual: pauses cost nothing. A restart that finds fills missing waits 5.5 s more in reality.
    """
    worlds: list[LongWorld] = []

    def build(plan: Plan, folder: Path) -> LongWorld:
        worlds.append(LongWorld(plan, folder))
        return worlds[-1]

    async def nothing(world: World) -> None:
        with SqliteJournal(world.path, read_only=True) as journal:
            world.outcome.events = journal.last_seq
            world.outcome.orders = len(world.exchange.orders(open_only=False))

    with patch.object(world_module, "World", build), patch.object(world_module, "check", nothing):
        outcome = play(_plan(events))
    assert not outcome.broken, outcome.broken
    what = f"{outcome.events:,} events, {outcome.orders:,} orders"
    return [row(f"{what}: {name}", wall, "s", "CPU seconds", cpu) for name, wall, cpu in worlds[0].timed]
