"""Each cause of a difference between a session and its backtest is planted, and the parity report has to name it."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.given import Given
from tests.venue import as_alpaca, beside, goes_on, recent_minutes
from trader_lib.config.settings import load_settings
from trader_lib.errors.taxonomy import BadData, Misused
from trader_lib.evidence.parity import Cause, ParityReport, parity
from trader_lib.evidence.reference import own_backtest
from trader_lib.evidence.sides import Side, SideReading, backtest_side, session_side
from trader_lib.exchange.costs import Costs
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.refusals import insufficient_buying_power
from trader_lib.exchange.server import ExchangeServer
from trader_lib.journal.opening import open_journal
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars
from trader_lib.research.backtest import backtest
from trader_lib.risk.limits import Limits
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.steering.control import ControlFile
from trader_lib.strategy.contract import Strategy
from trader_lib.strategy.intents import Intents
from trader_lib.trading.events import BarsClosed, Event, FillRecorded, PortfolioChanged
from trader_lib.trading.orders import Order, OrderRequest, OrderSide
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
    explained = report.difference - report.unexplained
    assert abs(by_order - explained) < Decimal("0.01") * (len(report.rows) + 1) or "data" in report.parts


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


class Bracketed(Strategy):
    """Buys dips by limit orders whose exits the broker holds."""

    lasts: str = "gtc"

    @property
    def warmup(self) -> int:
        return 5

    @property
    def lookback_max(self) -> int:
        return 5

    def targets(self, bars: Bars) -> Intents:
        close = bars.frame("close")
        dipped = (close < close.rolling(5).mean()).to_numpy(float) / len(bars.symbols)
        protects: dict[str, Any] = {"stop_loss": 0.98 * close, "take_profit": 1.02 * close, "bracket": True}
        return Intents(dipped, enter="limit", limit_bps=20, time_in_force=self.lasts, **protects)


@pytest.mark.parametrize("lasts", ["gtc", "day"])
async def test_exits_that_the_broker_holds_are_orders_of_their_own(lasts: str, tmp_path: Path) -> None:
    strategy, months = Bracketed(lasts=lasts), {"end": date(2012, 6, 29)}
    reading = read(await session(tmp_path, strategy, costs=Costs(slippage_bps=20), **months))
    exits = [line for line in reading.side.lines if line.key[2] == "exit" and line.fills]
    entries = {line.key[:2]: line for line in reading.side.lines if line.key[2] == "entry"}
    assert exits and all(line.filled * entries[line.key[:2]].filled < 0 for line in exits if line.key[:2] in entries)
    report = parity(reading, clean(reading, strategy))
    assert report.difference == 0 and not report.rows and report.same > 20
    report = parity(reading, clean(reading, strategy, costs=Costs()))
    assert report.parts["fill price"] < 0 and report.unexplained == 0
    adds_up(report)


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


async def test_an_order_that_the_broker_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accept, refused = Exchange.submit, []

    def submit(exchange: Exchange, request: OrderRequest, *more: Any) -> Order:
        if request.symbol == "IBM" and not refused:
            refused.append(request)
            raise insufficient_buying_power(Decimal(100), Decimal(0))
        return accept(exchange, request, *more)

    monkeypatch.setattr(Exchange, "submit", submit)
    reading = read(await session(tmp_path))
    report = parity(reading, clean(reading))
    named(report, "rejection by the broker")
    assert any("insufficient buying power" in row.pair.ours.reason for row in report.rows if row.pair.ours)


class ByDay(Strategy):
    """Half of equity in each symbol's share, and less on one day of the year."""

    less_on: date

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars: Bars) -> np.ndarray:
        days = np.array([bars.day(row) == self.less_on for row in range(bars.n)])
        return np.where(days[:, None], 0.1, 0.4) * np.ones((1, len(bars.symbols)))


def with_day(bars: Bars, day: date) -> Bars:
    """The bars and one more day, five percent below the day before."""
    rows = bars.to_frame()
    before = rows[rows["timestamp"] < pd.Timestamp(day, tz="America/New_York")].groupby("symbol").last().reset_index()
    before["timestamp"] = pd.Timestamp(day, tz="America/New_York").tz_convert("UTC")
    before[["open", "high", "low", "close"]] *= 0.95
    return Bars.from_frame(pd.concat([rows, before]).sort_values(["timestamp", "symbol"]), adjustment="all")


async def test_a_day_on_which_the_exchange_is_closed_is_the_calendars(tmp_path: Path) -> None:
    saturday = date(2012, 1, 14)
    strategy, bars = ByDay(less_on=saturday), sample_bars(("AAPL", "IBM"), "2012-01-03", "2012-02-29").without_actions()
    reading = read(await session(tmp_path, strategy, bars))
    report = parity(reading, clean(reading, strategy, with_day(bars, saturday), calendar="24/7"))
    named(report, "calendar")
    assert any("when the exchange is closed" in sentence for row in report.rows for sentence in row.pair.why)


async def test_a_day_that_the_session_missed_is_the_datas(tmp_path: Path) -> None:
    monday = date(2012, 1, 23)
    whole = sample_bars(("AAPL", "IBM"), "2012-01-03", "2012-02-29").without_actions()
    kept = [row for row in range(whole.n) if whole.day(row) != monday]
    figures = {name: getattr(whole, name)[kept] for name in ("open", "high", "low", "close", "volume")}
    bars = Bars(**figures, index=whole.index[kept], symbols=whole.symbols, provenance=whole.provenance)
    strategy = ByDay(less_on=monday)
    reading = read(await session(tmp_path, strategy, bars))
    report = parity(reading, clean(reading, strategy, whole))
    named(report, "data")
    assert any("The session has no bar of AAPL at 2012-01-23" in said for row in report.rows for said in row.pair.why)


