"""Run the tests of the rules against their mutants: `python -m tests.mutation`.

The exit code is 1 where one survives unlisted. The rules run as Python (NUMBA_DISABLE_JIT), and the tests nearest to
them are collected once. Each mutant lives in a forked child that puts its code into the function object, whoever
imported it. A mutant that no test notices has to stand in `survivors.toml` with the reason why it changes nothing; one
that stands there and is noticed is out of date. Rules that `survivors.toml` does not name as triaged are tried as well,
and what survives of them is only reported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import signal
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":  # before the rules are imported; a test that imports this keeps its compiler
    os.environ["NUMBA_DISABLE_JIT"] = "1"
    os.environ["CI"] = "1"  # the same examples for every mutant

import pytest
from _pytest.runner import runtestprotocol

from tests.mutation.operators import Mutant, mutants_of

ROOT = Path(__file__).parents[2]
SURVIVORS = Path(__file__).with_name("survivors.toml")
RULES = tuple(sorted(f"rules.{path.stem}" for path in (ROOT / "trader_lib" / "rules").glob("[a-z]*.py")))
# What tests a rule has to stand beside it: an engine further away may notice a change too, but takes minutes for it.
TESTS = (
    "nbs/rules",
    "nbs/risk",
    "tests/test_rules_boundaries.py",
    "tests/test_rules_actions.py",
    "tests/test_trading_folding.py",
    "tests/test_strategy_sizing.py",
    "tests/test_strategy_planner.py",
)
TEST_S_MAX = 3.0  # a test that takes longer is left to `make test`
MUTANT_S_MAX = 30


class MutantLoop:
    """A pytest plugin that runs the collected tests once, then once for each mutant until one of them fails."""

    def __init__(self, mutants: Sequence[Mutant], jobs: int) -> None:
        self.mutants, self.jobs = mutants, jobs
        self.survivors: list[Mutant] = []
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run everything; pytest's own loop does not begin."""
        for item in session.items:
            began = time.perf_counter()
            if not _passes([item]):
                raise pytest.UsageError(f"{item.nodeid} fails without a mutation")
            self.seconds[item.nodeid] = time.perf_counter() - began
        items = [item for item in session.items if self.seconds[item.nodeid] <= TEST_S_MAX]
        items.sort(key=lambda item: self.seconds[item.nodeid])
        if os.waitstatus_to_exitcode(os.waitpid(_in_a_child(None, items), 0)[1]) != 0:
            raise pytest.UsageError("the tests fail in this order without a mutation, so nothing can be said")
        waiting, running = list(reversed(self.mutants)), dict[int, Mutant]()
        while waiting or running:
            while waiting and len(running) < self.jobs:
                mutant = waiting.pop()
                running[_in_a_child(mutant, _nearest_first(mutant, items))] = mutant
            pid, status = os.wait()
            mutant = running.pop(pid)
            if os.waitstatus_to_exitcode(status) == 0:
                self.survivors.append(mutant)
            done = len(self.mutants) - len(waiting) - len(running)
            if done % 50 == 0 or not waiting:
                sys.stderr.write(f"{done} of {len(self.mutants)} mutants, {len(self.survivors)} survived\n")
        return True


