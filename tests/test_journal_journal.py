"""The journal survives what happens to processes and files."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from trader_lib.errors.taxonomy import BadData, InvariantBroken, Misconfigured, Misused
from trader_lib.journal.journal import NO_HASH, SqliteJournal
from trader_lib.trading.events import ClockTicked, Event, OperatorCommand

PRELUDE = """
import os, signal, sys
from datetime import UTC, datetime
from trader_lib.journal.journal import SqliteJournal
from trader_lib.trading.events import ClockTicked, Event
MOMENT = datetime(2024, 3, 1, 21, tzinfo=UTC)
def event(seq):
    return Event(id=f"e-{seq}", seq=seq, time=MOMENT, recorded_at=MOMENT, correlation_id="c", source="t",
                 session_id="s", payload=ClockTicked(at=MOMENT))
journal = SqliteJournal(sys.argv[1], durability=sys.argv[2])
"""
MOMENT = datetime(2024, 3, 1, 21, tzinfo=UTC)


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


def child(script: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("durability", ["process", "power"])
def test_what_was_committed_survives_a_killed_process(tmp_path: Path, durability: str) -> None:
    path = tmp_path / "journal.sqlite"
    script = """
    for seq in range(1, 8):
        journal.append(event(seq))
        if seq == 5:
            journal.commit()
    os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = child(script, path, durability)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    with SqliteJournal(path) as journal:
        assert journal.last_seq == 5
        assert journal.verify().ok
        journal.append(event(6))
    with SqliteJournal(path, read_only=True) as journal:
        assert [read.seq for read in journal.read()] == [1, 2, 3, 4, 5, 6]
        assert journal.verify().ok


