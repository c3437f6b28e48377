"""What an account can come to: margin calls, ruin, cash that does not go below zero; the same in both engines."""

import json
from collections.abc import Callable, Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.given import Given
from trader_lib.clock.sessions import TradingCalendar
from trader_lib.config.settings import load_settings
from trader_lib.errors.taxonomy import Misused, Rejected
from trader_lib.exchange.costs import Costs
from trader_lib.exchange.engine import Exchange
from trader_lib.journal.opening import open_journal
from trader_lib.market.bars import Bars, Provenance, Timeframe
from trader_lib.replay.replay import replay
from trader_lib.research.backtest import BacktestResult, backtest
from trader_lib.risk.limits import Limits
from trader_lib.rules.sizing import SizingRules
from trader_lib.runs.session_cells import session_notes
from trader_lib.session.session import SessionResult, run_session
from trader_lib.session.spec import SessionSpec, StrategyShare
from trader_lib.strategy.contract import Strategy
from trader_lib.strategy.exits import ProtectiveExits
from trader_lib.trading.events import TradingState, TradingStateChanged
from trader_lib.trading.order_list import compare_order_lists
from trader_lib.trading.orders import OrderRequest, OrderSide, decimal_text

NAN = float("nan")
FREE = Limits(max_gross_exposure=None, max_margin_used=None)


pytestmark = pytest.mark.usefixtures("quiet")


def bars_of(*columns: Sequence[float], volume: Any = 1e12, opens: Sequence[float] | None = None) -> Bars:
    """Daily bars of one price each, a symbol a column. volume: one, or [time × symbol]; opens: of the first symbol."""
    close = np.array(columns, float).T
    open_ = close.copy()
    if opens is not None:
        open_[:, 0] = opens
    stamps = TradingCalendar().bar_stamps(date(2024, 1, 2), date(2024, 12, 31), "1Day")[: len(close)]
    origin = Provenance("example", "none", Timeframe.DAY_1, "split", synthetic=True)
    high, low = np.maximum(open_, close), np.minimum(open_, close)
    volumes = np.broadcast_to(np.asarray(volume, float), close.shape).copy()
    symbols = ("AAA", "BBB", "CCC")[: close.shape[1]]
    return Bars(open_, high, low, close, volumes, pd.DatetimeIndex(stamps, tz="UTC"), symbols, origin)


async def in_both(
    strategy: Strategy, bars: Bars, *, cash: float = 10_000, sizing: SizingRules | None = None, **account: Any
) -> tuple[BacktestResult, SessionResult]:
    """The same in a backtest and in a session of agents, which agree."""
    sizing = sizing or SizingRules()
    shared = {"costs": Costs.none(), "limits": FREE, "multiplier": 2} | account
    result = backtest(strategy, bars, cash=cash, sizing=sizing, **shared)
    spec = SessionSpec(
        symbols=bars.symbols,
        cash=Decimal(str(cash)),
        fractional=sizing.fractional,
        min_trade=sizing.min_trade,
        leverage=sizing.leverage,
        **shared,
    )
    session = await run_session(spec, load_settings(environ={}, env_file=None), bars=bars, strategy=strategy)
    found = compare_order_lists(result.orders, session.orders)
    assert found.equal, "\n".join([found.summary(), *(row.sentence() for row in found.differences[:5])])
    assert session.order_list_hash == result.order_list_hash and session.equity_end == result.equity_end
    assert np.array_equal(result.equity.to_numpy(), session.equity.to_numpy())
    assert [(one.decided_at, one.symbol, one.reasons) for one in result.refusals] == [
        (one.decided_at, one.symbol, one.reasons) for one in session.refusals
    ]
    assert session.status == "completed" and session.reconciliation.ok
    assert session.ruined_at == result.ruined_at
    return result, session


def told(result: BacktestResult) -> list[tuple[str, str, str, str, str]]:
    """Day, purpose, side, quantity and status of every order."""
    return [
        (
            f"{order.decided_at:%m-%d}",
            order.purpose,
            order.side.value,
            decimal_text(order.filled_qty),
            order.status.value,
        )
        for order in result.orders
    ]


