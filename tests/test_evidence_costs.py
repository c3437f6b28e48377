"""What a session was charged is found again from its fills, and each part of the shortfall where it was planted."""

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.given import Given
from trader_lib.evidence.sides import SideReading, session_side
from trader_lib.evidence.trading_costs import by_size, by_symbol, by_time, fitted_costs, grouped, order_costs
from trader_lib.exchange.costs import Costs
from trader_lib.journal.opening import open_journal
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.runs.store import RunStore
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec

pytestmark = pytest.mark.usefixtures("quiet")

Trader = Callable[..., tuple[int, str, str]]
SWAY = Given(weights=tuple((-0.4, 0.6) if row % 6 < 3 else (0.5, -0.4) for row in range(2_000)))


async def minutes(folder: Path, **more: Any) -> SideReading:
    """A session over an hour's bars of synthetic minutes in two symbols."""
    bars = synthetic_bars(("AAA", "BBB"), date(2025, 6, 2), date(2025, 6, 2), timeframe="1Min", seed=5)
    spec = SessionSpec(symbols=bars.symbols, timeframe="1Min", source="synthetic", **more)
    path = folder / "journal.sqlite"
    await run_session(spec, bars=bars.head(100), strategy=SWAY, journal_path=path, check=False)
    with open_journal(path) as journal:
        return session_side(journal.read())


async def test_slippage_and_commission_are_fitted_from_fills(tmp_path: Path) -> None:
    charged = order_costs([await minutes(tmp_path, costs=Costs(slippage_bps=4.5, commission_per_share=0.02))])
    fitted = fitted_costs(charged)
    assert len(charged) > 20 and fitted.slippage_bps == pytest.approx(4.5, abs=0.1)
    assert abs(fitted.slippage_bps - 4.5) < 4 * fitted.error_bps + 0.01 and fitted.error_bps < 0.1
    assert fitted.costs.commission_per_share == pytest.approx(0.02, abs=1e-4)
    assert [row.group for row in grouped(charged, by_time)] == ["09:00", "10:00", "11:00", "all"]
    assert [row.group for row in grouped(charged, by_symbol)] == ["AAA", "BBB", "all"]
    assert grouped(charged, by_size)[-1].orders == len(charged)


async def test_the_parts_are_the_whole_shortfall(tmp_path: Path) -> None:
    for cost in order_costs([await minutes(tmp_path, costs=Costs(slippage_bps=4.5, volume_share=0.02))]):
        paid = cost.filled * cost.average if cost.filled else 0.0
        assert abs(cost.delay + cost.execution) == pytest.approx(abs(paid - cost.filled * cost.arrival))
        assert (cost.missed != 0.0) <= (cost.filled < cost.asked)
        assert cost.execution > -1e-6, "slippage never helps"


def test_the_command_shows_tables_and_a_model(tmp_path: Path, trader: Trader) -> None:
    import asyncio

    run = RunStore(tmp_path / "runs").create("paper")
    spec = SessionSpec(
        params={"fast": 2, "slow": 5},
        symbols=("AAPL", "IBM"),
        start=date(2012, 1, 3),
        end=date(2012, 2, 29),
        costs=Costs(slippage_bps=7),
    )
    asyncio.run(run_session(spec, journal_path=run.journal))
    code, out, _ = trader("costs", "latest-paper")
    assert code == 0 and "7.00 bps, standard error 0.00" in out and "Time of day" in out
    code, out, _ = trader("costs", "latest-paper", "--json")
    assert code == 0 and json.loads(out)["fitted"]["costs"]["slippage_bps"] == pytest.approx(7, abs=0.01)
    assert trader("costs", "nope")[0] == 2 and trader("costs", "latest-paper", "--of", "trend")[0] == 2
