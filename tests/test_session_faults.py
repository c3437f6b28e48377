"""Real processes, real signals, a real disk: sessions that are killed, frozen, cut off and refused their files.

`TRADER_KILLS=100` kills a session over HTTP a hundred times in all.
"""

import asyncio
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.test_session_resume import DAILY, check, fresh, resumed, whole
from tests.venue import as_alpaca, beside, goes_on, recent_minutes
from trader_lib.clock.sessions import NEW_YORK, TradingCalendar
from trader_lib.config.settings import load_settings
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.journal.journal import SqliteJournal
from trader_lib.replay.replay import replay
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.trading.events import AgentFailed, OrderIntended, Reconciled

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("TRADER_KILLS", "6"))
RUN = """
import asyncio, sys
from pathlib import Path
from loguru import logger
from tests.test_session_resume import DAILY, settings
from trader_lib.errors.taxonomy import TraderError
from trader_lib.session.session import run_session
logger.remove()
{before}
try:
    result = asyncio.run(run_session(DAILY, settings({transport!r}), journal_path=Path({path!r}), resume=True))
except TraderError as error:
    print(type(error).__name__, error.message, *getattr(error, "__notes__", ()), sep="\\n", flush=True)
    sys.exit(error.exit_code)
"""


pytestmark = pytest.mark.usefixtures("quiet")


def started(path: Path, transport: str = "http", before: str = "", **more: Any) -> subprocess.Popen[str]:
    """A session in a process of its own, which goes on with whatever the journal holds."""
    script = RUN.format(path=str(path), transport=transport, before=before)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **pipes, **more)


def wait_for(what: Callable[[], bool], seconds: float = 60.0) -> None:
    ends = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < ends, "waited for too long"
        time.sleep(0.01)


def events_in(path: Path, *kinds: type) -> int:
    if not path.is_file():
        return 0
    with SqliteJournal(path, read_only=True) as journal:
        return sum(1 for _ in journal.read(types=list(kinds)))


# ---- death


