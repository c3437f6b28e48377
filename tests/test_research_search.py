"""A guided search is the same for a seed, goes on where it ended, gives up what lags, and names what is wrong."""

from pathlib import Path

import numpy as np
import pytest

from trader_lib.errors.taxonomy import BadData, Misconfigured, Misused
from trader_lib.market.sample import sample_bars
from trader_lib.research.backtest import LookAheadWarning, backtest
from trader_lib.research.search import done_trials, ensure_study, probes, search, windows_of
from trader_lib.research.trials import TrialLedger
from trader_lib.strategy.contract import Strategy
from trader_lib.strategy.sma_cross import SmaCross

SPACE = {"fast": range(2, 40), "slow": range(20, 120)}
PRICES = sample_bars(["IBM"], start="2006-01-03", end="2007-12-31")


def test_a_search_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = search(SmaCross, SPACE, PRICES, trials=14, folds=2, seed=3)

    def stop(done: int, total: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    first = search(SmaCross, SPACE, PRICES, trials=14, folds=2, seed=3, storage=tmp_path, report=stop)
    assert not first.complete and first.frame.equals(whole.frame.head(9))
    first.study.ask()  # as a process leaves it that was killed within a trial
    rest = search(SmaCross, SPACE, PRICES, trials=14, folds=2, seed=3, storage=tmp_path)
    assert rest.complete and rest.frame.equals(whole.frame)
    assert not search(SmaCross, SPACE, PRICES, trials=14, folds=2, seed=4).frame.equals(whole.frame)


def test_a_study_of_something_else_is_refused(tmp_path: Path) -> None:
    search(SmaCross, SPACE, PRICES, trials=1, storage=tmp_path)
    for changed in ({"folds": 3}, {"by": "total_return"}, {"costs": {"slippage_bps": 5}}, {"seed": 1}):
        with pytest.raises(Misused, match=r"is of something else|cannot be opened"):
            search(SmaCross, SPACE, PRICES, trials=1, storage=tmp_path, **changed)
    other = search(SmaCross, SPACE, PRICES, trials=1, storage=tmp_path, name="another", folds=3)
    assert other.complete


def test_several_objectives_leave_a_front_that_nothing_beats() -> None:
    found = search(SmaCross, SPACE, PRICES, trials=16, folds=2, by=("sharpe_ratio", "turnover"), seed=2)
    done = found.frame[found.frame["reason"] == ""]
    for _, one in found.front.iterrows():
        better = (done["sharpe_ratio"] >= one["sharpe_ratio"]) & (done["turnover"] <= one["turnover"])
        equal = (done["sharpe_ratio"] == one["sharpe_ratio"]) & (done["turnover"] == one["turnover"])
        assert not (better & ~equal).any()
    assert found.front.loc[found.front["sharpe_ratio"].idxmax(), "fast"] == found.best()["fast"]
    lagged = found.frame[found.frame["reason"].str.contains("below the median")]
    assert len(lagged) and (lagged["folds"] == 1).all()


def test_every_fold_is_a_backtest_of_its_window() -> None:
    found = search(SmaCross, SPACE, PRICES, trials=6, folds=2, by="total_return")
    windows, checked = windows_of(PRICES, found.terms, 2), 0
    for trial in done_trials(found.study):
        chosen = {name: SPACE[name][trial.params[name]] for name in SPACE}
        for (first, last), (value,) in zip(windows, trial.user_attrs["folds"], strict=False):
            assert value == pytest.approx(
                backtest(SmaCross(**chosen), PRICES, start=first, end=last).statistics["total_return"]
            )
            checked += 1
    assert checked >= 6
    whole = found.backtest(**found.best())
    assert whole.statistics["total_return"] == pytest.approx(
        backtest(SmaCross(**found.best()), PRICES).statistics["total_return"]
    )


class Never(Strategy):
    """Holds nothing."""

    days: int = 3

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars: object) -> np.ndarray:
        return np.zeros((bars.n, len(bars.symbols)))  # type: ignore[attr-defined]


