"""A session and a backtest of the same strategy place the same orders, whatever the strategy, the costs or the wire."""

from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trader_lib.config.settings import Settings, load_settings
from trader_lib.exchange.costs import Costs
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.research.backtest import BacktestResult, backtest
from trader_lib.risk.limits import Limits
from trader_lib.session.session import SessionResult, run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.trading.order_list import compare_order_lists
from trader_lib.trading.orders import OrderStatus

DEAR = Costs(commission_per_share=0.005, commission_minimum=1.0, slippage_bps=5, volume_share=0.000005)
NARROW = Limits(max_order_qty=900, max_daily_loss=0.02, max_orders=3, max_gross_exposure=0.9)

CRASH = {"start": date(2008, 1, 2), "end": date(2008, 12, 31)}

CASES: dict[str, dict[str, Any]] = {
    "sma_cross": {"strategy": "sma_cross", "params": {"fast": 5, "slow": 15}},
    "sma_cross, dear and thin": {"strategy": "sma_cross", "params": {"fast": 5, "slow": 15}, "costs": DEAR},
    "sma_cross, cash account": {"strategy": "sma_cross", "params": {"fast": 5, "slow": 15}, "multiplier": 1},
    "sma_cross, fractional": {"strategy": "sma_cross", "params": {"fast": 5, "slow": 15}, "fractional": True},
    "sma_cross, a symbol listed late": {
        "strategy": "sma_cross",
        "params": {"fast": 5, "slow": 15},
        "symbols": ("AAPL", "FB"),
        "start": date(2012, 3, 1),
        "end": date(2012, 12, 31),
    },
    "rsi_reversion, with exits": {"strategy": "rsi_reversion", **CRASH},
    "rsi_reversion, with exits, dear and thin": {"strategy": "rsi_reversion", "costs": DEAR, **CRASH},
    "rsi_reversion, refused": {"strategy": "rsi_reversion", "limits": Limits(max_gross_exposure=0.66)},
    "momentum": {"strategy": "momentum", "symbols": ("AAPL", "GOOG", "IBM", "MSFT")},
    "momentum, refused": {"strategy": "momentum", "limits": NARROW},
    "vol_target": {"strategy": "vol_target"},
    "vol_target, refused, dear and thin": {
        "strategy": "vol_target",
        "limits": Limits(max_position_notional=45_000, max_order_notional=20_000),
        "costs": DEAR,
    },
}


pytestmark = pytest.mark.usefixtures("quiet")


def settings(transport: str) -> Settings:
    return load_settings(environ={}, env_file=None, overrides={"broker": {"transport": transport}})


def specification(case: dict[str, Any], **more: Any) -> SessionSpec:
    return SessionSpec(**({"start": date(2005, 1, 3), "end": date(2005, 12, 30)} | case | more))


async def both(
    spec: SessionSpec, transport: str, folder: Path, bars: Bars | None = None
) -> tuple[BacktestResult, SessionResult]:
    played = sample_bars(spec.symbols) if bars is None else bars
    tested = backtest(
        spec.build_strategy(),
        played,
        start=spec.start,
        end=spec.end,
        cash=float(spec.cash),
        costs=spec.costs,
        limits=spec.limits,
        multiplier=spec.multiplier,
        sizing=spec.sizing,
    )
    run = await run_session(spec, settings(transport), bars=bars, journal_path=folder / "journal.sqlite")
    return tested, run


def assert_same(tested: BacktestResult, run: SessionResult) -> None:
    found = compare_order_lists(tested.orders, run.orders)
    assert found.equal, "\n".join([found.summary(), *(row.sentence() for row in found.differences[:5])])
    assert tested.order_list_hash == run.order_list_hash
    assert np.array_equal(tested.equity.to_numpy()[-run.bars :], run.equity.to_numpy())
    assert Decimal(str(round(float(tested.equity.iloc[-1]), 2))) == run.equity_end
    assert [(no.decided_at, no.symbol, no.reasons) for no in tested.refusals] == [
        (no.decided_at, no.symbol, no.reasons) for no in run.refusals
    ]
    assert run.reconciliation.ok, run.reconciliation.differences
    assert all(agent.state == "ok" for agent in run.health), run.health


@pytest.mark.parametrize("name", CASES)
async def test_in_process_session_equals_backtest(name: str, tmp_path: Path) -> None:
    tested, run = await both(specification(CASES[name]), "in_process", tmp_path)
    assert_same(tested, run)
    assert run.orders, "a case that trades nothing shows nothing"
    assert bool(run.refusals) == ("refused" in name)
    if "thin" in name:
        assert any(0 < order.filled_qty < order.qty for order in run.orders)
    if "exits" in name:
        assert any(order.purpose == "exit" and order.filled_qty for order in run.orders)


async def test_exit_returns_in_both_when_the_order_it_made_way_for_is_refused(tmp_path: Path) -> None:
    spec = specification(CASES["rsi_reversion, refused"])
    tested, run = await both(spec, "in_process", tmp_path)
    assert_same(tested, run)
    exits = {(order.decided_at, order.symbol) for order in run.orders if order.purpose == "exit"}
    assert any((no.decided_at, no.symbol) in exits for no in run.refusals)


@pytest.mark.parametrize("name", ["sma_cross, dear and thin", "rsi_reversion, with exits, dear and thin"])
async def test_session_over_http_equals_backtest(name: str, tmp_path: Path) -> None:
    spec = specification(CASES[name])
    tested, run = await both(spec, "http", tmp_path)
    assert_same(tested, run)
    assert run.orders


@pytest.mark.parametrize("transport", ["in_process", "http"])
async def test_intraday_session_equals_backtest(transport: str, tmp_path: Path) -> None:
    days = ("2010-03-08", "2010-03-12")
    bars = synthetic_bars(("AAPL", "MSFT"), *days, timeframe="30Min", seed=7)
    spec = specification(
        {"strategy": "rsi_reversion", "params": {"period": 5}, "costs": Costs(volume_share=0.002)},
        symbols=("AAPL", "MSFT"),
        timeframe="30Min",
        start=date(2010, 3, 9),
        end=date(2010, 3, 12),
    )
    tested, run = await both(spec, transport, tmp_path, bars)
    assert_same(tested, run)
    assert len(run.orders) > 10 and any(len(order.fills) > 1 for order in run.orders)
    assert {order.status for order in run.orders} >= {OrderStatus.FILLED, OrderStatus.EXPIRED, OrderStatus.CANCELED}


async def test_targets_that_turn_while_their_order_works(tmp_path: Path) -> None:
    bars = synthetic_bars(("AAPL", "MSFT"), "2010-03-08", "2010-03-12", timeframe="15Min", seed=11)
    spec = specification(
        {"strategy": "sma_cross", "params": {"fast": 2, "slow": 5}, "costs": Costs(volume_share=0.0005)},
        symbols=("AAPL", "MSFT"),
        timeframe="15Min",
        start=date(2010, 3, 9),
        end=date(2010, 3, 12),
    )
    tested, run = await both(spec, "in_process", tmp_path, bars)
    assert_same(tested, run)
    assert any(order.status is OrderStatus.CANCELED and order.filled_qty for order in run.orders)


async def test_both_wires_give_the_same_list(tmp_path: Path) -> None:
    spec = specification(CASES["vol_target"], end=date(2005, 3, 31))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = await run_session(spec, settings("in_process"), journal_path=tmp_path / "a" / "journal.sqlite")
    other = await run_session(spec, settings("http"), journal_path=tmp_path / "b" / "journal.sqlite")
    assert one.order_list_hash == other.order_list_hash and one.equity_end == other.equity_end
