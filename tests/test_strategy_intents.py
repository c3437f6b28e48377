"""What a strategy orders on terms of its own, worked out by hand, in a backtest and in sessions of agents."""

import json
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.given import Given
from trader_lib.config.settings import load_settings
from trader_lib.errors.taxonomy import BadData, Misused
from trader_lib.exchange.costs import Costs
from trader_lib.journal.journal import SqliteJournal
from trader_lib.journal.opening import open_journal
from trader_lib.market.actions import Announced
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.replay.replay import replay
from trader_lib.research.backtest import BacktestResult, backtest
from trader_lib.research.sensitivity import rerun
from trader_lib.research.sweep import sweep
from trader_lib.risk.limits import Limits
from trader_lib.rules.sizing import SizingRules
from trader_lib.session.session import SessionResult, run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.strategy.contract import Strategy
from trader_lib.strategy.exits import ProtectiveExits
from trader_lib.strategy.intents import Intents
from trader_lib.trading.events import TargetsDecided
from trader_lib.trading.order_list import compare_order_lists

pytestmark = pytest.mark.usefixtures("quiet")

NAN = float("nan")
FREE, WIDE = Costs.none(), Limits(max_gross_exposure=None, max_margin_used=None, max_orders=None, price_collar=None)
TEN = (100.0, 101.0, 99.0, 100.0)  # open, high, low, close: a quiet bar


def market(*rows: tuple[float, float, float, float]) -> Bars:
    """One symbol, AAA, a day a row."""
    days = sample_bars("IBM", "2004-01-02", "2005-12-30").index[: len(rows)].tz_convert("America/New_York").date
    prices = dict(zip(("open", "high", "low", "close"), np.array(rows, dtype=float).T, strict=True))
    return Bars.from_frame(pd.DataFrame({"symbol": "AAA", "timestamp": days, **prices, "volume": 1e6}))


def ran(bars: Bars, weights: Any = 0.5, exits: ProtectiveExits | None = None, **terms: Any) -> BacktestResult:
    """A backtest of 10,000 USD without costs and limits; a number is the weight of every bar."""
    rows = [weights] * bars.n if isinstance(weights, float) else weights
    strategy = Given(weights=tuple((float(weight),) for weight in rows), protection=exits, terms=terms or None)
    return backtest(strategy, bars, cash=10_000, costs=FREE, limits=WIDE, check=False, trials=False)


def lines(result: BacktestResult) -> list[tuple[int, str, str, float | None, float | None, str, float | None]]:
    """Each order: row of the decision, purpose, type, limit, stop, status, price that it filled at."""
    found = []
    for order in result.orders:
        row = int(np.searchsorted(result.bars.times_ns, pd.Timestamp(order.decided_at).value))
        prices = [None if price is None else float(price) for price in (order.limit_price, order.stop_price)]
        paid = None if order.filled_avg_price is None else float(order.filled_avg_price)
        found.append((row, order.purpose, order.type.value, *prices, order.status.value, paid))
    return found


def test_limit_fills_at_the_limit_where_the_bar_comes_down_to_it() -> None:
    result = ran(market(TEN, (100, 100, 97, 99)), enter="limit", limit_price=98.0)
    assert lines(result)[0] == (0, "entry", "limit", 98.0, None, "filled", 98.0)
    assert result.orders[0].qty == 50  # by the close, 100, and not by the limit


def test_limit_fills_at_the_open_where_that_is_better() -> None:
    result = ran(market(TEN, (96, 100, 95, 99)), enter="limit", limit_bps=200)
    assert lines(result)[0] == (0, "entry", "limit", 98.0, None, "filled", 96.0)


def test_limit_for_the_day_expires_and_the_next_has_the_next_price() -> None:
    result = ran(market(TEN, (100, 100, 99, 99.5), (99, 99, 98.1, 99)), enter="limit", limit_price=((98.0,), (98.5,)))
    assert lines(result)[:2] == [
        (0, "entry", "limit", 98.0, None, "expired", None),
        (1, "entry", "limit", 98.5, None, "filled", 98.5),
    ]


