"""Weights of bars that are known ahead: the same orders, and a strategy that looks ahead is stopped."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path

import pandas as pd
import pytest

from trader_lib import SessionSpec, Strategy, load_settings, run_session, sample_bars
from trader_lib.journal.opening import open_journal
from trader_lib.market.bars import Bars
from trader_lib.strategy.ahead import LooksAhead
from trader_lib.trading.events import OrderProposed, SessionEnded, TargetsDecided

SPEC = {"strategy": "sma_cross", "symbols": ["IBM", "MSFT"], "start": "2009-01-05", "end": "2010-12-31"}
SETTINGS = load_settings(overrides={"broker": {"kind": "simulated", "transport": "in_process"}}, env_file=None)


class Tomorrow(Strategy):
    """Buys what closes higher on the next day."""

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars: Bars) -> pd.DataFrame:
        return (bars.frame().diff().shift(-1) > 0.0) / 2.0


def test_a_look_ahead_stops_the_session_and_names_the_row(tmp_path: Path) -> None:
    spec, path = SessionSpec.model_validate(SPEC), tmp_path / "journal.sqlite"
    bars = sample_bars(["IBM", "MSFT"], start="2008-12-01", end="2010-12-31")
    with pytest.raises(LooksAhead, match=r"the weight 0\.\d at .*, row \d+, when later bars are known"):
        asyncio.run(run_session(spec, SETTINGS, bars=bars, strategy=Tomorrow(), journal_path=path, check=False))
    with open_journal(path) as journal:
        assert not list(journal.read(types=[OrderProposed]))
        (ended,) = journal.read(types=[SessionEnded])
    assert isinstance(ended.payload, SessionEnded) and ended.payload.reason.startswith("LooksAhead: ")


class Afraid(Strategy):
    """Holds a half of each symbol, and raises once a close of IBM above 90 USD is among its bars."""

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars: Bars) -> pd.DataFrame:
        if bars.close[:, 0].max() > 90.0:
            raise ValueError("too high")
        return bars.frame() * 0.0 + 0.5


def test_a_strategy_that_raises_fails_at_the_bar_at_which_it_would_without_a_block(tmp_path: Path) -> None:
    spec, path = SessionSpec.model_validate(SPEC), tmp_path / "journal.sqlite"
    bars = sample_bars(["IBM", "MSFT"], start="2008-12-01", end="2010-12-31")
    result = asyncio.run(run_session(spec, SETTINGS, bars=bars, strategy=Afraid(), journal_path=path, check=False))
    (health,) = [one for one in result.health if one.agent == "strategy"]
    line = inspect.getsourcelines(Afraid.targets)[1] + 2
    raised = f'It was raised in {__file__}, line {line}: `raise ValueError("too high")`.'
    assert (health.failed, health.state, health.reason) == (6, "down", f"ValueError: too high. {raised}")
    first = next(row for row in range(21, bars.n) if bars.close[: row + 1, 0].max() > 90.0)
    with open_journal(path) as journal:
        decided = [event.payload for event in journal.read(types=[TargetsDecided])]
    assert isinstance(decided[-1], TargetsDecided) and decided[-1].at == bars.at(first - 1)
    assert len(result.orders) >= 2
