"""The checks on real and generated bars: no false alarm for honest strategies, no miss for planted ones."""

import json
import os
from threading import Lock
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trader_lib.config.settings import Settings, load_settings
from trader_lib.market.bars import Bars, Timeframe, window
from trader_lib.market.sample import sample_bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.research.backtest import LookAheadWarning, backtest
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.strategy.causality import LookAhead, check_causal, first_change
from trader_lib.strategy.checks import check_strategy, checked_targets, ensure_checked
from trader_lib.strategy.contract import Strategy, history_bars, needed_bars, target_weights
from trader_lib.strategy.registry import build_strategy
from trader_lib.strategy.sma_cross import SmaCross
from trader_lib.strategy.start import LookbackExceeded, check_start

OURS = {
    "sma_cross": {"fast": 10, "slow": 50},
    "rsi_reversion": {},
    "momentum": {"lookback": 63, "every": 10},
    "vol_target": {},
}


@pytest.fixture(scope="module")
def sample() -> Bars:
    return sample_bars(start="2003-01-02", end="2013-03-01")


@pytest.fixture(scope="module")
def intraday() -> Bars:
    return synthetic_bars(["AAA", "BBB", "CCC"], "2024-01-02", "2024-01-19", Timeframe.MIN_5, seed=3)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("bars", ["sample", "intraday"])
def test_our_strategies_raise_no_false_alarm(name, bars, request):
    data = request.getfixturevalue(bars)
    strategy = build_strategy(name, OURS[name])
    assert check_causal(strategy, data, rows=80, fresh=False).truncations >= 60
    assert target_weights(strategy, data).any(), "a strategy that does nothing proves nothing"


@pytest.mark.parametrize("name", OURS)
def test_our_strategies_are_exact_on_every_truncation(name, intraday):
    bars = intraday.rows_between(0, 260)
    strategy = build_strategy(name, OURS[name])
    assert check_causal(strategy, bars, rows=bars.n, fresh=False).truncations == 260 - strategy.warmup + 1


@pytest.mark.parametrize("name", OURS)
def test_long_only_weights_never_add_up_to_more_than_one(name, sample):
    weights = target_weights(build_strategy(name, OURS[name]), sample)
    assert weights.min() >= 0.0
    assert weights.sum(axis=1).max() <= 1.0 + 1e-12
    assert not weights[np.isnan(sample.close)].any()


class Close(Strategy):
    """A five-bar mean: honest unless a subclass prepares its prices dishonestly."""

    @property
    def warmup(self):
        return 5

    def prices(self, close):
        return close

    def targets(self, bars):
        close = self.prices(bars.frame("close"))
        return (close >= close.rolling(5).mean()) / len(bars.symbols)


class Tomorrow(Close):
    def prices(self, close):
        return close.shift(-1)


class WholeSample(Close):
    def targets(self, bars):
        close = bars.frame("close")
        return ((close - close.mean()) / close.std() < 0.0) / len(bars.symbols)


class BackFilled(Close):
    def prices(self, close):
        return close.bfill()


@pytest.mark.parametrize("cheat", [Tomorrow, WholeSample])
@pytest.mark.parametrize("bars", ["sample", "intraday"])
def test_the_future_and_the_whole_sample_are_caught(cheat, bars, request):
    with pytest.raises(LookAhead, match="weight"):
        check_causal(cheat(), request.getfixturevalue(bars), fresh=False)


def test_back_filling_is_caught_where_a_symbol_was_listed_late(sample):
    with pytest.raises(LookAhead) as caught:
        check_causal(BackFilled(), sample, fresh=False)
    assert caught.value.context["symbol"] in {"FB", "GOOG"}


def test_back_filling_without_gaps_changes_nothing(intraday):
    check_causal(BackFilled(), intraday, fresh=False)


def test_an_honest_strategy_over_late_listings_passes(sample):
    check_causal(Close(), sample, fresh=False)


