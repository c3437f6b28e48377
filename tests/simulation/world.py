"""One seed: a short session of the real agents, bus and journal behind a bad connection, and what must hold then."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from datetime import timedelta
from decimal import Decimal
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tests.simulation.loop import LoopClock, VirtualLoop
from trader_lib.agents.execution import ExecutionAgent, Patience
from trader_lib.agents.market_data import MarketDataAgent
from trader_lib.agents.monitor import MonitorAgent
from trader_lib.agents.portfolio import PortfolioAgent
from trader_lib.agents.risk import RiskAgent
from trader_lib.agents.strategy import StrategyAgent
from trader_lib.broker.faults import Faults, FaultyBroker
from trader_lib.broker.in_process import InProcessBroker
from trader_lib.bus.bus import InProcessBus
from trader_lib.clock.ids import SeededIds, generator
from trader_lib.clock.sessions import TradingCalendar
from trader_lib.config.settings import Settings, load_settings
from trader_lib.exchange.book import OrderEvent
from trader_lib.exchange.costs import Costs
from trader_lib.exchange.engine import Exchange
from trader_lib.journal.journal import SqliteJournal
from trader_lib.market.bars import Bars
from trader_lib.market.stamps import from_ns
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.risk.limits import Limits
from trader_lib.session.drivers import Desk, RealTimeDriver
from trader_lib.session.session import Session
from trader_lib.session.spec import SessionSpec
from trader_lib.session.wiring import Agents, SessionInputs
from trader_lib.strategy.contract import Strategy
from trader_lib.strategy.exits import ProtectiveExits
from trader_lib.strategy.planner import Planner
from trader_lib.trading.events import (
    AgentFailed,
    Event,
    FillRecorded,
    OrderAcknowledged,
    OrderFailed,
    OrderIntended,
    Reconciled,
    TradeUpdated,
)
from trader_lib.trading.orders import OrderRequest

SYMBOLS = ("AAA", "BBB")
WARMUP = 3
BARS = 24
TICK_S = 15.0
CALM = timedelta(seconds=150)  # after the last bar: the connection is good again, and all must come right
LEVELS = np.array([0.0, 0.4, -0.3, 0.2, 0.0, 0.45])


class Restless(Strategy):
    """Changes its mind at about every second bar, for no reason but the prices."""

    seed: int = 0
    stop_loss: float | None = None
    take_profit: float | None = None

    @property
    def warmup(self) -> int:
        return WARMUP

    @property
    def exits(self) -> ProtectiveExits | None:
        if self.stop_loss is None and self.take_profit is None:
            return None
        return ProtectiveExits(stop_loss=self.stop_loss, take_profit=self.take_profit)

    def targets(self, bars: Bars) -> np.ndarray:
        cents = np.round(bars.close * 100).astype(np.int64) + self.seed
        mood = cents // 3 % 17
        weights = LEVELS[mood % len(LEVELS)]
        for row in range(1, bars.n):
            keep = mood[row] >= 9
            weights[row, keep] = weights[row - 1, keep]
        return weights


@dataclass(frozen=True)
class Plan:
    """What a seed stands for."""

    seed: int
    faults: Faults
    strategy: Restless
    costs: Costs
    limits: Limits
    very_late: bool  # orders arrive a minute after their sender has given up
    to_the_end: bool  # the storm does not abate before the session closes


def plan_of(seed: int) -> Plan:
    """The world of a seed: some kinds of fault, each with its own strength, and a strategy."""
    rng = generator(seed, "simulation/plan")

    def chance(most: float) -> float:
        return float(rng.uniform(0.02, most)) if rng.random() < 0.6 else 0.0

    very_late = bool(rng.random() < 0.1)
    faults = Faults(
        submit_lost=chance(0.2),
        submit_late=chance(0.15),
        answer_lost=chance(0.25),
        submit_limited=chance(0.2),
        submit_slow=chance(0.2),
        cancel_lost=chance(0.3),
        cancel_answer_lost=chance(0.3),
        read_fails=chance(0.25),
        update_lost=chance(0.3),
        update_late=chance(0.4),
        update_doubled=chance(0.3),
        mute=chance(0.06),
        submit_late_s=60.0 if very_late else 8.0,
    )
    exits = bool(rng.random() < 0.5)
    strategy = Restless(
        seed=seed,
        stop_loss=float(rng.uniform(0.0005, 0.003)) if exits else None,
        take_profit=float(rng.uniform(0.0005, 0.003)) if exits and rng.random() < 0.7 else None,
    )
    costs = Costs(volume_share=float(rng.choice([0.02, 0.05, 0.2])), slippage_bps=float(rng.choice([0.0, 2.0])))
    limits = Limits(max_order_qty=900, max_position_qty=1100, max_gross_exposure=1.2)
    to_the_end = not very_late and bool(rng.random() < 0.25)
    return Plan(seed, faults, strategy, costs, limits, very_late, to_the_end)


@cache
def _calendar() -> TradingCalendar:
    return TradingCalendar()


@cache
def _settings() -> Settings:
    return load_settings(environ={}, env_file=None)


@cache
def _days(variant: int) -> Bars:
    """A morning of minutes; ten of them are enough, the strategy reads each differently."""
    day = synthetic_bars(SYMBOLS, "2012-03-05", "2012-03-05", "1Min", variant, volatility=0.9, calendar=_calendar())
    return day.head(WARMUP + BARS)


class WatchedJournal(SqliteJournal):
    """Knows which intents are safe on disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._fresh: list[OrderIntended] = []
        self.safe: dict[str, OrderIntended] = {}
        self.failures: list[str] = []

    def append(self, event: Event) -> None:
        super().append(event)
        if isinstance(event.payload, OrderIntended):
            self._fresh.append(event.payload)
        elif isinstance(event.payload, AgentFailed):
            self.failures.append(f"{event.payload.agent}: {event.payload.error}")

    def commit(self) -> None:
        super().commit()
        self.safe.update((intent.request.client_order_id, intent) for intent in self._fresh)
        self._fresh.clear()


