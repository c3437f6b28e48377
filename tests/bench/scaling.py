"""The bus in one process and over Redis, beside bare redis-py streams; the journal on PostgreSQL beside SQLite."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.servers import POSTGRES, REDIS, PostgresServer, RedisServer
from trader_lib.bus.bus import InProcessBus
from trader_lib.bus.mailbox import connect
from trader_lib.bus.member import RedisMember
from trader_lib.bus.redis import RedisHub
from trader_lib.clock.clock import WallClock
from trader_lib.clock.ids import UniqueIds
from trader_lib.journal.chain import Journal
from trader_lib.journal.journal import SqliteJournal
from trader_lib.journal.postgres import PostgresJournal
from trader_lib.trading.events import ClockTicked, Event

EVENTS, PINGS, ROWS, REPEATS = 5_000, 1_000, 2_000, 3


@contextmanager
def redis_server() -> Iterator[RedisServer]:
    with TemporaryDirectory(prefix="bench-redis-") as folder:
        server = RedisServer(Path(folder))
        try:
            yield server
        finally:
            server.kill()


def percentile(seconds: list[float], share: int) -> float:
    return statistics.quantiles(seconds, n=100)[share - 1]


async def tick(bus: InProcessBus) -> None:
    await bus.publish(ClockTicked(at=WallClock().now()), source="bench", correlation_id="c")


async def bus_figures(bus: InProcessBus) -> tuple[float, list[float]]:
    """Events a second in a row, and seconds from publication to everybody's rest, one by one."""
    began = time.perf_counter()
    for _ in range(EVENTS):
        await tick(bus)
    await bus.idle(60)
    rate = EVENTS / (time.perf_counter() - began)
    took = []
    for _ in range(PINGS):
        began = time.perf_counter()
        await tick(bus)
        await bus.idle(60)
        took.append(time.perf_counter() - began)
    return rate, took


async def in_process() -> tuple[float, list[float]]:
    bus = InProcessBus(WallClock(), UniqueIds(), None, "bench")

    async def handle(event: Event) -> None: ...

    bus.subscribe("agent", (), handle)
    try:
        return await bus_figures(bus)
    finally:
        await bus.close()


async def over_redis(url: str) -> tuple[float, list[float]]:
    hub = RedisHub(WallClock(), UniqueIds(), None, "bench", url, ["agent"])
    await hub.open()

    async def handle(event: Event) -> None: ...

    hub.subscribe("agent", (), handle)
    member = RedisMember(url, "bench", "agent")
    first = asyncio.create_task(hub.idle())  # lets agents in
    await member.join()
    member.subscribe("agent", (), handle)
    await member.catch_up(None, ())
    await first
    try:
        return await bus_figures(hub)
    finally:
        await member.close()
        await hub.close()


async def bare(url: str) -> tuple[float, list[float]]:
    """The floor: one client adds to a stream, another reads as a group, acknowledges, deletes and answers."""
    ours, theirs = connect(url), connect(url)
    await theirs.xgroup_create("out", "g", id="0", mkstream=True)
    payload = {"m": ClockTicked(at=WallClock().now()).to_json() * 4}  # as long as an event with its envelope
    rounds = EVENTS + PINGS

    async def read() -> None:
        done = 0
        while done < rounds:
            found: Any = await theirs.xreadgroup("g", "c", {"out": ">"}, count=256, block=1000)
            streams = found.values() if isinstance(found, dict) else [entries for _, entries in found or ()]
            names = [entry[0] for entries in streams for entry in _entries(entries)]
            if names:
                async with theirs.pipeline() as pipe:
                    pipe.xack("out", "g", *names)
                    pipe.xdel("out", *names)
                    pipe.xadd("back", {"n": len(names)})
                    await pipe.execute()
                done += len(names)

    reader = asyncio.create_task(read())
    last = "0"

    async def until(count: int) -> None:
        nonlocal last
        heard = 0
        while heard < count:
            found: Any = await ours.xread({"back": last}, block=1000)
            streams = found.values() if isinstance(found, dict) else [entries for _, entries in found or ()]
            for entries in streams:
                for entry in _entries(entries):
                    last, heard = entry[0], heard + int(entry[1][b"n"])

    began = time.perf_counter()
    for start in range(0, EVENTS, 256):
        async with ours.pipeline() as pipe:
            for _ in range(min(256, EVENTS - start)):
                pipe.xadd("out", payload)
            await pipe.execute()
    await until(EVENTS)
    rate = EVENTS / (time.perf_counter() - began)
    took = []
    for _ in range(PINGS):
        began = time.perf_counter()
        await ours.xadd("out", payload)
        await until(1)
        took.append(time.perf_counter() - began)
    await reader
    await ours.aclose()
    await theirs.aclose()
    return rate, took


