"""Strategies that decide step by step: the same orders in a backtest, a session, after a kill and in a replay."""

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dying import die_after
from tests.simulation.plan import plan_of
from tests.simulation.world import play
from tests.test_session_resume import check, cut, fresh, torn_rows
from trader_lib.config.settings import load_settings
from trader_lib.errors.taxonomy import Misused
from trader_lib.exchange.costs import Costs
from trader_lib.journal.journal import SqliteJournal
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.replay.replay import replay
from trader_lib.research.backtest import BacktestResult, backtest
from trader_lib.research.sensitivity import rerun
from trader_lib.research.sweep import sweep
from trader_lib.rules.sizing import SizingRules
from trader_lib.session.session import SessionResult, run_session
from trader_lib.session.spec import SessionSpec, StrategyShare
from trader_lib.strategy.contract import Strategy
from trader_lib.strategy.events import EventState, EventStrategy, Fill, Intent, View, read_state
from trader_lib.strategy.exits import ProtectiveExits
from trader_lib.strategy.pairs import Pairs
from trader_lib.strategy.registry import build_strategy, register
from trader_lib.trading.order_list import compare_order_lists

pytestmark = pytest.mark.usefixtures("quiet")

SEEN: dict[str, list[tuple[object, ...]]] = {}


@register
class Watchful(EventStrategy):
    """Trades on everything that a view shows, and writes down what it was shown."""

    class State(EventState):
        orders: int = 0
        paid: float = 0.0
        last: tuple[Fill, ...] = ()

    stop: float | None = None
    short: bool = True

    @property
    def exits(self) -> ProtectiveExits | None:
        return ProtectiveExits(stop_loss=self.stop) if self.stop else None

    @property
    def lookback_max(self) -> int:
        return 5

    def decide(self, view: View, state: State) -> tuple[State, list[Intent]]:
        SEEN.setdefault("", []).append(
            (view.now, view.cash, view.equity, view.fills, view.orders, view.is_first_bar_of_session, state)
        )
        if view.fills:
            paid = sum(abs(fill.qty) * fill.price for fill in view.fills)
            state = state.replace(orders=state.orders + 1, paid=state.paid + paid, last=view.fills)
        intents = []
        for symbol in view.symbols:
            recent = view.last(symbol, 5)
            if view.position(symbol) and view.close[symbol] > 1.01 * view.average_price(symbol):
                intents.append(view.close_position(symbol))
            elif (
                not view.position(symbol) and not view.working(symbol) and recent[-1] < recent.mean() and view.cash > 0
            ):
                intents.append(view.target(symbol, -0.2 if self.short and state.orders % 3 == 0 else 0.3))
        return state, intents


def settings(transport: str = "in_process") -> Any:
    return load_settings(environ={}, env_file=None, overrides={"broker": {"transport": transport}})


async def both(
    spec: SessionSpec, transport: str, folder: Path, bars: Bars | None = None, strategy: Strategy | None = None
) -> tuple[BacktestResult, SessionResult]:
    tested = backtest(
        strategy or spec.build_strategy(),
        sample_bars(spec.symbols) if bars is None else bars,
        start=spec.start,
        end=spec.end,
        cash=float(spec.cash),
        costs=spec.costs,
        limits=spec.limits,
        multiplier=spec.multiplier,
        sizing=spec.sizing,
        check=False,
        trials=False,
    )
    journal = folder / "journal.sqlite"
    SEEN["backtest"] = SEEN.pop("", [])
    run = await run_session(spec, settings(transport), bars=bars, strategy=strategy, journal_path=journal, check=False)
    return tested, run


def assert_same(tested: BacktestResult, run: SessionResult) -> None:
    found = compare_order_lists(tested.orders, run.orders)
    assert found.equal, "\n".join([found.summary(), *(row.sentence() for row in found.differences[:5])])
    assert tested.order_list_hash == run.order_list_hash and run.orders
    assert np.array_equal(tested.equity.to_numpy()[-run.bars :], run.equity.to_numpy())
    assert run.reconciliation.ok and all(agent.state == "ok" for agent in run.health)


