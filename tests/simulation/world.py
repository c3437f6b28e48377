"""One seed: a session that the composition root puts together, on a bad connection, a bad disk and a bad clock."""

from __future__ import annotations

import asyncio
import errno
import functools
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from decimal import Decimal
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from dishka import AsyncContainer, Provider, Scope, from_context, make_async_container, provide

from tests.simulation.checks import check
from tests.simulation.disk import Died, Record, WatchedJournal
from tests.simulation.groups import Grouping
from tests.simulation.loop import LoopClock, VirtualLoop
from tests.simulation.plan import WARMUP, Plan, calendar, days, plan_of
from trader_lib.agents.execution import ExecutionAgent
from trader_lib.agents.market_data import MarketDataAgent
from trader_lib.broker.faults import Faults, FaultyBroker
from trader_lib.broker.in_process import InProcessBroker
from trader_lib.broker.port import Broker, MarketData
from trader_lib.bus.bus import InProcessBus
from trader_lib.clock.clock import Clock
from trader_lib.clock.ids import Ids, SeededIds, generator
from trader_lib.clock.sessions import TradingCalendar
from trader_lib.config.settings import Settings, load_settings
from trader_lib.errors.taxonomy import Halted, Misconfigured, Retryable, TraderError
from trader_lib.exchange.book import OrderEvent
from trader_lib.exchange.engine import Exchange
from trader_lib.journal.chain import Journal
from trader_lib.journal.journal import SqliteJournal
from trader_lib.market.bars import Bars
from trader_lib.market.stamps import from_ns
from trader_lib.recovery.snapshots import SnapshotKeeper
from trader_lib.session import session as session_module
from trader_lib.session import wiring as wiring_module
from trader_lib.session.companions import Companion
from trader_lib.session.drivers import Driver, Gateway, RealTimeDriver
from trader_lib.session.reconcile import Reconciler
from trader_lib.session.session import SessionResult
from trader_lib.session.spec import SessionSpec
from trader_lib.session.wiring import AgentProvider, CoreProvider, History, SessionInputs, UpkeepProvider
from trader_lib.steering.control import SessionLock
from trader_lib.trading.events import AccountReported, OrderAcknowledged
from trader_lib.trading.orders import Order, OrderRequest, ReplaceRequest

CALM = timedelta(seconds=150)  # after the last bar: the connection is good again, and all must come right
TICK_S = 15.0
RECONCILE_S = 100.0  # between two comparisons of the books in a storm
RECONCILING = 4  # one seed in so many compares its books meanwhile; what that repairs, a planted bug cannot show
ROOM_S = 60.0  # after the calm: an operator makes room on the disk
PATIENCE_S = 20.0  # before a session that could not begin or go on is started again
LIVES_MAX = 60

Patches = Mapping[str, Any]  # what a planted bug puts in the place of what


@dataclass
class Outcome:
    """What a seed left behind. broken: sentences, one for each thing that should have held."""

    seed: int
    broken: list[str] = field(default_factory=list)
    orders: int = 0
    fills: int = 0
    repaired: int = 0
    events: int = 0
    compared: int = 0  # decisions and orders that the replay gave again
    restarts: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    struck: tuple[int, ...] = ()  # draws of fate that did harm
    journal_hash: str = ""

    @property
    def kind(self) -> str:
        """What sort of thing did not hold first."""
        return self.broken[0].partition(":")[0] if self.broken else ""


