"""The bus keeps order, pushes back, isolates failures and knows when it is at rest."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from loguru import logger

from trader_lib.bus.bus import InProcessBus, Overloaded
from trader_lib.clock.clock import VirtualClock
from trader_lib.clock.ids import SeededIds
from trader_lib.errors.taxonomy import Misused
from trader_lib.journal.journal import SqliteJournal
from trader_lib.telemetry.log import correlation_id
from trader_lib.trading.events import ClockTicked, Event, OperatorCommand, Payload

MOMENT = datetime(2024, 3, 1, 21, tzinfo=UTC)
TICK = ClockTicked(at=MOMENT)
HALT = OperatorCommand(action="halt", reason="r", by="b")
Maker = Callable[..., InProcessBus]


@pytest.fixture
async def make_bus() -> AsyncIterator[Maker]:
    made: list[InProcessBus] = []

    def make(journal: SqliteJournal | None = None, **options: object) -> InProcessBus:
        made.append(InProcessBus(VirtualClock(MOMENT), SeededIds("bus"), journal, "s-1", **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for bus in made:
        await bus.close()


async def say(bus: InProcessBus, payload: Payload = TICK, **options: object) -> Event:
    return await bus.publish(payload, source="test", correlation_id="c", **options)  # type: ignore[arg-type]


async def test_all_subscribers_see_one_order_however_fast_they_are(make_bus: Maker) -> None:
    bus = make_bus(queue_max=3)
    seen: dict[str, list[int]] = {"fast": [], "slow": []}

    async def fast(event: Event) -> None:
        seen["fast"].append(event.seq)

    async def slow(event: Event) -> None:
        for _ in range(event.seq % 4):
            await asyncio.sleep(0)
        seen["slow"].append(event.seq)

    bus.subscribe("fast", (), fast)
    bus.subscribe("slow", (), slow)

    async def publisher() -> None:
        for _ in range(40):
            await say(bus)

    await asyncio.gather(*(publisher() for _ in range(5)))
    await bus.idle(timeout_s=10)
    assert seen["fast"] == seen["slow"] == list(range(1, 201))


async def test_an_event_is_in_the_journal_before_anyone_sees_it(make_bus: Maker, tmp_path: Path) -> None:
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        bus = make_bus(journal)
        found: list[bool] = []

        async def look(event: Event) -> None:
            found.append(event in list(journal.read(event.seq)))

        bus.subscribe("look", (), look)
        for payload in (TICK, HALT):
            await say(bus, payload)
        await bus.idle()
        assert found == [True, True]
        assert journal.last_seq == bus.last_seq == 2


async def test_a_bus_over_a_journal_goes_on_where_it_stopped(make_bus: Maker, tmp_path: Path) -> None:
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        journal.append((await say(make_bus())).model_copy(update={"id": "e-0"}))
        assert (await say(make_bus(journal), time=datetime(2020, 1, 1, tzinfo=UTC))).seq == 2
        assert [read.time.year for read in journal.read()] == [2024, 2020]


async def test_what_the_journal_refuses_is_not_published(make_bus: Maker, tmp_path: Path) -> None:
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        bus = make_bus(journal)
        seen: list[int] = []

        async def note(event: Event) -> None:
            seen.append(event.seq)

        bus.subscribe("note", (), note)
        journal.append(await say(make_bus()))  # behind the bus's back
        with pytest.raises(Exception, match="cannot follow"):
            await say(bus)
        await bus.idle()
        assert seen == []
        assert bus.last_seq == 0


async def test_publishers_wait_for_a_slow_subscriber_and_lose_nothing(make_bus: Maker) -> None:
    bus = make_bus(queue_max=1)
    gate = asyncio.Event()
    seen: list[int] = []

    async def slow(event: Event) -> None:
        await gate.wait()
        seen.append(event.seq)

    bus.subscribe("slow", (ClockTicked,), slow)
    publishers = [asyncio.create_task(say(bus)) for _ in range(10)]
    for _ in range(50):
        await asyncio.sleep(0)
    assert bus.depths() == {"slow": 1}
    assert sum(task.done() for task in publishers) == 2
    await say(bus, HALT)  # nobody wants it: it does not wait
    gate.set()
    await asyncio.gather(*publishers)
    await bus.idle()
    assert len(seen) == 10
    assert seen == sorted(seen)


async def test_overloaded_means_that_nothing_happened(make_bus: Maker, tmp_path: Path) -> None:
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        bus = make_bus(journal, queue_max=1, put_timeout_s=0.02)
        gate = asyncio.Event()
        other: list[int] = []

        async def hang(event: Event) -> None:
            await gate.wait()

        async def note(event: Event) -> None:
            other.append(event.seq)

        bus.subscribe("hang", (), hang)
        bus.subscribe("note", (), note)
        await say(bus)
        await asyncio.sleep(0)
        await say(bus)
        with pytest.raises(Overloaded, match="hang did not make room") as told:
            await say(bus)
        assert told.value.context["depths"] == {"hang": 1, "note": 0}
        assert journal.last_seq == bus.last_seq == 2
        gate.set()
        await bus.idle()
        assert other == [1, 2]


async def test_a_handler_that_floods_itself_is_told_and_the_rest_goes_on(make_bus: Maker) -> None:
    errors: list[BaseException] = []
    bus = make_bus(queue_max=2, put_timeout_s=0.02, on_error=lambda name, event, error: errors.append(error))

    async def flood(event: Event) -> None:
        if event.seq == 1:
            for _ in range(5):
                await say(bus)

    subscription = bus.subscribe("flood", (), flood)
    await say(bus)
    await bus.idle(timeout_s=5)
    assert [type(error) for error in errors] == [Overloaded]
    assert (subscription.handled, subscription.failed) == (2, 1)


async def test_a_publisher_that_gives_up_leaves_its_turn_to_the_next(make_bus: Maker) -> None:
    bus = make_bus(queue_max=1)
    gate = asyncio.Event()

    async def slow(event: Event) -> None:
        await gate.wait()

    bus.subscribe("slow", (), slow)
    await say(bus)
    await asyncio.sleep(0)
    await say(bus)
    waiting = [asyncio.create_task(say(bus)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()  # while it waits
    await asyncio.sleep(0)
    gate.set()
    await asyncio.sleep(0)
    waiting[1].cancel()  # perhaps with its turn in hand
    await asyncio.wait_for(waiting[2], 1)
    await bus.idle(timeout_s=1)
    assert bus.depths() == {"slow": 0}


async def test_room_for_one_of_two_full_inboxes_is_passed_on(make_bus: Maker) -> None:
    bus = make_bus(queue_max=1, put_timeout_s=2.0)
    gates = {"a": asyncio.Event(), "b": asyncio.Event()}

    def waits(name: str) -> Callable[[Event], object]:
        async def handler(event: Event) -> None:
            await gates[name].wait()

        return handler

    bus.subscribe("a", (ClockTicked, OperatorCommand), waits("a"))  # type: ignore[arg-type]
    bus.subscribe("b", (ClockTicked,), waits("b"))  # type: ignore[arg-type]
    await say(bus)
    await asyncio.sleep(0)
    await say(bus)  # both are busy and full
    both = asyncio.create_task(say(bus, TICK))
    await asyncio.sleep(0)
    only_a = asyncio.create_task(say(bus, HALT))
    await asyncio.sleep(0)
    gates["a"].set()
    await asyncio.wait_for(only_a, 1)  # although the one before it still waits for b
    assert not both.done()
    gates["b"].set()
    await asyncio.wait_for(both, 1)
    await bus.idle(timeout_s=1)


async def test_idle_waits_for_a_cascade_across_agents(make_bus: Maker) -> None:
    bus = make_bus(queue_max=100)
    ticks: list[int] = []
    commands: list[int] = []

    async def split(event: Event) -> None:
        await asyncio.sleep(0.001)
        ticks.append(event.seq)
        for _ in range(3):
            await bus.publish(HALT, source="split", correlation_id="c", causation_id=event.id)

    async def follow(event: Event) -> None:
        await asyncio.sleep(0.001)
        commands.append(event.seq)
        if len(ticks) < 4 and len(commands) % 3 == 0:
            await say(bus)

    bus.subscribe("split", (ClockTicked,), split)
    bus.subscribe("follow", (OperatorCommand,), follow)
    await say(bus)
    await bus.idle(timeout_s=5)
    assert (len(ticks), len(commands)) == (4, 12)
    assert sorted(ticks + commands) == list(range(1, 17))


async def test_idle_waits_for_publishers_that_wait_for_room(make_bus: Maker) -> None:
    bus = make_bus(queue_max=1)
    seen: list[int] = []

    async def slow(event: Event) -> None:
        await asyncio.sleep(0.001)
        seen.append(event.seq)

    bus.subscribe("slow", (), slow)
    publishers = [asyncio.create_task(say(bus)) for _ in range(6)]
    await asyncio.sleep(0)
    await bus.idle(timeout_s=5)
    assert len(seen) == 6
    assert all(task.done() for task in publishers)


async def test_idle_on_a_quiet_bus_returns_at_once(make_bus: Maker) -> None:
    await asyncio.wait_for(make_bus().idle(), 0.1)


async def test_a_handler_may_not_wait_for_itself(make_bus: Maker) -> None:
    errors: list[BaseException] = []
    bus = make_bus(on_error=lambda name, event, error: errors.append(error))

    async def wait(event: Event) -> None:
        await bus.idle()

    async def leave(event: Event) -> None:
        await bus.unsubscribe(leaving)

    bus.subscribe("wait", (), wait)
    leaving = bus.subscribe("leave", (), leave)
    await say(bus)
    await bus.idle(timeout_s=1)
    assert sorted(str(error)[:30] for error in errors) == [
        "A handler cannot wait for the ",
        "The handler of 'leave' cannot ",
    ]


async def test_a_failing_handler_is_logged_under_its_correlation_id(make_bus: Maker) -> None:
    lines: list[str] = []
    bound: list[str | None] = []
    sink = logger.add(lambda message: lines.append(f"{correlation_id.get()} {message}"), format="{extra} {message}")
    try:
        bus = make_bus()

        async def fail(event: Event) -> None:
            bound.append(correlation_id.get())
            raise ValueError("a bad day")

        subscription = bus.subscribe("risk", (), fail)
        await say(bus)
        await say(bus)
        await bus.idle()
    finally:
        logger.remove(sink)
    assert bound == ["c", "c"]
    assert subscription.failed == 2
    assert len(lines) == 2
    assert lines[0].startswith("c ")
    assert "risk failed on event 1 (clock_ticked)" in lines[0]
    assert "a bad day" in lines[0]


async def test_a_failing_error_report_stops_nothing(make_bus: Maker) -> None:
    def worse(name: str, event: Event, error: BaseException) -> None:
        raise RuntimeError("worse")

    bus = make_bus(on_error=worse)

    async def fail(event: Event) -> None:
        raise ValueError

    subscription = bus.subscribe("fail", (), fail)
    await say(bus)
    await say(bus)
    await bus.idle(timeout_s=1)
    assert subscription.failed == 2


async def test_a_cancelled_call_inside_a_handler_is_the_handlers_failure(make_bus: Maker) -> None:
    bus = make_bus(on_error=lambda name, event, error: None)

    async def cancelled(event: Event) -> None:
        raise asyncio.CancelledError

    subscription = bus.subscribe("cancelled", (), cancelled)
    await say(bus)
    await say(bus)
    await bus.idle(timeout_s=1)
    assert subscription.failed == 2


async def test_unsubscribing_frees_those_who_wait(make_bus: Maker) -> None:
    bus = make_bus(queue_max=1)

    async def hang(event: Event) -> None:
        await asyncio.Event().wait()

    subscription = bus.subscribe("hang", (), hang)
    await say(bus)
    await asyncio.sleep(0)
    await say(bus)
    waiting = [asyncio.create_task(say(bus)) for _ in range(3)]
    await asyncio.sleep(0)
    await bus.unsubscribe(subscription)
    await bus.unsubscribe(subscription)
    await asyncio.wait_for(asyncio.gather(*waiting), 1)
    await bus.idle(timeout_s=1)
    assert bus.depths() == {}
    assert bus.last_seq == 5


async def test_a_handler_that_ignores_its_cancellation_ends_after_that_event(make_bus: Maker) -> None:
    bus = make_bus()

    async def stubborn(event: Event) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    subscription = bus.subscribe("stubborn", (), stubborn)
    await say(bus)
    await say(bus)
    await asyncio.sleep(0)
    await asyncio.wait_for(bus.unsubscribe(subscription), 1)
    await bus.idle(timeout_s=1)


async def test_closing_refuses_those_who_wait_and_those_who_come(make_bus: Maker) -> None:
    bus = make_bus(queue_max=1)

    async def hang(event: Event) -> None:
        await asyncio.Event().wait()

    bus.subscribe("hang", (), hang)
    await say(bus)
    await asyncio.sleep(0)
    await say(bus)
    waiting = asyncio.create_task(say(bus))
    await asyncio.sleep(0)
    await bus.close()
    with pytest.raises(Misused, match="closed"):
        await waiting
    with pytest.raises(Misused, match="closed"):
        await say(bus)
    with pytest.raises(Misused, match="closed"):
        bus.subscribe("late", (), hang)


async def test_names_are_unique_and_bounds_are_bounds(make_bus: Maker) -> None:
    bus = make_bus()

    async def note(event: Event) -> None: ...

    bus.subscribe("note", (), note)
    with pytest.raises(Misused, match="'note' already"):
        bus.subscribe("note", (), note)
    for options in ({"queue_max": 0}, {"put_timeout_s": 0}):
        with pytest.raises(Misused, match="queue_max"):
            make_bus(**options)


async def test_a_subscriber_gets_what_comes_after_it_came(make_bus: Maker) -> None:
    bus = make_bus()
    seen: list[int] = []

    async def note(event: Event) -> None:
        seen.append(event.seq)

    await say(bus)
    bus.subscribe("note", (ClockTicked,), note)
    await say(bus)
    await say(bus, HALT)
    await bus.idle()
    assert seen == [2]
