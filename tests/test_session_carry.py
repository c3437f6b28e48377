"""What holding costs, and when cash may be used, is the same in a backtest, in a session and over HTTP, to the cent."""

from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.given import Given
from tests.parity.drawn import both as drawn_both
from tests.parity.drawn import configuration, difference, play
from tests.test_session_parity import assert_same, both, settings, specification
from trader_lib.exchange.costs import Costs
from trader_lib.market.sample import sample_bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.research.backtest import backtest
from trader_lib.rules.sizing import SizingRules
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec

pytestmark = pytest.mark.usefixtures("quiet")

RATES = Costs(margin_rate=0.08, borrow_rate=0.03, slippage_bps=2)


@pytest.mark.parametrize("transport", ["in_process", "http"])
async def test_session_is_charged_what_the_backtest_was(transport: str, tmp_path: Path) -> None:
    weights = ((0.0, 0.0),) * 5 + ((1.4, -0.3),) * 40 + ((0.0, -0.8),) * 20
    strategy, bars = Given(weights=weights), sample_bars("AAPL,IBM", "2005-01-03", "2005-06-30")
    costs, sizing = RATES, SizingRules(leverage=1.8)
    tested = backtest(strategy, bars, costs=costs, sizing=sizing, check=False)
    spec = SessionSpec(symbols=bars.symbols, costs=costs, leverage=1.8)
    run = await run_session(
        spec, settings(transport), bars=bars, strategy=strategy, journal_path=tmp_path / "journal.sqlite"
    )
    assert_same(tested, run)
    assert tested.simulation.interest > 100.0 and tested.simulation.borrow_fees > 100.0
    assert np.array_equal(tested.cash.to_numpy()[-run.bars :], run.curve["cash"].to_numpy())


@pytest.mark.parametrize("seed", [3, 5, 9])
async def test_drawn_accounts_over_http_are_charged_the_same(seed: int) -> None:
    drawn = configuration(seed)
    drawn.account["costs"] = drawn.account["costs"].model_copy(
        update={"margin_rate": 0.25, "borrow_rate": 0.8, "settlement_days": 1}
    )
    assert difference(*await drawn_both(drawn, "http")) == ""


@pytest.mark.parametrize("first", range(0, 24, 6))
def test_drawn_configurations_agree(first: int) -> None:
    seen: Counter[str] = Counter()
    for outcome in map(play, range(first, first + 6)):
        assert outcome.broken == "", f"seed {outcome.seed}: {outcome.broken}"
        seen += outcome.seen
    assert seen["orders"] > 10


@pytest.mark.parametrize("transport", ["in_process", "http"])
async def test_cash_account_that_waits_for_settlement_orders_the_same(transport: str, tmp_path: Path) -> None:
    days = ("2010-03-08", "2010-03-12")
    bars = synthetic_bars(("AAPL", "MSFT"), *days, timeframe="30Min", seed=7)
    given: dict[str, Any] = {
        "strategy": "rsi_reversion",
        "params": {"period": 5},
        "symbols": ("AAPL", "MSFT"),
        "timeframe": "30Min",
        "multiplier": 1,
        "start": date(2010, 3, 9),
        "end": date(2010, 3, 12),
    }
    later = specification(given, costs=Costs(settlement_days=1))
    tested, run = await both(later, transport, tmp_path, bars)
    assert_same(tested, run)
    at_once = backtest(
        later.build_strategy(), bars, start=later.start, end=later.end, sizing=later.sizing, multiplier=1
    )
    assert tested.order_list_hash != at_once.order_list_hash  # money of the morning was missing in the afternoon