def test_a_single_peek_in_ten_years_is_caught(sample):
    class OnePeek(Close):
        """Sells on one bar only, because it has seen what comes."""

        def targets(self, bars):
            weights = np.full((bars.n, len(bars.symbols)), 0.1)
            if bars.n > 1234:
                weights[1233] = 0.0
            return weights

    with pytest.raises(LookAhead) as caught:
        check_causal(OnePeek(), sample, fresh=False)
    assert caught.value.context["row"] == 1233


# ---- planted look-ahead of many kinds: each is found, by the thorough check; most by the quick one as well

KEPT: dict[tuple[str, ...], object] = {}


class Base(Strategy):
    """Ten-bar averages; a subclass plants something."""

    @property
    def warmup(self):
        return 10

    def frame(self, bars):
        close = bars.frame("close")
        return (close > close.rolling(10).mean()) / len(bars.symbols)

    def targets(self, bars):
        return self.frame(bars)


class LeavesBeforeFalls(Base):
    """Out on the day before a fall of more than five percent: 24 rows in ten years."""

    def targets(self, bars):
        close = bars.frame("close")
        return self.frame(bars).where(~(close.shift(-1) / close < 0.95), 0.0)


class JumpsIn(Base):
    def targets(self, bars):
        close = bars.frame("close")
        return self.frame(bars).where(~(close.shift(-1) / close > 1.05), 1.0 / len(bars.symbols))


class NextOpen(Base):
    def targets(self, bars):
        return self.frame(bars) * (bars.frame("open").shift(-1).ffill() > bars.frame("close"))


class NextVolume(Base):
    def targets(self, bars):
        volume = bars.frame("volume")
        return self.frame(bars).where(~(volume.shift(-1) > 4 * volume), 0.0)


class Centred(Base):
    def targets(self, bars):
        close = bars.frame("close")
        return (close > close.rolling(9, center=True).mean()) / len(bars.symbols)


class WeekAhead(Base):
    """The mean of the calendar week, known on its Monday."""

    def targets(self, bars):
        close = bars.frame("close")
        weeks = close.index.tz_convert("America/New_York").tz_localize(None).to_period("W")
        return (close < close.groupby(weeks).transform("mean")) / len(bars.symbols)


class Ranked(Base):
    """A rank in the whole sample."""

    def targets(self, bars):
        return (bars.frame("close").rank(pct=True) < 0.3) / len(bars.symbols)


class BestOfAll(Base):
    """Chooses the symbol that ends highest."""

    def targets(self, bars):
        close = bars.frame("close").ffill()
        best = (close.iloc[-1] / close.bfill().iloc[0]).idxmax()
        return self.frame(bars) * [symbol == best for symbol in bars.symbols]


class Fitted(Base):
    """A threshold that is fitted to all bars."""

    def targets(self, bars):
        returns = bars.frame("close").pct_change(fill_method=None)
        return (returns < returns.quantile(0.2)) / len(bars.symbols)


class OutAtTheEnd(Base):
    def targets(self, bars):
        weights = self.frame(bars)
        weights.iloc[-3:] = 0.0
        return weights


class BehindTheView(Base):
    """Looks behind the end of the slice that it was given."""

    def targets(self, bars):
        whole = bars.close.base
        close = whole[3] if whole is not None and whole.ndim == 3 else bars.close
        tomorrow = np.full_like(bars.close, np.nan)
        later = close[1 : bars.n + 1]
        tomorrow[: len(later)] = later
        return np.nan_to_num(tomorrow > bars.close) / len(bars.symbols)


class OneSymbolOnly(Base):
    """Peeks at the last symbol alone, and only on Fridays."""

    def targets(self, bars):
        weights, close = self.frame(bars).to_numpy().copy(), bars.close
        friday = bars.index.tz_convert("America/New_York").day_of_week == 4
        rises = np.append(close[1:, -1] > close[:-1, -1], False)
        weights[friday, -1] = rises[friday] / len(bars.symbols)
        return weights


class KeepsBySymbol(Base):
    def targets(self, bars):
        close = bars.frame("close")
        known = KEPT.setdefault(bars.symbols, (close.shift(-1) > close).astype(float) / len(bars.symbols))
        return known.reindex(close.index).fillna(0.0)