PAIRS = {"strategy": "pairs", "symbols": ("IBM", "MSFT"), "params": {"lookback": 20}}
YEAR = {"start": date(2005, 1, 3), "end": date(2005, 12, 30)}
DEAR = Costs(commission_per_share=0.005, commission_minimum=1.0, slippage_bps=5, volume_share=0.000005)


@pytest.mark.parametrize("transport", ["in_process", "http"])
async def test_a_session_of_pairs_places_the_orders_of_its_backtest(transport: str, tmp_path: Path) -> None:
    spec = SessionSpec(**PAIRS, **YEAR, costs=Costs(slippage_bps=5))
    tested, run = await both(spec, transport, tmp_path)
    assert_same(tested, run)
    assert any(order.side.value == "sell" and order.purpose == "entry" for order in run.orders)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"costs": DEAR},
        {"params": {"stop": 0.02}},
        {"params": {"stop": 0.02}, "costs": DEAR},
        {"multiplier": 1, "params": {"short": False}},
    ],
    ids=["plain", "dear and thin", "exits", "exits, dear and thin", "cash account"],
)
async def test_the_view_shows_the_same_in_both_engines(more: dict[str, Any], tmp_path: Path) -> None:
    spec = SessionSpec(strategy="watchful", symbols=("AAPL", "IBM"), **{**YEAR, **more})
    SEEN.clear()
    tested, run = await both(spec, "in_process", tmp_path)
    assert_same(tested, run)
    assert [*map(repr, SEEN["backtest"])] == [*dict.fromkeys(map(repr, SEEN[""]))]  # some are asked for twice
    assert len(SEEN[""]) > len(SEEN["backtest"])


async def test_minutes_with_partial_fills_and_timers_are_the_same_in_both(tmp_path: Path) -> None:
    bars = synthetic_bars(("AAPL", "MSFT"), "2010-03-08", "2010-03-12", timeframe="15Min", seed=7)
    spec = SessionSpec(
        strategy="watchful",
        symbols=("AAPL", "MSFT"),
        timeframe="15Min",
        start=date(2010, 3, 9),
        end=date(2010, 3, 12),
        costs=Costs(volume_share=0.002),
    )
    SEEN.clear()
    tested, run = await both(spec, "in_process", tmp_path, bars)
    assert_same(tested, run)
    assert any(len(order.fills) > 1 for order in run.orders)
    assert [*map(repr, SEEN["backtest"])] == [*dict.fromkeys(map(repr, SEEN[""]))]


# ---- how to enter, and what protects


@register
class Bracketed(EventStrategy):
    """Enters by every kind of order in turn, with protection of its own, and never twice in the same way."""

    bracket: bool = False
    lasting: bool = False

    class State(EventState):
        entries: int = 0
        waiting: int = 0

    def decide(self, view: View, state: State) -> tuple[State, list[Intent]]:
        SEEN.setdefault("", []).append((view.now, view.cash, view.equity, view.fills, view.orders, state))
        intents = []
        for symbol in view.symbols:
            close, held = view.close[symbol], view.position(symbol)
            state = state.replace(waiting=state.waiting + 1)
            if held and state.waiting % 37 == 0:
                intents.append(view.close_position(symbol))
            elif not held and not any(order.symbol == symbol for order in view.orders):
                intents.append(self._entry(view, symbol, close, state.entries % 6))
                state = state.replace(entries=state.entries + 1)
        return state, intents

    def _entry(self, view: View, symbol: str, close: float, kind: int) -> Intent:
        safe = {"stop_loss": 0.97 * close, "take_profit": 1.03 * close, "bracket": self.bracket}
        safe |= {"time_in_force": "gtc"} if self.lasting else {}
        if kind == 0:
            return view.buy(symbol, 0.3, limit_price=0.99 * close, good_for=3, **safe)
        if kind == 1:
            return view.buy(symbol, 0.3, stop_price=1.005 * close, **safe)
        if kind == 2:
            return view.short(symbol, 0.2, limit_price=1.01 * close, time_in_force="gtc", trailing=0.02)
        if kind == 3:
            return view.buy(symbol, 0.2, stop_price=1.002 * close, limit_price=1.01 * close, trailing=0.03)
        return view.target(symbol, 0.3, **safe) if kind == 4 else view.close_position(symbol)


