"""`kill -9` of a live session, then `trader live --resume`: the orders of its rehearsal, none twice, none missing.

The embedded exchange's server stands in the place of Alpaca's live host. It outlives every session, as the host does.
"""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest

from tests.venue import as_alpaca, recent_minutes
from trader_lib.errors.taxonomy import Misused
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.journal.opening import open_journal
from trader_lib.runs.resume import ensure_resumable
from trader_lib.runs.store import RunFolder, RunStore
from trader_lib.steering.control import lock_path, who_runs
from trader_lib.trading.events import OrderIntended, SessionStarted

TRADER = str(Path(sys.executable).with_name("trader"))
BARS = 10
STRATEGY = """
from trader_lib.strategy.contract import Strategy


class Flips(Strategy):
    share: float

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars):
        close = bars.frame("close")
        holds = close.index.minute.to_numpy() // 2 % 2 == 0
        return close.notna().mul(holds * self.share / len(bars.symbols), axis=0)
"""  # every other bar, so that each order has filled, and its fill was reported, before the next is decided
WHAT = (
    *("--strategy", "flips.py:Flips", "-p", "share=0.4", "--symbols", "AAPL,IBM"),
    *("--timeframe", "1Min", "--bars-max", str(BARS)),
)
LIMITS = (
    "--max-order-notional=90000",
    "--max-position-notional=90000",
    "--max-gross-exposure=2",
    "--max-daily-loss=0.5",
)
LIVE = ("live", "--profile", "live", "--account", "SIMULATED", *LIMITS)
Line = tuple[str, str, str, str]


def wait_for(what: Callable[[], bool], seconds: float = 60.0) -> None:
    ends = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < ends, "waited for too long"
        time.sleep(0.02)


def count(journal: Path, *types: str) -> int:
    """How many events of some types a journal holds; of all types without any."""
    which = f" WHERE type IN ({','.join('?' * len(types))})" if types else ""
    try:
        connection = sqlite3.connect(f"file:{journal}?mode=ro", uri=True)
        try:
            return int(connection.execute(f"SELECT count(*) FROM events{which}", types).fetchone()[0])
        finally:
            connection.close()
    except sqlite3.Error:
        return 0


@contextmanager
def host() -> Iterator[ExchangeServer]:
    """The same market each time, which stands still unless it is moved."""
    bars = recent_minutes()
    with ExchangeServer(Exchange(bars, bars.n - 80), key_id="key", secret_key="secret") as server:
        yield server


class Desk:
    """A person at a terminal, in front of one market."""

    def __init__(self, server: ExchangeServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRADER_", "APCA_"))}
        broker = {f"TRADER_BROKER__{name.upper()}": value for name, value in as_alpaca(server).items()}
        self.environ = clean | broker | {"TRADER_RUNS__TIMEOUT_S": "120"}

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [TRADER, *arguments], cwd=self.folder, env=self.environ, text=True, stderr=subprocess.PIPE
        )

    def run_of(self, kind: str) -> RunFolder:
        wait_for(lambda: bool(RunStore(self.folder / "runs").runs(kind)))
        return RunStore(self.folder / "runs").runs(kind)[0]

    def at_rest(self, journal: Path) -> None:
        """Wait until nothing has been written for a moment."""
        written, since = -1, time.monotonic()
        while time.monotonic() - since < 0.25:
            if (now := count(journal)) != written:
                written, since = now, time.monotonic()
            time.sleep(0.02)

    def move(self, journal: Path, until: int) -> None:
        """Let bar after bar close, each once the session has done what the one before calls for."""
        while (closed := count(journal, "bars_closed")) < until:
            self.at_rest(journal)
            self.server.call(self.server.exchange.advance)
            wait_for(lambda closed=closed: count(journal, "bars_closed") > closed)  # type: ignore[misc]

    def move_and_kill(self, run: RunFolder, process: "subprocess.Popen[str]", victim: str) -> None:
        """Let one more bar close, and kill the session, or the command that started it, while it works on that."""
        before = count(run.journal)
        _, runner = who_runs(lock_path(run.journal))
        assert runner is not None and runner.pid != process.pid
        self.server.call(self.server.exchange.advance)
        wait_for(lambda: count(run.journal) > before)
        os.kill(runner.pid if victim == "kernel" else process.pid, signal.SIGKILL)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (5 if victim == "kernel" else -signal.SIGKILL), said
        wait_for(lambda: not who_runs(lock_path(run.journal))[0])  # a kernel may outlive its command for a moment

    def orders(self) -> list[Line]:
        """What the host was sent, in order: symbol, side, shares, type."""
        sent = self.server.call(lambda: self.server.exchange.orders(open_only=False))
        return sorted_by_arrival(sent)

    def begin(self, *arguments: str) -> "tuple[subprocess.Popen[str], RunFolder]":
        process = self.start(*arguments, *WHAT)
        run = self.run_of(arguments[0])
        wait_for(lambda: count(run.journal, "reconciled") > 0)
        return process, run


def sorted_by_arrival(sent: list) -> list[Line]:  # type: ignore[type-arg]
    ordered = sorted(sent, key=lambda order: (order.submitted_at, order.symbol))
    return [(order.symbol, order.side.value, str(order.qty), order.type.value) for order in ordered]


def finished(process: "subprocess.Popen[str]") -> None:
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said


def intended(run: RunFolder) -> list[str]:
    with open_journal(run.journal) as journal:
        assert journal.verify().ok
        events = [event.payload for event in journal.read(types=[OrderIntended])]
    return [payload.request.client_order_id for payload in events if isinstance(payload, OrderIntended)]


@pytest.mark.slow
def test_a_live_session_that_is_killed_goes_on_with_the_orders_of_its_rehearsal(tmp_path: Path) -> None:
    (tmp_path / "flips.py").write_text(STRATEGY)
    with host() as server:
        desk = Desk(server, tmp_path)
        process, rehearsal = desk.begin("paper", "--profile", "paper", "--broker", "alpaca")
        desk.move(rehearsal.journal, BARS)
        finished(process)
        rehearsed = desk.orders()
    assert len(rehearsed) >= BARS

    with host() as server:
        desk = Desk(server, tmp_path)
        process, run = desk.begin(*LIVE)
        for victim, bar in (("kernel", 4), ("command", 8)):
            desk.move(run.journal, bar)
            desk.at_rest(run.journal)
            desk.move_and_kill(run, process, victim)
            ended = count(run.journal)
            process = desk.start(*LIVE, "--resume", run.name)
            wait_for(lambda ended=ended: count(run.journal) > ended)  # type: ignore[misc]
        desk.move(run.journal, BARS)
        finished(process)
        assert desk.orders() == rehearsed
        sent = server.call(lambda: [one.client_order_id for one in server.exchange.orders(open_only=False)])

    ids = intended(run)
    assert sorted(ids) == sorted(sent) and len(set(ids)) == len(ids)
    result = orjson.loads((run.path / "result.json").read_bytes())
    assert (result["kind"], result["status"], result["reconciliation"]["ok"]) == ("live", "completed", True)
    with open_journal(run.journal) as journal:
        (started,) = [event.payload for event in journal.read(types=[SessionStarted])]
    assert isinstance(started, SessionStarted) and (started.stage, started.account) == ("live", "SIMULATED")
    with pytest.raises(Misused, match="has ended already"):
        ensure_resumable(run)
