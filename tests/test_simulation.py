"""Hundreds of short sessions behind a bad connection: nothing lost, nothing doubled; and every planted bug is found."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from tests.simulation.__main__ import command
from tests.simulation.mutations import MUTATIONS
from tests.simulation.world import simulate
from trader_lib.agents.execution import ExecutionAgent

SEEDS = 300
SUITE_S = 300  # a machine that is busy with other things included
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger.disable("trader_lib")
    yield
    logger.enable("trader_lib")


@pytest.mark.slow
def test_no_order_is_lost_or_doubled_and_no_fill_is_lost_or_counted_twice_over_300_seeds() -> None:
    """In processes of their own: what coverage and other tests do to this one does not reach them."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}
    played = subprocess.run(
        [sys.executable, "-m", "tests.simulation", "--seeds", str(SEEDS)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SUITE_S,
        check=False,
    )
    assert played.returncode == 0, played.stdout + played.stderr
    assert "| seeds with something broken | 0 |" in played.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_planted_bug_is_found(mutation: type[ExecutionAgent], record_property: Any) -> None:
    for seed in range(SEEDS):
        outcome = simulate(seed, mutation)
        if outcome.broken:
            record_property("caught_by_seed", seed)
            return
    pytest.fail(f"{SEEDS} seeds do not notice {mutation.__name__}: {mutation.__doc__}")


def test_a_seed_repeats_to_the_last_byte_of_the_journal() -> None:
    first, second = simulate(7), simulate(7)
    assert first.journal_hash == second.journal_hash and first == second
    assert simulate(8).journal_hash != first.journal_hash


def test_a_failing_seed_comes_with_the_command_that_repeats_it() -> None:
    assert command(17) == "python -m tests.simulation --seed 17"
    played = subprocess.run(
        [sys.executable, *command(17).split()[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert played.returncode == 0 and "| seeds | 1 |" in played.stdout, played.stdout + played.stderr