async def test_a_split_that_both_saw_is_no_difference(tmp_path: Path) -> None:
    days = {"start": date(2005, 2, 1), "end": date(2005, 3, 31)}
    bars = sample_bars(("AAPL", "IBM"), "2005-02-01", "2005-03-31", adjustment="raw")
    reading = read(await session(tmp_path, bars=bars, adjustment="raw", **days))
    assert reading.side.actions
    report = parity(reading, clean(reading))
    assert report.difference == 0 and not report.parts and not report.rows


async def test_a_split_and_other_slippage_still_add_up(tmp_path: Path) -> None:
    days = {"start": date(2005, 2, 1), "end": date(2005, 3, 31)}
    bars = sample_bars(("AAPL", "IBM"), "2005-02-01", "2005-03-31", adjustment="raw")
    reading = read(await session(tmp_path, bars=bars, adjustment="raw", costs=Costs(slippage_bps=20), **days))
    report = parity(reading, clean(reading, bars=bars, costs=Costs()))
    adds_up(report)
    assert set(report.parts) <= {"fill price", "corporate action"} and report.unexplained == 0
    assert abs(report.parts["fill price"]) > Decimal("0.95") * abs(report.difference)


async def test_what_a_delisted_share_paid_is_a_corporate_action(tmp_path: Path) -> None:
    table = sample_bars(("AAPL", "IBM"), "2012-01-03", "2012-02-29").to_frame()
    gone = (table["symbol"] == "IBM") & (table["timestamp"] > pd.Timestamp("2012-02-01", tz="UTC"))
    bars, strategy = Bars.from_frame(table[~gone], adjustment="split"), ByDay(less_on=date(2000, 1, 3))
    reading = read(await session(tmp_path, strategy, bars, costs=Costs(delisting_recovery=0.5)))
    report = parity(reading, clean(reading, strategy, bars, costs=Costs()))
    named(report, "corporate action")


async def test_what_no_record_accounts_for_is_unexplained(tmp_path: Path) -> None:
    def edit(event: Event) -> list[Event]:
        payload = event.payload
        if isinstance(payload, PortfolioChanged) and payload.equity is not None and event.seq > 100:
            return [event.model_copy(update={"payload": payload.model_copy(update={"equity": payload.equity - 50})})]
        return [event]

    reading = read(await session(tmp_path, costs=Costs(slippage_bps=20)), edit)
    report = parity(reading, clean(reading, costs=Costs()))
    adds_up(report)
    assert report.unexplained == -50 and not report.holds and "fill price" in report.parts
    reading = read(tmp_path / "journal.sqlite", edit)
    assert parity(reading, clean(reading, costs=Costs()), bound=Decimal(50)).holds


@pytest.mark.parametrize("cut", [20, 60, 150])
async def test_half_a_session_is_held_against_half_a_backtest(cut: int, tmp_path: Path) -> None:
    def edit(event: Event) -> list[Event]:
        return [event] if event.seq < cut else []

    reading = read(await session(tmp_path), edit)
    report = parity(reading, clean(reading))
    assert report.unexplained == 0 and set(report.parts) <= {"latency"}, report.parts


async def test_a_session_without_bars_is_refused(tmp_path: Path) -> None:
    path = await session(tmp_path)
    with pytest.raises(BadData, match="before its first bar closed"):
        read(path, lambda event: [event] if event.seq < 4 else [])
    with pytest.raises(Misused, match="It has one strategy: leave --of out"):
        with open_journal(path) as journal:
            session_side(journal.read(), "trend")


@pytest.mark.parametrize("held", [False, True], ids=["from nothing", "with shares already held"])
async def test_a_session_over_alpacas_protocol_in_real_time(held: bool, tmp_path: Path) -> None:
    """A market that goes on by itself, fills within bars, symbols that do not trade: every dollar has a cause."""
    bars, path = recent_minutes(), tmp_path / "journal.sqlite"
    fast = {"strategy": "sma_cross", "params": {"fast": 2, "slow": 4}}
    spec = SessionSpec.model_validate(fast | {"symbols": ("AAPL", "IBM"), "timeframe": "1Min", "bars_max": 15})
    with ExchangeServer(Exchange(bars, bars.n - 60), key_id="key", secret_key="secret") as server:
        server.call(server.exchange.advance)
        if held:
            before = OrderRequest(symbol="IBM", side=OrderSide.BUY, qty=Decimal(10), client_order_id="before")
            server.call(lambda: server.exchange.submit(before))
        server.call(server.exchange.advance)
        settings = load_settings(environ={}, env_file=None, overrides={"broker": as_alpaca(server)})
        async with asyncio.timeout(60), beside(goes_on(server, pace_s=0.1)):
            await run_session(spec, settings, journal_path=path)
    reading = read(path)
    report = parity(reading, clean(reading, spec.build_strategy()))
    assert sum(report.parts.values()) == report.difference and report.unexplained == 0, report.parts
    assert ("operator" in report.parts) <= held
    assert [row.pair.key[2] for row in report.rows].count("opening") == held