class Wire(FaultyBroker):
    """One life's connection; fate is drawn for all lives in one sequence."""

    def __init__(self, world: World) -> None:
        self._world = world
        inner = InProcessBroker(world.exchange)
        super().__init__(inner, Faults(), world.fate, world.clock, data=inner, before_submit=self._on_the_wire)
        self.counts = world.outcome.faults
        self.looked_up: set[str] = set()
        self.replaced: set[str] = set()  # by the client order id of what was to come

    def _strikes(self, name: str, probability: float) -> bool:
        struck = super()._strikes(name, probability)
        if struck and not self._world.may_strike():
            self.counts[name] -= 1
            return False
        self._world.draws += not struck
        return struck

    def _fate(self, **probabilities: float) -> str | None:
        fate = super()._fate(**probabilities)
        if fate is not None and not self._world.may_strike():
            self.counts[f"submit_{fate}"] -= 1
            return None
        self._world.draws += fate is None
        return fate

    async def order_by_client_id(self, client_order_id: str) -> Order | None:
        self._refuse_the_dead()
        found = await super().order_by_client_id(client_order_id)
        self.looked_up.add(client_order_id)
        return found

    async def account(self) -> AccountReported:
        report = await super().account()
        self._world.equity_told = report.equity
        return report

    async def submit(self, request: OrderRequest) -> Order:
        self._refuse_the_dead()
        return await super().submit(request)

    async def cancel(self, order_id: str) -> None:
        self._refuse_the_dead()
        await super().cancel(order_id)

    async def replace(self, order_id: str, request: ReplaceRequest) -> Order:
        self._refuse_the_dead()
        self._world.on_replacement(self, request)
        return await super().replace(order_id, request)

    def _refuse_the_dead(self) -> None:
        if self._world.journal is not None and self._world.journal.is_dead:
            raise Died

    async def stop(self) -> None:
        self.drop()

    def _on_the_wire(self, request: OrderRequest) -> None:
        self._world.on_the_wire(self, request)


class _Follower(RealTimeDriver):
    """The driver of a real market; with it the storm begins."""

    world: World

    async def run(self, stop: asyncio.Event) -> str:
        self.world.storm()
        return await super().run(stop)


class StormProvider(Provider):
    """The real parts, but for time, the connection and the disk."""

    scope = Scope.APP
    world = from_context(dict, scope=Scope.APP)  # {"world": World}: the context of one life

    @provide
    def clock(self, world: dict) -> Clock:  # type: ignore[type-arg]
        return world["world"].clock  # type: ignore[no-any-return]

    @provide
    def ids(self, inputs: SessionInputs) -> Ids:
        return SeededIds(f"{inputs.session_id}:{inputs.past.last_seq}")

    @provide
    async def lock(self, inputs: SessionInputs, world: dict) -> AsyncIterator[SessionLock]:  # type: ignore[type-arg]
        lock = world["world"].lock = SessionLock(inputs.journal_path)
        await lock.acquire(inputs.session_id)
        yield lock
        lock.release()

    @provide
    async def journal(
        self,
        inputs: SessionInputs,
        lock: SessionLock,
        world: dict,  # type: ignore[type-arg]
    ) -> AsyncIterator[Journal]:
        journal = world["world"].open_journal(inputs.journal_path)
        yield journal
        journal.close()

    @provide
    def broker(self, world: dict) -> Broker:  # type: ignore[type-arg]
        return world["world"].wire()  # type: ignore[no-any-return]

    @provide
    def data(self, broker: Broker) -> MarketData:
        return broker  # type: ignore[return-value]

    @provide(scope=Scope.REQUEST)
    def driver(
        self,
        inputs: SessionInputs,
        bus: InProcessBus,
        clock: Clock,
        broker: Broker,
        data: MarketData,
        calendar: TradingCalendar,
        market_data: MarketDataAgent,
        gateway: Gateway,
        ids: Ids,
        journal: Journal,
        history: History,
        reconciler: Reconciler,
        keeper: SnapshotKeeper,
        execution: ExecutionAgent,
        world: dict,  # type: ignore[type-arg]
    ) -> Driver:
        plan: Plan = world["world"].plan
        driver = _Follower(
            bus, clock, broker, data, calendar, market_data, gateway, ids, journal.commit, history.symbols,
            inputs.spec.timeframe, inputs.past.last_bar or history.at(history.n - 1), count=inputs.past.bars,
            ends_at=world["world"].ends_at, wait_s=5.0, tick_s=TICK_S, reconcile_s=RECONCILE_S,
            reconciler=reconciler if plan.seed % RECONCILING == RECONCILING - 1 else None,
            resumed=not inputs.past.is_empty, keeper=keeper, is_behind=lambda: execution.book.is_behind,
        )  # fmt: skip
        keeper.disk = world["world"].record  # type: ignore[attr-defined]
        driver.world = world["world"]
        return driver