@dataclass
class Outcome:
    """What a seed left behind. broken: sentences, one for each thing that should have held."""

    seed: int
    broken: list[str] = field(default_factory=list)
    orders: int = 0
    fills: int = 0
    repaired: int = 0
    unknown: int = 0
    events: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    journal_hash: str = ""


class World:
    """Everything that a seed needs, wired by hand: the composition root's parts around another broker and clock."""

    def __init__(self, plan: Plan | int, folder: Path, execution: type[ExecutionAgent] = ExecutionAgent) -> None:
        self.plan = plan_of(plan) if isinstance(plan, int) else plan
        self.outcome = Outcome(self.plan.seed)
        self._folder = folder
        self._execution = execution
        self.executions: list[OrderEvent] = []

    async def run(self) -> Outcome:
        """Play the session, check, and say what did not hold."""
        plan, bars, calendar = self.plan, _days(self.plan.seed % 10), _calendar()
        spec = SessionSpec(
            strategy="tests.simulation.world:Restless",
            symbols=SYMBOLS,
            timeframe="1Min",
            source="synthetic",
            costs=plan.costs,
            limits=plan.limits,
            seed=plan.seed,
            min_trade=0.02,
        )
        session_id = f"simulation-{plan.seed}"
        path = self._folder / "journal.sqlite"
        inputs = SessionInputs(spec, _settings(), plan.strategy, bars, WARMUP, session_id, path)
        exchange = self.exchange = Exchange(
            bars, WARMUP, calendar=calendar, costs=plan.costs, ids=SeededIds(f"{session_id}/exchange")
        )
        exchange.on_order_event(lambda event: self.executions.append(event) if event.execution_id else None)
        clock = LoopClock(exchange.now + timedelta(seconds=1))
        journal = self.journal = WatchedJournal(path)
        ids = SeededIds(session_id)
        bus = InProcessBus(clock, ids, journal, session_id)
        inner = InProcessBroker(exchange)
        broker = self.broker = FaultyBroker(
            inner,
            Faults(),
            generator(plan.seed, "simulation/storm"),
            clock,
            data=inner,
            before_submit=self._on_the_wire,
        )
        history = bars.head(WARMUP)
        market_data = MarketDataAgent(bus, clock, calendar, SYMBOLS, "1Min")
        planner = Planner(SYMBOLS, spec.sizing, plan.strategy.exits)
        agents = self.agents = Agents(
            MonitorAgent(bus, clock),
            PortfolioAgent(bus, clock, inputs.commission),
            self._execution(bus, clock, broker, journal.commit, Patience()),
            RiskAgent(bus, clock, plan.limits, history),
            StrategyAgent(bus, clock, plan.strategy, history, planner, session_id),
            market_data,
        )
        desk = Desk(bus, broker, ids)
        closes = [from_ns(int(ns)) for ns in calendar.close_times(bars.times_ns, "1Min")[WARMUP:]]
        driver = RealTimeDriver(
            bus, clock, broker, broker, calendar, market_data, desk, ids, journal.commit, SYMBOLS, "1Min",
            history.at(history.n - 1), ends_at=closes[-1] + CALM, wait_s=5.0, tick_s=TICK_S,
        )  # fmt: skip
        await broker.start()
        session = Session(inputs, bus, broker, clock, ids)
        market = asyncio.get_running_loop().create_task(self._play(closes, clock))
        try:
            await session.open(agents, desk, driver, history, ())
            broker.faults = plan.faults
            await driver.run(asyncio.Event())
            found, _ = await session.close(agents, desk, driver, "the end was reached")
            await market
            journal.commit()
            self._check(found)
        finally:
            market.cancel()
            await broker.stop()
            await bus.close()
            journal.close()
        return self.outcome

    async def _play(self, closes: list[Any], clock: LoopClock) -> None:
        """The market: a bar a minute, whatever anybody else does; after the last one, calm."""
        for close in closes:
            await clock.sleep((close - clock.now()).total_seconds())
            self.exchange.advance()
        if not self.plan.to_the_end:
            self.broker.faults = Faults()

    # --- what must hold

    def _on_the_wire(self, request: OrderRequest) -> None:
        broken, name = self.outcome.broken, request.client_order_id
        if name not in self.journal.safe:
            broken.append(f"write-ahead: {name} was sent before its intent was on disk")
        for earlier in self.broker.submissions:
            if earlier.request.client_order_id == name and earlier.fate != "limited":
                broken.append(f"sent twice: {name} was sent again after it was {earlier.fate}")
        held = {position.symbol: position.qty for position in self.exchange.positions()}.get(request.symbol, Decimal(0))
        reduces = held * request.signed_qty < 0 and abs(request.signed_qty) <= abs(held)
        bound = self.plan.limits.max_order_qty
        if bound is not None and not reduces and abs(request.signed_qty) > bound:
            broken.append(f"limit: {name} is over {request.qty} shares, {bound:g} allowed")

    def _check(self, found: Reconciled) -> None:
        outcome, exchange, broken = self.outcome, self.exchange, self.outcome.broken
        events = list(self.journal.read())
        fills = [event.payload.fill for event in events if isinstance(event.payload, FillRecorded)]
        outcome.events, outcome.fills, outcome.faults = len(events), len(fills), self.broker.counts
        outcome.repaired = sum(fill.execution_id.startswith("repair:") for fill in fills)
        outcome.journal_hash = _fingerprint(events)
        verification = self.journal.verify()
        if not verification.ok:
            broken.append(f"journal: {verification.reason}")
        broken += [f"agent failed: {failure}" for failure in self.journal.failures]
        broken += [f"reconciliation: {difference}" for difference in found.differences]
        broken += [f"left open: {order.client_order_id}" for order in exchange.orders()]
        broken += [f"down: {agent.name}" for agent in self.agents.all() if agent.health().state == "down"]

        silent = _without_outcome(events)
        broken += [f"unresolved: nobody knows what became of {name}" for name in sorted(silent)]
        decisions: dict[Any, list[str]] = defaultdict(list)
        placed = exchange.orders(open_only=False)
        outcome.orders = len(placed)
        for order in placed:
            intent = self.journal.safe.get(order.client_order_id)
            if intent is None:
                broken.append(f"unexplained: {order.client_order_id} has no intent")
                continue
            key = order.symbol, intent.decided_at, intent.request.purpose
            decisions[key].append(order.client_order_id)
        broken += [f"doubled: {key} led to {names}" for key, names in decisions.items() if len(names) > 1]

        if not self.plan.very_late:
            given_up = {e.payload.client_order_id for e in events if _gives_up(e)}
            early = sorted(given_up & {order.client_order_id for order in placed})
            broken += [f"given up too early: {name} was said not to have been sent" for name in early]

        theirs: dict[str, Decimal] = defaultdict(Decimal)
        for execution in self.executions:
            assert execution.qty is not None
            theirs[execution.order.id] += execution.qty
        ours: dict[str, Decimal] = defaultdict(Decimal)
        for fill in fills:
            ours[fill.order_id] += fill.qty
        for order_id in sorted(theirs.keys() | ours.keys()):
            if theirs[order_id] != ours[order_id]:
                broken.append(f"fills: order {order_id} filled {theirs[order_id]}, we counted {ours[order_id]}")
        names = Counter(fill.execution_id for fill in fills)
        broken += [f"fills: {name} was counted {count} times" for name, count in names.items() if count > 1]

        portfolio = self.agents.portfolio.portfolio
        held = {position.symbol: position.qty for position in portfolio.held}
        truth = {position.symbol: position.qty for position in exchange.positions()}
        if held != truth:
            broken.append(f"positions: we hold {held}, the exchange says {truth}")
        cash = portfolio.cash + self.agents.portfolio.cash_drift  # as reported last
        if cash != exchange.account().cash:
            broken.append(f"cash: we report {cash}, the exchange {exchange.account().cash}")
        drift = abs(self.agents.portfolio.cash_drift)
        if drift > Decimal("0.01") * outcome.repaired:
            broken.append(f"cash: our fills are {drift} USD away from the exchange's account")
        peak = _largest_position(self.executions)
        bound = Decimal(str(self.plan.limits.max_position_qty))
        if peak > bound and not self.plan.very_late:
            broken.append(f"limit: {peak} shares were held, {bound} allowed")