def test_row_without_a_price_orders_nothing_and_leaves_what_works() -> None:
    bars = market(TEN, TEN, (100, 100, 97, 99), TEN)
    terms = {"enter": "limit", "limit_price": ((98.0,), (NAN,)), "time_in_force": "gtc"}
    assert lines(ran(bars, **terms))[0] == (0, "entry", "limit", 98.0, None, "filled", 98.0)
    assert len(ran(bars, enter="limit", limit_price=NAN).orders) == 0


def test_good_for_takes_it_back_at_the_close_of_its_last_bar() -> None:
    bars = market(TEN, TEN, TEN, TEN, (100, 100, 97, 99))
    result = ran(bars, enter="limit", limit_price=((98.0,), (NAN,)), good_for=2)
    assert lines(result) == [(0, "entry", "limit", 98.0, None, "canceled", None)]
    again = ran(bars, enter="limit", limit_price=98.0, good_for=2)
    assert [line[0] for line in lines(again)] == [0, 3]  # taken back at row 2, sent again at row 3
    assert lines(again)[1][-2:] == ("filled", 98.0)


def test_price_that_moves_is_left_alone_unless_it_follows() -> None:
    bars = market(TEN, TEN, TEN, TEN)
    terms = {"enter": "limit", "limit_price": ((97.0,), (97.5,)), "time_in_force": "gtc"}
    assert [line[:4] for line in lines(ran(bars, **terms))] == [(0, "entry", "limit", 97.0)]
    moved = lines(ran(bars, follow=True, **terms))
    assert [(line[0], line[3]) for line in moved] == [(0, 97.0), (2, 97.5)] and moved[0][-2] == "canceled"


@pytest.mark.parametrize("weight", [0.0, -0.5])
def test_target_that_turns_takes_it_back(weight: float) -> None:
    bars = market(TEN, TEN, TEN)
    result = ran(bars, weights=[0.5, weight, weight], enter="limit", limit_bps=300, time_in_force="gtc")
    assert lines(result)[0][-2] == "canceled" and (len(result.orders) == 1) == (weight == 0.0)


def test_close_that_runs_away_does_not_take_it_back() -> None:
    bars = market(TEN, (100, 120, 100, 120), (120, 120, 97, 98), TEN)
    result = ran(bars, enter="limit", limit_price=98.0, time_in_force="gtc")
    assert lines(result)[0] == (0, "entry", "limit", 98.0, None, "filled", 98.0)


def test_stop_fills_at_the_stop_and_after_a_gap_at_the_open() -> None:
    touched = ran(market(TEN, (100, 103, 100, 102)), enter="stop", stop_price=102.0)
    assert lines(touched)[0] == (0, "entry", "stop", None, 102.0, "filled", 102.0)
    gapped = ran(market(TEN, (105, 106, 104, 105)), enter="stop", stop_bps=200)
    assert lines(gapped)[0] == (0, "entry", "stop", None, 102.0, "filled", 105.0)


def test_stop_limit_does_not_chase_a_gap() -> None:
    bars = market(TEN, (105, 106, 104, 105), (104, 104, 102.5, 103))
    result = ran(bars, enter="stop_limit", stop_price=102.0, limit_price=103.0, time_in_force="gtc")
    assert lines(result)[0] == (0, "entry", "stop_limit", 103.0, 102.0, "filled", 103.0)  # a bar later, as a limit


def test_short_entry_mirrors_it() -> None:
    result = ran(market(TEN, (100, 103, 100, 102)), weights=-0.5, enter="limit", limit_bps=200)
    assert lines(result)[0] == (0, "entry", "limit", 102.0, None, "filled", 102.0)
    assert float(result.positions.iloc[-1, 0]) == -50.0


def test_what_makes_a_position_smaller_is_a_market_order() -> None:
    bars = market(TEN, (100, 100, 97, 99), TEN, TEN)
    result = ran(bars, weights=[0.5, 0.5, 0.0, 0.0], enter="limit", limit_price=98.0, time_in_force="gtc")
    assert lines(result)[1] == (2, "entry", "market", None, None, "filled", 100.0)