class FittedOnce(Base):
    """A threshold that is fitted to the first bars that it sees, and kept."""

    def targets(self, bars):
        returns = bars.frame("close").pct_change(fill_method=None)
        least = KEPT.setdefault(("least", *bars.symbols), returns.quantile(0.3))
        return (returns < least) / len(bars.symbols)


PLANTED = [
    LeavesBeforeFalls,
    JumpsIn,
    NextOpen,
    NextVolume,
    Centred,
    WeekAhead,
    Ranked,
    BestOfAll,
    Fitted,
    OutAtTheEnd,
    BehindTheView,
    OneSymbolOnly,
]


@pytest.fixture(scope="module")
def three() -> Bars:
    return sample_bars(["AAPL", "IBM", "MSFT"], start="2003-01-03", end="2012-12-31")


@pytest.mark.parametrize("cheat", PLANTED)
def test_planted_look_ahead_is_found(cheat, three):
    with pytest.raises(LookAhead):
        check_causal(cheat(), three, fresh=False)
    if cheat is not OneSymbolOnly:  # a peek on Fridays can hide from the quick look, which says how much it looks at
        assert checked_targets(cheat(), three)[1], "the quick look missed it"


@pytest.mark.parametrize("cheat", [KeepsBySymbol, FittedOnce])
def test_what_is_kept_from_an_earlier_call_is_found_in_a_process_of_its_own(cheat, three):
    KEPT.clear()
    bars = three.head(500)
    with pytest.raises(LookAhead, match="in a process of its own"):
        check_causal(cheat(), bars)


def test_honest_base_of_the_planted_ones_is_clean_in_every_check(three):
    found = check_strategy(Base(), three)
    assert found.ok and found.causality.fresh and found.causality.noise == 0.0 and found.causality.futures > 100
    assert found.start.needed == 10 and checked_targets(Base(), three)[1] == ""


def test_a_strategy_that_cannot_travel_is_checked_without_a_process_of_its_own(three):
    class Locked(Base):
        lock: Any = None

    passed = check_causal(Locked(lock=Lock()), three.head(300))
    assert passed.fresh == 0 and "cannot be packed" in passed.notes[0]


def test_a_failure_in_the_other_process_is_a_sentence(three):
    here = os.getpid()

    class OnlyHere(Base):
        def targets(self, bars):
            assert os.getpid() == here, "not in another process"
            return super().targets(bars)

    passed = check_causal(OnlyHere(), three.head(300))
    assert passed.fresh == 0 and "AssertionError: not in another process" in passed.notes[0]


# ---- honest strategies never fail


@given(seed=st.integers(0, 10_000), length=st.integers(40, 300), window=st.integers(1, 30), kind=st.integers(0, 4))
@settings(max_examples=15)
def test_honest_strategies_never_fail(seed, length, window, kind):
    class Drawn(Strategy):
        @property
        def warmup(self):
            return window

        def targets(self, bars):
            close = bars.frame("close")
            match kind:
                case 0:
                    return (close > close.rolling(window).mean()) / 2.0
                case 1:
                    return (close > close.ewm(span=window).mean()) / 2.0
                case 2:
                    return (close.rolling(window).rank(pct=True) > 0.5) / 2.0
                case 3:
                    return np.tanh(close / close.expanding().mean() - 1.0)
            return (close >= close.cummax() * 0.97) * (bars.frame("volume") > bars.frame("volume").cummin()) / 2.0

    bars = synthetic_bars(["AAA", "BBB"], "2020-01-02", "2021-12-30", Timeframe.DAY_1, seed=seed).head(length)
    if bars.n <= window + 1:
        return
    assert check_causal(Drawn(), bars, rows=12, fresh=False).bars == bars.n
    assert checked_targets(Drawn(), bars)[1] == ""
    ensure_checked(Drawn(), bars.symbols, Timeframe.DAY_1, bars)


def test_weights_that_keep_what_there_is_are_equal_to_themselves():
    keeping = np.array([[0.5], [np.nan], [0.2]])
    assert first_change(keeping, keeping[:2]) is None and first_change(keeping, np.array([[0.5], [0.5]])) == (1, 0)