def _largest_position(executions: list[OrderEvent]) -> Decimal:
    return max((abs(event.position_qty or Decimal(0)) for event in executions), default=Decimal(0))


def _without_outcome(events: list[Event]) -> set[str]:
    """Orders that were to be sent, and of which neither the broker's record nor a definite failure was ever heard."""
    waiting: set[str] = set()
    for event in events:
        match event.payload:
            case OrderIntended(request=request):
                waiting.add(request.client_order_id)
            case OrderAcknowledged(order=order) | TradeUpdated(order=order):
                waiting.discard(order.client_order_id)
            case OrderFailed(client_order_id=name, outcome=outcome) if outcome != "unknown":
                waiting.discard(name)
    return waiting


def _gives_up(event: Event) -> bool:
    return isinstance(event.payload, OrderFailed) and event.payload.outcome == "not_sent"


def _fingerprint(events: list[Event]) -> str:
    digest = hashlib.sha256()
    for event in events:
        digest.update(event.to_json())
    return digest.hexdigest()[:16]


def simulate(seed: int, execution: type[ExecutionAgent] = ExecutionAgent, **changes: Any) -> Outcome:
    """Play one seed, its plan changed where asked; what it raises is one of the things that did not hold."""
    with TemporaryDirectory(prefix="simulation-", dir=_fast_folder()) as folder:
        world = World(replace(plan_of(seed), **changes), Path(folder), execution)
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            try:
                return runner.run(world.run())
            except Exception as error:
                world.outcome.broken.append(f"ended by {type(error).__name__}: {error}")
                return world.outcome


@cache
def _fast_folder() -> Path | None:
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else None
