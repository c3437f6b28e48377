"""What every journal promises, over SQLite in a file and over PostgreSQL on a server."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import pytest

from tests.servers import PostgresServer
from trader_lib.config.sections import JournalSettings
from trader_lib.errors.taxonomy import BadData, InvariantBroken, Misconfigured, Misused
from trader_lib.journal.journal import NO_HASH, SqliteJournal
from trader_lib.journal.opening import AnyJournal, journal_exists, open_journal
from trader_lib.journal.postgres import PostgresJournal
from trader_lib.trading.events import ClockTicked, Event, OperatorCommand

MOMENT = datetime(2024, 3, 1, 21, tzinfo=UTC)
HALT = OperatorCommand(action="halt", reason="r", by="b")
NUMBERS = count(1)
Opener = Callable[..., AnyJournal]


def event(seq: int, **changes: object) -> Event:
    fields: dict[str, object] = {
        "id": f"e-{seq}",
        "seq": seq,
        "time": MOMENT,
        "recorded_at": MOMENT,
        "correlation_id": "c",
        "source": "t",
        "session_id": "s",
        "payload": ClockTicked(at=MOMENT),
    }
    return Event.model_validate(fields | changes)


@pytest.fixture(params=["sqlite", "postgres"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens one journal, again and again."""
    if request.param == "sqlite":
        return lambda **options: SqliteJournal(tmp_path / "journal.sqlite", **options)
    server = request.getfixturevalue("postgres_server")
    name = f"run-{next(NUMBERS)}"
    return lambda **options: PostgresJournal(server.url, name, **options)


def test_events_come_back_as_they_were_written(opened: Opener) -> None:
    written = [event(seq, payload=HALT) if seq % 4 == 0 else event(seq) for seq in range(1, 11)]
    with opened() as journal:
        for one in written:
            journal.append(one)
        assert list(journal.read()) == written, "a writer sees what it has not committed yet"
    with opened(read_only=True) as reader:
        assert list(reader.read()) == written
        assert [read.seq for read in reader.read(from_seq=8)] == [8, 9, 10]
        assert [read.seq for read in reader.read(types=[OperatorCommand])] == [4, 8]
        assert [read.seq for read in reader.last([OperatorCommand])] == [8]
        assert [read.seq for read in reader.last([OperatorCommand, ClockTicked], 2)] == [9, 10]
        assert reader.last_seq == 10
        assert reader.verify().rows == 10
        with pytest.raises(Misused, match="opened for reading"):
            reader.append(event(11))


