"""Attempts to reach real money by another way than `trader live`: each is refused before it connects or sends."""

import asyncio
import dataclasses
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.servers import RedisServer
from tests.venue import as_alpaca, beside, goes_on_once_agreed, recent_minutes
from trader_lib.agents.execution import ExecutionAgent
from trader_lib.app.doctor import check_broker
from trader_lib.broker.alpaca import AlpacaBroker
from trader_lib.broker.connection import AlpacaAccess
from trader_lib.broker.streams import StreamThread, WatchedTradingStream
from trader_lib.bus.bus import InProcessBus
from trader_lib.bus.redis import HubTerms, RedisHub
from trader_lib.clock.clock import VirtualClock
from trader_lib.clock.ids import SeededIds
from trader_lib.config.sections import BrokerSettings, ResilienceSettings
from trader_lib.config.settings import Settings, load_settings
from trader_lib.errors.taxonomy import Misconfigured, Misused
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.journal.journal import SqliteJournal
from trader_lib.journal.opening import journal_exists, open_journal
from trader_lib.runs.runner import run_notebook
from trader_lib.runs.store import RunFolder, RunStore
from trader_lib.runs.templates import template_path
from trader_lib.session.agent_process import serve_agent
from trader_lib.session.permit import PERMIT_FD, REAL_MONEY, handed_over, issue_live_permit, use_live_permit
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.steering.commands import kill
from trader_lib.steering.control import ControlFile
from trader_lib.trading.events import OrderIntended, SessionStarted
from trader_lib.trading.orders import OrderRequest, OrderSide

Trader = Callable[..., tuple[int, str, str]]
LIVE = {"trading_url": "https://api.alpaca.markets", "trading_stream_url": "wss://api.alpaca.markets/stream"}
KEYS = {"key_id": "AK-planted", "secret_key": "planted-secret"}
MINUTES = SessionSpec(
    params={"fast": 2, "slow": 4}, symbols=("AAPL", "IBM"), timeframe="1Min", source="alpaca", bars_max=3
)


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """What the test tried to connect to, or to look up, beyond this machine: nothing, or it fails."""
    tried: list[object] = []
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def is_here(address: object) -> bool:
        return not isinstance(address, tuple) or str(address[0]) in {"127.0.0.1", "::1", "localhost"}

    def connecting(line: socket.socket, address: Any) -> Any:
        if is_here(address):
            return connect(line, address)
        tried.append(address)
        raise OSError(f"the test may not connect to {address}")

    def looking_up(host: Any, *more: Any, **options: Any) -> Any:
        if is_here((host,)):
            return lookup(host, *more, **options)
        tried.append(host)
        raise OSError(f"the test may not look up {host}")

    monkeypatch.setattr(socket.socket, "connect", connecting)
    monkeypatch.setattr(socket.socket, "connect_ex", connecting)
    monkeypatch.setattr(socket, "getaddrinfo", looking_up)
    yield tried
    assert not tried, tried


def in_environment(monkeypatch: pytest.MonkeyPatch, broker: dict[str, str]) -> None:
    for name, value in ({"kind": "alpaca"} | KEYS | broker).items():
        monkeypatch.setenv(f"TRADER_BROKER__{name.upper()}", value)


# ---- the address decides

