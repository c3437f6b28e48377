"""The opening-range breakout orders the same in a backtest and in sessions, by brackets, and is flat over night."""

from datetime import date

import numpy as np
import pytest

from trader_lib.config.settings import load_settings
from trader_lib.exchange.costs import Costs
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.research.backtest import backtest
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.strategy.start import check_start
from trader_lib.trading.order_list import compare_order_lists

BARS = synthetic_bars(["AAA", "BBB"], "2024-11-25", "2024-12-06", "5Min", seed=4)
SPEC = SessionSpec(
    strategy="opening_range",
    symbols=BARS.symbols,
    start=date(2024, 11, 26),
    end=date(2024, 12, 6),
    timeframe="5Min",
    costs=Costs(slippage_bps=2, volume_share=0.01),
)


def played():
    return backtest(
        SPEC.build_strategy(), BARS, start=SPEC.start, end=SPEC.end, cash=float(SPEC.cash), costs=SPEC.costs
    )


def test_entries_are_stops_with_legs_and_nothing_is_held_over_night():
    result = played()
    entries = [order for order in result.orders if order.purpose == "entry" and order.side == "buy"]
    exits = [order for order in result.orders if order.purpose == "exit" and order.filled_qty]
    assert len(entries) >= 8 and {order.type for order in entries} == {"stop"}
    assert {order.type for order in exits} >= {"stop"}, "a case in which nothing is stopped out shows little"
    held = result.positions.to_numpy().any(axis=1)
    days = result.positions.index.tz_convert("America/New_York").date
    last_bars = np.append(days[1:] != days[:-1], True)
    assert held.any() and not held[last_bars].any()


def test_what_it_knows_is_of_its_session():
    assert check_start(SPEC.build_strategy(), BARS).needed <= 78


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("transport", ["in_process", "http"])
async def test_a_session_orders_what_the_backtest_orders(transport, tmp_path):
    chosen = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": transport}})
    run = await run_session(SPEC, chosen, bars=BARS, journal_path=tmp_path / "journal.sqlite")
    found = compare_order_lists(played().orders, run.orders)
    assert found.equal, "\n".join([found.summary(), *(row.sentence() for row in found.differences[:5])])
    assert played().order_list_hash == run.order_list_hash and run.reconciliation.ok
