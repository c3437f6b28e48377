"""Play seeds and report: `python -m tests.simulation --seeds 10000`, or one of them: `--seed 17`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

from loguru import logger

from tests.simulation.world import Outcome, simulate

SHOWN_MAX = 20


def _quietly(seed: int) -> Outcome:
    logger.remove()
    return simulate(seed)


def outcomes(seeds: Iterable[int], processes: int) -> Iterator[Outcome]:
    """Play seeds on several processes; the outcomes come in the sequence of the seeds."""
    if processes == 1:
        yield from map(_quietly, seeds)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(_quietly, seeds, chunksize=10)


def command(seed: int) -> str:
    """What repeats a seed."""
    return f"python -m tests.simulation --seed {seed}"


def summary(played: int, failed: int, totals: Counter[str], faults: Counter[str], wall_s: float) -> str:
    """The table of a run."""
    rows = [("seeds", played), ("seeds with something broken", failed), *sorted(totals.items())]
    rows += [(f"fault: {name.replace('_', ' ')}", count) for name, count in sorted(faults.items()) if count]
    lines = ["| what | count |", "| --- | ---: |", *(f"| {name} | {count:,} |" for name, count in rows)]
    return "\n".join([*lines, "", f"{wall_s:.0f} s, {1000 * wall_s / max(played, 1):.0f} ms a seed"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="play this one alone")
    parser.add_argument("--seeds", type=int, default=300, help="how many to play")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    seeds = [asked.seed] if asked.seed is not None else range(asked.first, asked.first + asked.seeds)
    began, failed, played = time.monotonic(), 0, 0
    totals: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for outcome in outcomes(seeds, 1 if len(seeds) == 1 else asked.processes):
        played += 1
        totals += Counter(
            orders=outcome.orders, fills=outcome.fills, events=outcome.events, **{"fills repaired": outcome.repaired}
        )
        faults += outcome.faults
        if outcome.broken:
            failed += 1
            if failed <= SHOWN_MAX:
                print(f"seed {outcome.seed} is broken; repeat it with: {command(outcome.seed)}")
                for sentence in outcome.broken[:6]:
                    print(f"  {sentence}")
    print(summary(played, failed, totals, faults, time.monotonic() - began))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
