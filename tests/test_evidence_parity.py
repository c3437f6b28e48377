"""Each cause of a difference between a session and its backtest is planted, and the parity report has to name it."""

from collections.abc import Callable, Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.given import Given
from trader_lib.evidence.parity import Cause, ParityReport, parity
from trader_lib.evidence.reference import own_backtest
from trader_lib.evidence.sides import Side, SideReading, backtest_side, session_side
from trader_lib.exchange.costs import Costs
from trader_lib.journal.opening import open_journal
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars
from trader_lib.research.backtest import backtest
from trader_lib.risk.limits import Limits
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.steering.control import ControlFile
from trader_lib.strategy.contract import Strategy
from trader_lib.trading.events import BarsClosed, Event, FillRecorded, PortfolioChanged
from trader_lib.trading.portfolio import Fill

pytestmark = pytest.mark.usefixtures("quiet")

DAYS: dict[str, Any] = {"symbols": ("AAPL", "IBM"), "start": date(2012, 1, 3), "end": date(2012, 2, 29)}
STEP = Given(weights=tuple((0.5, 0.4) if row % 9 < 5 else (0.1, 0.5) for row in range(60)))
Edit = Callable[[Event], Sequence[Event]]


async def session(folder: Path, strategy: Strategy | None = STEP, bars: Bars | None = None, **more: Any) -> Path:
    """Run a session; return its journal."""
    path = folder / "journal.sqlite"
    progress = more.pop("progress", None)
    spec = SessionSpec(**(DAYS | more))
    played = bars if bars is not None else sample_bars(spec.symbols)
    await run_session(spec, bars=played, strategy=strategy, journal_path=path, progress=progress, check=False)
    return path


def read(path: Path, edit: Edit = lambda event: [event]) -> SideReading:
    """Return a session's side, its events changed on the way."""
    with open_journal(path) as journal:
        return session_side(one for event in journal.read() for one in edit(event))


def clean(reading: SideReading, strategy: Strategy = STEP, bars: Bars | None = None, **other: Any) -> Side:
    """Return the side of the backtest without anything that was planted."""
    if bars is None and not other:
        return backtest_side(own_backtest(reading, strategy))
    assert reading.spec is not None
    spec = reading.spec
    given = {"costs": spec.costs, "limits": spec.limits, "sizing": spec.sizing, "cash": spec.cash} | other
    played = bars if bars is not None else sample_bars(spec.symbols)
    return backtest_side(backtest(strategy, played, start=spec.start, end=spec.end, check=False, trials=False, **given))


def adds_up(report: ParityReport) -> None:
    """The sums by cause are the whole difference; so are those of every day."""
    assert sum(report.parts.values()) == report.difference
    for day in report.days:
        assert abs(sum(day.parts.values()) - day.difference) <= Decimal("0.01"), day
    by_order = sum((amount for row in report.rows for amount in row.parts.values()), Decimal(0))
    assert abs(by_order - report.difference) < Decimal("0.01") * (len(report.rows) + 1) or "data" in report.parts


def named(report: ParityReport, *causes: Cause) -> None:
    """These causes are named, the first has the most, and nothing else is; it adds up and nothing is unexplained."""
    adds_up(report)
    assert set(report.parts) == set(causes), report.parts
    assert max(report.parts, key=lambda cause: abs(report.parts[cause])) == causes[0], report.parts
    assert report.unexplained == 0 and report.holds


async def test_nothing_planted_nothing_found(tmp_path: Path) -> None:
    reading = read(await session(tmp_path, costs=Costs(slippage_bps=5, commission_per_share=0.005)))
    report = parity(reading, clean(reading))
    assert report.difference == 0 and not report.parts and not report.rows and report.same > 10


async def test_other_slippage_is_the_fill_price(tmp_path: Path) -> None:
    reading = read(await session(tmp_path, costs=Costs(slippage_bps=20)))
    report = parity(reading, clean(reading, costs=Costs()))
    named(report, "fill price")
    assert report.parts["fill price"] < 0


async def test_commission_is_a_cost(tmp_path: Path) -> None:
    reading = read(await session(tmp_path, costs=Costs(commission_per_share=0.05)))
    report = parity(reading, clean(reading, costs=Costs()))
    named(report, "cost")
    assert report.parts["cost"] < 0


async def test_an_order_that_risk_refused(tmp_path: Path) -> None:
    reading = read(await session(tmp_path, limits=Limits(max_order_qty=900)))
    report = parity(reading, clean(reading, limits=Limits()))
    named(report, "refusal by risk")
    assert any("at most 900" in (row.pair.ours.reason if row.pair.ours else "") for row in report.rows)


async def test_a_share_of_volume_that_fills_in_part(tmp_path: Path) -> None:
    reading = read(await session(tmp_path, costs=Costs(volume_share=0.000002)))
    report = parity(reading, clean(reading, costs=Costs(volume_share=0.0)))
    named(report, "partial fill")


