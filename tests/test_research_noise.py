"""A thousand strategies that know nothing, run by the engine: the nominal share passes, and an edge is found."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trader_lib.exchange.costs import Costs
from trader_lib.market.bars import Bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.research.backtest import BacktestResult, agreed, run_on
from trader_lib.research.engine import run
from trader_lib.research.ledger import Market, Rules
from trader_lib.research.power import power
from trader_lib.research.verdict import Case, of_luck, shape_of, verdict
from trader_lib.strategy.contract import Strategy

TRIED, LEVEL = 1_000, 0.05
BOUND = 3.0 * (LEVEL * (1.0 - LEVEL) / TRIED) ** 0.5  # three standard errors of the share


class Coin(Strategy):
    """Long or short by a coin, thrown anew at each bar; with an edge, it peeks at the next bar now and then."""

    seed: int
    edge: float = 0.0  # share of throws that know the next bar

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars: Bars) -> NDArray[np.float64]:
        chance = np.random.Generator(np.random.PCG64(self.seed))
        thrown = np.where(chance.random(bars.close.shape) < 0.5, 0.5, -0.5)
        if self.edge:  # a planted edge: what is bought at the next open and sold at the one after
            gain = np.zeros_like(bars.open)
            gain[:-2] = np.sign(bars.open[2:] / bars.open[1:-1] - 1.0)
            thrown = np.where(chance.random(bars.close.shape) < self.edge, 0.5 * gain, thrown)
        return thrown


@pytest.fixture(scope="module")
def market() -> Bars:
    return synthetic_bars(["AAPL"], "2015-01-05", "2016-12-30", "1Day", seed=5)


@cache
def base(market: Bars) -> tuple[BacktestResult, Market, Rules]:
    """A run of one coin, and what all of them share."""
    terms = agreed(costs=Costs.none(), limits={"allow_short": True})
    return run_on(Coin(seed=0), market, terms), terms.market(market)[0], terms.rules(market.symbols, None)


def thrown(market: Bars, seed: int, edge: float = 0.0) -> BacktestResult:
    first, prices, rules = base(market)
    coin = Coin(seed=seed, edge=edge)
    weights = coin.targets(market)
    simulation = run(prices, weights, rules, start=first.start, starting_cash=first.starting_cash)
    return replace(first, strategy=coin, weights=weights, simulation=simulation)


def shares(market: Bars, **more: Any) -> tuple[float, list[float]]:
    """The share of strategies that the light for luck lets pass, and their Sharpe ratios per session."""
    passed, ratios = 0, []
    for seed in range(TRIED):
        case = Case(thrown(market, seed, **more), trials=1)
        passed += of_luck(case).colour == "green"
        ratios.append(shape_of(case.sessions.returns)[0])
    return passed / TRIED, ratios


@pytest.mark.slow
def test_of_a_thousand_coins_the_nominal_share_passes(market: Bars) -> None:
    passed, ratios = shares(market)
    assert abs(np.mean(ratios)) < 3.0 * np.std(ratios) / TRIED**0.5, "the coins are not fair"
    assert LEVEL - BOUND < passed < LEVEL + BOUND


@pytest.mark.slow
def test_a_planted_edge_is_found_as_often_as_theory_says(market: Bars) -> None:
    found, ratios = shares(market, edge=0.12)
    theory = power(float(np.mean(ratios)), len(market))
    assert 0.3 < theory < 0.95
    assert abs(found - theory) < 3.0 * (theory * (1.0 - theory) / TRIED) ** 0.5 + 0.02, (found, theory)


@pytest.mark.slow
def test_whole_verdicts_on_coins_say_no(market: Bars) -> None:
    passed = [verdict(thrown(market, seed), trials=1, markets=20, draws=200).passed for seed in range(25)]
    assert sum(passed) <= 4  # of 25 at one in twenty, more than 4 happen once in 140 cases
