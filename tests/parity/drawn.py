"""One drawn configuration: market, account and strategy from a seed, in a backtest and in a session of agents."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tests.given import Given
from trader_lib.clock.sessions import NEW_YORK, TradingCalendar
from trader_lib.config.settings import load_settings
from trader_lib.exchange.costs import Costs
from trader_lib.market.bars import Bars, Provenance, Timeframe
from trader_lib.research.backtest import BacktestResult, backtest
from trader_lib.risk.limits import Limits, SymbolLimits
from trader_lib.rules.sizing import SizingRules
from trader_lib.session.session import SessionResult, run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.strategy.exits import ProtectiveExits
from trader_lib.trading.order_list import compare_order_lists

SYMBOLS = ("AAA", "BBB", "CCC", "DDD")
LEVELS = (0.06, 0.37, 0.9, 4.0, 30.0, 150.0, 30_000.0)  # USD a share
CASH = (1_500.0, 10_000.0, 100_000.0, 5_000_000.0, 400_000_000.0)


@dataclass(frozen=True)
class Configuration:
    """Everything that both engines are given."""

    bars: Bars
    strategy: Given
    cash: float
    sizing: SizingRules
    account: dict[str, Any]  # costs, limits, multiplier


@dataclass(frozen=True)
class Outcome:
    """What a configuration came to. broken: what differs or failed, empty for nothing."""

    seed: int
    broken: str
    seen: Counter[str]


def pick(rng: np.random.Generator, *values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def market(rng: np.random.Generator, timeframe: str) -> Bars:
    """Bars of one to four symbols: cheap and dear, quiet and jumping, thin and liquid, listed late or delisted."""
    rows, n = int(rng.integers(15, 50)), int(rng.integers(1, 5))
    level = np.array([pick(rng, *LEVELS) for _ in range(n)])
    steps = rng.normal(0, pick(rng, 0.004, 0.02, 0.06), (rows, n))
    if rng.random() < 0.4:  # a jump that an account on credit may not survive
        steps[int(rng.integers(rows)), int(rng.integers(n))] += math.log(pick(rng, 0.3, 0.5, 1.6, 2.5, 3.5))
    path = level * np.exp(np.cumsum(steps, axis=0))
    ticks = np.where(path < 1.0, 4, 2)
    close = np.maximum(_rounded(path, ticks), 0.01)
    before = np.vstack([close[:1], close[:-1]])
    gap = _rounded(np.where(rng.random((rows, n)) < 0.5, before, close), ticks)
    high, low = np.maximum(gap, close), np.minimum(gap, close)
    high = _rounded(high * (1 + rng.uniform(0, 0.01, (rows, n))), ticks).clip(min=high)
    low = _rounded(low * (1 - rng.uniform(0, 0.01, (rows, n))), ticks).clip(min=0.01, max=low)
    volume = np.floor(rng.lognormal(1, 2, (rows, n)) * np.array([pick(rng, 10.0, 1e3, 1e8, 1e10) for _ in range(n)]))
    volume *= rng.random((rows, n)) > 0.1
    arrays = [gap, high, low, close, volume]
    for s in range(1, n):
        if rng.random() < 0.3:
            for array in arrays:
                array[: rows // 5, s] = math.nan
    stamps = stamps_of(rng, timeframe, rows)
    origin = Provenance("drawn", "none", Timeframe(timeframe), "split", synthetic=True)  # no split hides in a jump
    return Bars(*arrays, pd.DatetimeIndex(stamps, tz="UTC"), SYMBOLS[:n], origin)


def stamps_of(rng: np.random.Generator, timeframe: str, rows: int) -> NDArray[np.int64]:
    """Regular bars, or one in three times minutes from 4:00 to 20:00, from some moment of a day on, through a night."""
    if timeframe == "1Day" or rng.random() > 0.35:
        return TradingCalendar().bar_stamps(date(2025, 11, 24), date(2026, 6, 1), timeframe)[:rows]
    days = [day.date.isoformat() for day in TradingCalendar().sessions(date(2025, 11, 24), date(2025, 11, 26))]
    hours = [pd.date_range(f"{day} 04:00", f"{day} 19:45", freq="15min", tz=NEW_YORK) for day in days]
    first = int(rng.integers(20, 60))
    return np.concatenate([each.tz_convert("UTC").as_unit("ns").asi8 for each in hours])[first : first + rows]


def outside_regular_hours(bars: Bars) -> bool:
    """Whether a bar trades before the open or after the close of its session."""
    calendar = TradingCalendar()
    return bars.timeframe != "1Day" and not all(calendar.is_open(bars.at(row)) for row in range(bars.n))


def _rounded(values: NDArray[np.float64], decimals: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(decimals == 4, np.round(values, 4), np.round(values, 2))


def weights(rng: np.random.Generator, rows: int, n: int) -> tuple[tuple[float, ...], ...]:
    """Targets that stay for a while, change, turn, or keep what there is."""
    choices = [0.0, 0.1, 0.4, 0.9, 2.0, -0.2, -1.0, math.nan]
    drawn = rng.choice(choices, (rows, n)) * pick(rng, 1.0, 0.5, 0.97)
    changes = rng.random((rows, n)) < pick(rng, 0.05, 0.2, 0.7)
    table = np.zeros((rows, n))
    for t in range(rows):
        table[t] = np.where(changes[t], drawn[t], table[t - 1] if t else 0.0)
    if rng.random() < 0.3:  # rebalanced once in a while, and kept between
        table[np.arange(rows) % 7 != 0] = math.nan
    return tuple(tuple(row) for row in table.tolist())


KINDS = ("market", "limit", "stop", "stop_limit")


def rows_of(table: NDArray[Any]) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())


def terms(rng: np.random.Generator, bars: Bars, weights_of: Any, fractional: bool) -> dict[str, Any]:
    """How positions are entered and protected: kinds, prices near the close or missing, one for all or by row."""
    shape = bars.close.shape
    kinds = rng.choice(KINDS, shape) if rng.random() < 0.5 else np.full(shape, pick(rng, *KINDS))
    near = pick(rng, 0.003, 0.01, 0.04)

    def around(share: float, missing: float) -> tuple[tuple[float, ...], ...]:
        prices = np.round(bars.close * (1.0 + share * rng.uniform(-1.0, 1.0, shape)), 3)
        prices = np.where((rng.random(shape) < missing) | ~(prices > 0.0), math.nan, prices)
        return rows_of(prices)

    lasts = "day" if fractional else pick(rng, "day", "gtc", None)
    drawn: dict[str, Any] = {
        "enter": rows_of(kinds),
        "limit_price": around(near, pick(rng, 0.0, 0.5)),
        "stop_price": around(near, pick(rng, 0.0, 0.5)),
        "good_for": pick(rng, None, 1, 2, 5),
        "time_in_force": lasts,
        "follow": bool(rng.random() < 0.4),
    }
    if fractional and drawn["good_for"] is not None:
        drawn["time_in_force"] = "day"
    if not fractional and rng.random() < 0.6:
        drawn |= {
            "stop_loss": around(0.05, 0.3),
            "take_profit": around(0.08, 0.5),
            "trailing": pick(rng, None, 0.03),
            "bracket": bool(rng.random() < 0.5),
        }
        if rng.random() < 0.5:  # on their sides of the entry: a bracket is an order then
            low, high = np.nan_to_num(bars.close, nan=1.0) * 0.97, np.nan_to_num(bars.close, nan=1.0) * 1.03
            short = np.array(weights_of) < 0.0
            drawn |= {
                "stop_loss": rows_of(np.where(short, high, low)),
                "take_profit": rows_of(np.where(short, low, high)),
            }
    return {name: value for name, value in drawn.items() if value is not None}


def carried(rng: np.random.Generator) -> dict[str, Any]:
    """What holding costs, and whether a cash account waits for settlement: nothing in half of the configurations."""
    if rng.random() < 0.5:
        return {}
    return {
        "margin_rate": pick(rng, 0.0, 0.0625, 0.9),
        "borrow_rate": pick(rng, 0.0, 0.03, 3.0),
        "settlement_days": pick(rng, 0, 1),
    }


def configuration(seed: int) -> Configuration:
    """The configuration of a seed."""
    rng = np.random.default_rng(seed)
    bars = market(rng, pick(rng, "1Day", "15Min"))
    stop, target, trail = pick(rng, None, 0.03, 0.1), pick(rng, None, 0.05, 0.2), pick(rng, None, 0.04)
    guarded = rng.random() < 0.35 and (stop or target or trail)
    exits = ProtectiveExits(stop_loss=stop, take_profit=target, trailing_stop=trail) if guarded else None
    costs = Costs(
        **carried(np.random.default_rng([seed, 98])),
        commission_per_share=pick(rng, 0.0, 0.005),
        commission_bps=pick(rng, 0.0, 3.0),
        commission_minimum=pick(rng, 0.0, 1.0),
        slippage_bps=pick(rng, 0.0, 2.5, 20.0),
        volume_share=pick(rng, 0.0, 0.05, 0.1),
    )
    wide = {"max_gross_exposure": None, "max_margin_used": None, "max_orders": None}
    narrow = {
        "max_order_notional": pick(rng, None, 20_000),
        "max_drawdown": pick(rng, None, 0.1),
        "max_daily_loss": pick(rng, None, 0.05),
        "allow_short": pick(rng, True, False),
        "symbols": pick(rng, {}, {"AAA": SymbolLimits(max_order_qty=150)}),
    }
    fractional = exits is None and rng.random() < 0.5
    sizing = SizingRules(fractional, pick(rng, 0.01, 0.0), pick(rng, 1.0, 1.0, 2.0, 4.0))
    account = {
        "costs": costs,
        "limits": Limits(**pick(rng, wide, wide, narrow, {})),
        "multiplier": pick(rng, 1, 2, 2, 4),
    }
    strategy = Given(weights=weights(rng, bars.n, len(bars.symbols)), protection=exits)
    cash = pick(rng, *CASH)
    if rng.random() < 0.6:
        strategy = strategy.model_copy(update={"terms": terms(rng, bars, strategy.weights, fractional)})
    return Configuration(bars, strategy, cash, sizing, account)


async def both(drawn: Configuration, transport: str = "in_process") -> tuple[BacktestResult, SessionResult]:
    """The configuration in both engines. transport: of the session's broker."""
    sizing = drawn.sizing
    result = backtest(drawn.strategy, drawn.bars, cash=drawn.cash, sizing=sizing, check=False, **drawn.account)
    spec = SessionSpec(
        symbols=drawn.bars.symbols,
        timeframe=str(drawn.bars.timeframe),
        cash=Decimal(str(drawn.cash)),
        fractional=sizing.fractional,
        min_trade=sizing.min_trade,
        leverage=sizing.leverage,
        **drawn.account,
    )
    wire = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": transport}})
    return result, await run_session(spec, wire, bars=drawn.bars, strategy=drawn.strategy)