WRONG_ADDRESSES = {
    "live host, paper flag": LIVE,
    "live host only": {"trading_url": LIVE["trading_url"]},
    "live stream only": {"trading_stream_url": LIVE["trading_stream_url"]},
    "live host in capitals": {
        "trading_url": "https://API.Alpaca.Markets",
        "trading_stream_url": "wss://API.Alpaca.Markets/stream",
    },
    "live host with a port": LIVE | {"trading_url": "https://api.alpaca.markets:443"},
    "live host with a final dot": LIVE | {"trading_url": "https://api.alpaca.markets."},
    "user name": {"trading_url": "https://paper-api.alpaca.markets@api.alpaca.markets"},
    "user name and password": {"trading_url": "https://paper-api.alpaca.markets:443@evil.example"},
    "backslash": {"trading_url": "https://paper-api.alpaca.markets\\@evil.example"},
    "query": {"trading_url": "https://evil.example?paper-api.alpaca.markets"},
    "line end": {"trading_url": "https://paper-api.alpaca.markets\n.evil.example"},
    "wide letters": {"trading_url": "https://\uff41pi.alpaca.markets"},
    "begins like loopback": {
        "trading_url": "https://localhost.evil.example",
        "trading_stream_url": "wss://localhost.evil.example/stream",
    },
    "begins like the paper host": {
        "trading_url": "https://paper-api.alpaca.markets.evil.example",
        "trading_stream_url": "wss://paper-api.alpaca.markets.evil.example/stream",
    },
    "subdomain of the paper host": {
        "trading_url": "https://x.paper-api.alpaca.markets",
        "trading_stream_url": "wss://x.paper-api.alpaca.markets/stream",
    },
    "the broker API": {"trading_url": "https://broker-api.alpaca.markets"},
    "the broker API's sandbox": {"trading_url": "https://broker-api.sandbox.alpaca.markets"},
    "loopback in another spelling": {"trading_url": "http://127.1:80", "trading_stream_url": "ws://127.1:80/stream"},
    "loopback as one number": {"trading_url": "https://2130706433", "trading_stream_url": "wss://2130706433/stream"},
    "any address": {"trading_url": "http://0.0.0.0:80", "trading_stream_url": "ws://0.0.0.0:80/stream"},
    "paper host unencrypted": {"trading_url": "http://paper-api.alpaca.markets"},
    "stream unencrypted": {"trading_stream_url": "ws://paper-api.alpaca.markets/stream"},
    "data unencrypted": {"data_url": "http://data.alpaca.markets"},
    "data stream unencrypted": {"data_stream_url": "ws://stream.data.alpaca.markets/v2/iex"},
    "data from the live trading host": {"data_url": LIVE["trading_url"]},
    "orders here, updates from elsewhere": {"trading_url": "http://127.0.0.1:9"},
    "scheme of a stream": {"trading_url": "wss://paper-api.alpaca.markets"},
}


@pytest.mark.parametrize("broker", WRONG_ADDRESSES.values(), ids=WRONG_ADDRESSES.keys())
def test_paper_session_with_a_wrong_address_is_refused_before_it_connects(
    broker: dict[str, str], trader: Trader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, connections: list[object]
) -> None:
    in_environment(monkeypatch, broker)
    code, out, err = trader("paper", "--broker", "alpaca", "--symbols", "AAPL,IBM", "--timeframe", "1Min")
    assert (code, out) == (3, ""), err
    assert "broker" in err.lower() and "Traceback" not in err and "planted" not in err
    assert not (tmp_path / "runs").exists()


