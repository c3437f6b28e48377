"""Compile what a first run would wait for: Python's byte code, and the machine code of the rules.

    python -m tests.tools.warm

Both are kept beside the package, so that every later process finds them. The machine code is that of a backtest with
every shipped strategy, of a sweep and of a short session; a change of a rule makes it anew.
"""

import asyncio
import compileall
from pathlib import Path

from loguru import logger

import trader_lib
from trader_lib import SmaCross, backtest, sample_bars, sweep
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.strategy.registry import load_strategy, strategy_names


def main() -> None:
    """Run each path once."""
    logger.remove()  # the figures of this session are of no interest
    compileall.compile_dir(Path(trader_lib.__file__).parent, quiet=1)
    bars = sample_bars(["AAPL", "MSFT"], start="2004-01-02", end="2006-12-29")
    for name in strategy_names():
        result = backtest(load_strategy(name)(), bars)
        assert result.statistics and result.order_list_hash
    assert sweep(SmaCross, {"fast": [2, 5]}, bars, workers=1, trials=False).complete
    spec = SessionSpec(strategy="sma_cross", params=SmaCross(fast=2, slow=5).model_dump(), symbols=("AAPL",))
    asyncio.run(run_session(spec, bars=sample_bars(["AAPL"], start="2006-01-03", end="2006-02-15")))


if __name__ == "__main__":
    main()