@pytest.mark.parametrize(
    ("transport", "costs", "params"),
    [
        ("in_process", Costs(), {}),
        ("in_process", DEAR, {}),
        ("in_process", Costs(), {"bracket": True}),
        ("in_process", Costs(slippage_bps=5), {"bracket": True, "lasting": True}),
        ("in_process", DEAR, {"bracket": True, "lasting": True}),
        ("http", Costs(slippage_bps=5), {"bracket": True}),
    ],
    ids=["plain", "dear and thin", "brackets", "lasting brackets", "lasting, dear and thin", "brackets over HTTP"],
)
async def test_entries_of_every_kind_are_the_same_in_both_engines(
    transport: str, costs: Costs, params: dict[str, Any], tmp_path: Path
) -> None:
    spec = SessionSpec(strategy="bracketed", params=params, symbols=("AAPL", "IBM"), **YEAR, costs=costs)
    SEEN.clear()
    tested, run = await both(spec, transport, tmp_path)
    assert_same(tested, run)
    assert [*map(repr, SEEN["backtest"])] == [*dict.fromkeys(map(repr, SEEN[""]))]
    entries = [order for order in run.orders if order.purpose == "entry"]
    assert {order.type.value for order in entries} == {"limit", "stop", "stop_limit", "market"}
    assert {order.time_in_force.value for order in entries} == {"day", "gtc"}
    assert any(order.purpose == "exit" and order.filled_qty for order in run.orders)
    journal = tmp_path / "journal.sqlite"
    with SqliteJournal(journal, read_only=True) as read:
        again = await replay(read)
    assert again.agrees, again.sentence()


async def test_prices_of_an_entry_follow_a_split_of_its_close(tmp_path: Path) -> None:
    """AAPL split 2 for 1 on 28 February 2005: an entry decided at the close before it is in shares after it."""
    spec = SessionSpec(
        strategy="bracketed", symbols=("AAPL", "IBM"), adjustment="raw", start=date(2005, 2, 14), end=date(2005, 3, 18)
    )
    played = sample_bars(spec.symbols, adjustment="raw")
    SEEN.clear()
    tested, run = await both(spec, "in_process", tmp_path, played)
    assert_same(tested, run)
    assert run.corporate_actions
    assert [*map(repr, SEEN["backtest"])] == [*dict.fromkeys(map(repr, SEEN[""]))]


# ---- interrupted, and looked at again

SHORT = SessionSpec(**PAIRS, start=date(2005, 1, 3), end=date(2005, 4, 29))


async def test_torn_anywhere_a_session_of_events_gives_the_same_orders(tmp_path: Path) -> None:
    one = await run_session(SHORT, settings(), journal_path=fresh(tmp_path / "whole") / "journal.sqlite")
    assert len(one.orders) >= 8
    for rows in torn_rows(one, 131):
        path = cut(one, rows, tmp_path / "torn") / "journal.sqlite"
        check(one, await run_session(SHORT, settings(), journal_path=path, resume=True), rows)


async def test_a_killed_session_of_events_goes_on_and_is_replayed(tmp_path: Path) -> None:
    one = await run_session(SHORT, settings(), journal_path=fresh(tmp_path / "whole") / "journal.sqlite")
    path = fresh(tmp_path / "killed") / "journal.sqlite"
    for rows in (150, 90):
        await die_after(rows, path, "tests.test_strategy_events", "SHORT")
    check(one, await run_session(SHORT, settings(), journal_path=path, resume=True), 1)
    with SqliteJournal(path, read_only=True) as journal:
        again = await replay(journal)
    assert again.agrees, again.sentence()


