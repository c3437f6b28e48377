"""Journals are verified, shown, exported and replayed from outside; a forged one is caught at its place."""

import asyncio
import functools
import sqlite3
from collections.abc import Callable
from datetime import date, datetime
from os import makedirs
from pathlib import Path
from typing import Any
from unittest.mock import patch

import orjson
import pandas as pd
import pytest

from tests.simulation.loop import VirtualLoop
from tests.simulation.plan import plan_of
from tests.simulation.world import World, _container
from trader_lib.app.cli import main
from trader_lib.config.settings import load_settings
from trader_lib.errors.taxonomy import InvariantBroken
from trader_lib.journal.journal import SqliteJournal
from trader_lib.market.bars import Bars
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.replay.replay import ReplayResult, replay
from trader_lib.session import session as session_module
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.steering.control import ControlFile
from trader_lib.strategy.contract import Strategy
from trader_lib.trading.events import (
    AgentFailed,
    BarRow,
    BarsClosed,
    Event,
    FillRecorded,
    OrderIntended,
    OrderProposed,
    Payload,
    PortfolioChanged,
    RiskDecided,
    SessionStarted,
    TargetsDecided,
    TradeUpdated,
    TradingStateChanged,
)

SPEC = SessionSpec(params={"fast": 5, "slow": 15}, start=date(2005, 1, 3), end=date(2005, 4, 29))
HALTING = SessionSpec.model_validate(
    SPEC.values()
    | {
        "strategy": "rsi_reversion",
        "params": {"period": 3, "entry": 45, "exit": 60},
        "limits": {"max_drawdown": 0.01},
    }
)
RUN = "20260105T210000Z-paper-abcdef"


pytestmark = pytest.mark.usefixtures("quiet")


async def session(folder: Path, spec: SessionSpec = SPEC, transport: str = "in_process", **more: Any) -> Path:
    makedirs(folder, exist_ok=True)
    settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": transport}})
    await run_session(spec, settings, journal_path=folder / "journal.sqlite", **more)
    return folder / "journal.sqlite"


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    """The journal of a run."""
    return await session(tmp_path / "runs" / RUN)


async def replayed(path: Path, **how: Any) -> ReplayResult:
    with SqliteJournal(path, read_only=True) as journal:
        return await replay(journal, **how)


def read(path: Path, *kinds: type[Payload]) -> list[Event]:
    with SqliteJournal(path, read_only=True) as journal:
        return list(journal.read(types=kinds))


def forge(path: Path, change: Callable[[Event], Event | None]) -> Path:
    """Another journal, its chain in order, in which events say something else, or are left out."""
    other = path.with_name("forged.sqlite")
    other.unlink(missing_ok=True)
    with SqliteJournal(other) as journal:
        for event in read(path):
            changed = change(event)
            if changed is not None:
                journal.append(changed.model_copy(update={"seq": journal.last_seq + 1}))
    return other


def say(event: Event, **changes: Any) -> Event:
    return event.model_copy(update={"payload": event.payload.model_copy(update=changes)})


def at(seq: int, **changes: Any) -> Callable[[Event], Event]:
    return lambda event: say(event, **changes) if event.seq == seq else event


# ---- what agrees


@pytest.mark.parametrize("transport", ["in_process", "http"])
@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        SPEC.model_copy(update={"strategy": "rsi_reversion", "params": {"period": 3, "entry": 45, "exit": 60}}),
        SPEC.model_copy(update={"strategy": "momentum", "params": {}, "end": date(2005, 3, 1)}),
        SessionSpec.model_validate(SPEC.values() | {"limits": {"max_order_notional": 20_000, "max_daily_loss": 0.001}}),
        SessionSpec.model_validate(SPEC.values() | {"fractional": True, "costs": {"volume_share": 0.00001}}),
        HALTING,
    ],
    ids=["sma_cross", "exits", "momentum", "limits", "fractions", "drawdown"],
)
async def test_replay_of_a_session_agrees_entirely(transport: str, spec: SessionSpec, tmp_path: Path) -> None:
    path = await session(tmp_path, spec, transport)
    result = await replayed(path)
    assert result.agrees, result.sentence()
    assert result.ended and not result.unfinished and not result.unrepeated
    said = ["strategy", "risk", "execution", "portfolio"]
    assert sum(result.compared.values()) == sum(event.source in said for event in read(path)) > 50


async def test_replay_of_an_open_market_agrees(tmp_path: Path) -> None:
    bars = synthetic_bars(("AAPL", "IBM", "MSFT"), "2010-03-08", "2010-03-10", timeframe="15Min", seed=5)
    spec = SessionSpec(params={"fast": 2, "slow": 5}, timeframe="15Min", source="synthetic", seed=5)
    result = await replayed(await session(tmp_path, spec, bars=bars))
    assert result.agrees and result.compared["order_intended"] > 5, result.sentence()


