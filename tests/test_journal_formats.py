"""Small journals of every format that there has been: they read, they verify, and they replay to the same decisions."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from tests.journals.__main__ import KEY, kept
from trader_lib.app.cli import main
from trader_lib.config.sections import JournalSettings
from trader_lib.errors.taxonomy import Misconfigured
from trader_lib.journal.journal import SCHEMAS, SqliteJournal
from trader_lib.journal.opening import open_journal
from trader_lib.replay.replay import replay
from trader_lib.trading.events import BarsClosed, BarsSlice, FillRecorded, OrderIntended, SessionEnded, SessionStarted

pytestmark = pytest.mark.usefixtures("quiet")
# By format: events as a reader sees them, bars, orders and fills; the quiet bars of 3 and 4 are rows of many.
HELD = {1: (143, 32, 5, 5), 2: (143, 32, 5, 5), 3: (1_034, 320, 8, 8), 4: (1_034, 320, 8, 8)}
KEYED = (2, 4)


def opened(version: int, folder: Path, change: str = "") -> SqliteJournal:
    """A journal of a format, after a change to its file, in SQL."""
    settings = JournalSettings(key=KEY if version in KEYED else None, ledger_path=folder / "ledger.sqlite")
    path = kept(version, folder)
    with sqlite3.connect(path) as connection:
        connection.execute(change)
    journal = open_journal(path, settings)
    assert isinstance(journal, SqliteJournal)
    return journal


def test_every_format_that_is_read_has_a_journal_here() -> None:
    assert set(SCHEMAS) == set(HELD), "keep a small journal of a new format: python -m tests.journals FOLDER"


@pytest.mark.parametrize("version", HELD)
def test_journal_of_each_format_reads_event_by_event(version: int, tmp_path: Path) -> None:
    path = kept(version, tmp_path)
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (version,)
    with opened(version, tmp_path) as journal:
        events = list(journal.read())
        kinds = (BarsClosed, OrderIntended, FillRecorded)
        found = (len(events), *(sum(isinstance(event.payload, kind) for event in events) for kind in kinds))
        assert found == HELD[version]
        assert isinstance(events[0].payload, SessionStarted) and isinstance(events[-1].payload, SessionEnded)
        assert {event.seq for event in events} == set(range(1, journal.last_seq + 1))
        assert [event.time for event in events] == sorted(event.time for event in events)
        assert bool(list(journal.read(types=[BarsSlice]))) == (version in (3, 4))


@pytest.mark.parametrize("version", HELD)
def test_journal_of_each_format_verifies_and_shows_a_change(version: int, tmp_path: Path) -> None:
    with opened(version, tmp_path) as journal:
        found = journal.verify()
        assert found.ok and bool(found.key_id) == (version in KEYED)
    with opened(version, tmp_path, "UPDATE events SET source = 'somebody' WHERE seq = 20") as journal:
        found = journal.verify()
    assert (found.ok, found.first_bad_seq) == (False, 20)


@pytest.mark.parametrize("version", HELD)
def test_journal_of_each_format_replays_to_the_same_decisions(version: int, tmp_path: Path) -> None:
    with opened(version, tmp_path) as journal:
        found = asyncio.run(replay(journal))
    assert found.agrees
    assert found.compared["targets_decided"] == HELD[version][1]
    assert found.compared["order_intended"] == HELD[version][2]


@pytest.mark.parametrize("version", KEYED)
def test_keyed_journal_does_not_verify_by_another_key(version: int, tmp_path: Path) -> None:
    settings = JournalSettings(key="x" * 40, ledger_path=tmp_path / "ledger.sqlite")
    with open_journal(kept(version, tmp_path), settings) as journal, pytest.raises(Misconfigured, match="key"):
        journal.verify()


def test_format_of_the_future_is_refused_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = kept(1, tmp_path)
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {max(SCHEMAS) + 1}")
    assert main(["journal", "verify", str(path)]) == 4
    assert "Use the version that wrote it" in capsys.readouterr().err
