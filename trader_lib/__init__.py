"""Same strategy, same orders, explained.

The public names live in their rooms and are imported when first used, so that `import trader_lib` costs
milliseconds: pandas, numba, vectorbt, plotly and alpaca-py load with the first name that needs them.
"""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config.settings import Settings, load_settings
    from .exchange.costs import Costs
    from .market.bars import Bars
    from .market.sample import sample_bars
    from .market.store import BarStore
    from .market.synthetic import synthetic_bars
    from .research.backtest import BacktestResult, backtest
    from .research.sweep import SweepResult, sweep
    from .research.verdict import Verdict, verdict
    from .research.walkforward import WalkForward, walk_forward
    from .risk.limits import Limits
    from .session.session import run_session
    from .session.spec import SessionSpec
    from .strategy.causality import check_causal
    from .strategy.contract import Strategy
    from .strategy.events import EventState, EventStrategy, Intent, View
    from .strategy.exits import ProtectiveExits
    from .strategy.intents import Intents
    from .strategy.momentum import Momentum
    from .strategy.pairs import Pairs
    from .strategy.registry import load_strategy, register
    from .strategy.rsi_reversion import RsiReversion
    from .strategy.sma_cross import SmaCross
    from .strategy.start import check_start
    from .strategy.vol_target import VolTarget

HOMES = {
    "BacktestResult": "research.backtest",
    "BarStore": "market.store",
    "Bars": "market.bars",
    "Costs": "exchange.costs",
    "EventState": "strategy.events",
    "EventStrategy": "strategy.events",
    "Intent": "strategy.events",
    "Intents": "strategy.intents",
    "Limits": "risk.limits",
    "Momentum": "strategy.momentum",
    "Pairs": "strategy.pairs",
    "ProtectiveExits": "strategy.exits",
    "RsiReversion": "strategy.rsi_reversion",
    "SessionSpec": "session.spec",
    "Settings": "config.settings",
    "SmaCross": "strategy.sma_cross",
    "Strategy": "strategy.contract",
    "SweepResult": "research.sweep",
    "Verdict": "research.verdict",
    "View": "strategy.events",
    "VolTarget": "strategy.vol_target",
    "WalkForward": "research.walkforward",
    "backtest": "research.backtest",
    "check_causal": "strategy.causality",
    "check_start": "strategy.start",
    "load_settings": "config.settings",
    "load_strategy": "strategy.registry",
    "register": "strategy.registry",
    "run_session": "session.session",
    "sample_bars": "market.sample",
    "sweep": "research.sweep",
    "synthetic_bars": "market.synthetic",
    "verdict": "research.verdict",
    "walk_forward": "research.walkforward",
}

__all__ = sorted(HOMES)


def __getattr__(name: str) -> object:
    home = HOMES.get(name)
    if home is None:
        raise AttributeError(f"trader_lib has no {name!r}; it offers {', '.join(__all__)}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