def test_protection_that_came_with_the_row_rests_from_the_entrys_close_on() -> None:
    bars = market(TEN, (100, 100, 97, 99), (99, 99, 94, 95), TEN)
    terms = {"enter": "limit", "limit_price": 98.0, "stop_loss": ((95.0,), (50.0,)), "take_profit": 110.0}
    result = ran(bars, exits=ProtectiveExits(stop_loss=0.5), **terms)
    assert lines(result)[1:3] == [
        (1, "exit", "limit", 110.0, None, "canceled", None),
        (1, "exit", "stop", None, 95.0, "filled", 95.0),
    ]  # 95 of the row that ordered, not 50 of a later one, and not half of what was paid


def test_strategys_exits_protect_where_the_row_brings_nothing() -> None:
    bars = market(TEN, (100, 100, 97, 99), TEN)
    result = ran(bars, exits=ProtectiveExits(stop_loss=0.1), enter="limit", limit_price=98.0)
    assert lines(result)[1][:5] == (1, "exit", "stop", None, 88.2)


def test_trailing_that_came_with_the_row_follows_the_best_close() -> None:
    bars = market(TEN, TEN, (100, 110, 100, 110), (110, 110, 103, 104))
    result = ran(bars, weights=[0.5, NAN, NAN, NAN], trailing=0.05)
    assert [line[4] for line in lines(result) if line[1] == "exit"] == [95.0, 104.5]


def test_price_that_the_close_has_passed_closes_the_position() -> None:
    bars = market(TEN, (100, 100, 93, 94), TEN, TEN)
    result = ran(bars, enter="limit", limit_price=98.0, stop_loss=95.0)
    assert [line[1:3] for line in lines(result)] == [("entry", "limit"), ("entry", "market")]
    assert float(result.positions.iloc[-1, 0]) == 0.0  # and the same opinion does not buy it back


def test_protected_position_is_not_enlarged_by_an_order_that_waits() -> None:
    bars = market(TEN, (100, 100, 97, 99), TEN, TEN)
    weights = [0.3, 0.3, 0.8, 0.8]
    guarded = ran(bars, weights=weights, enter="limit", limit_price=99.5, stop_loss=90.0)
    assert [line[1] for line in lines(guarded)] == ["entry", "exit"]
    bare = ran(bars, weights=weights, enter="limit", limit_price=99.5)
    assert [line[1] for line in lines(bare)] == ["entry", "entry"]


def test_rest_of_an_entry_in_parts_is_taken_back_so_that_its_exit_can_rest() -> None:
    bars = market(TEN, (100, 100, 97, 99), TEN, TEN, TEN)
    strategy = Given(
        weights=((0.5,),), terms={"enter": "limit", "limit_price": 98.0, "time_in_force": "gtc", "stop_loss": 90.0}
    )
    thin = FREE.model_copy(update={"volume_share": 0.00002})  # 20 shares a bar
    result = backtest(strategy, bars, cash=10_000, costs=thin, limits=WIDE, check=False, trials=False)
    assert [(line[0], line[1], line[5]) for line in lines(result)] == [
        (0, "entry", "canceled"),
        (2, "exit", "canceled"),
    ]
    assert float(result.positions.iloc[-1, 0]) == 20.0


def test_order_till_canceled_lives_for_ninety_days() -> None:
    bars = market(*[TEN] * 90)
    result = ran(bars, enter="limit", limit_price=((50.0,), (NAN,)), time_in_force="gtc")
    assert lines(result) == [(0, "entry", "limit", 50.0, None, "expired", None)]


async def test_split_moves_the_prices_of_its_own_row_and_what_protects(tmp_path: Path) -> None:
    prices = [100.0, 100.0, 100.0, 50.0, 50.0, 44.0, 44.0]
    days = sample_bars("IBM", "2004-01-02", "2004-12-31").index[: len(prices)].tz_convert("America/New_York").date
    same = dict.fromkeys(("open", "high", "low", "close"), prices)
    frame = pd.DataFrame({"symbol": "AAA", "timestamp": days, **same, "volume": 1e9})
    bars = Bars.from_frame(frame).with_actions([Announced("AAA", days[3], 2.0)])
    # the limit of row 2, in whose close the split happens, is 98 USD of a share before it: 49 of one after it
    early = Given(weights=((0.5,),), terms={"stop_loss": ((90.0,),)})
    late = Given(weights=((NAN,), (NAN,), (0.5,), (NAN,)), terms={"enter": "limit", "limit_price": 98.0, "good_for": 9})
    for strategy, wanted in ((early, [("exit", 90.0), ("exit", 45.0)]), (late, [("entry", 49.0)])):
        result = backtest(strategy, bars, cash=10_000, costs=FREE, limits=WIDE, check=False, trials=False)
        seen = [(line[1], line[3] or line[4]) for line in lines(result) if line[3] or line[4]]
        assert seen == wanted
        spec = document(symbols=("AAA",), start=None, end=None, cash=Decimal(10_000), costs=FREE)
        run = await run_session(spec, settings("in_process"), bars=bars, strategy=strategy, check=False)
        assert_same(result, run)


