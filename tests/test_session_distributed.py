"""A session whose agents live in processes of their own: the same journal, and nothing lost or doubled by a kill."""

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import date, datetime
from itertools import count
from pathlib import Path

import pytest

from tests.servers import PostgresServer, RedisServer
from tests.venue import as_alpaca, beside, goes_on_once_agreed, recent_minutes
from trader_lib.config.settings import Settings, load_settings
from trader_lib.errors.taxonomy import Misconfigured, Misused
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.journal.opening import open_journal
from trader_lib.session.agent_process import Supervisor, agent_command, find_session, serve_agent
from trader_lib.session.session import SessionResult, run_session
from trader_lib.session.spec import SessionSpec

NAMES = ("strategy", "risk", "execution")
SPEC = SessionSpec(params={"fast": 3, "slow": 9}, start=date(2012, 1, 3), end=date(2012, 3, 15))
NUMBERS = count(1)


def environ(server: RedisServer) -> dict[str, str]:
    return {"TRADER_BUS__URL": server.url, "TRADER_CACHE__URL": server.url, "TRADER_LOGGING__LEVEL": "WARNING"}


@asynccontextmanager
async def agents(server: RedisServer, restarts_max: int = 10) -> AsyncIterator[Supervisor]:
    """The three deciding agents, each in a process of its own, started again when it dies."""
    keeper, stop = Supervisor(NAMES, agent_command, environ(server), restarts_max), asyncio.Event()
    running = asyncio.create_task(keeper.run(stop))
    try:
        yield keeper
        await asyncio.wait({running}, timeout=20)
    finally:
        stop.set()
        await running


def facts(result: SessionResult) -> tuple[str, int, str]:
    with open_journal(result.journal_path) as journal:
        assert journal.verify().ok
        return journal.last_hash, journal.last_seq, result.order_list_hash


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int, str]:
    """What the session is in one process."""
    path = tmp_path_factory.mktemp("alone") / "journal.sqlite"
    result = asyncio.run(run_session(SPEC, Settings(), journal_path=path))
    assert len(result.orders) > 10
    return facts(result)


async def play(
    server: RedisServer, path: Path, at_bar: Callable[[int], None] = lambda bar: None, **settings: object
) -> SessionResult:
    def progress(bars: int, at: datetime) -> None:
        at_bar(bars)

    chosen = Settings(bus={"url": server.url}, cache={"url": server.url}, **settings)  # type: ignore[arg-type]
    return await asyncio.wait_for(run_session(SPEC, chosen, journal_path=path, progress=progress), 150)


def soon(chance: random.Random, act: Callable[[], None]) -> None:
    """Do something a moment later, in the middle of whatever happens then."""
    asyncio.get_running_loop().call_later(chance.uniform(0.0, 0.02), act)


async def test_a_session_over_four_processes_is_the_same_to_the_byte(
    redis_server: RedisServer, tmp_path: Path, alone: tuple[str, int, str]
) -> None:
    async with agents(redis_server) as keeper:
        result = await play(redis_server, tmp_path / "journal.sqlite")
    assert result.reconciliation.ok
    assert facts(result) == alone
    assert keeper.restarts == {}
    assert {one.agent: one.state for one in result.health}["execution"] == "ok"
    handled = {one.agent: one.handled for one in result.health}
    assert all(handled[name] > 10 for name in NAMES), "their processes say how they are"


async def test_a_process_that_is_replaced_leaves_the_field_to_its_successor(
    redis_server: RedisServer, tmp_path: Path, alone: tuple[str, int, str]
) -> None:
    chosen = Settings(bus={"url": redis_server.url})  # type: ignore[arg-type]
    serving = {name: asyncio.create_task(serve_agent(name, chosen)) for name in NAMES}
    successors: list[asyncio.Task[str]] = []

    def at_bar(bar: int) -> None:
        if bar == 10:
            successors.append(asyncio.create_task(serve_agent("risk", chosen)))

    result = await play(redis_server, tmp_path / "journal.sqlite", at_bar)
    assert facts(result) == alone
    assert await serving.pop("risk") == "another process serves this agent"
    assert await asyncio.gather(*serving.values(), *successors) == ["ended"] * len(NAMES)


async def test_several_strategies_live_in_a_process_each(redis_server: RedisServer, tmp_path: Path) -> None:
    shares = [
        {"name": name, "strategy": "sma_cross", "params": {"fast": fast, "slow": 9}, "capital": "50%"}
        for name, fast in (("quick", 2), ("calm", 5))
    ]
    spec = SessionSpec.model_validate({"strategies": shares, "start": "2012-01-03", "end": "2012-02-10"})
    chosen = Settings(bus={"url": redis_server.url})  # type: ignore[arg-type]
    one = await run_session(spec, Settings(), journal_path=tmp_path / "one.sqlite")
    names = ("strategy:quick", "strategy:calm", "risk", "execution")
    serving = [asyncio.create_task(serve_agent(name, chosen)) for name in names]
    nobody = asyncio.create_task(serve_agent("strategy:quik", chosen))
    other = await run_session(spec, chosen, journal_path=tmp_path / "other.sqlite")
    assert await asyncio.gather(*serving) == ["ended"] * 4
    assert one.orders
    assert facts(other) == facts(one)
    with pytest.raises(Misused, match="strategy:quick"):
        await nobody