def difference(result: BacktestResult, session: SessionResult) -> str:
    """What the two do not agree on, or what is wrong with either; empty for nothing."""
    found = compare_order_lists(result.orders, session.orders)
    if not found.equal:
        return " ".join([found.summary(), *(row.sentence() for row in found.differences[:2])])
    refusals: Sequence[Any] = [
        [(one.decided_at, one.symbol, one.reasons) for one in engine.refusals] for engine in (result, session)
    ]
    checks = {
        "equity": np.array_equal(result.equity.to_numpy(), session.equity.to_numpy()),
        "hash": result.order_list_hash == session.order_list_hash,
        "refusals": refusals[0] == refusals[1],
        "ruin": result.ruined_at == session.ruined_at,
        "status": session.status == "completed",
        "books": session.reconciliation.ok,
        "agents": all(agent.state == "ok" for agent in session.health),
        "cash": result.multiplier > 1 or bool((result.cash >= -result.fills_frame["fee"].sum()).all()),
    }
    return ", ".join(name for name, right in checks.items() if not right)


def exits_at_once(result: BacktestResult) -> bool:
    """Whether an exit that the broker held filled in the bar in which its entry did."""
    orders, fills = result.simulation.orders, result.simulation.fills
    filled = dict(zip(fills["order"].tolist(), fills["bar"].tolist(), strict=True))
    entries = np.flatnonzero((orders["form"] >= 2) & (orders["exit"] == 0)).tolist()
    legs = [(entry, entry + leg) for entry in entries for leg in range(1, int(orders["form"][entry]))]
    return any(filled.get(entry, -1) == filled.get(leg) for entry, leg in legs)