@pytest.mark.slow
async def test_session_over_http_that_is_killed_at_random_moments_gives_the_same_orders(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    one = await whole(tmp_path / "whole", DAILY, "http")
    rng, killed, sessions = random.Random(7), 0, 0
    rows = max(events_in(one.journal_path), 1)
    while killed < KILLS:
        path = fresh(tmp_path / "killed") / "journal.sqlite"
        sessions += 1
        for _ in range(8):
            if not await asyncio.to_thread(killed_after, path, rng.randrange(1, rows // 4), rng.random() * 0.01):
                break
            killed += 1
            with SqliteJournal(path) as journal:
                assert journal.verify().ok, f"after {killed} kills"
        other = await resumed(path.parent, DAILY, "http")
        check(one, other, 1)
        shutil.rmtree(path.parent)
    record_property("kills", f"{killed} over {sessions} sessions of {rows} events")


def events_in_or_none(path: Path) -> int:
    """How many events are committed; 0 where the file is not ready to be read."""
    try:
        return events_in(path)
    except Exception:
        return 0


def killed_after(path: Path, rows: int, seconds: float) -> bool:
    """Start a session and kill it when so many more events are safe; False where it ended before."""
    process, goal = started(path), events_in_or_none(path) + rows
    while process.poll() is None and events_in_or_none(path) < goal:
        time.sleep(0.002)
    time.sleep(seconds)  # between two writes, or in the middle of one
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


FOLLOWS = """
import asyncio, sys
from contextlib import asynccontextmanager
from pathlib import Path
from loguru import logger
from trader_lib.config.settings import load_settings
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
logger.remove()

@asynccontextmanager
async def look(parts):
    print("with a snapshot" if parts.inputs.snapshot else "without", flush=True)
    yield

settings = load_settings(environ={{}}, env_file=None, overrides={overrides!r})
spec = SessionSpec(params={{"fast": 2, "slow": 4}}, symbols=("AAPL", "IBM"), timeframe="1Min", bars_max={bars})
asyncio.run(run_session(spec, settings, journal_path=Path({path!r}), resume=True, companions=[look]))
"""


@pytest.mark.slow
async def test_a_session_in_a_real_market_is_killed_and_goes_on_from_its_snapshot(tmp_path: Path) -> None:
    path, bars, rng = fresh(tmp_path / "real") / "journal.sqlite", recent_minutes(), random.Random(3)
    with ExchangeServer(Exchange(bars, bars.n - 300), key_id="key", secret_key="secret") as server:
        overrides = {"broker": as_alpaca(server), "session": {"snapshot_events": 10, "reconcile_interval_s": 10.0}}
        script = FOLLOWS.format(overrides=overrides, path=str(path), bars=60)

        def life(rows: int | None) -> tuple[int, str]:
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            process, goal = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **pipes), events_in_or_none(path)
            while process.poll() is None and (rows is None or events_in_or_none(path) < goal + rows):
                time.sleep(0.005)
            if rows is not None:
                time.sleep(rng.random() * 0.05)
                process.kill()
            said, errors = process.communicate()
            return process.returncode, said or errors

        async with asyncio.timeout(150), beside(goes_on(server, pace_s=0.25)):
            lives = [await asyncio.to_thread(life, rows) for rows in (40, 60, 25, None)]
    assert [code for code, _ in lives] == [-signal.SIGKILL] * 3 + [0], lives
    assert [said.split("\n")[0] for _, said in lives] == ["without"] + ["with a snapshot"] * 3
    with SqliteJournal(path) as journal:
        assert journal.verify().ok
        events = list(journal.read())
        again = await replay(journal)
    names = [event.payload.request.client_order_id for event in events if isinstance(event.payload, OrderIntended)]
    assert names and len(names) == len(set(names))
    assert [event.payload.ok for event in events if isinstance(event.payload, Reconciled)][-1]
    assert again.agrees, again.sentence()


# ---- the disk


def test_a_file_that_may_not_grow_ends_the_session_with_the_reason_and_it_resumes(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the system refuse the write, as a full disk does, without any privilege."""
    path = fresh(tmp_path / "small") / "journal.sqlite"

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    process = started(path, "in_process", preexec_fn=small)
    told, _ = process.communicate(timeout=90)
    assert process.returncode == 3, told
    assert "Misconfigured" in told and "open entries were canceled at the broker" in told
    with SqliteJournal(path) as journal:
        assert journal.verify().ok and journal.last_seq > 20
    again = started(path, "in_process")
    told, errors = again.communicate(timeout=90)
    assert again.returncode == 0, told + errors


async def test_a_session_that_ran_out_of_room_gives_the_same_orders_when_it_has_some(tmp_path: Path) -> None:
    one = await whole(tmp_path / "whole", DAILY)
    path = fresh(tmp_path / "small") / "journal.sqlite"
    for size in (200_000, 500_000, 800_000):

        def small(size: int = size) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        process = await asyncio.to_thread(started, path, "in_process", preexec_fn=small)
        await asyncio.to_thread(process.communicate, timeout=90)
        assert process.returncode in {0, 3}
    check(one, await resumed(path.parent, DAILY), 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can become somebody who may not write")
def test_revoked_write_permission_is_said_before_anything_is_sent(tmp_path: Path) -> None:
    """The superuser may write anywhere: the session runs as nobody, in a folder that is not nobody's."""
    folder = fresh(Path("/tmp") / f"trader-revoked-{os.getpid()}")
    try:
        folder.chmod(0o555)
        before = "import os; os.setgid(65534); os.setuid(65534)"
        process = started(folder / "journal.sqlite", "in_process", before)
        told, errors = process.communicate(timeout=90)
        assert process.returncode == 3, told + errors
        assert "Permission denied" in told or "cannot be used" in told
        assert not list(folder.iterdir())
    finally:
        shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can become somebody who may not write")
def test_write_permission_that_is_revoked_before_a_resume_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    folder = fresh(Path("/tmp") / f"trader-revoked-later-{os.getpid()}")
    try:
        path = folder / "journal.sqlite"
        process = started(path, "in_process")
        wait_for(lambda: events_in_or_none(path) > 60)
        process.kill()
        process.communicate()
        before = events_in(path)
        for each in (*folder.iterdir(), folder):
            each.chmod(0o555 if each.is_dir() else 0o444)
        drop = "import os; os.setgid(65534); os.setuid(65534)"
        refused = started(path, "in_process", drop)
        told, errors = refused.communicate(timeout=90)
        assert refused.returncode == 3, told + errors
        for each in (folder, *folder.iterdir()):
            each.chmod(0o755 if each.is_dir() else 0o644)
        assert events_in(path) >= before
        again = started(path, "in_process")
        told, errors = again.communicate(timeout=90)
        assert again.returncode == 0, told + errors
    finally:
        shutil.rmtree(folder)


# ---- the exchange, in a process of its own

EXCHANGE = """
import sys, time
import orjson
from datetime import date
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.market.synthetic import synthetic_bars
bars = synthetic_bars(("AAPL", "IBM"), {first!r}, {last!r}, timeframe="1Min", seed=3)
with ExchangeServer(Exchange(bars, bars.n - 90), key_id="key", secret_key="secret") as server:
    addresses = [server.url, server.trading_stream_url, server.data_stream_url]
    print(orjson.dumps(addresses).decode(), flush=True)
    sys.stdin.readline()
    while not server.call(lambda: server.exchange.is_over):
        server.call(server.exchange.advance)
        time.sleep(0.25)
    sys.stdin.readline()
"""


class Proxy:
    """A port between a session and an exchange, which may be gone for a while."""

    def __init__(self, port: int) -> None:
        self._to = port
        self.port = 0
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        """Listen, on the same port as before."""
        self._server = await asyncio.start_server(self._pass_on, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Be gone, and let every connection break."""
        self._server.close()
        for writer in tuple(self._writers):
            writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.close()
            return
        both = {writer, back}
        self._writers |= both
        await asyncio.wait(
            {asyncio.create_task(self._copy(reader, back)), asyncio.create_task(self._copy(there, writer))},
            return_when=asyncio.FIRST_COMPLETED,
        )
        for each in both:
            each.close()
        self._writers -= both

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["frozen", "gone"])
async def test_a_session_survives_an_exchange_that_is_away_for_a_while(fault: str, tmp_path: Path) -> None:
    """frozen: SIGSTOP of its process, then SIGCONT. gone: its port refuses and breaks connections, then is back."""
    today = datetime.now(NEW_YORK).date()
    days = [day.date for day in TradingCalendar().sessions(today - timedelta(days=20), today - timedelta(days=1))][-2:]
    script = EXCHANGE.format(first=str(days[0]), last=str(days[-1]))
    exchange = serving(script)
    assert exchange.stdout is not None
    try:
        url, trading, data = orjson.loads(await asyncio.to_thread(exchange.stdout.readline))
        port = url.rpartition(":")[2]
        proxy = Proxy(int(port))
        await proxy.open()
        here = f":{proxy.port}"
        broker = {
            "kind": "alpaca",
            "key_id": "key",
            "secret_key": "secret",
            "trading_url": url.replace(f":{port}", here),
            "data_url": url.replace(f":{port}", here),
            "trading_stream_url": trading.replace(f":{port}", here),
            "data_stream_url": data.replace(f":{port}", here),
        }
        resilience = {"reads_timeout_s": 4.0, "orders_timeout_s": 4.0, "cancels_timeout_s": 4.0}
        overrides = {"broker": broker, "resilience": resilience}
        wire = load_settings(environ={}, env_file=None, overrides=overrides)
        spec = SessionSpec(params={"fast": 2, "slow": 4}, symbols=("AAPL", "IBM"), timeframe="1Min", bars_max=40)
        away, path = asyncio.Event(), fresh(tmp_path / "away") / "journal.sqlite"

        def played(count: int, at: datetime) -> None:
            if count == 8:
                away.set()

        async with asyncio.timeout(110):
            session = asyncio.create_task(run_session(spec, wire, journal_path=path, progress=played))
            await asyncio.sleep(1.5)
            await asyncio.to_thread(_say, exchange, "go")
            await away.wait()
            if fault == "frozen":
                exchange.send_signal(signal.SIGSTOP)
                await asyncio.sleep(6.0)
                exchange.send_signal(signal.SIGCONT)
            else:
                await proxy.close()
                await asyncio.sleep(6.0)
                await proxy.open()
            result = await session
    finally:
        exchange.send_signal(signal.SIGCONT)
        exchange.kill()
        exchange.communicate()
    assert result.bars >= 40 and result.reconciliation.ok, result.reconciliation.differences
    with SqliteJournal(path) as journal:
        assert journal.verify().ok
        names = [event.payload.request.client_order_id for event in journal.read(types=[OrderIntended])]  # type: ignore[attr-defined]
        assert names and len(names) == len(set(names))
        assert not list(journal.read(types=[AgentFailed]))
        again = await replay(journal)
    assert again.agrees, again.sentence()


def serving(script: str) -> "subprocess.Popen[str]":
    """An exchange that waits for a word before it plays."""
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )


def _say(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