async def test_short_position_that_loses_more_than_there_is_ruins_the_account_on_that_day() -> None:
    """Short 100 at 100 USD, and 350 two days on: 20,000 in cash, 35,000 owed. They are bought back; the debt stays."""
    bars = bars_of([100.0] * 3 + [350.0] * 4 + [50.0] * 2)
    result, session = await in_both(Given(weights=((-1.0,),)), bars)
    assert told(result) == [
        ("01-02", "entry", "sell", "100", "filled"),
        ("01-05", "liquidation", "buy", "100", "filled"),
    ]
    assert result.equity.tolist() == [10_000.0] * 3 + [-15_000.0] * 6
    assert result.ruined_at == bars.at(3) == session.ruined_at and "ruined on 2024-01-05" in repr(result)
    with open_journal(session.journal_path) as journal:
        (change,) = [event.payload for event in journal.read(types=[TradingStateChanged])]
    assert change.state is TradingState.REDUCING and change.reason.startswith("Ruined: the equity is -15,000.00 USD")


async def test_what_has_no_bar_is_closed_at_its_next() -> None:
    """BBB ruins the account while AAA does not trade: AAA can only be bought back when it trades again."""
    volume = np.full((7, 2), 1e9)
    volume[3:5, 0] = 0.0
    bars = bars_of([100.0] * 5 + [120.0] * 2, [100.0] * 3 + [350.0] * 4, volume=volume)
    costs = Costs(volume_share=0.1)
    result, _ = await in_both(Given(weights=((-0.5, -0.5), (NAN, NAN))), bars, costs=costs)
    assert told(result)[:2] == [("01-02", "entry", "sell", "50", "filled")] * 2
    assert [(f"{one.decided_at:%m-%d}", one.symbol) for one in result.liquidations] == [("01-05", "BBB")]
    assert told(result)[-1] == ("01-08", "entry", "buy", "50", "filled")  # the account's own order: it may close
    assert result.equity_end == 10_000 - 50 * 250 - 50 * 20
    assert result.ruined_at == bars.at(3) and not result.positions.iloc[-1].any()


async def test_long_position_on_credit_is_cut_to_the_initial_margin() -> None:
    """200 shares for 10,000 USD of equity fall from 100 to 60: 2,000 of 12,000 are left, and 66 shares may be kept."""
    bars = bars_of([100.0, 100.0, 60.0, 60.0, 66.0])
    strategy = Given(weights=((2.0,), (NAN,)))
    result, session = await in_both(strategy, bars, sizing=SizingRules(leverage=2.0))
    assert told(result) == [
        ("01-02", "entry", "buy", "200", "filled"),
        ("01-04", "liquidation", "sell", "134", "filled"),
    ]
    assert result.equity.tolist() == [10_000.0, 10_000.0, 2_000.0, 2_000.0, 2_000.0 + 66 * 6.0]
    assert result.ruined_at is None and [order.filled_qty for order in result.liquidations] == [134]
    with open_journal(session.journal_path) as journal:
        again = await replay(journal, strategy=strategy)
    assert again.agrees, again.sentence()


async def test_owner_who_sells_enough_at_the_same_open_is_not_called() -> None:
    """The price falls within the day: at its close the strategy itself orders what it wants to be left with."""
    bars = bars_of([100.0, 100.0, 60.0, 60.0, 66.0], opens=[100.0, 100.0, 100.0, 60.0, 60.0])
    result, _ = await in_both(Given(weights=((2.0,),)), bars, sizing=SizingRules(leverage=2.0))
    assert not result.liquidations
    assert told(result)[1] == ("01-04", "entry", "sell", "134", "filled")  # 2 × 2,000 USD at 60 are 66 shares


async def test_short_seller_who_is_ruined_at_a_close_buys_back_himself() -> None:
    bars = bars_of([100.0, 100.0, 350.0, 300.0, 300.0], opens=[100.0, 100.0, 100.0, 300.0, 300.0])
    result, _ = await in_both(Given(weights=((-1.0,),)), bars)
    assert told(result) == [("01-02", "entry", "sell", "100", "filled"), ("01-04", "entry", "buy", "100", "filled")]
    assert result.ruined_at == bars.at(2) and result.equity_end == -10_000