WORDS = {
    "limit without a price": ({"enter": "limit"}, "needs a limit price"),
    "a misspelt kind": ({"enter": "stop-limit", "limit_bps": 1}, "Did you mean 'stop_limit'"),
    "a price below zero": ({"enter": "limit", "limit_price": -3.0}, "a price above 0"),
    "a shape that does not fit": ({"stop_loss": ((1.0, 2.0),)}, "one row a bar and one column a symbol"),
    "part of a bar": ({"good_for": 1.5}, "a whole number of bars"),
    "an auction": ({"time_in_force": "opg"}, "for the day or till canceled"),
}


@pytest.mark.parametrize("name", WORDS)
def test_what_cannot_be_ordered_is_refused_before_the_first_bar(name: str) -> None:
    terms, words = WORDS[name]
    with pytest.raises((Misused, BadData), match=words):
        ran(market(TEN, TEN), **terms)


@pytest.mark.parametrize("terms", [{"time_in_force": "gtc"}, {"good_for": 3}, {"stop_loss": 90.0}])
def test_fractions_of_a_share_are_for_the_day_and_unprotected(terms: dict[str, Any]) -> None:
    strategy = Given(weights=((0.5,),), terms=terms)
    with pytest.raises(Misused, match="for the day only"):
        backtest(strategy, market(TEN, TEN), sizing=SizingRules(fractional=True), check=False, trials=False)


class Dip(Strategy):
    """Bids below the close while it is near its high of some days, for three bars, protected on both sides."""

    days: int = 10
    bps: float = 50.0

    @property
    def warmup(self) -> int:
        return self.days + 1

    @property
    def lookback_max(self) -> int:
        return self.days + 1

    def targets(self, bars: Bars) -> Intents:
        close = bars.frame("close")
        above = close > close.rolling(self.days).max().shift(1) * 0.97
        return Intents(
            above * 0.3,
            enter="limit",
            limit_bps=self.bps,
            good_for=3,
            stop_loss=0.95 * close,
            take_profit=1.04 * close,
        )


def document(**more: Any) -> SessionSpec:
    given = {"symbols": ("AAPL", "IBM"), "start": date(2005, 1, 3), "end": date(2005, 12, 30), "limits": WIDE}
    return SessionSpec(**(given | more))


def settings(transport: str) -> Any:
    return load_settings(environ={}, env_file=None, overrides={"broker": {"transport": transport}})


def assert_same(result: BacktestResult, run: SessionResult) -> None:
    found = compare_order_lists(result.orders, run.orders)
    assert found.equal, "\n".join([found.summary(), *(row.sentence() for row in found.differences[:5])])
    assert result.order_list_hash == run.order_list_hash
    assert run.reconciliation.ok and all(agent.state == "ok" for agent in run.health), run.health


@pytest.mark.parametrize("transport", ["in_process", "http"])
async def test_session_enters_and_protects_as_the_backtest_does(transport: str, tmp_path: Path) -> None:
    spec, bars = document(), sample_bars(("AAPL", "IBM"))
    terms = {"start": spec.start, "end": spec.end, "cash": float(spec.cash), "limits": WIDE, "trials": False}
    result = backtest(Dip(), bars, costs=spec.costs, sizing=spec.sizing, **terms)
    assert not result.look_ahead
    run = await run_session(
        spec, settings(transport), bars=bars, strategy=Dip(), journal_path=tmp_path / "journal.sqlite"
    )
    assert_same(result, run)
    kinds = {(order.purpose, order.type.value, order.status.value) for order in run.orders}
    assert kinds >= {("entry", "limit", "filled"), ("entry", "limit", "canceled"), ("exit", "stop", "filled")}