async def test_a_journal_that_ends_anywhere_replays_to_there(path: Path) -> None:
    for last in range(4, 100, 3):
        cut = forge(path, lambda event, last=last: event if event.seq <= last else None)
        result = await replayed(cut)
        assert result.agrees and not result.ended and result.events == last, result.sentence()


async def test_a_resumed_session_replays_as_one(path: Path, tmp_path: Path) -> None:
    settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})
    for last in (7, 60, 90):
        cut = forge(path, lambda event, last=last: event if event.seq <= last else None)
        await run_session(SPEC, settings, journal_path=cut, resume=True)
        result = await replayed(cut)
        assert result.agrees and result.ended, result.sentence()


async def test_a_session_that_its_drawdown_halted_resumes_and_replays_as_one(tmp_path: Path) -> None:
    whole = await session(tmp_path / "whole", HALTING)
    (halt,) = read(whole, TradingStateChanged)
    assert isinstance(halt.payload, TradingStateChanged) and halt.payload.exits_pass
    exits = [event.seq for event in read(whole, OrderIntended) if event.seq > halt.seq]
    settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})
    for last in (halt.seq - 1, halt.seq, exits[0] if exits else halt.seq + 5):
        cut = forge(whole, lambda event, last=last: event if event.seq <= last else None)
        await run_session(HALTING, settings, journal_path=cut, resume=True)
        result = await replayed(cut)
        assert result.agrees and result.ended, result.sentence()
        assert [event.payload for event in read(cut, OrderIntended)] == [
            event.payload for event in read(whole, OrderIntended)
        ]


@pytest.mark.parametrize("action", ["reduce", "halt", "flatten"])
async def test_a_session_that_an_operator_stopped_replays(action: Any, tmp_path: Path) -> None:
    control = ControlFile.beside(tmp_path / "journal.sqlite")

    def interfere(bars: int, _: datetime) -> None:
        if bars in (25, 45):
            control.append(action if bars == 25 else "resume", reason="to see", by="me")

    result = await replayed(await session(tmp_path, progress=interfere))
    assert result.agrees and result.compared["trading_state_changed"] >= 1, result.sentence()


@pytest.mark.parametrize("seed", [0, 1, 3, 4, 5, 6])
def test_a_session_behind_a_bad_connection_replays(seed: int, tmp_path: Path) -> None:
    world = World(plan_of(seed), tmp_path)
    container = functools.partial(_container, world)
    with (
        patch.object(session_module, "session_container", container),
        asyncio.Runner(loop_factory=VirtualLoop) as runner,
    ):
        runner.run(world.run())
    with SqliteJournal(tmp_path / "journal.sqlite", read_only=True) as journal:
        result = asyncio.run(replay(journal, strategy=world.plan.strategy))
    assert result.agrees and result.compared["order_acknowledged"] > 5, result.sentence()


# ---- what diverges


@pytest.mark.parametrize(
    ("kind", "agent", "changes"),
    [
        (TargetsDecided, "strategy", {"weights": {"AAPL": 0.5, "IBM": 0.0, "MSFT": 0.0}}),
        (OrderProposed, "strategy", {"reference_price": 1.0}),
        (RiskDecided, "risk", {"checks": ()}),
        (PortfolioChanged, "portfolio", {"positions": ()}),
    ],
)
async def test_tampered_decision_diverges_at_its_place(
    kind: type[Payload], agent: str, changes: dict[str, Any], path: Path
) -> None:
    seq = [event.seq for event in read(path, kind) if event.source == agent][-2]
    result = await replayed(forge(path, at(seq, **changes)))
    first = result.first
    assert first is not None and (first.seq, first.agent) == (seq, agent)
    assert first.fields[0][0].startswith(next(iter(changes)))
    assert first.recorded is not None and first.replayed is not None and first.cause is not None
    assert first.chain[-1].seq == seq and first.cause in first.chain
    assert result.document()["divergences"][0]["fields"]


async def test_tampered_quantity_of_an_order_is_found_where_it_was_intended(path: Path) -> None:
    intended = read(path, OrderIntended)[3]
    assert isinstance(intended.payload, OrderIntended) and intended.payload.request.qty is not None
    more = intended.payload.request.model_copy(update={"qty": intended.payload.request.qty + 1})
    first = (await replayed(forge(path, at(intended.seq, request=more)))).first
    assert first is not None and first.seq == intended.seq and first.agent == "execution"
    assert first.fields[0][0] == "request.qty"