async def test_margin_call_pays_what_market_orders_pay_and_takes_its_share_of_the_volume() -> None:
    """600 shares a bar, of which a tenth may fill: the call is met in two bars, and cancels the resting exit."""
    volume = [[1e6]] * 3 + [[600.0]] * 4
    bars = bars_of([100.0] * 3 + [60.0] * 4, volume=volume)
    costs = Costs(commission_per_share=0.01, slippage_bps=10, volume_share=0.1)
    strategy = Given(weights=((2.0,), (NAN,)), protection=ProtectiveExits(take_profit=0.5))
    result, _ = await in_both(strategy, bars, sizing=SizingRules(leverage=2.0), costs=costs)
    parts = [(f"{one.decided_at:%m-%d}", one.filled_qty, one.filled_avg_price) for one in result.liquidations]
    assert [day for day, _, _ in parts] == ["01-05", "01-08"] and parts[0][1:] == (60, Decimal("59.94"))
    exits = [order for order in result.orders if order.purpose == "exit"]
    assert len(exits) > 1 and {order.status.value for order in exits} == {"canceled"}


async def test_cash_account_never_owes_anything_after_a_gap() -> None:
    """100 shares are ordered at 100 USD and open at 600: 16 are paid for, the rest lapses with the day."""
    bars = bars_of([100.0, 600.0, 600.0], opens=[100.0, 600.0, 600.0])
    result, _ = await in_both(Given(weights=((1.0,), (NAN,))), bars, multiplier=1)
    assert told(result) == [("01-02", "entry", "buy", "16", "expired")]
    assert result.cash.tolist() == [10_000.0, 400.0, 400.0] and result.equity_end == 10_000


async def test_cash_account_pays_the_commission_too() -> None:
    bars = bars_of([100.0] * 3)
    costs = Costs(commission_minimum=1.0, volume_share=0.0)
    result, _ = await in_both(Given(weights=((1.0,),)), bars, multiplier=1, costs=costs)
    assert result.fills_frame["qty"].tolist() == [99.0] and result.cash.min() >= 0.0


async def test_large_fractions_are_numbers_that_both_sides_hold() -> None:
    """5,000,000 USD at 0.37: seven digits before the point leave eight after it."""
    prices = np.round(0.37 * np.exp(np.cumsum(np.random.default_rng(1).normal(0, 0.02, 60))), 4)
    weights = tuple((weight,) for weight in np.random.default_rng(2).choice([0.3, 0.6, 0.9, 0.0], 60))
    result, _ = await in_both(
        Given(weights=weights), bars_of(prices), cash=5_000_000, sizing=SizingRules(fractional=True)
    )
    assert len(result.orders) > 40 and all(order.filled_qty for order in result.orders[:-1])
    assert max(len(order.qty.normalize().as_tuple().digits) for order in result.orders) == 15


async def test_fraction_is_never_sold_short() -> None:
    """Whole shares that fill in fractions, when volume is thin: what follows is whole again, in both engines."""
    bars = bars_of([100.0] * 8, volume=37.0)
    result, _ = await in_both(
        Given(weights=((-0.5,),)),
        bars,
        sizing=SizingRules(fractional=True, min_trade=0.0),
        costs=Costs(volume_share=0.1),
    )
    assert len(result.orders) == 8 and not result.refusals
    assert all(order.qty == int(order.qty) for order in result.orders) and result.positions.iloc[1, 0] == -3.7


async def test_weight_of_nan_keeps_what_there_is() -> None:
    """Half the equity at 10 USD, and no order more while the price doubles; then a tenth of the 15,000."""
    prices = [10.0] * 2 + list(np.linspace(10.0, 20.0, 10)) + [20.0] * 2
    weights = ((0.5,), *[(NAN,)] * 11, (0.1,))
    result, _ = await in_both(Given(weights=weights), bars_of(prices))
    assert [(order.side.value, int(order.qty)) for order in result.orders] == [("buy", 500), ("sell", 425)]


@pytest.mark.parametrize("cash", [float("inf"), NAN, None, 0.001, 0, -5, "abc", "1e999", 1e20, True])
def test_cash_that_is_no_amount_of_money_is_refused_in_a_sentence(cash: Any) -> None:
    with pytest.raises(Misused, match=r"cannot start with .* give an amount"):
        backtest(Given(weights=((0.5,),)), bars_of([10.0] * 3), cash=cash)


