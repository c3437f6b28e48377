"""Run the tests of the rules against every mutant: `python -m tests.mutation`; exit code 1 where one survives unlisted.

The rules run as Python here (NUMBA_DISABLE_JIT), and every test is collected once. Each mutant lives in a forked child
that puts the changed code into the function object, whoever imported it. A mutant that no test notices has to stand
in `survivors.toml` with the reason why it changes nothing; one that stands there and is noticed is out of date.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ["NUMBA_DISABLE_JIT"] = "1"

import pytest
from _pytest.runner import runtestprotocol

from tests.mutation.operators import Mutant, mutants_of

ROOT = Path(__file__).parents[2]
SURVIVORS = Path(__file__).with_name("survivors.toml")
RULES = (
    "rules.numbers",
    "rules.folding",
    "rules.account",
    "rules.wash",
    "rules.matching",
    "rules.sizing",
    "rules.exits",
    "rules.checks",
)
TESTS = (
    "nbs/rules",
    "nbs/trading",
    "nbs/exchange",
    "nbs/risk",
    "nbs/strategy",
    "nbs/research",
    "tests/test_rules_boundaries.py",
    "tests/test_trading_folding.py",
    "tests/test_strategy_sizing.py",
    "tests/test_strategy_planner.py",
    "tests/test_research_engine.py",
)
TEST_S_MAX = 3.0  # a test that takes longer is left to `make test`
MUTANT_S_MAX = 60


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
    """The rule's own notebook before the others: most mutants fall there."""
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
    """Fork; the child ends with 0 where no test noticed the change, or where there is none. Returns its process id."""
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


def listed_survivors() -> dict[str, str]:
    """The mutants that change nothing, and why."""
    with SURVIVORS.open("rb") as file:
        return {row["mutant"]: row["reason"] for row in tomllib.load(file)["equivalent"]}


def all_mutants(modules: Sequence[str]) -> Iterator[Mutant]:
    """Every mutant of the rules' modules."""
    for name in modules:
        yield from mutants_of(f"trader_lib.{name}", ROOT / "trader_lib" / f"{name.replace('.', '/')}.py")


def main() -> int:
    """Try every mutant and report those that survive."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.partition("\n")[0])
    parser.add_argument("--module", choices=RULES, help="only this module's mutants")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="children at once [all cores]")
    asked = parser.parse_args()
    mutants = list(all_mutants([asked.module] if asked.module else RULES))
    loop = MutantLoop(mutants, asked.jobs)
    tests = [str(ROOT / path) for path in TESTS]
    code = pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", *tests], plugins=[loop])
    if code != pytest.ExitCode.OK or not loop.seconds:
        return int(code) or 1
    listed, found = listed_survivors(), {mutant.key: mutant for mutant in loop.survivors}
    unlisted = [mutant for key, mutant in found.items() if key not in listed]
    every = {mutant.key for mutant in mutants}
    stale = [key for key in listed if key in every and key not in found] if not asked.module else []
    gone = [key for key in listed if key not in every] if not asked.module else []
    for mutant in unlisted:
        sys.stdout.write(f"{mutant.module.replace('.', '/')}.py:{mutant.line}: survived  {mutant.key}\n")
    for key in stale:
        sys.stdout.write(f"{SURVIVORS.name}: a test notices  {key}\n")
    for key in gone:
        sys.stdout.write(f"{SURVIVORS.name}: there is no such mutant  {key}\n")
    sys.stdout.write(
        f"{len(mutants)} mutants: {len(mutants) - len(found)} noticed, {len(found) - len(unlisted)} equivalent, "
        f"{len(unlisted)} survived.\n"
    )
    return 1 if unlisted or stale or gone else 0


if __name__ == "__main__":
    sys.exit(main())