async def test_journal_says_on_which_terms_and_replays_alike(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    run = await run_session(document(end=date(2005, 4, 29)), settings("in_process"), strategy=Dip(), journal_path=path)
    assert run.orders
    with open_journal(path) as journal:
        decided = [event.payload for event in journal.read(types=[TargetsDecided])]
        said = next(payload.terms["IBM"] for payload in decided if "IBM" in payload.terms)
        assert said["enter"] == "limit" and said["good_for"] == 3.0 and said["stop_loss"] < said["limit_price"]
        assert (await replay(journal, strategy=Dip())).agrees
        other = await replay(journal, strategy=Dip(bps=60.0))
        assert not other.agrees


async def test_minutes_with_entries_that_wait_through_the_night(tmp_path: Path) -> None:
    bars = synthetic_bars(("AAPL", "MSFT"), "2010-03-08", "2010-03-12", timeframe="30Min", seed=7)
    costs = Costs(volume_share=0.002)
    given = {"timeframe": "30Min", "start": date(2010, 3, 9), "end": date(2010, 3, 12), "costs": costs}
    spec = document(symbols=("AAPL", "MSFT"), **given)
    strategy = Dip(days=5, bps=20.0)
    result = backtest(
        strategy, bars, start=spec.start, end=spec.end, cash=float(spec.cash), costs=costs, limits=WIDE, trials=False
    )
    run = await run_session(
        spec, settings("in_process"), bars=bars, strategy=strategy, journal_path=tmp_path / "journal.sqlite"
    )
    assert_same(result, run)
    assert any(order.time_in_force.value == "gtc" and order.purpose == "entry" for order in run.orders)


def test_sweep_runs_intents_as_a_backtest_does() -> None:
    bars = sample_bars("IBM").rows_between(0, 600)
    grid = sweep(Dip, {"days": [5, 10], "bps": [20.0, 100.0]}, bars, workers=1, check=False, trials=False)
    for row in grid.frame.reset_index().itertuples():
        alone = backtest(Dip(days=row.days, bps=row.bps), bars, check=False, trials=False)
        assert float(alone.equity_end) == row.equity_end and len(alone.orders) == row.orders


def test_same_run_with_later_decisions_keeps_its_terms() -> None:
    result = backtest(Dip(), sample_bars("IBM").rows_between(0, 400), check=False, trials=False)
    assert rerun(result).order_list_hash == result.order_list_hash
    later = rerun(result, delay=1)
    assert later.order_list_hash != result.order_list_hash
    assert {order.type.value for order in later.orders} >= {"limit", "stop"}
    assert Decimal(0) < later.equity_end and json.dumps(result.refused_by) is not None


def test_bracket_protects_within_its_entrys_bar() -> None:
    bars = market(TEN, (100, 101, 94, 96), TEN)  # down to the limit, and on to the stop
    terms = {"enter": "limit", "limit_price": 98.0, "stop_loss": 95.0, "take_profit": 99.0}
    held = lines(ran(bars, bracket=True, **terms))
    assert [line[1:] for line in held] == [
        ("entry", "limit", 98.0, None, "filled", 98.0),
        ("exit", "limit", 99.0, None, "canceled", None),
        ("exit", "stop", None, 95.0, "filled", 95.0),
    ]
    late = lines(ran(bars, **terms))
    assert [line[0] for line in late if line[1] == "exit"] == [1, 1]  # rests from that bar's close on


def test_brackets_target_waits_for_the_next_bar_unless_the_entry_filled_at_the_open() -> None:
    terms = {"enter": "limit", "limit_price": 98.0, "stop_loss": 90.0, "take_profit": 100.5, "bracket": True}
    inside = ran(market(TEN, (100, 101, 97, 100), (100, 101, 100, 101)), time_in_force="gtc", **terms)
    assert [str(fill.bar.date()) for fill in inside.orders[1].fills] == [str(inside.bars.day(2))]
    at_open = ran(market(TEN, (97, 101, 97, 100), TEN), time_in_force="gtc", **terms)
    assert [str(fill.bar.date()) for fill in at_open.orders[1].fills] == [str(at_open.bars.day(1))]


def test_brackets_exit_goes_on_as_the_exit_of_its_position() -> None:
    bars = market(TEN, (100, 101, 97, 100), TEN, (100, 101, 94, 96), TEN)
    result = ran(
        bars, enter="limit", limit_price=98.0, time_in_force="gtc", stop_loss=95.0, take_profit=120.0, bracket=True
    )
    assert [line[1:3] for line in lines(result)] == [("entry", "limit"), ("exit", "limit"), ("exit", "stop")]
    assert lines(result)[2][-2:] == ("filled", 95.0)  # the one that was held, and no other


def test_exits_of_a_bracket_for_the_day_are_followed_by_others() -> None:
    bars = market(TEN, (100, 101, 97, 100), TEN)
    result = ran(bars, enter="limit", limit_price=98.0, time_in_force="day", stop_loss=95.0, bracket=True)
    assert [(line[0], line[1], line[-2]) for line in lines(result)] == [
        (0, "entry", "filled"),
        (0, "exit", "expired"),
        (1, "exit", "canceled"),
    ]


def test_bracket_whose_exits_lie_on_the_wrong_side_is_no_order() -> None:
    assert len(ran(market(TEN, TEN), stop_loss=100.0, bracket=True).orders) == 0
    assert len(ran(market(TEN, TEN), weights=-0.5, stop_loss=99.0, bracket=True).orders) == 0


class HeldDip(Dip):
    """The same, with exits that the broker holds."""

    def targets(self, bars: Bars) -> Intents:
        given = super().targets(bars)
        return replace(given, bracket=True)


@pytest.mark.parametrize("transport", ["in_process", "http"])
async def test_session_sends_brackets_as_the_backtest_does(transport: str, tmp_path: Path) -> None:
    spec, bars = document(), sample_bars(("AAPL", "IBM"))
    terms = {"start": spec.start, "end": spec.end, "cash": float(spec.cash), "limits": WIDE, "trials": False}
    result = backtest(HeldDip(), bars, costs=spec.costs, sizing=spec.sizing, **terms)
    run = await run_session(
        spec, settings(transport), bars=bars, strategy=HeldDip(), journal_path=tmp_path / "journal.sqlite"
    )
    assert_same(result, run)
    forms = result.simulation.orders["form"]
    assert (forms == 3).sum() > 3 and any(order.purpose == "exit" and order.filled_qty for order in run.orders)


async def test_orders_till_canceled_end_after_ninety_days_in_a_session_too() -> None:
    bars = market(*[TEN] * 90)
    bid = {"enter": "limit", "limit_price": ((50.0,), (NAN,)), "time_in_force": "gtc"}
    rest = {"stop_loss": 50.0, "take_profit": 200.0}
    for terms in (bid, rest):
        strategy = Given(weights=((0.5,), (NAN,)), terms=terms)
        result = backtest(strategy, bars, cash=10_000, costs=FREE, limits=WIDE, check=False, trials=False)
        spec = document(symbols=("AAA",), start=None, end=None, cash=Decimal(10_000), costs=FREE)
        run = await run_session(spec, settings("in_process"), bars=bars, strategy=strategy, check=False)
        assert_same(result, run)
        assert any(order.status.value == "expired" for order in run.orders)


async def test_torn_at_any_event_a_session_with_brackets_gives_the_same_orders(tmp_path: Path) -> None:
    spec = document(symbols=("AAPL",), end=date(2005, 3, 15))
    whole = await run_session(spec, settings("in_process"), strategy=HeldDip(), journal_path=tmp_path / "whole.sqlite")
    assert any(order.purpose == "exit" and order.filled_qty for order in whole.orders)
    with open_journal(tmp_path / "whole.sqlite") as journal:
        events = list(journal.read())
    for number in range(40, len(events), max(len(events) // 12, 1)):
        path = tmp_path / f"torn-{number}.sqlite"
        with SqliteJournal(path) as torn:
            for event in events[:number]:
                torn.append(event)
        again = await run_session(spec, settings("in_process"), strategy=HeldDip(), journal_path=path, resume=True)
        assert again.order_list_hash == whole.order_list_hash, number