# ---- where the history begins


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("bars", ["sample", "intraday"])
def test_our_strategies_need_no_more_bars_than_they_say(name, bars, request):
    data = request.getfixturevalue(bars)
    found = check_start(build_strategy(name, OURS[name]), data, starts=24)
    assert found.needed is not None and found.needed <= found.declared and found.noise == 0.0


@pytest.mark.parametrize("name", OURS)
def test_a_backtest_and_a_session_that_start_on_the_same_day_decide_the_same(name, sample):
    """140 start days: what a session evaluates bar by bar against what a backtest evaluates at once."""
    strategy = build_strategy(name, {} if name != "momentum" else {"every": 10})
    full = target_weights(strategy, sample)
    for begin in np.linspace(400, sample.n - 9, 140).astype(int):
        cut, first = window(sample, sample.day(begin), sample.day(begin + 2), history_bars(strategy))
        at_once = target_weights(strategy, cut)[first:]
        known, by_bar = cut.head(first), []
        for row in range(first, cut.n):
            known = known.append(cut.at(row), cut.rows(row))
            by_bar.append(target_weights(strategy, needed_bars(strategy, known))[-1])
        assert np.array_equal(at_once, np.array(by_bar)), f"{name} from {sample.day(begin)}"
        assert np.array_equal(at_once, full[begin : begin + len(at_once)]), f"{name} forgets too little"


# ---- the first backtest


def test_a_backtest_marks_what_looks_ahead_and_says_it_again(three, recwarn):
    for _ in range(2):  # the second answer is known, and as loud
        recwarn.clear()
        result = backtest(LeavesBeforeFalls(), three)
        assert "LOOKS AHEAD" in repr(result) and "it saw bars after" in result.look_ahead
        assert [one.category for one in recwarn.list if issubclass(one.category, LookAheadWarning)] == [
            LookAheadWarning
        ]
    unchecked = backtest(LeavesBeforeFalls(), three, check=False)
    assert not unchecked.look_ahead and unchecked.order_list_hash == result.order_list_hash


def test_a_backtest_of_an_honest_strategy_is_quiet(three, recwarn, tmp_path):
    result = backtest(Base(), three)
    assert not result.look_ahead and not [one for one in recwarn.list if issubclass(one.category, LookAheadWarning)]
    assert "Look-ahead" not in result.report(tmp_path / "honest.html").read_text(encoding="utf-8")


def test_the_report_of_a_backtest_that_looks_ahead_begins_with_it(three, tmp_path):
    with pytest.warns(LookAheadWarning):
        result = backtest(Centred(), three)
    page = result.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "could not have been had in a market" in page


async def test_a_session_refuses_what_looks_ahead_unless_told_otherwise(tmp_path, three):
    spec = SessionSpec(strategy="sma_cross", start="2005-01-03", end="2005-02-10")
    with pytest.raises(LookAhead, match="--no-check"):
        await run_session(spec, in_process(), strategy=Centred(), journal_path=tmp_path / "refused.sqlite")
    assert not (tmp_path / "refused.sqlite").exists()
    done = await run_session(
        spec, in_process(), strategy=Centred(), journal_path=tmp_path / "forced.sqlite", check=False
    )
    assert done.status == "completed"


async def test_a_session_refuses_a_strategy_that_depends_on_more_bars_than_it_says(tmp_path):
    class Forgetful(Base):
        @property
        def lookback_max(self):
            return 10

        def targets(self, bars):
            return super().targets(bars)[np.arange(bars.n) % 7 == 0].reindex(bars.index).ffill().fillna(0.0)

    spec = SessionSpec(strategy="sma_cross", start="2005-01-03", end="2005-06-30")
    with pytest.raises(LookbackExceeded, match="lookback_max"):
        await run_session(spec, in_process(), strategy=Forgetful(), journal_path=tmp_path / "journal.sqlite")