async def test_edited_bar_diverges_at_the_first_decision_on_it(path: Path) -> None:
    closed = read(path, BarsClosed)[30]
    assert isinstance(closed.payload, BarsClosed)
    row = closed.payload.bars["AAPL"]
    lower = BarRow(open=row.open / 2, high=row.high / 2, low=row.low / 2, close=row.close / 2, volume=row.volume)
    result = await replayed(forge(path, at(closed.seq, bars=dict(closed.payload.bars) | {"AAPL": lower})))
    assert result.first is not None and result.first.cause is not None
    assert result.first.cause.seq == closed.seq and result.first.seq > closed.seq
    assert closed.seq in [event.seq for event in result.first.chain]


async def test_edited_fill_diverges_where_it_was_recorded(path: Path) -> None:
    update = next(e for e in read(path, TradeUpdated) if isinstance(e.payload, TradeUpdated) and e.payload.price)
    assert isinstance(update.payload, TradeUpdated) and update.payload.price is not None
    first = (await replayed(forge(path, at(update.seq, price=update.payload.price + 1)))).first
    assert first is not None and isinstance(first.replayed, FillRecorded)
    assert first.fields[0][0] == "fill.price" and first.cause is not None and first.cause.seq == update.seq


async def test_changed_parameter_diverges_at_the_first_target_that_it_changes(path: Path) -> None:
    started = read(path, SessionStarted)[0]
    assert isinstance(started.payload, SessionStarted)
    parameters = dict(started.payload.parameters) | {"params": {"fast": 8, "slow": 15}}
    first = (await replayed(forge(path, at(1, parameters=parameters)))).first
    assert first is not None and first.agent == "strategy" and isinstance(first.replayed, TargetsDecided)


async def test_changed_limit_diverges_at_the_first_risk_decision(path: Path) -> None:
    started = read(path, SessionStarted)[0]
    assert isinstance(started.payload, SessionStarted)
    parameters = dict(started.payload.parameters) | {"limits": {"max_order_qty": 1}}
    first = (await replayed(forge(path, at(1, parameters=parameters)))).first
    assert first is not None and first.seq == read(path, RiskDecided)[0].seq
    assert first.fields[0] == ("approved", True, False)


async def test_event_left_out_is_found_by_the_next_of_its_agent(path: Path) -> None:
    lost = read(path, TargetsDecided)[20]
    first = (await replayed(forge(path, lambda event: None if event.seq == lost.seq else event))).first
    assert first is not None and first.cause is not None and first.cause.id == lost.causation_id


async def test_last_event_of_an_agent_left_out_is_found_at_the_end(path: Path) -> None:
    lost = read(path, PortfolioChanged)[-1]
    result = await replayed(forge(path, lambda event: None if event.seq == lost.seq else event))
    assert result.first is not None and result.first.recorded is None
    assert "now publishes portfolio_changed; it had not" in result.sentence()


async def test_event_that_nobody_said_is_found(path: Path) -> None:
    before = read(path, RiskDecided)[2]
    said = TradingStateChanged(state="REDUCING", reason="somebody felt like it")
    extra = before.model_copy(update={"id": "forged", "payload": said})
    other = path.with_name("forged.sqlite")
    with SqliteJournal(other) as journal:
        for event in read(path):
            for one in (event, extra) if event.seq == before.seq else (event,):
                journal.append(one.model_copy(update={"seq": journal.last_seq + 1}))
    result = await replayed(other)
    assert result.first is not None and result.first.seq == before.seq + 1
    assert result.first.replayed is None or result.first.agent == "risk"


# ---- agents that failed


class Moody(Strategy):
    """Fails on one bar, always the same."""

    name = "moody"
    fails_at: int = 20

    @property
    def warmup(self) -> int:
        return 0

    def targets(self, bars: Bars) -> Any:
        if bars.n == self.fails_at:
            raise InvariantBroken("not today") if self.fails_at == 30 else ValueError("not today")
        return bars.close * 0.0 + 0.1 * (bars.n % 3)


@pytest.mark.parametrize("fails_at", [20, 30])
async def test_failure_of_a_strategy_comes_again(fails_at: int, tmp_path: Path) -> None:
    strategy = Moody(fails_at=fails_at)
    path = await session(tmp_path, strategy=strategy, check=False)  # its weights depend on how many bars there are
    result = await replayed(path, strategy=strategy)
    assert result.agrees and result.compared["agent_failed"] == 1, result.sentence()
    fine = await replayed(path, strategy=Moody(fails_at=10_000))
    assert not fine.agrees and isinstance(read(path, AgentFailed)[0].payload, AgentFailed)


# ---- the commands