async def test_a_session_in_real_time_lives_in_several_processes_too(redis_server: RedisServer, tmp_path: Path) -> None:
    bars = recent_minutes()
    path = tmp_path / "journal.sqlite"
    with ExchangeServer(Exchange(bars, bars.n - 60), key_id="key", secret_key="s3cret") as server:
        broker = as_alpaca(server, "s3cret")
        chosen = load_settings(
            environ={}, env_file=None, overrides={"broker": broker, "bus": {"url": redis_server.url}}
        )
        spec = SessionSpec(params={"fast": 2, "slow": 4}, symbols=("AAPL", "IBM"), timeframe="1Min", bars_max=10)

        serving = [asyncio.create_task(serve_agent(name, chosen)) for name in NAMES]
        async with beside(goes_on_once_agreed(server, path)):
            result = await asyncio.wait_for(run_session(spec, chosen, journal_path=path), 120)
        assert await asyncio.gather(*serving) == ["ended"] * 3
    assert result.bars >= 10
    assert result.orders
    assert result.reconciliation.ok, result.reconciliation.differences
    assert all(one.state == "ok" for one in result.health), result.health


@pytest.mark.slow
async def test_agents_killed_at_any_moment_lose_and_double_nothing(
    redis_server: RedisServer, tmp_path: Path, alone: tuple[str, int, str]
) -> None:
    chance = random.Random(0)
    victims = {7: "strategy", 13: "risk", 19: "execution", 25: "strategy", 31: "risk", 37: "execution"}
    async with agents(redis_server) as keeper:

        def kill(bar: int) -> None:
            if bar in victims:
                soon(chance, keeper.processes[victims[bar]].kill)

        result = await play(redis_server, tmp_path / "journal.sqlite", kill)
    assert set(keeper.restarts) == set(NAMES), "each died at least once; one that has not come back cannot die again"
    assert facts(result)[2] == alone[2]


@pytest.mark.slow
async def test_a_redis_killed_at_any_moment_loses_and_doubles_nothing(
    redis_server: RedisServer, tmp_path: Path, alone: tuple[str, int, str]
) -> None:
    chance, killed = random.Random(1), []

    def die() -> None:
        redis_server.kill()
        killed.append(1)
        asyncio.get_running_loop().call_later(0.3, redis_server.start)

    async with agents(redis_server):
        result = await play(
            redis_server, tmp_path / "journal.sqlite", lambda bar: soon(chance, die) if bar % 12 == 0 else None
        )
    assert len(killed) >= 3
    assert facts(result) == alone


@pytest.mark.slow
async def test_a_postgres_killed_at_any_moment_loses_and_doubles_nothing(
    redis_server: RedisServer, postgres_server: PostgresServer, tmp_path: Path, alone: tuple[str, int, str]
) -> None:
    chance, killed = random.Random(2), []

    def die() -> None:
        postgres_server.kill()
        killed.append(1)
        starts.append(asyncio.get_running_loop().run_in_executor(None, postgres_server.start))

    starts: list[asyncio.Future[None]] = []
    path = tmp_path / f"run-{os.getpid()}-{next(NUMBERS)}" / "journal.sqlite"
    path.parent.mkdir()
    os.environ["TRADER_JOURNAL__URL"] = postgres_server.url
    try:
        async with agents(redis_server):
            result = await play(
                redis_server,
                path,
                lambda bar: soon(chance, die) if bar % 15 == 0 else None,
                journal={"url": postgres_server.url},
            )
        await asyncio.gather(*starts)
        assert len(killed) >= 3
        assert facts(result) == alone
        assert not path.exists(), "nothing was written beside the server"
    finally:
        del os.environ["TRADER_JOURNAL__URL"]


SESSION = """
import asyncio, sys
from datetime import date
from pathlib import Path
from loguru import logger
from trader_lib.config.settings import load_settings
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.trading.events import Reconciled
logger.remove()
spec = SessionSpec(params={"fast": 3, "slow": 9}, start=date(2012, 1, 3), end=date(2012, 3, 15))
told = lambda bars, at: print(bars, flush=True)
result = asyncio.run(run_session(spec, load_settings(), journal_path=sys.argv[1], resume=True, progress=told))
print(result.order_list_hash, flush=True)
"""


@pytest.mark.slow
async def test_the_sessions_own_process_killed_and_resumed_finds_its_agents_again(
    redis_server: RedisServer, tmp_path: Path, alone: tuple[str, int, str]
) -> None:
    path, kills = tmp_path / "journal.sqlite", [9, 27]
    async with agents(redis_server) as keeper:
        while True:
            session = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                SESSION,
                str(path),
                env={**os.environ, **environ(redis_server)},
                stdout=asyncio.subprocess.PIPE,
            )
            assert session.stdout is not None
            said = ""
            while line := (await asyncio.wait_for(session.stdout.readline(), 120)).decode().strip():
                said = line
                if kills and line == str(kills[0]):
                    kills.pop(0)
                    await asyncio.sleep(0.005)
                    session.kill()
            await session.wait()
            if session.returncode == 0:
                break
            assert session.returncode == -signal.SIGKILL
    assert kills == []
    assert keeper.restarts == {}, "the agents' processes stayed, and began anew"
    assert said == alone[2]


async def test_what_is_missing_is_said(redis_server: RedisServer, tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="TRADER_BUS__URL"):
        await serve_agent("risk", Settings())
    with pytest.raises(Misused, match="Those that wait for agents: none"):
        await find_session(redis_server.url, "no-such-session")
    chosen = Settings(bus={"url": redis_server.url}, broker={"transport": "in_process"})  # type: ignore[arg-type]
    with pytest.raises(Misused, match="over HTTP"):
        await run_session(SPEC, chosen, journal_path=tmp_path / "journal.sqlite")


async def test_an_agent_that_nobody_serves_stops_the_session_with_its_name(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trader_lib.session.distributed.JOIN_S", 0.5)
    with pytest.raises(Misconfigured, match="No process has come") as told:
        await play(redis_server, tmp_path / "journal.sqlite")
    assert all(name in str(told.value) for name in (*NAMES, "trader agent NAME"))