class Nervous(EventStrategy):
    """Counts its fills and changes its mind with them, for no reason but the prices."""

    class State(EventState):
        fills: int = 0
        bought: float = 0.0

    stop_loss: float | None = None

    @property
    def warmup(self) -> int:
        return 5

    @property
    def exits(self) -> ProtectiveExits | None:
        return ProtectiveExits(stop_loss=self.stop_loss) if self.stop_loss else None

    def decide(self, view: View, state: State) -> tuple[State, list[Intent]]:
        state = state.replace(
            fills=state.fills + len(view.fills), bought=state.bought + sum(fill.qty for fill in view.fills)
        )
        intents = []
        for symbol in view.symbols:
            mood = (round(view.close[symbol] * 100) // 3 + state.fills) % 7
            if mood < 3 and not view.working(symbol):
                intents.append(view.target(symbol, (0.0, 0.3, 0.2)[mood]))
        return state, intents


@pytest.mark.parametrize("seed", [1, 6, 24])
def test_among_faults_deaths_and_snapshots_a_session_of_events_stays_whole(seed: int) -> None:
    """No order is lost or doubled, the books agree, and a replay gives the same decisions."""
    plan = plan_of(seed)
    strategy = Nervous(stop_loss=plan.strategy.stop_loss)
    outcome = play(replace(plan, strategy=strategy, snapshot_events=10))  # type: ignore[arg-type]
    assert not outcome.broken, outcome.broken
    assert outcome.orders > 5


# ---- sweeps, other terms, several strategies


def test_a_sweep_gives_each_combination_the_figures_of_its_backtest() -> None:
    bars = sample_bars(("IBM", "MSFT")).head(1200)
    costs = Costs(slippage_bps=5)
    found = sweep("pairs", {"lookback": [20, 40], "limit_bps": [0.0, 10.0]}, bars, costs=costs, workers=1, trials=False)
    assert len(found.frame) == 4 and (found.frame["reason"] == "").all() and (found.frame["orders"] > 20).all()
    for parameters in found.parameters:
        one = backtest(Pairs(**parameters), bars, costs=costs, check=False, trials=False)  # type: ignore[arg-type]
        row = found.frame.loc[tuple(parameters.values())]
        assert row["orders"] == len(one.orders)
        assert row["total_return"] == pytest.approx(one.statistics["total_return"], abs=1e-9)
        again = found.backtest(**parameters)
        assert again.order_list_hash == one.order_list_hash


def test_a_sweep_with_a_start_gives_every_combination_its_own_history() -> None:
    bars = sample_bars(("IBM", "MSFT"))
    terms: dict[str, Any] = {"start": "2004-01-02", "end": "2005-12-30"}
    found = sweep("pairs", {"lookback": [20, 90]}, bars, **terms, workers=1, trials=False)
    for lookback in (20, 90):
        one = backtest(Pairs(lookback=lookback), bars, **terms, check=False, trials=False)
        assert found.frame.loc[lookback, "orders"] == len(one.orders) > 0
        assert found.frame.loc[lookback, "total_return"] == pytest.approx(one.statistics["total_return"], abs=1e-9)


def test_other_costs_ask_the_strategy_again() -> None:
    bars = sample_bars(("AAPL", "IBM")).head(900)
    result = backtest(Watchful(stop=0.03), bars, check=False, trials=False)
    dear = Costs(slippage_bps=30)
    again = rerun(result, costs=dear)
    assert (
        again.order_list_hash
        == backtest(Watchful(stop=0.03), bars, costs=dear, check=False, trials=False).order_list_hash
    )
    assert again.order_list_hash != result.order_list_hash
    assert rerun(result).order_list_hash == result.order_list_hash


async def test_two_strategies_of_a_session_see_their_own_account_each(tmp_path: Path) -> None:
    days = {"start": date(2005, 1, 3), "end": date(2005, 6, 30)}
    spec = SessionSpec(
        symbols=("AAPL", "IBM", "MSFT"),
        **days,
        strategies=(
            StrategyShare(
                name="pair", strategy="pairs", symbols=("IBM", "MSFT"), params={"lookback": 20}, capital="60000"
            ),
            StrategyShare(
                name="dips", strategy="watchful", symbols=("AAPL",), params={"short": False}, capital="40000"
            ),
        ),
    )
    run = await run_session(spec, settings(), journal_path=tmp_path / "journal.sqlite", check=False)
    assert run.reconciliation.ok and all(agent.state == "ok" for agent in run.health)
    for label, strategy, symbols, cash in (
        ("pair", Pairs(lookback=20), ("IBM", "MSFT"), 60_000),
        ("dips", Watchful(short=False), ("AAPL",), 40_000),
    ):
        alone = backtest(strategy, sample_bars(symbols), **days, cash=cash, check=False, trials=False)
        own = [order for order in run.orders if order.strategy == label]
        assert [(o.decided_at, o.symbol, o.side, o.qty, o.fills) for o in own] == [
            (o.decided_at, o.symbol, o.side, o.qty, o.fills) for o in alone.orders
        ]
        assert own


# ---- failures


class Failing(EventStrategy):
    """Holds a position with a stop, and raises from one day on."""

    kind: str = "raises"

    @property
    def exits(self) -> ProtectiveExits:
        return ProtectiveExits(stop_loss=0.5)

    def decide(self, view: View, state: EventState) -> Any:
        if view.session < date(2005, 1, 20):
            return state, [view.buy("IBM", 0.3)] if not view.position("IBM") and not view.orders else []
        if self.kind == "raises":
            return state, [view.target("IBM", 1 / (view.position("AAPL") * 0))]
        if self.kind == "hoards":
            CALLS.append(1)
            return state, [view.target("IBM", len(CALLS) / 1000)]
        return None


CALLS: list[int] = []


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("raises", "division by zero"),
        ("returns nothing", "let decide return two things, the next state"),
        ("hoards", "decides differently when it is asked twice"),
    ],
)
async def test_a_strategy_that_fails_in_a_session_orders_nothing_more_and_stays_protected(
    kind: str, words: str, tmp_path: Path
) -> None:
    CALLS.clear()
    spec = SessionSpec(symbols=("AAPL", "IBM"), start=date(2005, 1, 3), end=date(2005, 4, 29))
    run = await run_session(
        spec, settings(), strategy=Failing(kind=kind), journal_path=tmp_path / "journal.sqlite", check=False
    )
    (strategy,) = (agent for agent in run.health if agent.agent == "strategy")
    assert strategy.state == "down" and words in strategy.reason
    late = [order for order in run.orders if order.purpose == "entry" and order.decided_at.date() > date(2005, 3, 15)]
    assert not late and any(order.purpose == "exit" and not order.filled_qty for order in run.orders)
    assert run.reconciliation.ok