def test_cash_may_be_text_or_a_decimal() -> None:
    for cash in ("25000", Decimal("25000.00"), 25_000, 25_000.004):
        assert backtest(Given(weights=((0.0,),)), bars_of([10.0] * 3), cash=cash).equity_end == 25_000


def test_exchange_lets_a_ruined_account_close_and_nothing_else() -> None:
    bars = bars_of([100.0] * 2 + [350.0] * 2, [10.0] * 4, opens=[100.0] * 3 + [350.0])
    exchange = Exchange(bars, starting_cash=Decimal(10_000), costs=Costs.none())

    def order(name: str, symbol: str, side: OrderSide) -> OrderRequest:
        return OrderRequest(symbol=symbol, side=side, qty=Decimal(100), client_order_id=name)

    exchange.advance()
    exchange.submit(order("short", "AAA", OrderSide.SELL))
    exchange.advance()
    exchange.advance()
    assert exchange.account().is_ruined and exchange.account().equity == -15_000
    with pytest.raises(Rejected, match="restricted to liquidation"):
        exchange.submit(order("more", "BBB", OrderSide.BUY))
    exchange.submit(order("close", "AAA", OrderSide.BUY))
    exchange.advance()
    assert exchange.positions() == () and exchange.account().cash == -15_000


async def test_run_that_orders_nothing_says_why_for_each_symbol(tmp_path: Path) -> None:
    """A share dearer than the account, a target of nothing, and a trade below the smallest one."""
    bars = bars_of([650_000.0] * 5, [10.0] * 5, [10.0] * 5)
    result, session = await in_both(Given(weights=((0.5, 0.0, 0.005),)), bars)
    dear, zero, small = result.notes
    assert dear.startswith("AAA: a whole share is dearer than its target at 5 of 5 bars: 5,000.00 of 10,000.00 USD")
    assert zero == "BBB: its target is 0 at all 5 bars." and "min_trade is 1.00%" in small
    assert all(one in repr(result) for one in result.notes)
    assert session_notes(session) == result.notes
    assert "a whole share is dearer" in result.report(tmp_path / "report.html").read_text(encoding="utf-8")


async def test_each_of_several_strategies_says_why_it_orders_nothing() -> None:
    bars = bars_of([650_000.0] * 5, [10.0] * 5)
    shares = (
        StrategyShare(name="dear", strategy="sma_cross", symbols=("AAA",), capital="50%"),
        StrategyShare(name="idle", strategy="sma_cross", symbols=("BBB",), capital="50%"),
    )
    spec = SessionSpec(symbols=bars.symbols, cash=Decimal(10_000), strategies=shares, costs=Costs.none())
    built = {"dear": Given(weights=((0.5,),)), "idle": Given(weights=((0.0,),))}
    session = await run_session(spec, load_settings(environ={}, env_file=None), bars=bars, strategy=built)
    dear, idle = session_notes(session)
    assert dear.startswith(
        "dear: AAA: a whole share is dearer than its target at 5 of 5 bars: 2,500.00 of 5,000.00 USD"
    )
    assert idle == "idle: BBB: its target is 0 at all 5 bars."


async def test_notes_of_a_called_and_cut_account_are_the_same_in_both_engines() -> None:
    bars = bars_of([100.0, 100.0, 50.0, 50.0, 55.0], [10.0] * 5)
    strategy = Given(weights=((1.9, 0.9), (NAN, NAN)))
    result, session = await in_both(strategy, bars, sizing=SizingRules(leverage=2.0))
    called, cut = result.notes
    assert called.startswith("Margin was called at 1 open") and "on 2024-01-04, 69 AAA were sold at 50" in called
    assert cut.startswith("Buys were cut to the money there was at 1 of 5 closes, by up to 80.8% of equity")
    assert "the weights add up to as much as 2.8, and leverage is 2" in cut
    assert session_notes(session) == result.notes


def test_command_line_and_result_say_why_nothing_was_ordered(trader: Callable[..., tuple[int, str, str]]) -> None:
    asked = ("--symbols", "AAPL", "--start", "2005-01-03", "--end", "2005-12-30", "--cash", "1")
    code, out, err = trader("backtest", *asked, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["notes"][0].startswith("AAPL: a whole share is dearer than its target") and not result["orders"]
    code, out, err = trader("runs", "show", "latest")
    assert code == 0 and "AAPL: a whole share is dearer than its target" in " ".join(out.split())
