"""What a seed stands for: a strategy, its limits, and everything that will go wrong."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np

from trader_lib.broker.faults import Faults
from trader_lib.clock.ids import generator
from trader_lib.clock.sessions import TradingCalendar
from trader_lib.exchange.costs import Costs
from trader_lib.market.bars import Bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.risk.limits import Limits
from trader_lib.strategy.contract import Strategy
from trader_lib.strategy.exits import ProtectiveExits

SYMBOLS = ("AAA", "BBB")
WARMUP = 3
BARS = 24
MARKET_S = 60.0 * BARS
FOR_GOOD_S = 1e9  # until an operator makes room, when the market has closed
LEVELS = np.array([0.0, 0.4, -0.3, 0.2, 0.0, 0.45])
GROUPS = range(300, 600)  # of every 600 seeds, those that play groups of orders
HIDES_FILLS = (
    "answer_lost", "submit_late", "submit_slow", "cancel_answer_lost", "cancel_lost", "read_fails", "read_slow",
    "update_lost", "update_late", "mute",
)  # fmt: skip


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


class Death(NamedTuple):
    """The process dies at a journal write (an append, or a commit of something).

    after: which writes are counted, all of them or those since an intent; number: of the write, or of the intent; plus:
    writes later than that intent; written: whether the write still happens; down_s: until it is started again.
    """

    after: Literal["start", "intent"]
    number: int
    plus: int
    written: bool
    down_s: float


class Full(NamedTuple):
    """The disk is full for a while; rolls_back: whether SQLite gives up what was not committed yet."""

    at_s: float
    for_s: float
    rolls_back: bool


class Jump(NamedTuple):
    """The wall clock jumps; by_s below 0: back."""

    at_s: float
    by_s: float


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
    deaths: tuple[Death, ...] = ()
    full: tuple[Full, ...] = ()
    jumps: tuple[Jump, ...] = ()
    stormy_restart: bool = False  # the connection is as bad while it starts again
    snapshot_events: int = 0  # events between two snapshots of the agents, 0 for none
    bars: int = BARS
    symbols: tuple[str, ...] = SYMBOLS
    groups: bool = False  # its orders are brackets, trailing stops and what moves them
    only: frozenset[int] | None = field(default=None)  # draws of fate that may strike; None: every one

    @property
    def is_told(self) -> bool:
        """Whether the session learns of every fill at once, so that no limit may be exceeded by a share."""
        known = all(getattr(self.faults, name) == 0.0 for name in HIDES_FILLS)
        return known and not (self.deaths or self.full or self.jumps)

    def changed(self, changes: dict[str, Any]) -> Plan:
        """Another plan, fields replaced by what JSON says of them."""
        unknown = changes.keys() - {each.name for each in fields(self)}
        if unknown:
            raise ValueError(f"A plan has no {', '.join(sorted(unknown))}.")
        read = {
            "faults": lambda value: Faults(**value),
            "deaths": lambda value: tuple(Death(*each) for each in value),
            "full": lambda value: tuple(Full(*each) for each in value),
            "jumps": lambda value: tuple(Jump(*each) for each in value),
            "symbols": tuple,
            "only": lambda value: None if value is None else frozenset(value),
        }
        return replace(self, **{name: read.get(name, lambda same: same)(value) for name, value in changes.items()})

    def changes(self) -> dict[str, Any]:
        """How it differs from what its seed stands for, as JSON has it."""
        usual = plan_of(self.seed)
        different = {each.name for each in fields(self) if getattr(self, each.name) != getattr(usual, each.name)}
        said: dict[str, Any] = {}
        for name in sorted(different):
            value = getattr(self, name)
            if isinstance(value, Faults):
                usual_faults = asdict(Faults())
                said[name] = {fault: how for fault, how in asdict(value).items() if how != usual_faults[fault]}
            else:
                said[name] = sorted(value) if isinstance(value, frozenset) else value
        return json.loads(json.dumps(said))


@cache
def plan_of(seed: int) -> Plan:
    """The world of a seed: some kinds of fault, each with its own strength, and a strategy."""
    rng = generator(seed, "simulation/plan")

    def chance(most: float) -> float:
        return float(rng.uniform(0.02, most)) if rng.random() < 0.6 else 0.0

    def rounded(low: float, high: float) -> float:
        return round(float(rng.uniform(low, high)), 1)

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
        read_slow=chance(0.1),
        bar_lost=chance(0.1),
        bars_mute=chance(0.05),
        submit_late_s=60.0 if very_late else 8.0,
    )
    exits = bool(rng.random() < 0.5)
    strategy = Restless(
        seed=seed,
        stop_loss=float(rng.uniform(0.0005, 0.003)) if exits else None,
        take_profit=float(rng.uniform(0.0005, 0.003)) if exits and rng.random() < 0.7 else None,
    )
    costs = Costs(volume_share=float(rng.choice([0.02, 0.05, 0.2])), slippage_bps=float(rng.choice([0.0, 2.0])))
    limits = Limits(
        max_order_qty=900,
        max_position_qty=1100,
        max_gross_exposure=float(rng.choice([0.5, 1.2])),
        max_orders=int(rng.choice([2, 200])),
    )
    to_the_end = not very_late and bool(rng.random() < 0.25)
    deaths: list[Death] = []
    if rng.random() < 0.4:
        for _ in range(int(rng.integers(1, 5))):
            down_s = rounded(310.0, 500.0) if rng.random() < 0.1 else rounded(1.0, 60.0)
            if rng.random() < 0.5:
                place: tuple[Literal["start", "intent"], int, int] = "start", int(rng.integers(1, 550)), 0
            else:
                place = "intent", int(rng.integers(1, 16)), int(rng.integers(1, 7))
            deaths.append(Death(*place, bool(rng.random() < 0.5), down_s))
    full: list[Full] = []
    if rng.random() < 0.2:
        for _ in range(int(rng.integers(1, 3))):
            length = (rounded(0.5, 20.0), rounded(60.0, 300.0), FOR_GOOD_S)[int(rng.integers(0, 3))]
            full.append(Full(rounded(0.0, MARKET_S), length, bool(rng.random() < 0.5)))
    jumps: list[Jump] = []
    if rng.random() < 0.25:
        for _ in range(int(rng.integers(1, 4))):
            far = 120.0 if rng.random() < 0.5 else 5.0
            jumps.append(Jump(rounded(0.0, MARKET_S), rounded(-far, far)))
    if rng.random() < 0.1:
        faults = replace(faults, **dict.fromkeys(HIDES_FILLS, 0.0))
        deaths, full, jumps = [], [], []
    groups = seed % GROUPS.stop in GROUPS
    if groups:
        faults = replace(faults, replace_lost=chance(0.3), replace_answer_lost=chance(0.3))
    return Plan(
        seed, faults, strategy, costs, limits, very_late, to_the_end, tuple(deaths), tuple(full), tuple(jumps),
        stormy_restart=bool(rng.random() < 0.5), snapshot_events=int(rng.choice([0, 10, 40])), groups=groups,
    )  # fmt: skip


@cache
def calendar() -> TradingCalendar:
    return TradingCalendar()


@cache
def days(variant: int, symbols: tuple[str, ...] = SYMBOLS, bars: int = BARS) -> Bars:
    """A morning of minutes; ten of them are enough, the strategy reads each differently."""
    day = synthetic_bars(SYMBOLS, "2012-03-05", "2012-03-05", "1Min", variant, volatility=0.9, calendar=calendar())
    return day.head(WARMUP + bars).sel(symbols)