def test_verify_says_that_the_chain_holds(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["journal", "verify", RUN, "--runs", str(path.parents[1])]) == 0
    assert "each chained to the one before it" in capsys.readouterr().out
    assert main(["journal", "verify", str(path), "--json"]) == 0
    assert orjson.loads(capsys.readouterr().out)["ok"] is True


def test_broken_chain_has_its_own_exit_code_and_a_position(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE events SET payload = replace(payload, '0', '1') WHERE seq = 40")
    connection.close()
    assert main(["journal", "verify", str(path)]) == 6
    assert "broken at event 40" in capsys.readouterr().out
    assert main(["replay", str(path)]) == 6
    assert "broken at event 40" in capsys.readouterr().out
    assert main(["journal", "verify", str(path), "--json"]) == 6
    assert orjson.loads(capsys.readouterr().out)["first_bad_seq"] == 40
    assert main(["replay", str(path), "--unverified", "--until", "39"]) == 0


def test_journal_of_another_version_says_why_not(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    assert main(["replay", str(path)]) == 4
    assert "has journal version 99" in capsys.readouterr().err


def test_run_without_a_journal_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "20260105T210000Z-backtest-abcdef").mkdir()
    assert main(["journal", "show", "latest", "--runs", str(tmp_path)]) == 2
    assert "only sessions write one" in capsys.readouterr().err


def test_show_follows_one_decision(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    intended = read(path, OrderIntended)[0]
    assert main(["journal", "show", str(path), "--correlation", intended.correlation_id, "--json"]) == 0
    events = orjson.loads(capsys.readouterr().out)
    assert {"bars_closed", "targets_decided", "risk_decided", "fill_recorded"} <= {event["type"] for event in events}
    assert main(["journal", "show", str(path), "--from", "5", "--until", "9", "--limit", "0"]) == 0
    assert capsys.readouterr().out.count("│\n") >= 5
    assert main(["journal", "show", str(path), "--type", "order_intendet"]) == 2
    assert "Did you mean 'order_intended'?" in capsys.readouterr().err


def test_export_writes_json_lines_and_parquet(
    path: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    whole = read(path)
    lines, table = tmp_path / "events.jsonl", tmp_path / "events.parquet"
    assert main(["journal", "export", str(path), "--to", str(lines)]) == 0
    assert [Event.from_json(line) for line in lines.read_bytes().splitlines()] == whole
    assert main(["journal", "export", str(path), "--to", str(table), "--type", "fill_recorded"]) == 0
    assert len(pd.read_parquet(table)) == len(read(path, FillRecorded))
    assert main(["journal", "export", str(path), "--to", "events.csv"]) == 2
    assert main(["journal", "export", str(path), "--to", str(tmp_path / "none" / "events.jsonl")]) == 2
    capfdbinary.readouterr()
    assert main(["journal", "export", str(path), "--type", "session_ended"]) == 0
    assert orjson.loads(capfdbinary.readouterr().out)["type"] == "session_ended"


def test_replay_shows_the_first_divergence_and_what_led_there(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decision = read(path, RiskDecided)[1]
    forged = forge(path, at(decision.seq, approved=False))
    assert main(["replay", str(path)]) == 0
    assert "The replay agrees" in capsys.readouterr().out
    assert main(["replay", str(forged)]) == 1
    text = capsys.readouterr().out
    assert f"Event {decision.seq}, the risk agent" in text and "What led there" in text and "bars_closed" in text
    assert main(["replay", str(forged), "--json"]) == 1
    document = orjson.loads(capsys.readouterr().out)
    assert document["divergences"][0]["seq"] == decision.seq and document["divergences"][0]["chain"]
    assert main(["replay", str(forged), "--until", str(decision.seq - 1)]) == 0


def test_replay_lists_what_another_version_would_have_decided(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(path), "-p", "fast=8"]) == 0
    assert "This version" in capsys.readouterr().out
    assert main(["replay", str(path), "--strategy", "momentum", "--until", "2005-02-01", "--json"]) == 0
    document = orjson.loads(capsys.readouterr().out)
    assert document["other_version"] and document["notes"] and document["strategy"] == "momentum"
    assert main(["replay", str(path), "-p", "fats=8"]) == 2
    assert "fast" in capsys.readouterr().err


def test_older_writer_is_named_beside_a_divergence(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decision = read(path, RiskDecided)[1]

    def change(event: Event) -> Event:
        if event.seq == 1:
            return say(event, versions={"trader_lib": "0.0.1"})
        return say(event, approved=False) if event.seq == decision.seq else event

    assert main(["replay", str(forge(path, change))]) == 1
    assert "written by trader_lib 0.0.1" in capsys.readouterr().out