async def test_another_version_of_the_strategy_is_a_decision(tmp_path: Path) -> None:
    reading = read(await session(tmp_path))
    other = Given(weights=tuple((0.5, 0.4) if row != 20 else (0.3, 0.4) for row in range(60)))
    report = parity(reading, clean(reading, other))
    named(report, "decision")
    assert any("The session wanted" in sentence for row in report.rows for sentence in row.pair.why)


async def test_an_operator_who_reduces_and_resumes(tmp_path: Path) -> None:
    control = ControlFile.beside(tmp_path / "journal.sqlite")

    def closed(bars: int, _at: datetime) -> None:
        if bars in {8, 16}:
            control.append("reduce" if bars == 8 else "resume", reason="looking", by="ada")

    reading = read(await session(tmp_path, progress=closed))
    report = parity(reading, clean(reading))
    named(report, "operator")
    assert any("ada asked for reduce: looking." in row.pair.ours.reason for row in report.rows if row.pair.ours)


async def test_an_operator_who_flattens(tmp_path: Path) -> None:
    def closed(bars: int, _at: datetime) -> None:
        if bars == 12:
            ControlFile.beside(tmp_path / "journal.sqlite").append("flatten", reason="prices", by="ada")

    reading = read(await session(tmp_path, progress=closed))
    report = parity(reading, clean(reading))
    named(report, "operator")
    assert any(row.pair.key[2] == "operator" for row in report.rows)


async def test_bars_that_differ(tmp_path: Path) -> None:
    original = sample_bars(("AAPL", "IBM"))
    row = int(np.searchsorted(original.index, pd.Timestamp("2012-01-20", tz="UTC")))
    arrays = {name: np.array(getattr(original, name)) for name in ("open", "high", "low", "close", "volume")}
    for name in ("open", "high", "low", "close"):
        arrays[name][row, 0] *= 1.03
    edited = Bars(**arrays, index=original.index, symbols=original.symbols, provenance=original.provenance)
    strategy = SessionSpec(params={"fast": 2, "slow": 5}).build_strategy()
    reading = read(await session(tmp_path, strategy, edited))
    report = parity(reading, clean(reading, strategy, original.without_actions()))
    adds_up(report)
    assert (
        report.rows and "data" in report.parts and abs(report.parts["data"]) > Decimal("0.9") * abs(report.difference)
    )
    assert set(report.parts) <= {"data", "cost"}, report.parts


async def test_a_bar_that_came_late(tmp_path: Path) -> None:
    late = {datetime.fromisoformat("2012-01-10T05:00:00+00:00")}
    reading = read(await session(tmp_path))
    side = reading.side
    side.late |= late
    side.lines = [line for line in side.lines if line.key[0] not in late]
    report = parity(reading, clean(reading))
    assert all(row.pair.key[0] in late for row in report.rows)
    assert all("came too late" in sentence for row in report.rows for sentence in row.pair.why)


class Later:
    """Moves the first fill of a journal into the bar after its own, at that bar's open, and its worth with it."""

    def __init__(self) -> None:
        self.held: Event | None = None
        self.bars: list[BarsClosed] = []  # that closed since it happened
        self.moved = False

    def __call__(self, event: Event) -> list[Event]:
        payload = event.payload
        if isinstance(payload, FillRecorded) and self.held is None:
            self.held = event
            return []
        if isinstance(payload, BarsClosed) and self.held is not None and not self.moved:
            self.bars.append(payload)
            if len(self.bars) == 2:
                self.moved = True
                return [self.late_fill(), event]
        if isinstance(payload, PortfolioChanged) and self.bars and payload.equity is not None:
            equity = payload.equity - self.qty * (self.price - self.before)
            return [event.model_copy(update={"payload": payload.model_copy(update={"equity": round(equity, 2)})})]
        return [event]

    @property
    def fill(self) -> Fill:
        assert self.held is not None and isinstance(self.held.payload, FillRecorded)
        return self.held.payload.fill

    @property
    def qty(self) -> Decimal:
        return self.fill.signed_qty

    @property
    def before(self) -> Decimal:
        return self.fill.price

    @property
    def price(self) -> Decimal:
        """Of the fill where it is now, or the close, while it is still on its way."""
        row = self.bars[-1].bars[self.fill.symbol] if not self.moved else self.bars[1].bars[self.fill.symbol]
        return Decimal(str(row.open if self.moved else row.close))

    def late_fill(self) -> Event:
        assert self.held is not None
        fill = self.fill.model_copy(update={"price": self.price})
        return self.held.model_copy(update={"payload": FillRecorded(fill=fill)})


async def test_a_fill_that_came_a_bar_later_is_latency(tmp_path: Path) -> None:
    later = Later()
    reading = read(await session(tmp_path), later)
    report = parity(reading, clean(reading))
    named(report, "latency")
    (row,) = report.rows
    assert row.pair.key[0] == min(reading.side.bars) and report.difference == -round(
        later.qty * (later.price - later.before), 2
    )
    assert set(report.days[1].parts) == {"latency"}, "while it is on its way, too"
