"""What the bus promises, in one process and over Redis Streams; and what happens when Redis or a process dies."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.servers import RedisServer
from trader_lib.bus.bus import InProcessBus, Overloaded
from trader_lib.bus.inbox import Handler
from trader_lib.bus.member import HubClock, RedisMember
from trader_lib.bus.redis import HubTerms, RedisHub
from trader_lib.clock.clock import VirtualClock
from trader_lib.clock.ids import SeededIds
from trader_lib.errors.taxonomy import Halted, Misconfigured, Misused, Retryable
from trader_lib.journal.journal import SqliteJournal
from trader_lib.trading.events import ClockTicked, Event, OperatorCommand, Payload

MOMENT = datetime(2024, 3, 1, 21, tzinfo=UTC)
TICK = ClockTicked(at=MOMENT)
HALT = OperatorCommand(action="halt", reason="r", by="b")


class Stage:
    """A bus with subscribers: beside it, or each behind a member of its own."""

    def __init__(self, bus: InProcessBus, server: RedisServer | None) -> None:
        self.bus, self._server = bus, server
        self.members: dict[str, RedisMember] = {}

    async def put_on(self, name: str, types: tuple[type[Payload], ...], handler: Handler) -> InProcessBus:
        """Subscribe, and return the bus that the subscriber publishes on."""
        self.bus.subscribe(name, types, handler)
        return await self.serve(name, types, handler)

    async def serve(self, name: str, types: tuple[type[Payload], ...], handler: Handler) -> InProcessBus:
        if self._server is None:
            return self.bus
        assert isinstance(self.bus, RedisHub)
        self.bus.admit_agents()
        member = self.members[name] = RedisMember(self._server.url, "s-1", name, absent_s=20)
        await member.join()
        member.subscribe(name, types, handler)
        await member.catch_up(None, ())
        return member

    async def say(self, payload: Payload = TICK) -> Event:
        return await self.bus.publish(payload, source="test", correlation_id="c")


Maker = Callable[..., Any]


@pytest.fixture(params=["in_process", "redis"])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Maker]:
    made: list[Stage] = []

    async def stage(*elsewhere: str, journal: SqliteJournal | None = None, **options: Any) -> Stage:
        clock, ids = VirtualClock(MOMENT), SeededIds("bus")
        if request.param == "in_process":
            made.append(Stage(InProcessBus(clock, ids, journal, "s-1", **options), None))
        else:
            server: RedisServer = request.getfixturevalue("redis_server")
            hub = RedisHub(clock, ids, journal, "s-1", server.url, elsewhere, terms=HubTerms(absent_s=20), **options)
            await hub.open()
            made.append(Stage(hub, server))
        return made[-1]

    yield stage
    for one in made:
        for member in one.members.values():
            await member.close()
        await one.bus.close()


async def test_all_subscribers_see_one_order(make: Maker) -> None:
    stage = await make("fast", "slow", queue_max=20)
    seen: dict[str, list[int]] = {"fast": [], "slow": []}

    async def fast(event: Event) -> None:
        seen["fast"].append(event.seq)

    async def slow(event: Event) -> None:
        await asyncio.sleep(0.001 * (event.seq % 4))
        seen["slow"].append(event.seq)

    await stage.put_on("fast", (), fast)
    await stage.put_on("slow", (), slow)
    await asyncio.gather(*(stage.say() for _ in range(200)))
    await stage.bus.idle(timeout_s=20)
    assert seen["fast"] == seen["slow"] == list(range(1, 201))
    assert stage.bus.depths() == {"fast": 0, "slow": 0}


async def test_an_event_is_in_the_journal_before_anyone_sees_it(make: Maker, tmp_path: Path) -> None:
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        stage = await make("look", journal=journal)
        found: list[bool] = []

        async def look(event: Event) -> None:
            found.append(event in list(journal.read(event.seq)))

        await stage.put_on("look", (), look)
        await stage.say()
        await stage.say(HALT)
        await stage.bus.idle(timeout_s=10)
        assert found == [True, True]
        assert journal.last_seq == stage.bus.last_seq == 2


async def test_idle_waits_for_a_cascade_across_processes(make: Maker) -> None:
    stage = await make("split", "follow")
    commands: list[int] = []

    async def split(event: Event) -> None:
        for _ in range(3):
            await buses["split"].publish(HALT, source="split", correlation_id="c", causation_id=event.id)

    async def follow(event: Event) -> None:
        await asyncio.sleep(0.001)
        commands.append(event.seq)
        if len(commands) in {3, 6, 9}:
            await buses["follow"].publish(TICK, source="follow", correlation_id="c")

    buses = {"split": await stage.put_on("split", (ClockTicked,), split)}
    buses["follow"] = await stage.put_on("follow", (OperatorCommand,), follow)
    await stage.say()
    await stage.bus.idle(timeout_s=10)
    assert len(commands) == 12
    assert stage.bus.last_seq == 16
    await buses["follow"].idle(timeout_s=5)


async def test_publishers_wait_for_room_and_are_refused_when_none_comes(make: Maker) -> None:
    stage = await make("slow", queue_max=2, put_timeout_s=0.3)
    gate, seen = asyncio.Event(), []

    async def slow(event: Event) -> None:
        await gate.wait()
        seen.append(event.seq)

    await stage.put_on("slow", (ClockTicked,), slow)
    said = await asyncio.gather(*(stage.say() for _ in range(6)), return_exceptions=True)
    refused = [one for one in said if isinstance(one, Overloaded)]
    assert len(refused) in {3, 4}, said
    assert "slow did not make room" in str(refused[0])
    await stage.say(HALT)  # nobody wants it: it does not wait
    gate.set()
    await stage.bus.idle(timeout_s=10)
    assert len(seen) == 6 - len(refused)
    assert seen == sorted(seen)


async def test_a_handler_may_not_wait_for_itself_and_its_failure_stays_its_own(make: Maker) -> None:
    stage = await make("wait")
    said: list[str] = []

    async def wait(event: Event) -> None:
        try:
            await bus.idle()
        except Misused as error:
            said.append(str(error))
            raise

    bus = await stage.put_on("wait", (), wait)
    await stage.say()
    await stage.say()
    await stage.bus.idle(timeout_s=10)
    assert len(said) == 2
    assert "keeps it busy" in said[0]


# --- over Redis alone


@pytest.fixture
async def hub(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[RedisHub]:
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        clock, ids, terms = VirtualClock(MOMENT), SeededIds("bus"), HubTerms(absent_s=20)
        hub = RedisHub(clock, ids, journal, "s-1", redis_server.url, ["risk"], terms=terms)
        await hub.open()
        hub.admit_agents()
        yield hub
        await hub.close()


class Repeating:
    """A past in which everything that was said is said again."""

    def __init__(self, events: list[Event]) -> None:
        self.said = [event for event in events if event.source == "risk"]

    def echo(self, payload: Payload, source: str, causation_id: str | None) -> Event | None:
        return self.said.pop(0) if self.said else None

    def finish(self) -> None:
        assert not self.said

    def leave_out(self, sources: object) -> None: ...


async def risk(server: RedisServer, seen: list[int], stuck_at: int = 0) -> RedisMember:
    """An agent that answers every tick with a command, in a process of its own as far as the hub can tell."""
    member = RedisMember(server.url, "s-1", "risk", absent_s=20)
    await member.join()

    async def handle(event: Event) -> None:
        seen.append(event.seq)
        if event.seq == stuck_at:
            await asyncio.Event().wait()
        await member.publish(HALT, source="risk", correlation_id="c", causation_id=event.id)

    past = await member.past()
    member.subscribe("risk", (ClockTicked,), handle)
    await member.catch_up(Repeating(past), [event for event in past if event.source != "risk"])
    return member


async def tick(hub: RedisHub) -> Event:
    return await hub.publish(TICK, source="test", correlation_id="c")


async def nobody(event: Event) -> None:
    raise AssertionError("the handler of one who lives elsewhere was called")


async def test_a_redis_that_comes_back_empty_loses_and_doubles_nothing(
    hub: RedisHub, redis_server: RedisServer
) -> None:
    seen: list[int] = []
    hub.subscribe("risk", (ClockTicked,), nobody)
    member = await risk(redis_server, seen)
    for round_ in range(3):
        pending = [asyncio.create_task(tick(hub)) for _ in range(5)]
        await asyncio.sleep(0.002 * round_)
        redis_server.kill()
        await asyncio.gather(*pending)
        redis_server.start()
        await hub.idle(timeout_s=15)
    assert len(seen) == len(set(seen)) == 15
    assert hub.last_seq == 30
    await member.close()


async def test_a_process_that_dies_is_followed_by_one_that_goes_on(hub: RedisHub, redis_server: RedisServer) -> None:
    first: list[int] = []
    second: list[int] = []
    hub.subscribe("risk", (ClockTicked,), nobody)
    dead = await risk(redis_server, first, stuck_at=3)
    await tick(hub)
    await hub.idle(timeout_s=10)
    await tick(hub)
    await tick(hub)
    for _ in range(1000):
        if len(first) == 2:
            break
        await asyncio.sleep(0.01)
    await dead.disconnect()
    member = await risk(redis_server, second)
    await hub.idle(timeout_s=10)
    await dead.close()
    assert first == [1, 3]
    assert second == [1, 3, 4]
    assert hub.last_seq == 6, "what the first had said was not said again"
    assert member.mailbox.claimed >= 1, "what it had taken and not acknowledged was claimed"
    await member.close()


async def test_a_process_that_only_seemed_dead_is_refused(hub: RedisHub, redis_server: RedisServer) -> None:
    hub.subscribe("risk", (ClockTicked,), nobody)
    old = await risk(redis_server, [])
    await hub.idle(timeout_s=10)
    new = await risk(redis_server, [])
    with pytest.raises(Halted, match="another process serves this agent"):
        await old.publish(HALT, source="risk", correlation_id="c")
    assert hub.last_seq == 0
    assert (await new.publish(HALT, source="risk", correlation_id="c")).seq == 1
    await old.close()
    await new.close()


async def test_a_successor_is_not_put_off_by_what_its_predecessor_is_told(
    hub: RedisHub, redis_server: RedisServer
) -> None:
    hub.subscribe("risk", (ClockTicked,), nobody)
    old = await risk(redis_server, [])
    await hub.idle(timeout_s=10)
    new = await risk(redis_server, [])
    await old.disconnect()  # so that the successor reads whatever is sent to either
    for number in range(5):
        await old.send(old.message("ask", ask=1000 + number))
        assert (await new.publish(HALT, source="risk", correlation_id="c")).seq == number + 1
    assert not new.over.done()
    await old.close()
    await new.close()


async def test_the_end_of_the_session_and_a_new_process_of_it_are_noticed(
    hub: RedisHub, redis_server: RedisServer
) -> None:
    hub.subscribe("risk", (ClockTicked,), nobody)
    member = await risk(redis_server, [])
    await hub.close()
    assert await asyncio.wait_for(member.over, 10) == "ended"
    await member.close()


async def test_an_agent_that_does_not_come_is_named(redis_server: RedisServer) -> None:
    clock, ids, terms = VirtualClock(MOMENT), SeededIds("bus"), HubTerms(absent_s=0.2)
    hub = RedisHub(clock, ids, None, "s-2", redis_server.url, ["risk"], terms=terms)
    await hub.open()
    hub.subscribe("risk", (), nobody)
    with pytest.raises(Misconfigured, match="for: risk"):
        await hub.idle()
    await hub.close()


async def test_a_redis_that_stays_away_ends_the_wait_for_rest(redis_server: RedisServer) -> None:
    clock, ids, terms = VirtualClock(MOMENT), SeededIds("bus"), HubTerms(absent_s=0.5)
    hub = RedisHub(clock, ids, None, "s-3", redis_server.url, ["risk"], terms=terms)
    await hub.open()
    hub.admit_agents()
    hub.subscribe("risk", (), nobody)
    member = RedisMember(redis_server.url, "s-3", "risk", absent_s=0.5)
    await member.join()
    await member.catch_up(None, ())  # without a subscriber: it never reports what it is sent
    await hub.attendance.complete.wait()
    redis_server.kill()
    try:
        await tick(hub)
        with pytest.raises(Retryable, match="Redis has not answered"):
            await asyncio.wait_for(hub.idle(), 10)
        assert hub.depths() == {"risk": 1}, "the event waits for the next process of the session"
        assert "the line to it broke" in await asyncio.wait_for(member.over, 10)
    finally:
        await member.close()
        await hub.close()
        redis_server.start()


async def test_time_is_the_hubs(hub: RedisHub, redis_server: RedisServer) -> None:
    hub.subscribe("risk", (ClockTicked,), nobody)
    member = await risk(redis_server, [])
    clock = HubClock(member)
    sleeper = asyncio.create_task(clock.sleep(60))
    virtual = hub.clock
    assert isinstance(virtual, VirtualClock)
    for _ in range(200):
        if virtual.next_wake is not None:
            break
        await asyncio.sleep(0.01)
    assert virtual.next_wake is not None
    assert not sleeper.done()
    virtual.advance_to(virtual.next_wake)
    await asyncio.wait_for(sleeper, 5)
    assert clock.monotonic() == 60.0
    await member.close()
