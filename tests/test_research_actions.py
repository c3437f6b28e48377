"""Splits, adjusted prices, delistings, cheap stocks and extended hours: values worked out by hand, in both engines."""

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from trader_lib.config.settings import load_settings
from trader_lib.errors.taxonomy import BadData
from trader_lib.exchange.costs import Costs
from trader_lib.market.actions import Announced
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars
from trader_lib.research.backtest import BacktestResult, backtest
from trader_lib.rules.sizing import SizingRules
from trader_lib.runs.session_cells import journal_bars, session_statistics
from trader_lib.session.session import SessionResult, run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.strategy.contract import Strategy
from trader_lib.strategy.exits import ProtectiveExits
from trader_lib.trading.order_list import compare_order_lists
from trader_lib.trading.orders import OrderStatus

FREE = Costs.none()


pytestmark = pytest.mark.usefixtures("quiet")


class Hold(Strategy):
    """The same weight in every symbol, from a row on."""

    weight: float = 1.0
    since: int = 0
    until: int = 1_000_000

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars: Bars) -> np.ndarray:
        weights = np.full((bars.n, len(bars.symbols)), self.weight / len(bars.symbols))
        weights[: self.since] = 0.0
        weights[self.until :] = 0.0
        return weights


class Guarded(Hold):
    """With a stop far below."""

    @property
    def exits(self) -> ProtectiveExits:
        return ProtectiveExits(stop_loss=0.4, trailing_stop=0.3)


class Loose(Hold):
    """With a stop that a fall from 10 to 4 does not touch."""

    @property
    def exits(self) -> ProtectiveExits:
        return ProtectiveExits(stop_loss=0.7)