COMMANDS = (
    ("doctor",),
    ("paper", "--profile", "live"),
    ("agent", "execution"),
    ("live", "--profile", "live", "--account", "1"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_command_reaches_the_live_host_with_the_paper_flag(
    command: tuple[str, ...], trader: Trader, monkeypatch: pytest.MonkeyPatch, connections: list[object]
) -> None:
    in_environment(monkeypatch, LIVE | {"paper": "true"})
    code, out, err = trader(*command)
    assert code in {1, 3} and "broker.paper is true" in out + err and "planted" not in out + err


def test_live_flag_with_a_paper_address_is_refused(
    trader: Trader, monkeypatch: pytest.MonkeyPatch, connections: list[object]
) -> None:
    in_environment(monkeypatch, {"trading_url": "https://paper-api.alpaca.markets"})
    code, _, err = trader("live", "--profile", "live", "--account", "1")
    assert code == 3 and "same side" in err
    monkeypatch.setenv("TRADER_BROKER__TRADING_STREAM_URL", "wss://paper-api.alpaca.markets/stream")
    code, _, err = trader("live", "--profile", "live", "--account", "1")
    assert code == 3 and "broker.paper is false" in err


def test_live_profile_in_a_paper_command_is_refused_whatever_the_addresses(
    trader: Trader, monkeypatch: pytest.MonkeyPatch, connections: list[object], tmp_path: Path
) -> None:
    for broker in ({}, LIVE, {"trading_url": "https://proxy.example", "trading_stream_url": "wss://proxy.example"}):
        in_environment(monkeypatch, broker)
        code, _, err = trader("paper", "--profile", "live", "--source", "alpaca")
        assert code == 2 and "`trader live` alone" in err, err
    assert not (tmp_path / "runs").exists()


def test_settings_made_past_their_checks_do_not_pass_the_sessions(tmp_path: Path, connections: list[object]) -> None:
    good = BrokerSettings.model_validate({"kind": "alpaca"} | KEYS)
    for update in (LIVE, {"trading_stream_url": LIVE["trading_stream_url"]}):
        settings = Settings().model_copy(update={"broker": good.model_copy(update=update)})
        with pytest.raises(Misconfigured, match=r"same side|broker\.paper is true"):
            asyncio.run(run_session(MINUTES, settings, journal_path=tmp_path / "journal.sqlite"))
    unnamed = Settings().model_copy(update={"broker": good.model_copy(update={"paper": False})})  # profile research
    with pytest.raises(Misused, match="`trader live` alone"):
        asyncio.run(run_session(MINUTES, unnamed, journal_path=tmp_path / "journal.sqlite"))
    assert not list(tmp_path.iterdir())


def test_access_that_is_changed_after_it_was_made_gives_no_client_and_no_stream(connections: list[object]) -> None:
    access = AlpacaAccess("key", "secret")
    with pytest.raises(Misconfigured):
        dataclasses.replace(access, **LIVE)
    object.__setattr__(access, "trading_stream_url", LIVE["trading_stream_url"])
    with pytest.raises(Misconfigured, match="same side"):
        access.trading_client()
    with pytest.raises(Misconfigured, match="same side"):
        StreamThread("t", lambda watcher: WatchedTradingStream(access, watcher), lambda error: None)
    object.__setattr__(access, "trading_url", LIVE["trading_url"])
    with pytest.raises(Misconfigured, match=r"broker\.paper is true"):
        AlpacaBroker(access, symbols=["IBM"], timeframe="1Day")


# ---- the account's number has the last word


@pytest.fixture
def market() -> Iterator[ExchangeServer]:
    bars = recent_minutes()
    with ExchangeServer(Exchange(bars, bars.n - 60), key_id="key", secret_key="secret") as server:
        yield server


def reports(monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    """Let the embedded exchange report another account's number."""
    monkeypatch.setattr("trader_lib.exchange.messages.SIMULATED_NUMBER", number)


def known_orders(server: ExchangeServer) -> int:
    return server.call(lambda: len(server.exchange.orders(open_only=False)))


def paper_settings(server: ExchangeServer, **more: object) -> Settings:
    return load_settings(environ={}, env_file=None, overrides={"broker": as_alpaca(server), **more})


async def test_proxy_on_loopback_that_leads_to_a_live_account_is_found_out(
    market: ExchangeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reports(monkeypatch, "123456789")
    path = tmp_path / "journal.sqlite"
    with pytest.raises(Misconfigured, match="not from a paper account"):
        await asyncio.wait_for(run_session(MINUTES, paper_settings(market), journal_path=path), 60)
    assert known_orders(market) == 0 and not journal_exists(path)


async def test_broker_that_was_never_started_compares_the_account_before_the_first_order(
    market: ExchangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports(monkeypatch, "123456789")
    settings = paper_settings(market)
    access = AlpacaAccess.from_settings(settings.broker, ResilienceSettings(reads_attempts=1))
    broker = AlpacaBroker(access, symbols=["IBM"], timeframe="1Day")
    order = OrderRequest.model_validate({"symbol": "IBM", "side": OrderSide.BUY, "qty": 1, "client_order_id": "x-1"})
    with pytest.raises(Misconfigured, match="not from a paper account"):
        await broker.submit(order)
    with pytest.raises(Misconfigured, match="not from a paper account"):
        await broker.cancel("some-order")
    await broker.stop()
    assert known_orders(market) == 0


def test_doctor_says_that_the_keys_are_not_of_a_paper_account(
    market: ExchangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, clock = paper_settings(market), VirtualClock(market.exchange.now)
    assert "alpaca, paper: the keys are taken" in check_broker(settings, clock)
    reports(monkeypatch, "123456789")
    with pytest.raises(Misconfigured, match="not from a paper account"):
        check_broker(settings, clock)


def write_start(path: Path, stage: str, account: str = "") -> None:
    """A journal, as somebody may forge it, whose session says what it trades."""

    async def write() -> None:
        clock, ids = VirtualClock(datetime(2026, 1, 5, 15, tzinfo=UTC)), SeededIds("forged")
        with SqliteJournal(path) as journal:
            bus = InProcessBus(clock, ids, journal, "s-1")
            started = SessionStarted(strategy="sma_cross", stage=stage, account=account)
            await bus.publish(started, source="session", correlation_id="c")
            await bus.close()

    asyncio.run(write())


@pytest.mark.parametrize(
    ("stage", "account", "words"),
    [
        ("live", "123456789", "began at the stage live"),
        ("simulated", "", "began at the stage simulated"),
        ("paper", "PA3G5ZX0M9BV", "another account than PA3G5ZX0M9BV"),
    ],
)
def test_resumed_session_keeps_its_stage_and_its_account(
    stage: str, account: str, words: str, market: ExchangeServer, tmp_path: Path
) -> None:
    path = tmp_path / "journal.sqlite"
    write_start(path, stage, account)
    with pytest.raises(Misconfigured, match=words):
        asyncio.run(asyncio.wait_for(run_session(MINUTES, paper_settings(market), journal_path=path, resume=True), 30))
    assert known_orders(market) == 0


# ---- every process asks


async def test_agent_with_live_settings_gets_no_client_in_a_paper_session(
    redis_server: RedisServer, market: ExchangeServer, tmp_path: Path
) -> None:
    bus = {"url": redis_server.url}
    chosen = paper_settings(market, bus=bus)
    money = load_settings(
        "live", environ={}, env_file=None, overrides={"broker": as_alpaca(market) | {"paper": False}, "bus": bus}
    )
    path = tmp_path / "journal.sqlite"

    session = asyncio.create_task(run_session(MINUTES, chosen, journal_path=path))
    try:
        async with beside(goes_on_once_agreed(market, path)):
            with pytest.raises(Misconfigured, match=r"does not take this process.*stage is paper.*for live"):
                await asyncio.wait_for(serve_agent("execution", money), 60)
            serving = [asyncio.create_task(serve_agent(name, chosen)) for name in ("strategy", "risk", "execution")]
            result = await asyncio.wait_for(session, 120)
            assert await asyncio.gather(*serving) == ["ended"] * 3
    finally:
        session.cancel()
    assert result.reconciliation.ok
    with open_journal(path) as journal:
        (begun,) = [event.payload for event in journal.last([SessionStarted])]
    assert isinstance(begun, SessionStarted) and (begun.stage, begun.account) == ("paper", "SIMULATED")


@pytest.mark.parametrize("hub_asks", [True, False])
async def test_agent_with_paper_settings_is_of_no_use_to_a_live_session(
    hub_asks: bool, redis_server: RedisServer, market: ExchangeServer
) -> None:
    """Either side alone finds out: the hub by the agent's hello, and the agent by the session's."""
    from trader_lib.session.distributed import stage_refusal

    facts = {"simulated": False, "control": "/none", "stage": "live", "account": "123456789"}
    hub = RedisHub(
        VirtualClock(datetime(2026, 1, 5, 15, tzinfo=UTC)),
        SeededIds("hub"),
        None,
        f"live-session-{hub_asks}",
        redis_server.url,
        [ExecutionAgent.name],
        terms=HubTerms(
            facts=facts,
            refuses=(lambda name, about: stage_refusal(name, about, facts)) if hub_asks else (lambda name, about: ""),
            absent_s=30.0,
        ),
    )

    async def nothing(event: object) -> None:
        raise AssertionError(event)

    hub.subscribe(ExecutionAgent.name, [OrderIntended], nothing)
    await hub.open()
    waiting = asyncio.create_task(hub.idle())
    try:
        with pytest.raises(Misconfigured, match=r"session's stage is live.*for paper"):
            settings = paper_settings(market, bus={"url": redis_server.url})
            await asyncio.wait_for(serve_agent("execution", settings, f"live-session-{hub_asks}"), 30)
    finally:
        waiting.cancel()
        await hub.close()
    assert known_orders(market) == 0


# ---- a folder chooses no account


def forged_run(tmp_path: Path, account: str = "123456789") -> RunFolder:
    """What a stranger sends: parameters and a journal that both say live."""
    run = RunStore(tmp_path / "runs").create("live")
    run.write_params({"kind": "live", "parameters": {"broker": "alpaca", "profile": "live"}})
    write_start(run.journal, "live", account)
    return run


@pytest.mark.parametrize("journal", [True, False])
def test_forged_folder_does_not_lead_kill_to_the_live_host(
    journal: bool, trader: Trader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, connections: list[object]
) -> None:
    in_environment(monkeypatch, {})
    run = forged_run(tmp_path)
    if not journal:
        run.journal.unlink()
    code, out, _ = trader("kill", run.name, "--flatten", "--by", "ada", "--wait", "1")
    assert code == 1 and "Nothing was done at the broker" in out
    assert f"trader kill {run.name} --flatten --profile live" in out, "an operator at night knows what to type"
    assert ControlFile.beside(run.journal).is_halted(), "to halt is always right"


def addressed(monkeypatch: pytest.MonkeyPatch, server: ExchangeServer) -> None:
    """The embedded exchange in the broker's place; its flag is left to the profile."""
    for name, value in as_alpaca(server).items():
        if name != "kind":
            monkeypatch.setenv(f"TRADER_BROKER__{name.upper()}", value)


def open_an_order(server: ExchangeServer) -> None:
    order = OrderRequest.model_validate(
        {"symbol": "IBM", "side": "buy", "qty": 1, "type": "limit", "limit_price": "0.5", "client_order_id": "mine"}
    )
    server.call(lambda: server.exchange.submit(order))


def open_orders(server: ExchangeServer) -> int:
    return server.call(lambda: len(server.exchange.orders()))


def test_kill_touches_only_the_account_that_the_session_traded(
    trader: Trader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, market: ExchangeServer
) -> None:
    addressed(monkeypatch, market)
    open_an_order(market)
    other = forged_run(tmp_path, account="987654321")
    code, out, _ = trader("kill", other.name, "--profile", "live", "--by", "ada", "--wait", "1")
    assert code == 1 and "another account than 987654321" in out and open_orders(market) == 1

    own = forged_run(tmp_path, account="SIMULATED")
    code, out, _ = trader("kill", own.name, "--by", "ada", "--wait", "1")
    assert code == 1 and open_orders(market) == 1, "the environment is for paper"
    code, out, _ = trader("kill", own.name, "--profile", "live", "--by", "ada", "--wait", "1")
    assert code == 0 and "Canceled 1 open orders" in out and open_orders(market) == 0
    code, out, _ = trader("kill", other.name, "--profile", "live", "--by", "ada", "--wait", "1")
    assert code == 1 and "another account than 987654321" in out, "nothing is open here, which says nothing of that one"


def test_kill_with_an_account_reaches_it_although_the_folder_is_lost(
    trader: Trader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, market: ExchangeServer
) -> None:
    addressed(monkeypatch, market)
    open_an_order(market)
    run = RunStore(tmp_path / "runs").create("live")
    run.journal.write_bytes(b"not a journal")
    code, out, _ = trader("kill", run.name, "--by", "ada", "--wait", "1")
    assert open_orders(market) == 1 and ControlFile.beside(run.journal).is_halted(), out
    code, out, err = trader("kill", run.name, "--profile", "live", "--by", "ada", "--wait", "1")
    assert code == 0 and open_orders(market) == 0, out + err


def test_simulated_session_is_not_killed_at_a_broker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, connections: list[object]
) -> None:
    path = tmp_path / "journal.sqlite"
    write_start(path, "simulated")
    settings = load_settings("live", environ={}, env_file=None, overrides={"broker": KEYS})
    steered = asyncio.run(kill(path, flatten=True, reason="r", by="ada", wait_s=1, operator=lambda: settings))
    assert not steered.done and "account is simulated" in " ".join(steered.sentences)


# ---- from a notebook


async def test_notebook_that_calls_run_session_trades_no_real_money(
    market: ExchangeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    money = load_settings("live", environ={}, env_file=None, overrides={"broker": as_alpaca(market) | {"paper": False}})
    run = RunStore(tmp_path / "runs").create("live")
    with pytest.raises(Misused, match="`trader live` alone"):
        await asyncio.wait_for(run_session(MINUTES, money, journal_path=run.journal), 30)
    with pytest.raises(TypeError):
        await run_session(MINUTES, money, journal_path=run.journal, real_money=True)  # type: ignore[call-arg]
    # A permission that the notebook makes for itself, with everything in it right.
    with handed_over(issue_live_permit("SIMULATED", MINUTES), run.path) as inherited:
        monkeypatch.setenv(PERMIT_FD, str(inherited[PERMIT_FD]))
        with pytest.raises(Misused, match="`trader live` alone"):
            await asyncio.wait_for(run_session(MINUTES, money, journal_path=run.journal), 30)
    for forged in ("", "0", "-1", "x", "999999"):
        monkeypatch.setenv(PERMIT_FD, forged)
        with pytest.raises(Misused, match="`trader live` alone"):
            await asyncio.wait_for(run_session(MINUTES, money, journal_path=run.journal), 30)
    assert known_orders(market) == 0 and not run.journal.exists()


def test_template_with_a_live_looking_folder_trades_no_real_money(
    trader: Trader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, market: ExchangeServer
) -> None:
    addressed(monkeypatch, market)
    run = RunStore(tmp_path / "runs").create("live")
    words = {"profile": "live", "broker": "alpaca", "source": "alpaca", "timeframe": "1Min", "bars_max": 3}
    given = [part for name, value in words.items() for part in ("-p", f"{name}={value}")]
    code, _, err = trader("run", str(template_path("live")), *given, "-p", f"run_folder={run.path}")
    assert code in {2, 5} and known_orders(market) == 0, err
    with pytest.raises(Misused, match="`trader live` alone"):
        run_notebook("live", words, store=RunStore(tmp_path / "runs"))


CHILD = """
import os, subprocess, sys, time
from pathlib import Path
from trader_lib.errors.taxonomy import Misused
from trader_lib.session.permit import PERMIT_FD, handed_over, issue_live_permit, use_live_permit
from trader_lib.session.spec import SessionSpec

def use(number, run):
    os.environ[PERMIT_FD] = number
    try:
        print(use_live_permit(Path(run), SessionSpec()), flush=True)
    except Misused as error:
        print(error.message, flush=True)
"""
USE = """
for one in sys.argv[1:]:
    use(*one.split(":"))
"""


def child(code: str, numbers: Iterable[int], *arguments: object) -> list[str]:
    """What a child process prints that inherits some descriptors."""
    command = [sys.executable, "-c", CHILD + textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, pass_fds=tuple(numbers), capture_output=True, text=True, timeout=60)
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_permission_is_used_once_by_the_child_for_the_run_it_was_made_for(tmp_path: Path) -> None:
    run, other = RunStore(tmp_path).create("live").path, RunStore(tmp_path).create("live").path
    permit, spec = issue_live_permit("123456789", SessionSpec()), SessionSpec()
    made = (
        permit,
        issue_live_permit("1", spec),  # for another run
        issue_live_permit("1", SessionSpec(strategy="momentum")),
        issue_live_permit("1", spec, valid_s=-0.001),
        issue_live_permit("1", spec),
    )
    with ExitStack() as open_ones:
        numbers = [open_ones.enter_context(handed_over(one, run))[PERMIT_FD] for one in made]
        *asked, fresh = [
            f"{number}:{where}" for number, where in zip(numbers, (run, other, run, run, run), strict=True)
        ]
        said = child(USE, numbers, *asked)
        assert said[0] == "123456789"
        assert "another session" in said[1] and "another session" in said[2] and "expired" in said[3]
        later = child(USE, numbers, *asked, fresh, fresh)
        assert all("used already" in words for words in later[:4]), "whatever came of it, it is spent"
        assert later[4:] == ["1", REAL_MONEY], "the descriptor is closed by its use"
    with pytest.raises(Misused, match="used already"), handed_over(permit, run):
        pass
    assert not list(run.iterdir()), "nothing of it lies in the run folder"


@pytest.mark.slow
def test_permission_is_not_for_a_grandchild_nor_for_an_orphan(tmp_path: Path) -> None:
    run = RunStore(tmp_path).create("live").path
    grandchild = """
        number, run = sys.argv[1].split(":")
        below = [sys.executable, "-c", sys.argv[2], sys.argv[1]]
        print(subprocess.run(below, pass_fds=[int(number)], capture_output=True, text=True).stdout, end="")
        use(number, run)
    """
    with handed_over(issue_live_permit("1", SessionSpec()), run) as inherited:
        number = inherited[PERMIT_FD]
        said = child(grandchild, [number], f"{number}:{run}", CHILD + USE)
        assert said == [REAL_MONEY, "1"], "and the attempt has not used it up"
    orphan = """
        with handed_over(issue_live_permit("1", SessionSpec()), Path(sys.argv[1])) as inherited:
            number = inherited[PERMIT_FD]
            below = [sys.executable, "-c", sys.argv[2], f"{number}:{sys.argv[1]}", str(os.getpid())]
            subprocess.Popen(below, pass_fds=[number])
    """
    wait = "while os.getppid() == int(sys.argv[2]): time.sleep(0.01)\ndel sys.argv[2]\n"
    assert child(orphan, [], run, CHILD + wait + USE) == [REAL_MONEY]


def test_permission_in_another_descriptor_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"theirs")
        monkeypatch.setenv(PERMIT_FD, str(theirs.fileno()))
        with pytest.raises(Misused, match="`trader live` alone"):
            use_live_permit(tmp_path, SessionSpec())
        assert theirs.recv(100) == b"theirs", "a descriptor that is somebody else's is neither read nor closed"