async def flush(url: str) -> None:
    client = connect(url)
    await client.flushall()
    await client.aclose()


def _entries(entries: Any) -> Iterator[tuple[bytes, dict[bytes, bytes]]]:
    for entry in entries:
        if isinstance(entry, list) and entry and isinstance(entry[0], list | tuple):
            yield from _entries(entry)
        else:
            yield entry[0], entry[1]


def journal_rate(journal: Journal, batch: int) -> float:
    """Events a second, with a commit after every so many."""
    moment, payload = WallClock().now(), ClockTicked(at=WallClock().now())
    events = [
        Event(
            id=f"{batch}-{seq}",
            seq=seq,
            time=moment,
            recorded_at=moment,
            correlation_id="c",
            source="bench",
            session_id="bench",
            payload=payload,
        )
        for seq in range(1, ROWS + 1)
    ]
    began = time.perf_counter()
    for event in events:
        journal.append(event)
        if event.seq % batch == 0:
            journal.commit()
    journal.commit()
    rate = ROWS / (time.perf_counter() - began)
    journal.close()
    return rate


def scaling(row: Callable[..., Any]) -> list[Any]:
    """The rows of the table; none of what is not installed."""
    rows = []
    rate, took = asyncio.run(in_process())
    rows.append(row("bus in one process", rate, "events/s", "", None))
    rows.append(row("bus in one process, publication to rest, p50", percentile(took, 50) * 1e3, "ms", "", None))
    rows.append(row("bus in one process, publication to rest, p99", percentile(took, 99) * 1e3, "ms", "", None))
    if REDIS is not None:
        with redis_server() as server:
            floors, ours_ = [], []
            for _ in range(REPEATS):  # in turns, since machines are noisy
                floors.append(asyncio.run(bare(server.url)))
                ours_.append(asyncio.run(over_redis(server.url)))
                asyncio.run(flush(server.url))
        floor_rate, floor = statistics.median(one[0] for one in floors), [s for one in floors for s in one[1]]
        rate, took = statistics.median(one[0] for one in ours_), [s for one in ours_ for s in one[1]]
        rows.append(row("bare redis-py streams, there and back", floor_rate, "events/s", "", None))
        rows.append(row("bus over Redis", rate, "events/s", "bare redis-py streams", rate / floor_rate))
        for share in (50, 99):
            low, high = percentile(floor, share) * 1e3, percentile(took, share) * 1e3
            rows.append(row(f"bare redis-py streams, there and back, p{share}", low, "ms", "", None))
            rows.append(row(f"bus over Redis, publication to rest, p{share}", high, "ms", "bare streams", high / low))
    if POSTGRES is not None:
        server_ = PostgresServer()
        try:
            for batch in (1, 100):
                with TemporaryDirectory() as folder:
                    ours = journal_rate(SqliteJournal(Path(folder) / "journal.sqlite", "power"), batch)
                theirs = journal_rate(PostgresJournal(server_.url, f"bench-{batch}"), batch)
                every = "each event" if batch == 1 else f"{batch} events"
                rows.append(
                    row(f"journal on PostgreSQL, a commit {every}", theirs, "events/s", "SQLite, power", theirs / ours)
                )
        finally:
            server_.stop()
    return rows
