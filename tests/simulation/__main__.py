"""Play seeds and report: `python -m tests.simulation --seeds 10000`, or one of them: `--seed 17`."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from loguru import logger

from tests.simulation.mutations import MUTATIONS, Mutation
from tests.simulation.plan import Plan, plan_of
from tests.simulation.shrink import Shrinker
from tests.simulation.world import Outcome, play, simulate

SHOWN_MAX = 20
SHRUNK_MAX = 3  # of the failing seeds of a run


def _quietly(seed: int, mutation: Mutation | None = None) -> Outcome:
    logger.remove()
    gc.set_threshold(100_000, 20, 20)
    return simulate(seed, mutation.patches if mutation else None)


def outcomes(seeds: Iterable[int], jobs: int, mutation: Mutation | None = None) -> Iterator[Outcome]:
    """Play seeds on several processes; the outcomes come in the sequence of the seeds."""
    play_one: Callable[[int], Outcome] = partial(_quietly, mutation=mutation)
    if jobs == 1:
        yield from map(play_one, seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(play_one, seeds, chunksize=5)


def command(plan: Plan | int, mutation: Mutation | None = None) -> str:
    """What repeats a seed, or a plan that was made from one."""
    plan = plan_of(plan) if isinstance(plan, int) else plan
    words = ["python", "-m", "tests.simulation", "--seed", str(plan.seed)]
    if changes := plan.changes():
        words += ["--plan", json.dumps(changes, separators=(",", ":"))]
    if mutation is not None:
        words += ["--mutation", mutation.name]
    return shlex.join(words)


def summary(played: int, failed: int, totals: Counter[str], faults: Counter[str], wall_s: float) -> str:
    """The table of a run."""
    rows = [("seeds", played), ("seeds with something broken", failed), *sorted(totals.items())]
    rows += [(f"fault: {name.replace('_', ' ')}", count) for name, count in sorted(faults.items()) if count]
    lines = ["| what | count |", "| --- | ---: |", *(f"| {name} | {count:,} |" for name, count in rows)]
    return "\n".join([*lines, "", f"{wall_s:.0f} s, {1000 * wall_s / max(played, 1):.0f} ms a seed"])


def report(outcome: Outcome, plan: Plan, mutation: Mutation | None, *, shrunk: bool) -> None:
    """Say what broke, and what repeats it; then the smallest that breaks like it."""
    print(f"seed {outcome.seed} is broken; repeat it with: {command(plan, mutation)}")
    for sentence in outcome.broken[:6]:
        print(f"  {sentence}")
    if shrunk:
        small, left = Shrinker(lambda plan: play(plan, mutation.patches if mutation else None)).shrink(plan)
        moments = "all" if small.only is None else len(small.only)
        print(
            f"  the smallest that breaks like it: {small.bars} bars of {', '.join(small.symbols)}, {moments} strokes "
            f"of fate, {len(small.deaths)} deaths, {len(small.full)} full disks, {len(small.jumps)} clock jumps:\n"
            f"  {command(small, mutation)}\n    {left.broken[0]}"
        )
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="play this one alone")
    parser.add_argument("--seeds", type=int, default=300, help="how many to play")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that play them")
    parser.add_argument("--plan", type=json.loads, default={}, help="with --seed: what of its plan to change, as JSON")
    parser.add_argument("--mutation", choices=[each.name for each in MUTATIONS], help="plant this bug")
    parser.add_argument("--no-shrink", action="store_true", help="leave a failing seed as it is")
    asked = parser.parse_args()
    mutation = next((each for each in MUTATIONS if each.name == asked.mutation), None)
    began, failed, played = time.monotonic(), 0, 0
    totals: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    logger.remove()
    plan = None if asked.seed is None else plan_of(asked.seed).changed(asked.plan)
    found = (
        outcomes(range(asked.first, asked.first + asked.seeds), asked.jobs, mutation)
        if plan is None
        else iter([play(plan, mutation.patches if mutation else None)])
    )
    for outcome in found:
        played += 1
        totals += Counter(
            orders=outcome.orders, fills=outcome.fills, events=outcome.events, **{
                "fills repaired": outcome.repaired,
                "decisions and orders replayed": outcome.compared,
                "starts after a death or a failure": outcome.restarts,
            },
        )  # fmt: skip
        faults += outcome.faults
        if outcome.broken:
            failed += 1
            if failed <= SHOWN_MAX:
                small = failed <= SHRUNK_MAX and not asked.no_shrink and not asked.plan
                report(outcome, plan or plan_of(outcome.seed), mutation, shrunk=small)
    print(summary(played, failed, totals, faults, time.monotonic() - began))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
