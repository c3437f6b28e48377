"""SMA pairs over a hundred thousand bars on a graphics card, beside the processor of the same machine, row by row.

Needs a CUDA device and the extra `gpu`. Example: python -m tests.bench.card --pairs 10000 100000 --json card.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numba import cuda
from numpy.typing import NDArray

from tests.bench.sweeping import prices
from trader_lib import SmaCross
from trader_lib.exchange.costs import Costs
from trader_lib.research import card
from trader_lib.research.backtest import agreed
from trader_lib.research.combinations import Combinations, combinations
from trader_lib.research.many import Runner
from trader_lib.research.measures import MEASURES
from trader_lib.research.streaming import DONE, FAULT

THREADS = card.THREADS
CHUNK = 50  # combinations that a thread of the processor takes at a time


def timed(found: dict[str, Any], name: str, call: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    answer = call()
    found[name] = round(time.perf_counter() - began, 4)
    return answer


def pairs(count: int) -> Combinations:
    """A square of so many pairs, fast averages below all slow ones."""
    side = math.isqrt(count)
    axes = {"fast": range(2, 2 + side), "slow": range(2 + side, 2 + side + count // side)}
    return combinations(SmaCross, axes)


def by_processor(grid: Combinations, bars: Any, terms: Any, rows: NDArray[np.int64], workers: int) -> Any:
    """The rows by the processor's threads, and the seconds that they took after a first one."""
    runners = [Runner(grid, bars, 0, terms) for _ in range(workers)]
    for runner in runners:
        runner.run([int(rows[0])])
    out = np.empty((len(rows), len(MEASURES)))

    def chunk(first: int) -> None:
        runner = runners.pop()
        out[first : first + CHUNK] = runner.run([int(row) for row in rows[first : first + CHUNK]])[0]
        runners.append(runner)

    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(chunk, range(0, len(rows), CHUNK)))
    return out, time.perf_counter() - began


def same_bits(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows are equal to the last bit; any NaN is like any other."""
    a, b = (np.where(np.isnan(one), np.nan, one).view(np.int64) for one in (ours, theirs))
    return np.asarray((a == b).all(axis=1))


def measured(count: int, checked: int, bars: Any, workers: int, blocks: list[int]) -> dict[str, Any]:
    """Seconds of each part of a sweep on the card, and how many of its rows are those of the processor."""
    found: dict[str, Any] = {"pairs": count, "bars": bars.n}
    terms = agreed(costs=Costs(volume_share=0))
    grid = timed(found, "grid_s", lambda: pairs(count))
    found["pairs"] = len(grid)
    runner = Runner(grid, bars, 0, terms)
    free = card.free_bytes()
    on_card = timed(found, "prepare_s", lambda: card.CardRunner(runner, range(len(grid))))
    parts = [np.arange(at, min(at + card.AT_ONCE, len(grid))) for at in range(0, len(grid), card.AT_ONCE)]
    timed(found, "compile_and_first_launch_s", lambda: on_card.launch(parts[0]))
    raw = timed(found, "launches_s", lambda: np.concatenate([on_card.launch(one) for one in parts]))
    for threads in blocks:
        card.THREADS = threads
        timed(found, f"launches_of_{threads}_threads_s", lambda: [on_card.launch(one) for one in parts])
    card.THREADS = THREADS
    found["memory_mb"] = round((free - card.free_bytes()) / 2**20, 1)
    found["ns_per_bar_and_pair"] = found["launches_s"] / bars.n / len(grid) * 1e9
    out = timed(found, "measures_s", lambda: on_card.measures(raw))
    found["faults"] = int((raw[:, FAULT] != DONE).sum())
    rows = np.unique(np.linspace(0, len(grid) - 1, min(checked, len(grid))).astype(np.int64))
    theirs, seconds = by_processor(grid, bars, terms, rows, workers)
    equal = same_bits(out[rows], theirs)
    found |= {"checked": len(rows), "equal": int(equal.sum()), "processor_threads": workers}
    found["processor_s"] = round(seconds, 4)
    found["processor_ns_per_bar_and_pair"] = seconds / bars.n / len(rows) * 1e9
    if not equal.all():
        k = int(np.flatnonzero(~equal)[0])
        differing = np.flatnonzero(out[rows][k] != theirs[k])
        names = {MEASURES[m]: (out[rows][k, m], theirs[k, m]) for m in differing}
        found["first_unequal"] = {"parameters": grid.parameters(int(rows[k])), "measures": repr(names)}
    kernel = on_card.kernel
    found["registers"] = max(kernel.get_regs_per_thread().values())
    found["local_bytes"] = max(kernel.get_local_mem_per_thread().values())
    found["fused"] = sum(len(card.fused_in(ptx)) for ptx in kernel.inspect_asm().values())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--checked", type=int, default=100_000, help="rows that are compared with the processor's")
    parser.add_argument("--threads", type=int, nargs="*", default=[], help="other sizes of a block to try")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    device = cuda.get_current_device()
    print(device.name, device.compute_capability, "numpy", np.__version__, "python", sys.version.split()[0], flush=True)
    bars, workers, found = prices(), os.cpu_count() or 1, []
    for count in chosen.pairs:
        found.append(measured(count, chosen.checked, bars, workers, chosen.threads))
        print(json.dumps(found[-1], indent=1), flush=True)
        if chosen.json:
            chosen.json.write_text(json.dumps({"device": str(device.name), "runs": found}, indent=2) + "\n")
    return 0 if all(one["equal"] == one["checked"] for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