@pytest.mark.parametrize("name", OURS)
async def test_sessions_and_backtests_from_several_days_order_the_same(name, tmp_path):
    for start, end in [("2005-03-07", "2005-04-15"), ("2005-03-16", "2005-04-22"), ("2008-10-01", "2008-11-05")]:
        symbols = ("AAPL", "GOOG", "IBM", "MSFT")
        spec = SessionSpec(strategy=name, params={}, symbols=symbols, start=start, end=end)
        tested = backtest(build_strategy(name), sample_bars(symbols), start=start, end=end)
        run = await run_session(spec, in_process(), journal_path=tmp_path / f"{name}-{start}.sqlite")
        assert run.order_list_hash == tested.order_list_hash


def in_process() -> Settings:
    return load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})


# ---- the command line

PEEK = """
from trader_lib import Strategy

class Peek(Strategy):
    ahead: int = 2

    @property
    def warmup(self):
        return 1

    def targets(self, bars):
        close = bars.frame("close")
        return (close.shift(-self.ahead) > close.shift(0 if self.ahead else 1)).astype(float) / len(bars.symbols)
"""
DAYS = ("--symbols", "AAPL,IBM", "--start", "2005-01-03", "--end", "2006-12-29")


def test_trader_check_reports_and_exits_with_one_where_it_finds_something(trader, tmp_path):
    (tmp_path / "peek.py").write_text(PEEK)
    code, out, err = trader("check", "peek.py:Peek", *DAYS)
    assert code == 1 and not err and "Look-ahead" in out and "it saw bars after" in " ".join(out.split())
    code, out, err = trader("check", "peek.py:Peek", "-p", "ahead=0", *DAYS, "--json")
    found = json.loads(out)
    assert code == 0 and found["ok"] and found["causality"]["fresh"] and found["start"]["needed"] == 2 - 1 + 1
    code, out, err = trader("check", *DAYS)
    assert code == 0 and "it names 50" in out
    assert trader("check", "nosuch")[0] == 2


def test_trader_paper_says_what_a_check_of_an_honest_strategy_noted(trader, tmp_path):
    (tmp_path / "peek.py").write_text(PEEK)
    words = ("--transport", "in_process", "--strategy", "peek.py:Peek", "-p", "ahead=0", "--symbols", "IBM")
    code, _, err = trader("paper", *words, "--start", "2005-01-03", "--end", "2005-04-29")
    assert code == 0 and "It names no lookback_max" in err


def test_trader_backtest_ends_with_five_and_paper_does_not_begin(trader, tmp_path):
    (tmp_path / "peek.py").write_text(PEEK)
    code, out, err = trader("backtest", "--strategy", "peek.py:Peek", *DAYS)
    assert code == 5 and "Not to be believed" in out and "it saw bars after" in err
    run = next((tmp_path / "runs").glob("*Z-*"))
    assert json.loads((run / "result.json").read_text())["failure"]["error"] == "LookAhead"
    assert "could not have been had in a market" in (run / "report.html").read_text()
    code, out, err = trader("paper", "--transport", "in_process", "--strategy", "peek.py:Peek", *DAYS)
    assert code == 5 and "--no-check" in err and len(list((tmp_path / "runs").glob("*Z-*"))) == 1
    code, out, err = trader("backtest", "--strategy", "peek.py:Peek", "--no-check", *DAYS)
    assert code == 0 and "Not to be believed" not in out


class Elsewhere(Strategy):
    """Takes the prices, the next day's among them, from a file and not from the bars that it is given."""

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars: Bars) -> pd.DataFrame:
        close = sample_bars(list(bars.symbols)).frame("close")
        return (close.shift(-1) > close).astype(float).reindex(bars.index).fillna(0.0)


def test_a_backtest_says_that_weights_do_not_come_from_the_prices() -> None:
    bars = sample_bars("AAPL", start="2005-01-03", end="2005-06-30")
    result = backtest(Elsewhere(), bars)
    assert result.doubt.startswith("Its weights are the same for entirely other prices")
    assert backtest(Elsewhere(), bars, check=False).doubt == "" == backtest(SmaCross(fast=2, slow=5), bars).doubt