def seen_in(drawn: Configuration, result: BacktestResult) -> Counter[str]:
    """What of interest happened, each counted once."""
    table, orders = result.simulation.orders, result.simulation.orders["qty"]
    facts = {
        "orders at all": len(table) > 0,
        "fractions of a share": bool((orders != np.floor(orders)).any()),
        "short positions": bool((result.positions.to_numpy() < 0).any()),
        "more than a million shares": bool((orders >= 1e6).any()),
        "sixteen digits avoided": drawn.sizing.fractional and bool((orders >= 1e6).any()),
        "fills in part": bool((np.bincount(result.simulation.fills["order"], minlength=1) > 1).any()),
        "weights of NaN": bool(np.isnan(np.array(drawn.strategy.weights)).any()),
        "prices below a dollar": bool((drawn.bars.close < 1.0).any()),
        "symbols without volume at times": bool((drawn.bars.volume == 0.0).any()),
        "extended hours": outside_regular_hours(drawn.bars),
        "margin calls": bool((table["exit"] == 2).any()),
        "ruin": result.ruined_at is not None,
        "cash accounts": result.multiplier == 1,
        "refusals": result.refused > 0,
        "protective exits": bool((table["exit"] == 1).any()),
        **{
            f"{name} entries": bool(((table["exit"] == 0) & (table["type"] == kind)).any())
            for kind, name in enumerate(KINDS)
        },
        "entries till canceled": bool(((table["exit"] == 0) & (table["lasts"] == 1)).any()),
        "entries that waited and filled": bool(
            ((table["exit"] == 0) & (table["type"] > 0) & (table["filled"] > 0)).any()
        ),
        "entries taken back": bool(((table["exit"] == 0) & (table["type"] > 0) & (table["status"] == 2)).any()),
        "brackets": bool((table["form"] == 3).any()),
        "brackets' exits that filled": bool(
            ((table["form"] >= 2) & (table["exit"] == 1) & (table["filled"] > 0)).any()
        ),
        "exits that filled in their entry's bar": exits_at_once(result),
        "protection that came with an entry": "stop_loss" in (drawn.strategy.terms or {}),
        "interest": result.simulation.interest > 0.0,
        "fees for borrowed shares": result.simulation.borrow_fees > 0.0,
        "settlement waited for": result.multiplier == 1 and drawn.account["costs"].settlement_days > 0,
    }
    return Counter({name: 1 for name, held in facts.items() if held} | {"orders": len(table)})


def play(seed: int) -> Outcome:
    """Play one seed; what either engine raises is an outcome too."""
    try:
        drawn = configuration(seed)
        result, session = asyncio.run(both(drawn))
        return Outcome(seed, difference(result, session), seen_in(drawn, result))
    except Exception as error:
        return Outcome(seed, f"{type(error).__name__}: {error}", Counter())