class Turning(Hold):
    """In and out by a rhythm of its own for each symbol."""

    def targets(self, bars: Bars) -> np.ndarray:
        rows, places = np.arange(bars.n)[:, None], np.arange(len(bars.symbols))[None, :]
        return np.where((rows // (3 + places)) % 2 == 0, self.weight / len(bars.symbols), 0.0)


class GuardedTurning(Turning):
    @property
    def exits(self) -> ProtectiveExits:
        return ProtectiveExits(stop_loss=0.03, take_profit=0.05, trailing_stop=0.02)


def frame(prices: list[float], symbol: str = "AAA", volume: float = 1e12, **more: list[float]) -> pd.DataFrame:
    days = sample_bars("IBM", "2004-01-02", "2004-12-31").index[: len(prices)].tz_convert("America/New_York").date
    same = dict.fromkeys(("open", "high", "low", "close"), prices)
    return pd.DataFrame({"symbol": symbol, "timestamp": days, **same, "volume": volume, **more})


async def session_of(
    tested: BacktestResult, bars: Bars, tmp_path: Path, transport: str = "in_process", **more: Any
) -> SessionResult:
    """The session that should have done the same."""
    settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": transport}})
    spec = SessionSpec(
        strategy="hold",
        symbols=bars.symbols,
        timeframe=bars.timeframe.value,
        cash=str(tested.starting_cash),
        costs=tested.costs,
        limits=tested.limits,
        multiplier=tested.multiplier,
        fractional=tested.sizing.fractional,
        adjustment=bars.provenance.adjustment,
        start=bars.day(tested.start),
        end=bars.day(-1),
        **more,
    )
    run = await run_session(
        spec, settings, strategy=tested.strategy, bars=bars, journal_path=tmp_path / "journal.sqlite"
    )
    found = compare_order_lists(tested.orders, run.orders)
    assert found.equal, "\n".join([found.summary(), *(row.sentence() for row in found.differences[:5])])
    assert tested.order_list_hash == run.order_list_hash
    assert np.array_equal(tested.equity.to_numpy()[-run.bars :], run.equity.to_numpy())
    assert run.reconciliation.ok, run.reconciliation.differences
    assert all(agent.state == "ok" for agent in run.health), run.health
    return run


def test_fees_and_caps_count_shares_as_traded() -> None:
    """AAPL at 17.45 USD in June 2003, which prices adjusted for all splits since say is 1.12."""
    costs = Costs(commission_per_share=0.005, volume_share=0.0015)
    bars = sample_bars("AAPL", "2003-06-02", "2003-06-30")
    fills = backtest(Hold(weight=0.95), bars, costs=costs).fills_frame
    assert len(fills) == 1 and fills["fee"].iloc[0] == 27.22
    assert fills["qty"].iloc[0] * bars.actions.factor[1, 0] == pytest.approx(95_000 / 17.45, abs=1)
    blind = backtest(Hold(weight=0.95), bars.without_actions(), costs=costs)  # what it was
    assert blind.statistics["fees"] > 400 and len(blind.fills_frame) >= 10


async def test_raw_bars_split_the_position(tmp_path: Path) -> None:
    bars = sample_bars("AAPL", "2005-02-01", "2005-03-31", adjustment="raw")
    result = backtest(Hold(), bars)
    assert result.statistics["total_return"] == pytest.approx(0.07, abs=0.01)
    assert result.corporate_actions == ("AAPL split 2 for 1 after the close of 2005-02-25: 1,289 shares became 2,578.",)
    await session_of(result, bars, tmp_path)


@pytest.mark.parametrize("ratio", [2.0, 1.5, 0.1])
async def test_a_split_by_hand(ratio: float, tmp_path: Path) -> None:
    """33 shares at 300, split before the fourth day: what is not a whole share is paid out at the new price."""
    table = frame([300.0] * 3 + [300.0 / ratio] * 4)
    bars = Bars.from_frame(table).with_actions([Announced("AAA", bars_day(table, 3), ratio)])
    result = backtest(Guarded(), bars, cash=10_000, costs=FREE, sizing=SizingRules(min_trade=0.2))
    assert result.positions["AAA"].tolist()[1:3] == [33, {2.0: 66, 1.5: 49, 0.1: 3}[ratio]]
    assert result.cash.iloc[2] == {2.0: 100.0, 1.5: 200.0, 0.1: 1_000.0}[ratio]
    assert result.equity.eq(10_000).all() and result.statistics["total_return"] == 0.0
    stops = [order for order in result.orders if order.purpose == "exit"]
    assert [order.status for order in stops][:2] == [OrderStatus.EXPIRED, OrderStatus.CANCELED]
    assert [float(order.stop_price) for order in stops][:2] == [210.0, 210.0 / ratio]
    assert stops[0].decided_at == bars.at(1) and stops[1].decided_at == bars.at(2)
    await session_of(result, bars, tmp_path, min_trade=0.2)


def bars_day(table: pd.DataFrame, row: int) -> date:
    day: date = table["timestamp"].iloc[row]
    return day


async def test_a_short_position_is_split_too(tmp_path: Path) -> None:
    table = frame([300.0] * 3 + [200.0] * 4)
    bars = Bars.from_frame(table).with_actions([Announced("AAA", bars_day(table, 3), 1.5)])
    result = backtest(Hold(weight=-1.0), bars, cash=10_000, costs=FREE)
    assert result.positions["AAA"].tolist()[1:3] == [-33, -49]
    assert result.equity.eq(10_000).all()
    await session_of(result, bars, tmp_path)


async def test_adjusted_bars_with_known_splits(tmp_path: Path) -> None:
    """A cap of 10 % of 500 shares as traded is 50 of them, 100 of the bars' before the split, charged as 50."""
    costs = Costs(commission_per_share=0.02, volume_share=0.1)
    table = frame([50.0] * 7, volume=500.0)
    bars = Bars.from_frame(table, adjustment="split").with_actions([Announced("AAA", bars_day(table, 5), 2.0)])
    result = backtest(Hold(until=5), bars, cash=10_000, costs=costs)
    fills = result.fills_frame
    assert fills["qty"].tolist()[:2] == [100, 99] and fills["fee"].tolist()[:2] == [1.0, 0.99]
    assert fills["qty"].tolist()[-1] == 50 and fills["fee"].tolist()[-1] == 1.0  # after the split: 50 shares are 50
    assert not result.corporate_actions
    await session_of(result, bars, tmp_path)
    own = Bars.from_frame(table, adjustment="split").with_actions(
        [Announced("AAA", bars_day(table, 5), 2.0)], volume="adjusted"
    )
    assert backtest(Hold(), own, cash=10_000, costs=costs).fills_frame["qty"].iloc[0] == 50


def leaving(recovery: float = 1.0) -> tuple[Bars, Costs]:
    """AAA falls to 4 and is gone after the fourth day; BBB goes on."""
    table = pd.concat([frame([10.0, 10.0, 8.0, 4.0], "AAA"), frame([50.0] * 8, "BBB")])
    bars = Bars.from_frame(table, adjustment="split")  # it fell; it was not split
    return bars, Costs(volume_share=0.0, delisting_recovery=recovery)


@pytest.mark.parametrize(("recovery", "equity"), [(1.0, 7_000.0), (0.5, 6_000.0), (0.0, 5_000.0)])
@pytest.mark.parametrize("strategy", [Hold(), Loose()])
async def test_a_delisted_symbol_is_paid_out(
    recovery: float, equity: float, strategy: Strategy, tmp_path: Path
) -> None:
    """500 AAA at 10 and 100 BBB at 50; the last price of AAA is 4, or what is recovered of it."""
    bars, costs = leaving(recovery)
    result = backtest(strategy, bars, cash=10_000, costs=costs, sizing=SizingRules(min_trade=0.45))
    held = result.positions
    assert held["AAA"].tolist() == [0, 500, 500, 0, 0, 0, 0, 0]
    assert result.equity.iloc[3:].eq(equity).all()
    assert result.corporate_actions == (
        f"AAA was delisted at the close of 2004-01-07, its last: 500 shares were closed at {4 * recovery:g} USD.",
    )
    last = result.fills_frame.set_index("bar").loc[bars.index[3]]
    assert (last["symbol"], last["side"], last["qty"], last["price"], last["fee"]) == ("AAA", -1, 500, 4 * recovery, 0)
    assert not any(order.symbol == "AAA" and order.decided_at >= bars.at(3) for order in result.orders)
    page = result.report(tmp_path / "report.html").read_text()
    assert "AAA was delisted at the close of 2004-01-07" in page
    run = await session_of(result, bars, tmp_path, min_trade=0.45)
    assert run.positions[0].symbol == "BBB" and len(run.positions) == 1
    assert run.corporate_actions == (
        f"AAA was delisted at the close of 2004-01-07, its last: a share is paid with {4 * recovery:g} USD.",
    )


async def test_a_delisted_short_is_bought_back(tmp_path: Path) -> None:
    bars, costs = leaving(0.0)
    result = backtest(Hold(weight=-1.0), bars, cash=10_000, costs=costs, sizing=SizingRules(min_trade=0.45))
    assert result.equity.iloc[-1] == 15_000 and result.positions["AAA"].iloc[-1] == 0
    await session_of(result, bars, tmp_path, min_trade=0.45)


def test_bars_that_end_with_the_run_are_not_delisted() -> None:
    bars, costs = leaving()
    assert not backtest(Hold(), bars, end="2004-01-07", cash=10_000, costs=costs).corporate_actions
    unheld = backtest(Hold(weight=0.0), bars, cash=10_000, costs=costs)
    assert unheld.corporate_actions == ("AAA was delisted at the close of 2004-01-07, its last; none was held.",)


def evening(days: tuple[str, ...] = ("2024-03-04", "2024-03-05")) -> Bars:
    """Half-hour bars: cheap at eight, 100 in regular hours, a crash after the close."""
    clock = (("08:00", 90), ("09:30", 100), ("12:00", 100), ("15:30", 100), ("16:00", 50), ("19:30", 40))
    rows = [
        {"timestamp": pd.Timestamp(f"{day} {at}", tz="America/New_York"), "price": float(price)}
        for day in days
        for at, price in clock
    ]
    table = pd.DataFrame(rows)
    same = dict.fromkeys(("open", "high", "low", "close"), table["price"])
    return Bars.from_frame(table.assign(symbol="AAA", volume=1e6, **same).drop(columns="price"), timeframe="30Min")


async def test_orders_wait_for_the_regular_session(tmp_path: Path) -> None:
    """Decided at 16:00, sent to a closed exchange, filled at 9:30 the next day: neither in the evening nor at eight."""
    bars = evening()
    result = backtest(Hold(since=3), bars, cash=10_000, costs=FREE)
    fill = result.fills_frame.iloc[0]
    assert fill["bar"] == pd.Timestamp("2024-03-05 09:30", tz="America/New_York") and fill["price"] == 100.0
    assert result.orders[0].decided_at == bars.at(3)
    run = await session_of(result, bars, tmp_path)
    assert run.orders[0].fills[0].bar == bars.at(7)


async def test_an_exit_does_not_fire_in_the_evening(tmp_path: Path) -> None:
    """Bought at 100 with a stop at 70: 50 at 16:00 and 40 in the evening do not touch it."""
    bars = evening()
    result = backtest(Guarded(weight=0.5), bars, cash=10_000, costs=FREE)
    exits = [order for order in result.orders if order.purpose == "exit"]
    assert exits and not any(order.filled_qty for order in exits)
    assert {fill.bar for order in result.orders for fill in order.fills} <= {bars.at(r) for r in (1, 2, 3, 7, 8, 9)}
    await session_of(result, bars, tmp_path)


async def test_day_orders_expire_with_the_regular_session(tmp_path: Path) -> None:
    """A cap of one share a bar: what is left at 16:00 expires then, and the evening's order waits for the morning."""
    bars = evening()
    result = backtest(Hold(since=1), bars, cash=10_000, costs=Costs(volume_share=1e-6))
    first = result.orders[0]
    assert first.status is OrderStatus.EXPIRED and [fill.bar for fill in first.fills] == [bars.at(2), bars.at(3)]
    assert {fill.bar for order in result.orders for fill in order.fills} <= {bars.at(r) for r in (1, 2, 3, 7, 8, 9)}
    await session_of(result, bars, tmp_path)


@pytest.mark.parametrize("price", [4e-5, 1.6e-4, 0.00334])
def test_prices_that_no_tick_comes_near_are_refused(price: float) -> None:
    with pytest.raises(BadData, match=r"2004-01-0.*finer than Alpaca's ticks below one dollar"):
        Bars.from_frame(frame([1.0, price, price]))


@pytest.mark.parametrize("price", [0.0001, 0.0002, 0.0123456, 0.0333, 0.5])
def test_cheap_prices_that_a_tick_comes_near_are_right(price: float) -> None:
    result = backtest(Hold(), Bars.from_frame(frame([price] * 4)), cash=10_000, costs=FREE)
    assert float(result.equity_end) == pytest.approx(10_000, rel=0.005)


async def test_more_shares_than_a_whole_number_of_billionths_holds(tmp_path: Path) -> None:
    """A million USD at 0.0001 are ten billion shares, whole ones, in both engines."""
    bars = Bars.from_frame(frame([0.0001, 0.0001, 0.0002, 0.0002, 0.0001]), adjustment="split")
    result = backtest(Hold(until=2), bars, cash=1_000_000, costs=FREE)
    assert result.positions["AAA"].tolist() == [0, 1e10, 1e10, 0, 0]
    assert result.equity_end == 2_000_000
    await session_of(result, bars, tmp_path)


def drawn(seed: int) -> tuple[Bars, Strategy, Costs, dict[str, Any]]:
    """A market with splits, adjusted or not, delistings and late listings; a strategy; costs."""
    rng = np.random.default_rng(seed)
    rows, n = 60, 3
    adjusted = bool(rng.integers(0, 2))
    names = ["AAA", "BBB", "CCC"]
    splits = {(int(rng.integers(5, 55)), s): float(rng.choice([2, 3, 1.5, 0.25])) for s in range(n) for _ in range(2)}
    parts = []
    for s, name in enumerate(names):
        close = 60 * np.exp(np.cumsum(rng.normal(0, 0.02, rows)))
        if not adjusted:
            for (row, place), ratio in splits.items():
                close[row:] /= ratio if place == s else 1.0
        close = np.round(close, 2)
        table = frame(close.tolist(), name, volume=float(rng.choice([300.0, 5_000.0, 1e7])))
        table["high"], table["low"] = np.round(close * 1.01, 2), np.round(close * 0.99, 2)
        first, last = (int(rng.integers(0, 6)), rows - int(rng.integers(0, 12))) if s else (0, rows)
        parts.append(table.iloc[first:last])
    days = parts[0]["timestamp"].tolist()
    known = [Announced(names[s], days[row], ratio) for (row, s), ratio in splits.items()]
    bars = Bars.from_frame(pd.concat(parts), adjustment="split" if adjusted else "raw").with_actions(known)
    kind = [Turning, GuardedTurning][int(rng.integers(0, 2))]
    costs = Costs(
        commission_per_share=float(rng.choice([0.0, 0.01])),
        slippage_bps=float(rng.choice([0.0, 5.0])),
        volume_share=float(rng.choice([0.0, 0.1])),
        delisting_recovery=float(rng.choice([1.0, 0.4])),
    )
    fractional = kind is Turning and bool(rng.integers(0, 2))
    return bars, kind(weight=float(rng.choice([0.9, 0.5]))), costs, {"sizing": SizingRules(fractional=fractional)}


@pytest.mark.parametrize("seed", range(6))
async def test_drawn_markets_give_equal_lists(seed: int, tmp_path: Path) -> None:
    bars, strategy, costs, more = drawn(seed)
    result = backtest(strategy, bars, cash=20_000, costs=costs, **more)
    assert len(result.orders) > 20
    await session_of(result, bars, tmp_path)


async def test_a_session_over_http_splits_and_pays_out_too(tmp_path: Path) -> None:
    bars, strategy, costs, more = drawn(1)
    result = backtest(strategy, bars, cash=20_000, costs=costs, **more)
    run = await session_of(result, bars, tmp_path, transport="http")
    assert len(run.corporate_actions) == len(result.corporate_actions) > 0


async def test_a_session_s_statistics_are_the_backtest_s(tmp_path: Path) -> None:
    """Splits, pay-outs, odd shares and fees on shares as traded, told by the journal alone."""
    names = ("total_return", "max_drawdown", "trades", "win_rate", "exposure", "turnover")
    for seed in (0, 3):
        (tmp_path / str(seed)).mkdir()
        bars, strategy, costs, more = drawn(seed)
        result = backtest(strategy, bars, cash=20_000, costs=costs, **more)
        run = await session_of(result, bars, tmp_path / str(seed))
        figures = session_statistics(run, journal_bars(run))
        for name in [name for name in names if name in figures]:
            assert figures[name] == pytest.approx(result.statistics[name], rel=1e-4), (seed, name)
        assert figures["fees"] == pytest.approx(result.statistics["fees"], rel=0.02)


async def test_a_session_on_adjusted_prices_shows_the_fees_it_paid(tmp_path: Path) -> None:
    bars = sample_bars("AAPL", "2003-06-02", "2003-06-30")
    result = backtest(Hold(weight=0.95), bars, costs=Costs(commission_per_share=0.005))
    run = await session_of(result, bars, tmp_path)
    assert session_statistics(run, journal_bars(run))["fees"] == result.statistics["fees"] == 27.22
