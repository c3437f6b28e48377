"""Hundreds of short sessions behind a bad connection: nothing lost, nothing doubled; and every planted bug is found."""

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from tests.simulation.__main__ import command
from tests.simulation.mutations import MUTATIONS
from tests.simulation.world import simulate
from trader_lib.agents.execution import ExecutionAgent
from trader_lib.broker.faults import Faults
from trader_lib.broker.in_process import InProcessBroker
from trader_lib.config.settings import load_settings
from trader_lib.errors.taxonomy import Retryable
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.trading.portfolio import Position

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


@pytest.mark.parametrize(
    ("seed", "faults"),
    [
        (1, Faults(update_lost=1.0)),
        (2, Faults(mute=1.0, mute_s=600.0)),
        (3, Faults(update_late=1.0, update_doubled=1.0, late_s=60.0)),
        (4, Faults(read_fails=0.4)),
        (5, Faults(submit_lost=0.5, read_fails=0.2)),
        (6, Faults(answer_lost=1.0)),
        (7, Faults(cancel_lost=0.6, cancel_answer_lost=0.6)),
        (8, Faults(update_lost=0.5, update_doubled=1.0, answer_lost=0.5, read_fails=0.3)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_a_storm_of_one_kind_that_lasts_to_the_end_leaves_nothing_unexplained(seed: int, faults: Faults) -> None:
    outcome = simulate(seed, faults=faults, to_the_end=True, very_late=False)
    assert not outcome.broken and outcome.orders and outcome.faults.total()


async def test_lockstep_session_asks_again_what_its_broker_did_not_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []
    answer = InProcessBroker.positions

    async def positions(self: InProcessBroker) -> tuple[Position, ...]:
        asked.append(self)
        if len(asked) in {1, 2, 4}:
            raise Retryable("down")
        return await answer(self)

    monkeypatch.setattr(InProcessBroker, "positions", positions)
    spec = SessionSpec(start=date(2005, 1, 3), end=date(2005, 2, 28))
    settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})
    result = await run_session(spec, settings, journal_path=tmp_path / "journal.sqlite")
    assert result.reconciliation.ok and len(asked) >= 5


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