def test_a_long_journal_is_read_in_pieces(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("journal", "postgres"):
        monkeypatch.setattr(f"trader_lib.journal.{module}.READ_ROWS", 3)
    with opened() as journal:
        for seq in range(1, 11):
            journal.append(event(seq))
        assert [read.seq for read in journal.read(from_seq=2)] == list(range(2, 11))
        assert journal.verify().rows == 10


def test_payloads_of_one_type_come_as_they_were_written(opened: Opener) -> None:
    with opened() as journal:
        for seq in range(1, 11):
            journal.append(event(seq, payload=HALT) if seq % 4 == 0 else event(seq))
        assert list(journal.payloads(OperatorCommand, 10)) == [HALT.to_json().decode()] * 2
        assert list(journal.payloads(OperatorCommand, 7)) == [HALT.to_json().decode()]
        assert len(list(journal.payloads(ClockTicked, 3))) == 3


@pytest.mark.parametrize("seq", [1, 2, 4, 100])
def test_a_gap_or_a_repeat_is_refused(opened: Opener, seq: int) -> None:
    with opened() as journal:
        journal.append(event(1))
        journal.append(event(2))
        with pytest.raises(InvariantBroken, match=f"Event {seq} cannot follow event 2"):
            journal.append(event(seq))
        assert journal.last_seq == 2


def test_an_event_id_is_not_kept_twice(opened: Opener) -> None:
    with opened() as journal:
        journal.append(event(1))
        with pytest.raises(Misused, match="event with this id already"):
            journal.append(event(2, id="e-1"))
        journal.append(event(2))
        assert journal.verify().rows == 2


def test_the_hash_kept_elsewhere_must_match(opened: Opener) -> None:
    with opened() as journal:
        for seq in range(1, 4):
            journal.append(event(seq))
        journal.commit()
        kept = journal.last_hash
    with opened() as again:
        assert (again.last_seq, again.last_hash) == (3, kept)
        assert again.verify(kept).ok
        assert not again.verify(NO_HASH).ok


def test_a_closed_journal_takes_nothing(opened: Opener) -> None:
    journal = opened()
    journal.close()
    journal.close()
    with pytest.raises(Misused, match="was closed"):
        journal.append(event(1))


def test_both_chains_are_one(tmp_path: Path, postgres_server: PostgresServer) -> None:
    with SqliteJournal(tmp_path / "j.sqlite") as one, PostgresJournal(postgres_server.url, "same") as other:
        for journal in (one, other):
            for seq in range(1, 6):
                journal.append(event(seq))
            journal.commit()
        assert one.last_hash == other.last_hash


# --- PostgreSQL alone

CHILD = """
import os, signal, sys
from datetime import UTC, datetime
from trader_lib.journal.postgres import PostgresJournal
from trader_lib.trading.events import ClockTicked, Event
MOMENT = datetime(2024, 3, 1, 21, tzinfo=UTC)
journal = PostgresJournal(sys.argv[1], sys.argv[2], durability=sys.argv[3])
for seq in range(1, 8):
    journal.append(Event(id=f"e-{seq}", seq=seq, time=MOMENT, recorded_at=MOMENT, correlation_id="c", source="t",
                         session_id="s", payload=ClockTicked(at=MOMENT)))
    if seq == 5:
        journal.commit()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("durability", ["process", "power"])
def test_what_was_committed_survives_a_killed_process(postgres_server: PostgresServer, durability: str) -> None:
    name = f"killed-{durability}"
    done = subprocess.run([sys.executable, "-c", CHILD, postgres_server.url, name, durability], timeout=60)
    assert done.returncode == -signal.SIGKILL
    with PostgresJournal(postgres_server.url, name) as journal:
        assert journal.last_seq == 5
        assert journal.verify().ok
        journal.append(event(6))
    with PostgresJournal(postgres_server.url, name, read_only=True) as journal:
        assert [read.seq for read in journal.read()] == [1, 2, 3, 4, 5, 6]


def test_a_second_writer_is_told_so(postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trader_lib.journal.postgres.LOCK_TRIES_MAX", 2)
    with PostgresJournal(postgres_server.url, "alone"):
        with pytest.raises(Misused, match="Another process writes"):
            PostgresJournal(postgres_server.url, "alone")
        PostgresJournal(postgres_server.url, "another").close()
    PostgresJournal(postgres_server.url, "alone").close()


@pytest.mark.parametrize("committed", [True, False])
def test_a_killed_server_loses_nothing_that_was_appended(postgres_server: PostgresServer, committed: bool) -> None:
    name = f"server-{committed}"
    with PostgresJournal(postgres_server.url, name) as journal:
        for seq in range(1, 4):
            journal.append(event(seq))
        if committed:
            journal.commit()
        postgres_server.kill()
        back = threading.Timer(0.5, postgres_server.start)
        back.start()
        journal.append(event(4))
        journal.commit()
        back.join()
        assert journal.reconnects == 1
        assert journal.verify().rows == 4
    with PostgresJournal(postgres_server.url, name, read_only=True) as reader:
        assert [read.seq for read in reader.read()] == [1, 2, 3, 4]


def test_an_intent_is_refused_while_the_server_stays_away(
    postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trader_lib.journal.postgres.RECONNECTS_MAX", 2)
    journal = PostgresJournal(postgres_server.url, "away")
    journal.append(event(1))
    journal.commit()
    journal.append(event(2))
    postgres_server.kill()
    try:
        with pytest.raises(Misconfigured, match="then resume the session"):
            journal.commit()
        with pytest.raises(Misconfigured, match="lost events 2 to 2"):
            journal.append(event(3))
        journal.close()
    finally:
        postgres_server.start()
    with PostgresJournal(postgres_server.url, "away") as again:
        assert again.last_seq == 1
        assert again.verify().ok


@pytest.mark.parametrize(
    ("statement", "seq", "reason"),
    [
        ("UPDATE journal_events SET payload = 'x' WHERE journal = %s AND seq = 2", 2, "was changed"),
        ("DELETE FROM journal_events WHERE journal = %s AND seq = 2", 2, "is missing"),
        ("DELETE FROM journal_events WHERE journal = %s AND seq = 3", 3, "missing at the end"),
    ],
)
def test_an_edit_shows(postgres_server: PostgresServer, statement: str, seq: int, reason: str) -> None:
    import psycopg

    name = f"edited-{next(NUMBERS)}"
    with PostgresJournal(postgres_server.url, name) as journal:
        for number in range(1, 4):
            journal.append(event(number))
    with psycopg.connect(postgres_server.url) as connection:
        connection.execute(statement, (name,))
    with PostgresJournal(postgres_server.url, name, read_only=True) as journal:
        found = journal.verify()
    assert (found.ok, found.first_bad_seq) == (False, seq)
    assert reason in found.reason
    if "end" in reason:
        with pytest.raises(BadData, match="lost its last rows"):
            PostgresJournal(postgres_server.url, name)


def test_a_reader_finds_the_journal_by_the_note_in_the_run_folder(
    postgres_server: PostgresServer, tmp_path: Path
) -> None:
    path = tmp_path / f"paper-{os.getpid()}-{next(NUMBERS)}" / "journal.sqlite"
    path.parent.mkdir()
    settings = JournalSettings(url=postgres_server.url)  # type: ignore[arg-type]
    assert not journal_exists(path)
    with open_journal(path, settings, read_only=False) as journal:
        assert isinstance(journal, PostgresJournal)
        journal.append(event(1))
    assert journal_exists(path)
    assert not path.exists()
    assert "s3cret" not in "".join(file.read_text() for file in path.parent.iterdir())
    with open_journal(path, settings) as reader:
        assert reader.last_seq == 1
    with pytest.raises(Misconfigured, match="TRADER_JOURNAL__URL"):
        open_journal(path, JournalSettings())
    (path.parent / "journal.json").unlink()
    with pytest.raises(Misused, match="of another run"):
        open_journal(path, settings, read_only=False)


def test_there_is_nothing_to_read_where_nobody_wrote(postgres_server: PostgresServer) -> None:
    PostgresJournal(postgres_server.url, "made").close()
    with pytest.raises(Misused, match="no journal"):
        PostgresJournal(postgres_server.url, "never", read_only=True)