def test_combinations_without_a_figure_keep_their_reason() -> None:
    found = search(Never, {"days": [2, 3, 4]}, PRICES, trials=3, folds=2)
    assert found.complete and found.frame["reason"].str.startswith("It has no sharpe_ratio from 2006-01-03").all()
    with pytest.raises(BadData, match=r"No combination got to the end: the first was given up because: It has no"):
        found.best()
    refused = search(SmaCross, {"fast": [50], "slow": [20]}, PRICES, trials=1)
    assert "must be smaller than slow" in refused.frame["reason"][0]


class Tomorrow(Strategy):
    """Holds what the next bar will gain."""

    days: int = 2

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars: object) -> np.ndarray:
        close = bars.close  # type: ignore[attr-defined]
        return np.append(close[1:] > close[:-1], np.zeros((1, close.shape[1])), axis=0).astype(float)


def test_a_search_counts_each_combination_once_and_marks_one_that_looks_ahead(tmp_path: Path) -> None:
    ledger = TrialLedger(tmp_path / "trials.jsonl")
    small = {"fast": [5, 10], "slow": [5, 20]}  # fast=5, slow=5 and fast=10, slow=5 are refused: they have no figures
    found = search(SmaCross, small, PRICES, trials=12, folds=2, ledger=ledger)
    (entry,) = ledger.entries()
    assert entry.kind == "search" and entry.count == 2 < len(found.frame) and entry.first == "2006-01-03"
    search(SmaCross, small, PRICES, trials=12, folds=2, ledger=ledger)
    assert len(ledger.about("sma_cross", ["IBM"], PRICES.day(0), PRICES.day(-1))) == 1
    search(SmaCross, small, PRICES, trials=1, folds=2, ledger=False)
    assert len(ledger.entries()) == 2 and found.look_ahead == ""
    with pytest.warns(LookAheadWarning, match="could not have been had"):
        assert "it saw bars after" in search(Tomorrow, {"days": [2, 3]}, PRICES, trials=1, folds=2).look_ahead
    assert not search(Tomorrow, {"days": [2, 3]}, PRICES, trials=1, folds=2, check=False).look_ahead


def test_the_corners_of_a_space_are_among_its_probes() -> None:
    some = probes(SmaCross, {"fast": range(2, 100), "slow": range(20, 400)})
    assert len(some) == 1_004 and some.rows[-1] == (99, 399)
    assert some.first_built()[0] == SmaCross(fast=2, slow=20)
    assert probes(SmaCross, {"fast": [50], "slow": [20]}).first_built()[0] is None


def test_a_study_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    search(SmaCross, SPACE, PRICES, trials=1, storage=tmp_path / "here")
    ensure_study(tmp_path / "here", "search")
    for place, name in ((tmp_path / "here", "another"), (tmp_path / "gone", "search")):
        with pytest.raises(BadData, match="There is no study"):
            ensure_study(place, name)
    assert not (tmp_path / "gone").exists()


def test_what_cannot_be_searched_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(Misused, match=r"judged by 'sharpe'\. Did you mean 'sharpe_ratio'"):
        search(SmaCross, SPACE, PRICES, by="sharpe")
    with pytest.raises(Misused, match="at least one objective, and none twice"):
        search(SmaCross, SPACE, PRICES, by=("fees", "fees"))
    with pytest.raises(Misused, match="has no parameter 'fats'"):
        search(SmaCross, {"fats": [1, 2]}, PRICES)
    with pytest.raises(Misused, match="values by parameter"):
        search(SmaCross, {}, PRICES)
    for trials, folds, error, sentence in (
        (0, 2, Misused, "0 trials try nothing"),
        (1, 0, Misused, "0 folds judge nothing"),
        (1, 400, BadData, "cannot be split into 400 folds"),
    ):
        with pytest.raises(error, match=sentence):
            search(SmaCross, SPACE, PRICES, trials=trials, folds=folds)
    (tmp_path / "file").write_text("")
    with pytest.raises(Misconfigured, match=r"cannot be kept in .*file"):
        search(SmaCross, SPACE, PRICES, trials=1, storage=tmp_path / "file" / "below")
    with pytest.raises(Misconfigured, match="cannot be opened"):
        search(SmaCross, SPACE, PRICES, trials=1, storage="nosuch://host/db")
