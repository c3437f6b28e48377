"""Hundreds of short sessions behind a bad connection: nothing lost, nothing doubled; and every planted bug is found."""

import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.given import run_apart
from tests.simulation.__main__ import command
from tests.simulation.mutations import MUTATIONS, Mutation
from tests.simulation.plan import GROUPS, Death, Full, Jump, plan_of
from tests.simulation.shrink import Shrinker
from tests.simulation.world import play, simulate
from trader_lib.broker.faults import Faults
from trader_lib.broker.in_process import InProcessBroker
from trader_lib.config.settings import load_settings
from trader_lib.errors.taxonomy import Retryable
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.trading.portfolio import Position

SEEDS = 300
SUITE_S = 600  # a machine that is busy with other things included; three minutes on one that is not
ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.slow
def test_no_order_is_lost_or_doubled_and_no_fill_is_lost_or_counted_twice_over_300_seeds() -> None:
    """In processes of their own: what coverage and other tests do to this one does not reach them."""
    played = run_apart("tests.simulation", "--seeds", str(SEEDS), timeout_s=SUITE_S)
    assert played.returncode == 0, played.stdout + played.stderr
    assert "| seeds with something broken | 0 |" in played.stdout


@pytest.mark.slow
def test_no_leg_is_lost_and_nothing_is_moved_twice_over_300_seeds_of_brackets_and_trailing_stops() -> None:
    asked = ("--first", str(GROUPS.start), "--seeds", str(len(GROUPS)))
    played = run_apart("tests.simulation", *asked, timeout_s=SUITE_S)
    assert played.returncode == 0, played.stdout + played.stderr
    assert "| seeds with something broken | 0 |" in played.stdout


@pytest.mark.parametrize("seed", range(GROUPS.start, GROUPS.start + 3))
def test_a_session_of_brackets_under_faults_leaves_nothing_unexplained(seed: int) -> None:
    outcome = simulate(seed)
    assert not outcome.broken and outcome.orders


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_bug_is_found(mutation: Mutation, record_property: Any) -> None:
    for seed in (mutation.seed, *mutation.seeds):
        outcome = simulate(seed, mutation.patches)
        if outcome.broken:
            record_property("caught_by_seed", seed)
            return
    pytest.fail(f"{SEEDS} seeds do not notice {mutation.name}: {mutation.part.__doc__}")


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
        (9, Faults(read_slow=0.5, late_s=30.0)),
        (10, Faults(bar_lost=0.5)),
        (11, Faults(bars_mute=0.3, mute_s=300.0)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_a_storm_of_one_kind_that_lasts_to_the_end_leaves_nothing_unexplained(seed: int, faults: Faults) -> None:
    outcome = simulate(seed, faults=faults, to_the_end=True, very_late=False, deaths=(), full=(), jumps=())
    assert not outcome.broken and outcome.orders and outcome.faults.total()


QUIET = {"faults": Faults(), "to_the_end": False, "very_late": False, "deaths": (), "full": (), "jumps": ()}


@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("plus", range(1, 7))
def test_a_process_that_dies_around_an_order_resumes_and_sends_it_once(plus: int, written: bool) -> None:
    deaths = tuple(Death("intent", number, plus, written, 20.0) for number in (1, 3, 5))
    outcome = simulate(3, **{**QUIET, "deaths": deaths})
    assert not outcome.broken and outcome.faults["died"] == outcome.restarts == 3


def test_an_order_that_fills_in_part_while_the_process_is_dead_is_counted() -> None:
    """Found by seed 126: the broker lists it, so nobody looked how much of it had filled."""
    outcome = simulate(126, **{**QUIET, "deaths": (Death("intent", 10, 6, True, 363.2),), "bars": 23})
    assert not outcome.broken and outcome.repaired


@pytest.mark.parametrize("rolls_back", [False, True])
@pytest.mark.parametrize("for_s", [20.0, 120.0, 1e9], ids=["a moment", "two minutes", "for good"])
def test_a_full_disk_stops_the_session_and_loses_nothing(for_s: float, rolls_back: bool) -> None:
    outcome = simulate(1, **{**QUIET, "full": (Full(410.0, for_s, rolls_back),)})
    assert not outcome.broken and outcome.faults["stopped by the disk"] == outcome.restarts > 0


@pytest.mark.parametrize("by_s", [-90.0, -2.0, 2.0, 90.0])
def test_a_clock_that_jumps_changes_no_order(by_s: float) -> None:
    usual, jumped = simulate(5, **QUIET), simulate(5, **{**QUIET, "jumps": (Jump(400.0, by_s),)})
    assert not jumped.broken and jumped.orders == usual.orders and jumped.fills == usual.fills


def test_a_failing_plan_shrinks_to_the_smallest_that_fails_alike() -> None:
    mutation = next(each for each in MUTATIONS if each.name == "TrustsTheStream")
    plan = plan_of(next(seed for seed in range(20) if simulate(seed, mutation.patches).broken))
    small, left = Shrinker(lambda plan: play(plan, mutation.patches)).shrink(plan)
    assert left.broken and small.bars < plan.bars and small.only is not None and len(small.only) <= 3
    again = play(plan_of(plan.seed).changed(small.changes()), mutation.patches)
    assert again.broken == left.broken


async def test_lockstep_session_asks_again_what_its_broker_did_not_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []
    answer = InProcessBroker.positions

    async def positions(self: InProcessBroker) -> tuple[Position, ...]:
        asked.append(self)
        if len(asked) % 2:
            raise Retryable("down")
        return await answer(self)

    monkeypatch.setattr(InProcessBroker, "positions", positions)
    spec = SessionSpec(start=date(2005, 1, 3), end=date(2005, 2, 28))
    settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})
    result = await run_session(spec, settings, journal_path=tmp_path / "journal.sqlite")
    assert result.reconciliation.ok and len(asked) >= 8  # at the opening twice, reconciling, and when all is over


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