def test_a_failure_in_a_backtest_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE, encoding="utf-8")
    strategy = build_strategy(f"{path}:Mine")
    with pytest.raises(ZeroDivisionError) as caught:
        backtest(strategy, sample_bars(("IBM",)).head(50), trials=False)
    assert any(f"{path}, line 6" in note for note in caught.value.__notes__)


MINE = """from trader_lib import EventState, EventStrategy


class Mine(EventStrategy):
    def decide(self, view, state):
        return state, [view.target("IBM", 1 / view.position("IBM"))]
"""


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda view, state: (state, [view.buy("IMB", 0.1)]), "Did you mean 'IBM'?"),
        (lambda view, state: (state, [view.target("IBM", float("inf"))]), "cannot have the weight inf"),
        (lambda view, state: (state, [view.buy("IBM", 0.1, stop_loss=-1.0)]), "stop_loss=-1.0 is no price"),
        (lambda view, state: (state, view.buy("IBM", 0.1)), "returned a str among its intents"),
        (lambda view, state: ({}, []), "returned a dict for its state"),
        (lambda view, state: (state.replace(tires=1), []), "has no field 'tires'"),
    ],
)
def test_what_is_no_decision_is_refused_with_what_to_do(answer: Any, words: str) -> None:
    class Wrong(EventStrategy):
        def decide(self, view: View, state: EventState) -> Any:
            return answer(view, state)

    with pytest.raises(Misused) as caught:
        backtest(Wrong(), sample_bars(("IBM",)).head(50), check=False, trials=False)
    assert words in caught.value.message


def test_fractional_entries_that_last_are_refused() -> None:
    class Patient(EventStrategy):
        def decide(self, view: View, state: EventState) -> tuple[EventState, list[Intent]]:
            return state, [view.buy("IBM", 0.1, limit_price=view.close["IBM"], good_for=5)]

    with pytest.raises(Misused, match="cannot be fractional"):
        backtest(
            Patient(), sample_bars(("IBM",)).head(50), sizing=SizingRules(fractional=True), check=False, trials=False
        )


def test_a_state_of_another_class_is_not_taken_over() -> None:
    with pytest.raises(Misused, match="resume with the code that wrote it, or begin a new session"):
        read_state(Pairs(), '{"tries":3}')
