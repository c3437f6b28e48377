"""What several tests take: a strategy whose weights are given, and a module that is run apart from the tests."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trader_lib.market.bars import Bars
from trader_lib.strategy.contract import Strategy
from trader_lib.strategy.exits import ProtectiveExits
from trader_lib.strategy.intents import Intents

ROOT = Path(__file__).parent.parent


class Given(Strategy):
    """Weights and exits that are given, whatever the bars say; the last row of weights goes on.

    terms: of `Intents`, by name: a word or number for all, or rows of them like the weights.
    """

    weights: tuple[tuple[float, ...], ...]
    protection: ProtectiveExits | None = None
    terms: dict[str, Any] | None = None

    @property
    def warmup(self) -> int:
        return 1

    @property
    def exits(self) -> ProtectiveExits | None:
        return self.protection

    def targets(self, bars: Bars) -> NDArray[np.float64] | Intents:
        weights = self.stretched(self.weights, bars)
        if self.terms is None:
            return weights
        given = {name: self.stretched(value, bars) for name, value in self.terms.items()}
        return Intents(weights, **given)

    def stretched(self, given: Any, bars: Bars) -> Any:
        """Rows as many as there are bars; what is no rows as it is."""
        if not isinstance(given, tuple | list):
            return given
        return np.array([given[min(row, len(given) - 1)] for row in range(bars.n)])


def run_apart(module: str, *arguments: str, timeout_s: float) -> "subprocess.CompletedProcess[str]":
    """Run a module in processes of its own: what coverage and other tests do to this one does not reach it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