@cache
def _template() -> AsyncContainer:
    providers = (CoreProvider(), AgentProvider(), UpkeepProvider(), StormProvider())
    return make_async_container(*providers, start_scope=Scope.RUNTIME, lock_factory=None)


class Keeper(SnapshotKeeper):
    """Writes snapshots to the same disk as the journal."""

    disk: Record

    async def take(self) -> None:
        if self.disk.fullness() is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        await super().take()


@cache
def _settings(snapshot_events: int) -> Settings:
    broker = {"kind": "alpaca", "key_id": "simulated", "secret_key": "simulated"}
    overrides = {"broker": broker, "session": {"snapshot_events": snapshot_events}}
    return load_settings(environ={}, env_file=None, overrides=overrides)


class World:
    """A market that goes on whatever happens, and a session that is started again until it has ended."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.outcome = Outcome(plan.seed)
        self.path = folder / "journal.sqlite"
        self.executions: list[OrderEvent] = []
        self.largest_exposure = 0.0  # after an execution that added to a position, as a multiple of equity
        self.fate = generator(plan.seed, "simulation/storm")
        self.draws = 0
        self.wires: list[Wire] = []
        self.journal: WatchedJournal | None = None
        self.lock: SessionLock | None = None
        self.equity_told: Decimal | None = None  # in the exchange's last answer; its market may have gone on since
        self.calm = False
        self.result: SessionResult | None = None
        self.last_error: TraderError | None = None

    async def run(self) -> Outcome:
        """Play the session, through all its lives, check, and say what did not hold."""
        plan, bars = self.plan, self.played()
        self.bars = bars
        self.spec = SessionSpec(
            strategy="tests.simulation.plan:Restless",
            symbols=plan.symbols,
            timeframe="1Min",
            source="synthetic",
            costs=plan.costs,
            limits=plan.limits,
            seed=plan.seed,
            min_trade=0.02,
        )
        self.session_id = f"simulation-{plan.seed}"
        exchange_ids = SeededIds(f"{self.session_id}/exchange")
        self.exchange = Exchange(bars, WARMUP, calendar=calendar(), costs=plan.costs, ids=exchange_ids)
        self.exchange.on_order_event(self._on_execution)
        closes = [from_ns(int(ns)) for ns in calendar().close_times(bars.times_ns, "1Min")[WARMUP:]]
        self.ends_at = closes[-1] + CALM
        self.clock = LoopClock(self.exchange.now + timedelta(seconds=1))
        self.record = Record(plan.deaths, plan.full, self.clock.monotonic, lambda: self._died.set())
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_only_what_nobody_meant)
        outside = [loop.create_task(self._play(closes)), loop.create_task(self._mistime())]
        try:
            await self._live_on()
            await outside[0]
            await check(self)
        finally:
            for task in outside:
                task.cancel()
        return self.outcome

    def played(self) -> Bars:
        """What the market plays, after the warm-up."""
        return days(self.plan.seed % 10, self.plan.symbols, self.plan.bars)

    # --- lives

    async def _live_on(self) -> None:
        for _ in range(LIVES_MAX):
            self._died = asyncio.Event()
            down_s = await self._live()
            if down_s is None:
                return
            self.outcome.restarts += 1
            await self.clock.sleep(down_s)
        self.outcome.broken.append(f"never ended: it was started {LIVES_MAX} times ({self.last_error})")

    async def _live(self) -> float | None:
        """One life; says how long it stays dead, seconds, or None where the session has ended."""
        loop = asyncio.get_running_loop()
        before = asyncio.all_tasks()
        life = loop.create_task(self.session())
        dying = loop.create_task(self._died.wait())
        await asyncio.wait({life, dying}, return_when=asyncio.FIRST_COMPLETED)
        dying.cancel()
        if self._died.is_set():
            self.outcome.faults["died"] += 1
            self.wires[-1].drop() if self.wires else None
            under_way = {task for wire in self.wires for task in wire._under_way}
            await asyncio.wait({life}, timeout=1.0)  # nothing that it does has an effect any more
            for _ in range(3):
                alive = asyncio.all_tasks() - before - under_way - {dying}
                for task in alive:
                    task.cancel()
                if alive:
                    await asyncio.wait(alive, timeout=10.0)
            self._bury()
            return self.record.down_s
        try:
            self.result = life.result()
        except (Retryable, Halted) as error:
            self.outcome.faults["start again"] += 1
            self.last_error = error
            return PATIENCE_S
        except Misconfigured as error:
            if not self.record.refused:
                raise
            self.outcome.faults["stopped by the disk"] += 1
            self.last_error = error
            stops = self.outcome.faults["stopped by the disk"]
            self._look_at_what_was_left()
            return min(PATIENCE_S * 2.0 ** (stops - 1), 320.0)
        return None

    def _bury(self) -> None:
        """What the operating system takes back from a process that has died."""
        if self.journal is not None:
            self.journal.close()
        if self.lock is not None:
            self.lock.release()

    def _look_at_what_was_left(self) -> None:
        """A session that can write nothing down any more cancels what may open a position, if it can."""
        faults = Faults() if self.calm else self.plan.faults
        if faults.cancel_lost:
            return  # it may not have been able to
        with SqliteJournal(self.path, read_only=True) as journal:
            known = {said.payload.client_order_id for said in journal.read(types=[OrderAcknowledged])}  # type: ignore[attr-defined]
        for order in self.exchange.orders():
            intent = self.record.safe.get(order.client_order_id)
            if intent is not None and intent.request.purpose == "entry" and order.client_order_id in known:
                self.outcome.broken.append(f"entries: {order.client_order_id} was left open when the disk was full")

    async def session(
        self, companions: Iterable[Companion] = (), *, snapshot_events: int | None = None
    ) -> SessionResult:
        """Begin the session, or go on with what its journal holds."""
        settings = _settings(self.plan.snapshot_events if snapshot_events is None else snapshot_events)
        wanted = session_module.snapshot_identity(self.spec, settings, self.plan.strategy)
        past, snapshot = session_module.read_recorded(self.path, settings.journal, wanted, resume=True)
        self.outcome.faults["began with a snapshot"] += snapshot is not None
        inputs = SessionInputs(
            self.spec, settings, self.plan.strategy, None, 0, self.session_id, self.path, past=past, snapshot=snapshot
        )
        return await session_module.run_prepared(inputs, companions)

    def open_journal(self, path: Path) -> WatchedJournal:
        self.journal = WatchedJournal(path, self.record)
        return self.journal

    def wire(self) -> Wire:
        wire = Wire(self)
        if self.plan.stormy_restart and self.wires:
            wire.faults = Faults() if self.calm else self.plan.faults
        self.wires.append(wire)
        return wire

    def storm(self) -> None:
        """The connection turns as bad as it is planned."""
        self.wires[-1].faults = Faults() if self.calm else self.plan.faults

    def may_strike(self) -> bool:
        """Whether the draw that did harm is one that may, and count it."""
        self.draws += 1
        if self.plan.only is not None and self.draws not in self.plan.only:
            return False
        self.outcome.struck += (self.draws,)
        return True

    # --- what goes on outside

    async def _play(self, closes: Sequence[Any]) -> None:
        """The market: a bar a minute, whatever anybody else does; after the last one, calm; then room on the disk."""
        for close in closes:
            await self.clock.sleep((close - self._truly()).total_seconds())
            self.exchange.advance()
        if not self.plan.to_the_end:
            self.calm = True
            self.clock.wrong_s = 0.0
            if self.wires:
                self.wires[-1].faults = Faults()
        await self.clock.sleep((CALM.total_seconds() + ROOM_S) if self.plan.full else 0.0)
        self.record.room_made = True

    async def _mistime(self) -> None:
        for jump in sorted(self.plan.jumps):
            await self.clock.sleep(jump.at_s - self.clock.monotonic())
            if self.calm:
                return
            self.outcome.faults["clock jumped"] += 1
            self.clock.wrong_s += jump.by_s

    def _truly(self) -> Any:
        return self.clock.now() - timedelta(seconds=self.clock.wrong_s)

    def _on_execution(self, event: OrderEvent) -> None:
        if not event.execution_id:
            return
        self.executions.append(event)
        side = 1 if event.order.side.value == "buy" else -1
        if side * (event.position_qty or Decimal(0)) > 0:
            account = self.exchange.account()
            gross = account.long_market_value + abs(account.short_market_value)
            self.largest_exposure = max(self.largest_exposure, float(gross / account.equity))

    def on_the_wire(self, wire: Wire, request: OrderRequest) -> None:
        """What must hold at the moment in which an order is sent."""
        broken, name = self.outcome.broken, request.client_order_id
        if name not in self.record.safe:
            broken.append(f"write-ahead: {name} was sent before its intent was on disk")
        for other in self.wires:
            for earlier in other.submissions:
                if earlier.request.client_order_id == name and earlier.fate != "limited":
                    if other is not wire and name in wire.looked_up:
                        continue  # after a restart nobody knows whether it was sent; it was looked for first
                    broken.append(f"sent twice: {name} was sent again after it was {earlier.fate}")
        held = {position.symbol: position.qty for position in self.exchange.positions()}.get(request.symbol, Decimal(0))
        reduces = held * request.signed_qty < 0 and abs(request.signed_qty) <= abs(held)
        bound = self.plan.limits.max_order_qty
        if bound is not None and not reduces and abs(request.signed_qty) > bound:
            broken.append(f"limit: {name} is over {request.qty} shares, {bound:g} allowed")

    def on_replacement(self, wire: Wire, request: ReplaceRequest) -> None:
        """What must hold at the moment in which a replacement is asked for."""
        name = request.client_order_id
        if name not in self.record.moves:
            self.outcome.broken.append(f"write-ahead: {name} was asked for before its intent was on disk")
        for other in self.wires:
            if name in other.replaced and (other is wire or name not in wire.looked_up):
                self.outcome.broken.append(f"sent twice: {name} was asked for again")
        wire.replaced.add(name)


def _only_what_nobody_meant(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not isinstance(context.get("exception"), Died):
        loop.default_exception_handler(context)


def _container(world: World, inputs: SessionInputs) -> AsyncContainer:
    return _template()(context={SessionInputs: inputs, dict: {"world": world}}, scope=Scope.APP)


_build = functools.partial(wiring_module.build_strategy_agent, kind=Grouping)
GROUPING: dict[str, Any] = dict.fromkeys(
    ("trader_lib.session.wiring.build_strategy_agent", "trader_lib.replay.fresh.build_strategy_agent"), _build
)


def play(plan: Plan, patches: Patches | None = None) -> Outcome:
    """Play one plan; what it raises is one of the things that did not hold."""
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="simulation-", dir=_fast_folder()))
        world = World(plan, Path(folder))
        stack.enter_context(patch.object(session_module, "session_container", functools.partial(_container, world)))
        stack.enter_context(patch.object(wiring_module, "SnapshotKeeper", Keeper))
        for target, other in ((GROUPING if plan.groups else {}) | dict(patches or {})).items():
            stack.enter_context(patch(target, other))
        runner = stack.enter_context(asyncio.Runner(loop_factory=VirtualLoop))
        try:
            return runner.run(world.run())
        except Exception as error:
            world.outcome.broken.append(f"ended by {type(error).__name__}: {error}")
            return world.outcome


def simulate(seed: int, patches: Patches | None = None, **changes: Any) -> Outcome:
    """Play one seed, its plan changed where asked."""
    return play(replace(plan_of(seed), **changes), patches)


@cache
def _fast_folder() -> Path | None:
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else None
