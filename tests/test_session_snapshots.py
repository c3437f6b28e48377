"""What agents take over from a snapshot is what they would know if they had lived through everything."""

from __future__ import annotations

import errno
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.simulation import world as world_module
from tests.simulation.plan import plan_of
from tests.simulation.world import Outcome, World, play
from trader_lib.agents.contract import Agent
from trader_lib.agents.tracking import OrderBook
from trader_lib.market.bars import Bars
from trader_lib.observe.metering import Meter
from trader_lib.recovery import snapshots
from trader_lib.recovery.snapshots import SnapshotKeeper, snapshot_folder
from trader_lib.session.companions import SessionParts

pytestmark = pytest.mark.usefixtures("quiet")


METRICS = (
    "trader_equity_usd",
    "trader_profit_usd",
    "trader_day_profit_usd",
    "trader_drawdown_ratio",
    "trader_cash_usd",
)
PASSING = {
    "touched",  # what changed since somebody asked
    "alive",  # empty drawers; what is in the others is compared by itself
    "last_event_at",  # of the restart itself
    "absent",  # a look-up without an answer is not journalled: the snapshot knows it, whoever lives through it does not
}


def differences(one: Any, other: Any, where: str = "", seen: frozenset[int] = frozenset()) -> list[str]:
    """Where two states are not the same, in paths."""
    if id(one) in seen:
        return []
    seen |= {id(one)}
    if type(one) is not type(other) and not (isinstance(one, float) and isinstance(other, float)):
        return [f"{where}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, Bars):
        return [] if one.content_hash == other.content_hash else [f"{where}: other bars"]
    if isinstance(one, np.ndarray):
        return [] if np.array_equal(one, other, equal_nan=one.dtype.kind == "f") else [f"{where}: {one} and {other}"]
    if isinstance(one, Mapping):
        if list(one) != list(other):
            return [f"{where}: {list(one)} and {list(other)}"]
        pairs = [(f"{where}[{key!r}]", value, other[key]) for key, value in one.items()]
    elif isinstance(one, list | tuple) or type(one).__name__ == "deque":
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} members"]
        pairs = [(f"{where}[{place}]", *both) for place, both in enumerate(zip(one, other, strict=True))]
    elif is_dataclass(one):
        pairs = [
            (f"{where}.{f.name}", getattr(one, f.name), getattr(other, f.name))
            for f in fields(one)
            if f.name not in PASSING
        ]
    elif type(one).__module__.startswith("trader_lib.") and hasattr(one, "__dict__"):
        mine, its = vars(one), vars(other)
        if mine.keys() != its.keys():
            return [f"{where}: {mine.keys() ^ its.keys()}"]
        pairs = [(f"{where}.{name}", mine[name], its[name]) for name in mine.keys() - PASSING]
    else:
        same = one == other or (one != one and other != other)
        return [] if same else [f"{where}: {one} and {other}"]
    return [found for path, left, right in pairs for found in differences(left, right, path, seen)]


def known_to(agent: Agent) -> tuple[Any, ...]:
    """All that decides what an agent does next."""
    return agent.state, agent.tally, getattr(agent, "bars", None)


class TwiceResumed(World):
    """Resumes its session once more when it is over: with its last snapshot, and without any."""

    knowing: list[dict[str, Agent]]
    metered: list[dict[str, float | None]]

    async def run(self) -> Outcome:
        self.knowing, self.metered = [], []
        outcome = await super().run()
        began_with = outcome.faults["began with a snapshot"]
        folder, kept = self.path.parent, self.path.parent.with_suffix(".kept")
        shutil.copytree(folder, kept)
        try:
            for events in (self.plan.snapshot_events, 0):
                shutil.copytree(kept, folder, dirs_exist_ok=True)
                await self.session([self._look], snapshot_events=events)
        finally:
            shutil.rmtree(kept)
        assert outcome.faults["began with a snapshot"] == began_with + 1
        return outcome

    @asynccontextmanager
    async def _look(self, parts: SessionParts) -> AsyncIterator[None]:
        meter = Meter(parts)
        parts.bus.subscribe("meter", (), meter.hear)
        yield
        self.metered.append({name: meter.metrics.get(name) for name in METRICS})
        self.knowing.append({name: agent for name, agent in parts.agents.knowing().items() if isinstance(agent, Agent)})


def resumed_twice(seed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Outcome, TwiceResumed]:
    worlds: list[TwiceResumed] = []

    def build(*args: Any) -> TwiceResumed:
        worlds.append(TwiceResumed(*args))
        return worlds[-1]

    monkeypatch.setattr(world_module, "World", build)
    return play(replace(plan_of(seed), snapshot_events=10)), worlds[0]


@pytest.mark.parametrize("seed", [1, 2, 6, 8, 24, 33])
def test_agents_know_the_same_with_a_snapshot_and_without(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, world = resumed_twice(seed, monkeypatch)
    assert not outcome.broken
    short, long = world.knowing
    assert short.keys() == long.keys()
    assert [track.client_order_id for track in short["execution"].book.working()] == [
        track.client_order_id for track in long["execution"].book.working()
    ]
    found = [found for name in short for found in differences(known_to(short[name]), known_to(long[name]), name)]
    assert not found, "\n".join(found)
    assert world.metered[0] == world.metered[1] and None not in world.metered[0].values()


def test_comparison_of_agents_sees_what_a_snapshot_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    restore = OrderBook.restore

    def forgetful(book: OrderBook, families: Any) -> None:
        told = list(families)
        for root in told:
            root.executions.clear()
        restore(book, told)

    monkeypatch.setattr(OrderBook, "restore", forgetful)
    _, world = resumed_twice(1, monkeypatch)
    short, long = world.knowing
    assert any(".executions" in found for found in differences(short["execution"].state, long["execution"].state))


def _damage(state: Path) -> None:
    if state.is_file():
        state.write_bytes(state.read_bytes().replace(b'"state":"ok"', b'"state":"down"', 1))


def test_damaged_snapshot_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = next(plan_of(seed) for seed in range(1, 50) if plan_of(seed).deaths and plan_of(seed).snapshot_events == 10)
    begun = play(plan).faults["began with a snapshot"]
    assert begun

    class Damaging(World):
        async def session(self, *args: Any, **more: Any) -> Any:
            _damage(snapshot_folder(self.path) / "state.json")
            return await super().session(*args, **more)

    monkeypatch.setattr(world_module, "World", Damaging)
    outcome = play(plan)
    assert not outcome.broken and not outcome.faults["began with a snapshot"]


def test_snapshot_of_another_form_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = next(plan_of(seed) for seed in range(1, 50) if plan_of(seed).deaths and plan_of(seed).snapshot_events == 10)

    class Updating(World):
        async def session(self, *args: Any, **more: Any) -> Any:
            monkeypatch.setattr(snapshots, "FORMAT", snapshots.FORMAT + 1)
            return await super().session(*args, **more)

    monkeypatch.setattr(world_module, "World", Updating)
    outcome = play(plan)
    assert not outcome.broken and outcome.faults["died"] and not outcome.faults["began with a snapshot"]


def test_disk_that_takes_no_snapshot_costs_the_shortcut_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = next(plan_of(seed) for seed in range(1, 50) if plan_of(seed).deaths and plan_of(seed).snapshot_events == 10)

    async def refuses(keeper: SnapshotKeeper) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SnapshotKeeper, "take", refuses)
    outcome = play(plan)
    assert not outcome.broken and outcome.faults["died"] and not outcome.faults["began with a snapshot"]
