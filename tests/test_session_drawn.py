"""Drawn markets, accounts and strategies: the session of agents orders what the backtest orders."""

from collections import Counter

import numpy as np
import pytest

from tests.given import run_apart
from tests.parity.drawn import configuration, difference, outside_regular_hours, play
from trader_lib.research.backtest import backtest
from trader_lib.session.session import SessionResult

SEEDS = 120  # `python -m tests.parity --seeds 500` plays more
SUITE_S = 900


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("seed", range(8))
def test_engines_agree_on_a_drawn_configuration(seed: int) -> None:
    outcome = play(seed)
    assert outcome.broken == ""


@pytest.mark.slow
def test_engines_agree_on_many_drawn_configurations() -> None:
    played = run_apart("tests.parity", "--seeds", str(SEEDS), "--from", "1000", timeout_s=SUITE_S)
    assert played.returncode == 0, played.stdout + played.stderr
    assert f"{SEEDS} configurations, 0 in which the engines disagree" in played.stdout


def test_draws_reach_what_the_comparison_is_for() -> None:
    """The first configurations hold cheap, dear, thin and large ones, and weights of every kind."""
    seen: Counter[str] = Counter()
    for seed in range(60):
        drawn = configuration(seed)
        weights, close = np.array(drawn.strategy.weights), drawn.bars.close
        seen += Counter(
            cheap=int(np.nanmin(close) < 0.1),
            dear=int(np.nanmax(close) > 10_000),
            thin=int(np.nanmin(drawn.bars.volume) == 0),
            large=int(drawn.cash > 1e6),
            kept=int(np.isnan(weights).any()),
            short=int(np.nanmin(weights) < 0),
            fractional=int(drawn.sizing.fractional),
            credit=int(drawn.sizing.leverage > 1),
            cash=int(drawn.account["multiplier"] == 1),
            guarded=int(drawn.strategy.exits is not None),
            extended=int(outside_regular_hours(drawn.bars)),
        )
    assert min(seen.values()) >= 5 and len(seen) == 11


def test_a_difference_is_told() -> None:
    """The comparison itself notices a session that ordered something else."""
    drawn = configuration(4)
    result = backtest(drawn.strategy, drawn.bars, cash=drawn.cash, sizing=drawn.sizing, **drawn.account)
    other = SessionResult.__new__(SessionResult)
    other.__dict__["orders"] = result.orders[1:]
    assert len(result.orders) > 1 and "1 are only left" in difference(result, other)
