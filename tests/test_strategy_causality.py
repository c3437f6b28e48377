"""The causality check on real and generated bars: no false alarm for ours, no miss for the three classic cheats."""

import numpy as np
import pytest

from trader_lib.market.bars import Bars, Timeframe
from trader_lib.market.sample import sample_bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.strategy.causality import LookAhead, check_causal
from trader_lib.strategy.contract import Strategy, build_strategy, target_weights

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
    assert check_causal(strategy, data, rows=80).truncations >= 60
    assert target_weights(strategy, data).any(), "a strategy that does nothing proves nothing"


@pytest.mark.parametrize("name", OURS)
def test_our_strategies_are_exact_on_every_truncation(name, intraday):
    bars = intraday.rows_between(0, 260)
    strategy = build_strategy(name, OURS[name])
    assert check_causal(strategy, bars, rows=bars.n).truncations == 260 - strategy.warmup + 1


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
        check_causal(cheat(), request.getfixturevalue(bars))


def test_back_filling_is_caught_where_a_symbol_was_listed_late(sample):
    with pytest.raises(LookAhead) as caught:
        check_causal(BackFilled(), sample)
    assert caught.value.context["symbol"] in {"FB", "GOOG"}


def test_back_filling_without_gaps_changes_nothing(intraday):
    check_causal(BackFilled(), intraday)


def test_an_honest_strategy_over_late_listings_passes(sample):
    check_causal(Close(), sample)


def test_a_single_peek_in_ten_years_is_caught(sample):
    class OnePeek(Close):
        """Sells on one bar only, because it has seen what comes."""

        def targets(self, bars):
            weights = np.full((bars.n, len(bars.symbols)), 0.1)
            if bars.n > 1234:
                weights[1233] = 0.0
            return weights

    with pytest.raises(LookAhead) as caught:
        check_causal(OnePeek(), sample)
    assert caught.value.context["row"] == 1233