def test_another_process_reads_while_one_writes(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    script = """
    for seq in range(1, 4):
        journal.append(event(seq))
        journal.commit()
        print(seq, flush=True)
        sys.stdin.readline()
    """
    writer = child(script, path, "process")
    assert writer.stdout is not None
    assert writer.stdin is not None
    for seq in (1, 2, 3):
        assert writer.stdout.readline() == f"{seq}\n"
        with SqliteJournal(path, read_only=True) as reader:
            assert [read.seq for read in reader.read()] == list(range(1, seq + 1))
            assert reader.verify().ok
        writer.stdin.write("\n")
        writer.stdin.flush()
    writer.communicate(timeout=60)
    assert writer.returncode == 0


def test_a_second_writer_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trader_lib.journal.journal.BUSY_TIMEOUT_S", 0.05)
    path = tmp_path / "journal.sqlite"
    with SqliteJournal(path) as first, SqliteJournal(path) as second:
        first.append(event(1))
        with pytest.raises(Misused, match="Another process writes"):
            second.append(event(1))
        first.commit()
        with pytest.raises(Misused, match="Another process writes"):
            second.append(event(1, id="other"))
        assert second.last_seq == 0
        assert first.verify().ok


def test_an_event_id_is_not_kept_twice(tmp_path: Path) -> None:
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        journal.append(event(1))
        with pytest.raises(Misused, match="event with this id already"):
            journal.append(event(2, id="e-1"))
        journal.append(event(2))
        assert journal.verify().rows == 2


@pytest.mark.parametrize("seq", [1, 2, 4, 100])
def test_a_gap_or_a_repeat_is_refused(tmp_path: Path, seq: int) -> None:
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        journal.append(event(1))
        journal.append(event(2))
        with pytest.raises(InvariantBroken, match=f"Event {seq} cannot follow event 2"):
            journal.append(event(seq))
        assert journal.last_seq == 2


def test_a_long_journal_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trader_lib.journal.journal.READ_ROWS", 3)
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        for seq in range(1, 11):
            command = OperatorCommand(action="halt", reason="r", by="b")
            journal.append(event(seq, payload=command) if seq % 4 == 0 else event(seq))
        assert [read.seq for read in journal.read(from_seq=2)] == list(range(2, 11))
        assert [read.seq for read in journal.read(types=[OperatorCommand])] == [4, 8]
        assert [read.seq for read in journal.read(types=[OperatorCommand, ClockTicked])] == list(range(1, 11))
        assert journal.verify().rows == 10


def written(path: Path, rows: int = 50) -> str:
    with SqliteJournal(path) as journal:
        for seq in range(1, rows + 1):
            journal.append(event(seq))
        journal.commit()
        return journal.last_hash


def test_every_edited_column_shows(tmp_path: Path) -> None:
    columns = "id type kind time recorded_at correlation_id causation_id source session_id payload prev_hash hash"
    for column in columns.split():
        path = tmp_path / f"{column}.sqlite"
        written(path, rows=3)
        connection = sqlite3.connect(path)
        with connection:
            connection.execute(f"UPDATE events SET {column} = 'x' WHERE seq = 2")
        connection.close()
        with SqliteJournal(path, read_only=True) as journal:
            found = journal.verify()
        assert (found.ok, found.first_bad_seq) == (False, 2), column


def test_a_file_cut_in_half_is_found(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    written(path, rows=2_000)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(BadData, match="not a journal that can be read"):
        SqliteJournal(path, read_only=True).verify()
    with pytest.raises(BadData, match="not a journal that can be read"):
        SqliteJournal(path)


def test_a_damaged_page_is_found(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    written(path, rows=2_000)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 8192)
    with SqliteJournal(path, read_only=True) as journal:
        found = journal.verify()
        assert not found.ok
        assert found.rows < 2_000
        with pytest.raises(BadData):
            list(journal.read())


def test_the_hash_kept_elsewhere_must_match(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    kept = written(path, rows=3)
    with SqliteJournal(path, read_only=True) as journal:
        assert journal.last_hash == kept
        assert journal.verify(kept).ok
        assert not journal.verify(NO_HASH).ok


def full_disk(journal: SqliteJournal) -> None:
    journal._connection.execute("PRAGMA max_page_count = 1")


def test_a_full_disk_loses_nothing_that_was_committed_and_stops_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    journal = SqliteJournal(path)
    journal.append(event(1))
    journal.commit()
    full_disk(journal)
    with pytest.raises(Misconfigured, match="has room"):
        for seq in range(2, 1_000):
            journal.append(event(seq))
    lost = journal.last_seq
    assert lost > 2
    journal._connection.execute("PRAGMA max_page_count = 1000000")  # room again, but too late
    for attempt in (journal.commit, lambda: journal.append(event(lost + 1))):
        with pytest.raises(Misconfigured, match=f"lost events 2 to {lost}"):
            attempt()
    assert journal.verify().rows == 1
    journal.close()
    with SqliteJournal(path) as again:
        assert again.verify().ok
        assert again.last_seq == 1


def closed(path: Path) -> object:
    journal = SqliteJournal(path)
    journal.close()
    journal.close()
    return journal.append(event(1))


def newer(path: Path) -> object:
    written(path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    return SqliteJournal(path)


def foreign(path: Path) -> object:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE notes (text TEXT)")
    connection.close()
    return SqliteJournal(path)


def empty(path: Path) -> object:
    path.touch()
    return SqliteJournal(path, read_only=True)


def under_a_file(path: Path) -> object:
    path.write_text("not a folder")
    return SqliteJournal(path / "journal.sqlite")


@pytest.mark.parametrize(
    ("attempt", "refused", "reason"),
    [
        (closed, Misused, "was closed"),
        (newer, BadData, "journal version 99"),
        (foreign, BadData, "journal version 0"),
        (empty, BadData, "holds nothing yet"),
        (under_a_file, Misconfigured, "folder that exists"),
    ],
)
def test_unusable_files_are_refused_with_what_to_do(
    tmp_path: Path, attempt: Callable[[Path], object], refused: type[Exception], reason: str
) -> None:
    with pytest.raises(refused, match=reason):
        attempt(tmp_path / "journal.sqlite")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(Misconfigured, match="can be written to"):
        SqliteJournal(tmp_path / "journal.sqlite")
