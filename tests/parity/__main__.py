"""Play drawn configurations in both engines: `python -m tests.parity --seeds 500`, or one of them: `--seed 17`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

from loguru import logger

from tests.parity.drawn import Outcome, play


def quietly(seed: int) -> Outcome:
    logger.remove()
    return play(seed)


def outcomes(seeds: Iterable[int], jobs: int) -> Iterator[Outcome]:
    """Play seeds on several processes; the outcomes come in the sequence of the seeds."""
    if jobs == 1:
        yield from map(quietly, seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(quietly, seeds, chunksize=5)


def main(arguments: list[str] | None = None) -> int:
    """Play and report; 1 where the engines disagree."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("--seeds", type=int, default=500, help="how many, from --from on [500]")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed [0]")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes [one a core]")
    asked = parser.parse_args(arguments)
    seeds = [asked.seed] if asked.seed is not None else range(asked.first, asked.first + asked.seeds)
    began, broken, totals, played = time.monotonic(), 0, Counter[str](), 0
    for outcome in outcomes(seeds, 1 if asked.seed is not None else asked.jobs):
        played += 1
        totals += outcome.seen
        if outcome.broken:
            broken += 1
            print(f"seed {outcome.seed}: {outcome.broken[:600]}", flush=True)
    for name, count in totals.most_common():
        print(f"{count:8,}  {name}")
    print(f"{played:,} configurations, {broken:,} in which the engines disagree, {time.monotonic() - began:.0f} s")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
