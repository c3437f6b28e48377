"""Drawn sweeps on a graphics card, or on numba's simulator of one, against the processor, row by row and bit by bit.

python -m tests.tools.card_cases [CASES] [BARS], with NUMBA_ENABLE_CUDASIM=1 NUMBA_DISABLE_JIT=1 where there is no card.
"""

from __future__ import annotations

import sys

import numpy as np

from trader_lib import RsiReversion, SmaCross, sample_bars
from trader_lib.exchange.costs import Costs
from trader_lib.research.backtest import agreed
from trader_lib.research.card import CardRunner
from trader_lib.research.combinations import combinations
from trader_lib.research.many import Runner
from trader_lib.research.measures import MEASURES
from trader_lib.risk.limits import Limits
from trader_lib.rules.sizing import SizingRules

CROSSINGS = [{"fast": fast, "slow": slow} for fast, slow in ((2, 5), (1, 3), (3, 20), (9, 4), (5, 40))]
REVERSIONS = [
    {"period": period, "entry": entry, "exit": 52.0, "stop_loss": stop, "take_profit": stop, "patience": 6}
    for period, entry, stop in ((2, 45.0, 0.01), (3, 50.0, None), (4, 60.0, 0.02), (3, 40.0, 0.03), (2, 50.0, 0.004))
]  # of each list one is refused


def drawn_terms(chance: np.random.Generator) -> dict[str, object]:
    return {
        "start": "2006-08-01" if chance.random() < 0.5 else None,
        "cash": float(chance.choice([1_500.0, 5_000.0, 100_000.0])),
        "costs": Costs(
            commission_per_share=float(chance.choice([0.0, 0.01])),
            slippage_bps=float(chance.choice([0.0, 5.0])),
            volume_share=float(chance.choice([0.0, 0.00001, 0.1])),
        ),
        "limits": Limits(
            max_order_notional=40_000.0 if chance.random() < 0.3 else None,
            max_drawdown=0.05 if chance.random() < 0.3 else None,
            max_daily_loss=0.01 if chance.random() < 0.3 else None,
            max_orders=1 if chance.random() < 0.3 else 200,
            throttle_window_s=float(chance.choice([60.0, 86_400.0])),
        ),
        "multiplier": int(chance.choice([1, 2, 4])),
        "sizing": SizingRules(
            fractional=bool(chance.random() < 0.5),
            min_trade=float(chance.choice([0.0, 0.01])),
            leverage=float(chance.choice([1.0, 1.6])),
        ),
    }


def main(cases: int, rows: int) -> int:
    chance = np.random.Generator(np.random.PCG64(88))
    bars = sample_bars(["AAPL", "IBM", "MSFT"], start="2006-06-01", end="2008-12-31").head(rows)
    seen = dict.fromkeys(("fills", "refused", "trades", "orders"), 0.0)
    for case in range(cases):
        drawn = drawn_terms(chance)
        first = 42 if drawn["start"] is not None else 0  # the first of August
        kind, rows_of = (SmaCross, CROSSINGS) if case % 2 == 0 else (RsiReversion, REVERSIONS)
        grid, terms = combinations(kind, rows_of), agreed(**drawn)  # type: ignore[arg-type]
        runner = Runner(grid, bars, first, terms)
        ours, why = CardRunner(runner, range(len(grid))).run(range(len(grid)))
        theirs, reasons = Runner(grid, bars, first, terms).run(range(len(grid)))
        equal = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
        if not equal.all() or why != reasons or not why:
            row, measure = np.argwhere(~equal)[0] if not equal.all() else (0, 0)
            where = f"case {case}, {rows_of[row]}, {MEASURES[measure]}"
            sys.stdout.write(f"{where}: {ours[row]} is not {theirs[row]}: {drawn}\n")
            return 1
        for name in seen:
            seen[name] += float(np.nansum(theirs[:, MEASURES.index(name)]))
    sys.stdout.write(f"{cases} cases are equal: {seen}\n")
    return 0 if all(seen.values()) else 1


if __name__ == "__main__":
    sys.exit(main(int((sys.argv[1:2] or ["6"])[0]), int((sys.argv[2:3] or ["160"])[0])))
