"""Operators against real sessions in processes of their own: alive, hung and dead, simulated and at a broker."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from tests.venue import holds, new_session_run, recent_minutes, wait_for
from trader_lib.config.settings import load_settings
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.journal.journal import SqliteJournal
from trader_lib.runs.store import RunFolder, RunStore
from trader_lib.runs.templates import template_path
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.steering.control import ControlFile
from trader_lib.steering.status import session_status
from trader_lib.trading.events import SessionStarted, TradingState

Trader = Callable[..., tuple[int, str, str]]

# A session that takes its time: argument 1 is the run folder, 2 the seconds a bar, 3 the specification, 4 "resume".
SLOW = """
import asyncio, sys, time
from pathlib import Path
from loguru import logger
from trader_lib.config.settings import load_settings
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
logger.disable("trader_lib")
spec = SessionSpec.model_validate_json(sys.argv[3])
def closed(bars, at):
    time.sleep(float(sys.argv[2]))
path, resume = Path(sys.argv[1]) / "journal.sqlite", sys.argv[4:] == ["resume"]
asyncio.run(run_session(spec, load_settings(), journal_path=path, progress=closed, resume=resume))
"""
SIMULATED = SessionSpec(
    params={"fast": 2, "slow": 5}, symbols=("IBM", "MSFT"), start=date(2005, 1, 3), end=date(2012, 12, 31)
)


@contextmanager
def session(
    run: RunFolder, spec: SessionSpec, bar_s: float, *words: str, **environ: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A session in a process of its own, ended whatever happens."""
    command = [sys.executable, "-c", SLOW, str(run.path), str(bar_s), spec.model_dump_json(), *words]
    process = subprocess.Popen(command, env=os.environ | environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_running_session_is_seen_reduced_flattened_and_resumed(trader: Trader, tmp_path: Path) -> None:
    run = new_session_run(tmp_path)
    with session(run, SIMULATED, 0.1, TRADER_BROKER__TRANSPORT="in_process") as process:
        wait_for(lambda: holds(run))
        code, out, _ = trader("status", "--json")
        shown = json.loads(out)
        assert code == 0 and shown["condition"] == "alive" and shown["runner"]["pid"] == process.pid
        assert shown["state"] == "ACTIVE" and shown["last_bar"] and Decimal(shown["equity"]) > 0

        code, out, err = trader("reduce", "latest-paper", "--by", "ada", "--reason", "news")
        assert code == 0 and "REDUCING" in out, out + err

        code, out, err = trader("kill", run.name, "--flatten", "--by", "ada", "--json")
        killed = json.loads(out)
        assert code == 0 and killed["done"] and killed["broker"] is None, out + err
        status = session_status(run.journal)
        assert status.alive and status.state is TradingState.HALTED and not status.positions and not status.open_orders
        last = status.last_bar
        wait_for(lambda: session_status(run.journal).last_bar != last)
        assert not session_status(run.journal).positions, "a halted session does not trade again by itself"

        code, out, err = trader("resume", run.name, "--by", "bob", "--reason", "checked")
        assert code == 0 and "ACTIVE" in out, out + err
        wait_for(lambda: session_status(run.journal).positions)
        assert "bob: checked" in session_status(run.journal).state_reason
        process.kill()
        process.wait()
    code, out, _ = trader("status")
    assert code == 7 and "dead" in out and "trader kill" in out


def test_session_that_was_flattened_and_then_died_is_resumed_halted(trader: Trader, tmp_path: Path) -> None:
    run, spec = new_session_run(tmp_path), SIMULATED.model_copy(update={"end": date(2005, 6, 30)})
    with session(run, spec, 0.1, TRADER_BROKER__TRANSPORT="in_process") as process:
        wait_for(lambda: holds(run))
        code, out, err = trader("kill", run.name, "--flatten", "--by", "ada")
        assert code == 0 and "confirmed" in out, out + err
        process.kill()
        process.wait()
    with session(run, spec, 0.0, "resume", TRADER_BROKER__TRANSPORT="in_process") as process:
        assert process.wait(60) == 0
    status = session_status(run.journal)
    assert status.state is TradingState.HALTED and not status.positions and status.reconciled
    assert status.ended == "every bar was played"


def test_halt_of_a_dead_session_binds_the_one_that_takes_its_folder_up(trader: Trader, tmp_path: Path) -> None:
    run = new_session_run(tmp_path)
    code, out, _ = trader("kill", run.name, "--by", "ada")
    assert code == 0 and "not running" in out
    spec = SIMULATED.model_copy(update={"end": date(2005, 3, 31)})
    with session(run, spec, 0.0, TRADER_BROKER__TRANSPORT="in_process") as process:
        assert process.wait(60) == 0
    status = session_status(run.journal)
    assert status.state is TradingState.HALTED and status.ended and not status.positions
    assert trader("status", run.name)[0] == 7


def test_second_session_in_the_same_folder_is_refused(trader: Trader, tmp_path: Path) -> None:
    run = new_session_run(tmp_path)
    with session(run, SIMULATED, 0.1, TRADER_BROKER__TRANSPORT="in_process"):
        wait_for(lambda: holds(run))
        with session(run, SIMULATED, 0.0, "resume", TRADER_BROKER__TRANSPORT="in_process") as second:
            assert second.wait(60) != 0
            assert second.stdout is not None and b"runs in" in second.stdout.read()
        assert session_status(run.journal).alive


def test_resume_wants_a_name(trader: Trader, tmp_path: Path) -> None:
    run = new_session_run(tmp_path)
    code, _, err = trader("resume", run.name)
    assert code == 2 and "--by" in err
    assert trader("resume", run.name, "--by", "")[0] == 2 and not ControlFile.beside(run.journal).commands()


def test_backtest_cannot_be_operated(trader: Trader, tmp_path: Path) -> None:
    run = RunStore(tmp_path / "runs").create("backtest")
    code, _, err = trader("kill", run.name)
    assert code == 2 and "not a session" in err
    code, _, err = trader("status", "latest-backtest")
    assert code == 2 and "not a session" in err


# ---- at a broker: the exchange's own server, which outlives every session


@contextmanager
def market(feed_s: float = 0.1) -> Iterator[ExchangeServer]:
    """The exchange on minute bars of recent days, whose market moves by itself."""
    bars = recent_minutes()
    stop = threading.Event()
    with ExchangeServer(Exchange(bars, bars.n - 300), key_id="key", secret_key="secret") as server:

        def move() -> None:
            while not stop.wait(feed_s) and not server.call(lambda: server.exchange.is_over):
                server.call(server.exchange.advance)

        thread = threading.Thread(target=move, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            stop.set()
            thread.join(10)


def addresses(server: ExchangeServer) -> dict[str, str]:
    return {
        "APCA_API_KEY_ID": "key",
        "APCA_API_SECRET_KEY": "secret",
        "TRADER_BROKER__TRADING_URL": server.url,
        "TRADER_BROKER__DATA_URL": server.url,
        "TRADER_BROKER__TRADING_STREAM_URL": server.trading_stream_url,
        "TRADER_BROKER__DATA_STREAM_URL": server.data_stream_url,
    }


MINUTES = SessionSpec(params={"fast": 2, "slow": 4}, symbols=("AAPL", "IBM"), timeframe="1Min", source="alpaca")


def alpaca_run(tmp_path: Path) -> RunFolder:
    run = RunStore(tmp_path / "runs").create("paper")
    run.write_params({"kind": "paper", "parameters": {"broker": "alpaca", "profile": "paper"}})
    return run


@pytest.mark.parametrize("fate", [signal.SIGSTOP, signal.SIGKILL])
def test_kill_reaches_the_account_of_a_session_that_hangs_or_is_dead(
    fate: signal.Signals, trader: Trader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = alpaca_run(tmp_path)
    with market() as server:
        for name, value in addresses(server).items():
            monkeypatch.setenv(name, value)
        with session(run, MINUTES, 0.0, TRADER_PROFILE="paper") as process:
            wait_for(lambda: server.call(lambda: bool(server.exchange.positions())))
            process.send_signal(fate)
            if fate is signal.SIGKILL:
                process.wait()
            code, out, err = trader("kill", run.name, "--flatten", "--by", "ada", "--wait", "1")
            assert "Canceled" in out and ControlFile.beside(run.journal).is_halted(), out + err
            assert not server.call(lambda: server.exchange.orders()), out + err
            assert not server.call(lambda: server.exchange.positions()), out + err
            if fate is signal.SIGKILL:
                assert code == 0 and "not running" in out
                return
            assert code == 1 and f"process {process.pid}" in out  # it did not confirm, and nothing depends on it
            assert session_status(run.journal).asked is TradingState.HALTED
            process.send_signal(signal.SIGCONT)
            wait_for(lambda: session_status(run.journal).state is TradingState.HALTED)
            status = session_status(run.journal)
            assert status.alive and status.asked is None
            last = status.last_bar
            wait_for(lambda: session_status(run.journal).last_bar != last)
            assert not server.call(lambda: server.exchange.positions()), "nothing was sent after the halt"
            assert not session_status(run.journal).positions, "the closing fills are in the session's books"
            process.terminate()
            assert process.wait(30) == 0
    assert session_status(run.journal).condition == "ended"


def test_kill_with_the_keys_of_another_kind_of_account_touches_nothing(
    trader: Trader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = alpaca_run(tmp_path)
    run.write_params({"kind": "live", "parameters": {"broker": "alpaca", "profile": "live"}})
    monkeypatch.setenv("APCA_API_KEY_ID", "key")
    monkeypatch.setenv("APCA_API_SECRET_KEY", "secret")
    code, out, _ = trader("kill", run.name, "--by", "ada")
    assert code == 1 and "Nothing was done at the broker" in out and f"trader kill {run.name} --profile live" in out
    assert ControlFile.beside(run.journal).is_halted()


async def test_operator_halts_and_the_session_records_it_as_an_input(tmp_path: Path) -> None:
    control = ControlFile(tmp_path / "control.jsonl")

    def closed(bars: int, at: datetime) -> None:
        if bars == 5:
            control.append("halt", reason="a test", by="ada")

    settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})
    spec = SIMULATED.model_copy(update={"end": date(2005, 2, 28)})
    result = await run_session(spec, settings, journal_path=tmp_path / "journal.sqlite", progress=closed)
    assert result.reconciliation.ok and result.status == "completed"
    assert {name for refusal in result.refusals for name in refusal.checks} <= {"TRADING_STATE", "BUYING_POWER"}


# ---- real money, behind its guard

WHAT = ("--strategy", "sma_cross", "-p", "fast=2", "-p", "slow=4", "--symbols", "AAPL,IBM", "--timeframe", "1Min")
LIMITS = (
    *("--max-order-notional", "60000", "--max-position-notional", "60000"),
    *("--max-gross-exposure", "1.5", "--max-daily-loss", "0.5"),
)


def test_every_refusal_is_told_at_once(trader: Trader, tmp_path: Path) -> None:
    code, out, err = trader("live", "--account", "1", *WHAT)
    assert (code, out) == (3, "") and "Traceback" not in err
    for words in ("The profile is research", "max_order_notional has to be yours", "no reconciled paper session"):
        assert words in err
    assert not (tmp_path / "runs").exists()


def test_account_has_to_be_typed(trader: Trader) -> None:
    code, _, err = trader("live", *WHAT)
    assert code == 2 and "--account" in err


def test_paper_does_not_trade_real_money(trader: Trader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("APCA_API_KEY_ID", "key")
    monkeypatch.setenv("APCA_API_SECRET_KEY", "secret")
    code, _, err = trader("paper", "--profile", "live", *WHAT)
    assert code == 2 and "`trader live` alone" in err and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_what_was_rehearsed_on_paper_may_go_live(
    trader: Trader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with market(0.4) as server:  # slowly: its 300 bars have to last for two sessions
        for name, value in addresses(server).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("TRADER_RUNS__TIMEOUT_S", "90")
        live = ("live", "--profile", "live", *WHAT)

        code, _, err = trader(*live, *LIMITS, "--account", "SIMULATED")
        assert code == 3 and "no reconciled paper session" in err and len(err.strip().splitlines()) == 2, err

        code, out, err = trader("paper", "--profile", "paper", *WHAT, "--bars-max", "12", "--json")
        assert code == 0 and json.loads(out)["reconciliation"]["ok"] and json.loads(out)["orders"], out + err

        code, _, err = trader(*live, *LIMITS, "--account", "PA-1")
        assert code == 3 and "'PA-1'" in err and len(err.strip().splitlines()) == 2, err
        code, _, err = trader(*live, "--account", "SIMULATED")
        assert code == 3 and "(0.05, by profile live)" in err and len(err.strip().splitlines()) == 5, err
        code, _, err = trader(*live, *LIMITS, "--account", "SIMULATED", "-p", "slow=5")
        assert code == 2, err  # a parameter twice
        monkeypatch.setenv("TRADER_BROKER__PAPER", "true")
        code, _, err = trader(*live, *LIMITS, "--account", "SIMULATED")
        assert code == 3 and "broker.paper false" in err
        monkeypatch.delenv("TRADER_BROKER__PAPER")
        other = [word.replace("slow=4", "slow=5") for word in live]
        code, _, err = trader(*other, *LIMITS, "--account", "SIMULATED")
        assert code == 3 and "no reconciled paper session" in err

        before = server.call(lambda: len(server.exchange.orders(open_only=False)))
        template = str(template_path("live"))  # the same notebook, run past the guard
        words = {"profile": "live", "broker": "alpaca", "source": "alpaca", "timeframe": "1Min", "bars_max": 3}
        given = [part for name, value in words.items() for part in ("-p", f"{name}={value}")]
        code, _, err = trader(
            "run", template, *given, "-p", 'symbols=["AAPL", "IBM"]', "-p", 'params={"fast": 2, "slow": 4}'
        )
        assert code == 5 and "which `trader live` alone does" in err, err
        assert server.call(lambda: len(server.exchange.orders(open_only=False))) == before

        code, out, err = trader(*live, *LIMITS, "--account", "SIMULATED", "--bars-max", "3", "--json")
        assert code == 0 and json.loads(out)["kind"] == "live", out + err
    (run,) = RunStore(tmp_path / "runs").runs("live")
    with SqliteJournal(run.journal, read_only=True) as journal:
        (begun,) = [event.payload for event in journal.last([SessionStarted])]
    assert isinstance(begun, SessionStarted) and begun.stage == "live"
    assert "secret" not in run.params.read_text() and "secret" not in run.notebook.read_text()