def _nearest_first(mutant: Mutant, items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Return the rule's own notebook before the others: most mutants fall there."""
    own = mutant.module.removeprefix("trader_lib.").replace(".", "/")
    room, name = own.split("/")
    return sorted(items, key=lambda item: not (f"nbs/{room}/" in item.nodeid and item.name.endswith(f"_{name}")))


def _passes(items: Sequence[pytest.Item]) -> bool:
    for at, item in enumerate(items):
        following = items[at + 1] if at + 1 < len(items) else None
        reports = runtestprotocol(item, log=False, nextitem=following)
        if any(report.failed for report in reports):
            return False
    return True


def _in_a_child(mutant: Mutant | None, items: Sequence[pytest.Item]) -> int:
    """Fork and return the child's process id; it ends with 0 where no test notices the change, or there is none."""
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(MUTANT_S_MAX)  # a loop without an end is noticed as well
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    if mutant is not None:
        function = getattr(importlib.import_module(mutant.module), mutant.function)
        function.__code__ = mutant.code
    code = 1
    try:
        code = 0 if _passes(items) else 1
    finally:
        os._exit(code)


def listed() -> tuple[dict[str, str], frozenset[str]]:
    """Return the mutants that change nothing with the reason, and the modules whose survivors are all known."""
    with SURVIVORS.open("rb") as file:
        table = tomllib.load(file)
    return {row["mutant"]: row["reason"] for row in table["equivalent"]}, frozenset(table["triaged"])


def all_mutants(modules: Iterable[str]) -> Iterator[Mutant]:
    """Return every mutant of the rules' modules."""
    for name in modules:
        yield from mutants_of(f"trader_lib.{name}", ROOT / "trader_lib" / f"{name.replace('.', '/')}.py")


def chosen(mutants: Sequence[Mutant], sample: int | None, seed: str) -> list[Mutant]:
    """Return that many mutants, or all of them, in the order of the source; the same seed chooses the same ones."""
    if sample is None or sample >= len(mutants):
        return list(mutants)
    picked = random.Random(seed).sample(range(len(mutants)), sample)
    return [mutants[at] for at in sorted(picked)]


def verdict(tried: Sequence[Mutant], survivors: Sequence[Mutant], known: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return sentences about what is wrong, and about what is not triaged yet.

    tried, survivors: mutants. known: the keys of every mutant that there is in the modules that were asked for.
    """
    equivalent, triaged = listed()
    left = {mutant.key for mutant in survivors}
    found = [
        (mutant, f"{mutant.module.replace('.', '/')}.py:{mutant.line}: survived  {mutant.key}")
        for mutant in survivors
        if mutant.key not in equivalent
    ]
    wrong = [text for mutant, text in found if mutant.module.removeprefix("trader_lib.") in triaged]
    wrong += [
        f"{SURVIVORS.name}: a test notices  {key}"
        for key in equivalent
        if key in {mutant.key for mutant in tried} and key not in left
    ]
    rooms, every = {key.rpartition(": ")[0].rpartition(".")[0] for key in known}, set(known)
    wrong += [
        f"{SURVIVORS.name}: there is no such mutant  {key}"
        for key in equivalent
        if key not in every and any(key.startswith(f"{room}.") for room in rooms)
    ]
    return wrong, [text for mutant, text in found if mutant.module.removeprefix("trader_lib.") not in triaged]


def main() -> int:
    """Try the mutants and report those that survive."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.partition("\n")[0])
    parser.add_argument("--module", choices=RULES, action="append", help="only these modules' mutants")
    parser.add_argument("--sample", type=int, help="only so many mutants, drawn by the seed [all]")
    parser.add_argument("--seed", default="0", help="any text that draws the sample [0]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="children at once [all cores]")
    asked = parser.parse_args()
    every = list(all_mutants(asked.module or RULES))
    mutants = chosen(every, asked.sample, asked.seed)
    loop = MutantLoop(mutants, asked.jobs)
    tests = [str(ROOT / path) for path in TESTS]
    code = pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", *tests], plugins=[loop])
    if code != pytest.ExitCode.OK or not loop.seconds:
        return int(code) or 1
    wrong, open_ = verdict(mutants, loop.survivors, [mutant.key for mutant in every])
    for text in (*open_, *wrong):
        sys.stdout.write(f"{text}\n")
    part = (
        "" if len(mutants) == len(every) else f" of {len(every)} (drawn by the seed {asked.seed!r}; all: make mutation)"
    )
    sys.stdout.write(
        f"{len(mutants)} mutants{part}: {len(mutants) - len(loop.survivors)} noticed, {len(loop.survivors)} survived, "
        f"of which {len(open_)} in rules that are not triaged yet; {len(wrong)} complaints.\n"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
