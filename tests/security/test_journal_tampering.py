"""Somebody who can write into a run folder changes its journal, or puts something else in its place."""

import asyncio
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import Mock

import orjson
import pytest
from loguru import logger

from tests.servers import PostgresServer
from trader_lib.agents.tracking import OrderBook
from trader_lib.clock.clock import VirtualClock
from trader_lib.config.settings import load_settings
from trader_lib.errors.taxonomy import BadData, Misconfigured
from trader_lib.journal.chain import NO_HASH, JournalKey, chain_hash
from trader_lib.journal.guard import PAYLOAD_MAX
from trader_lib.journal.journal import SqliteJournal
from trader_lib.journal.ledger import NOTE_EVENTS, NOTE_S, Vouching
from trader_lib.journal.opening import open_journal
from trader_lib.journal.postgres import PostgresJournal
from trader_lib.recovery.snapshots import SnapshotKeeper
from trader_lib.recovery.summary import Summary
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.trading.events import ENVELOPE, ClockTicked, Event, SessionStarted, SnapshotTaken

KEY = "plain-sight-key-of-more-than-32-characters"
OTHER_KEY = "another-key-that-has-more-than-32-characters"
RUN, OTHER_RUN = "20260105T210000Z-paper-abcdef", "20260105T220000Z-paper-fedcba"
SPEC = SessionSpec(params={"fast": 5, "slow": 15}, start=date(2005, 1, 3), end=date(2005, 2, 28))
MOMENT = datetime(2026, 1, 5, 21, tzinfo=UTC)
Trader = Callable[..., tuple[int, str, str]]


pytestmark = pytest.mark.usefixtures("quiet")


def session(journal: Path, key: str | None) -> None:
    journal.parent.mkdir(parents=True)
    overrides: dict[str, Any] = {"broker": {"transport": "in_process"}}
    if key is not None:
        overrides["journal"] = {"key": key, "ledger_path": str(journal.parents[2] / ".trader" / "ledger.sqlite")}
    settings = load_settings(environ={}, env_file=None, overrides=overrides)
    asyncio.run(run_session(SPEC, settings, journal_path=journal))
    parameters = {"broker": "simulated", "transport": "in_process"} | orjson.loads(SPEC.model_dump_json())
    (journal.parent / "params.json").write_bytes(orjson.dumps({"kind": "paper", "parameters": parameters}))


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose journal has no key."""
    logger.disable("trader_lib")
    journal = tmp_path_factory.mktemp("plain") / "runs" / RUN / "journal.sqlite"
    session(journal, None)
    return journal.parent


@pytest.fixture
def plain(plain_run: Path, trader: Trader, tmp_path: Path) -> Path:
    """The journal of such a run, below the folder in which commands are given."""
    shutil.copytree(plain_run, tmp_path / "runs" / RUN)
    return tmp_path / "runs" / RUN / "journal.sqlite"


@pytest.fixture
def keyed(trader: Trader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A journal with a key, noted in the ledger, and the key in the environment."""
    monkeypatch.setenv("TRADER_JOURNAL__KEY", KEY)
    journal = tmp_path / "runs" / RUN / "journal.sqlite"
    session(journal, KEY)
    return journal


def edit(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def recompute(path: Path) -> None:
    """Compute every hash again, and the head, as anybody can."""
    with closing(sqlite3.connect(path)) as connection:
        seq, link = 0, NO_HASH
        for row in connection.execute(f"SELECT {', '.join(ENVELOPE)}, payload FROM events ORDER BY seq").fetchall():
            envelope, before = dict(zip(ENVELOPE, row, strict=False)), link
            seq, link = envelope["seq"], chain_hash(before, envelope, row[-1].encode())
            connection.execute("UPDATE events SET prev_hash = ?, hash = ? WHERE seq = ?", (before, link, seq))
        connection.execute("UPDATE head SET seq = ?, hash = ?", (seq, link))
        connection.commit()


CHANGE = "UPDATE events SET payload = replace(payload, 'sma_cross', 'momentum') WHERE seq = 1"
CUT = "DELETE FROM events WHERE seq > (SELECT max(seq) FROM events) - 5"
HEAD = "UPDATE head SET (seq, hash) = (SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1)"


# ---- without a key


def test_a_journal_without_a_key_is_as_it_ever_was(plain: Path, tmp_path: Path, trader: Trader) -> None:
    with closing(sqlite3.connect(plain)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        last = connection.execute("SELECT hash FROM events ORDER BY seq DESC LIMIT 1").fetchone()
        assert connection.execute("SELECT hash FROM head").fetchone() == last
    assert tables == {"events", "head"}
    assert not (tmp_path / ".trader").exists()
    code, out, _ = trader("journal", "verify", RUN)
    assert code == 0 and "they show an accident, not somebody who computes them again" in " ".join(out.split())


@pytest.mark.parametrize("attack", [[CHANGE], [CUT]])
def test_plain_hashes_that_were_computed_again_pass_and_verify_says_that_they_can(
    attack: list[str], plain: Path, trader: Trader
) -> None:
    edit(plain, *attack)
    assert trader("journal", "verify", RUN)[0] == 6
    recompute(plain)
    code, out, _ = trader("journal", "verify", RUN, "--json")
    assert code == 0 and "plain" in orjson.loads(out)["promise"] and orjson.loads(out)["key_id"] == ""


# ---- with a key


def test_verify_promises_more_with_a_key(keyed: Path, trader: Trader) -> None:
    code, out, _ = trader("journal", "verify", RUN)
    words = " ".join(out.split())
    assert code == 0 and f"Nobody without the key {JournalKey(KEY).id}" in words
    assert "The ledger of runs has its last event" in words
    assert trader("replay", RUN)[0] == 0
    code, out, _ = trader("doctor", "--offline", "--json")
    told = {finding["name"]: finding["told"] for finding in orjson.loads(out)}
    assert JournalKey(KEY).id in told["journal key"] and KEY not in out


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        ([CHANGE], "event 1 was changed"),
        ([CHANGE, "recompute"], "event 1 is not chained to the one before it"),
        ([CUT], "missing at the end"),
        ([CUT, HEAD], "missing at the end"),
        (["DELETE FROM events WHERE seq = 7"], "event 7 is missing"),
        (["UPDATE keyed SET journal = 'another'"], "knows another journal here"),
        (["UPDATE keyed SET key_id = 'ffffffff'"], "names the key 'ffffffff'"),
        ([CHANGE, "recompute", "DROP TABLE keyed", "PRAGMA user_version = 1"], "and this one has none"),
        (["DELETE FROM keyed"], "does not say which key"),
    ],
)
def test_nobody_without_the_key_changes_a_keyed_journal(
    attack: list[str], reason: str, keyed: Path, trader: Trader
) -> None:
    for statement in attack:
        recompute(keyed) if statement == "recompute" else edit(keyed, statement)
    code, out, err = trader("journal", "verify", RUN)
    assert code == (4 if "which key" in reason else 6)
    assert reason in " ".join((out + err).split())
    code, _, _ = trader("replay", RUN)
    assert code == (4 if "which key" in reason else 6), "what does not verify is not replayed"
    settings = load_settings(env_file=None, overrides={"broker": {"transport": "in_process"}})
    with pytest.raises(BadData):
        asyncio.run(run_session(SPEC, settings, journal_path=keyed, resume=True))


def test_a_journal_that_was_put_back_shows_in_the_ledger(keyed: Path, tmp_path: Path, trader: Trader) -> None:
    journal, settings = tmp_path / "runs" / OTHER_RUN / "journal.sqlite", load_settings().journal
    journal.parent.mkdir()
    with open_journal(journal, settings, read_only=False) as opened:
        append(opened, 1, 3)
    before = journal.read_bytes()
    with open_journal(journal, settings, read_only=False) as opened:
        append(opened, 4, 6)
    journal.write_bytes(before)
    code, out, _ = trader("journal", "verify", OTHER_RUN)
    assert code == 6 and "the ledger of runs has event 6" in " ".join(out.split())


def test_a_journal_in_the_place_of_another_shows(keyed: Path, tmp_path: Path, trader: Trader) -> None:
    session(tmp_path / "runs" / OTHER_RUN / "journal.sqlite", KEY)
    shutil.copy(tmp_path / "runs" / OTHER_RUN / "journal.sqlite", keyed)
    code, out, _ = trader("journal", "verify", RUN)
    assert code == 6 and "knows another journal here" in " ".join(out.split())
    assert trader("journal", "verify", OTHER_RUN)[0] == 0


def test_a_journal_that_was_moved_is_known_by_its_id(keyed: Path, tmp_path: Path, trader: Trader) -> None:
    shutil.copytree(keyed.parent, tmp_path / "runs" / OTHER_RUN)
    code, out, _ = trader("journal", "verify", OTHER_RUN, "--json")
    found = orjson.loads(out)
    assert code == 0 and found["noted_seq"] == found["rows"]
    edit(tmp_path / "runs" / OTHER_RUN / "journal.sqlite", CUT, HEAD)
    assert trader("journal", "verify", OTHER_RUN)[0] == 6


def test_a_journal_does_not_take_another_name(keyed: Path, tmp_path: Path, trader: Trader) -> None:
    shutil.copytree(keyed.parent, tmp_path / "runs" / OTHER_RUN)
    edit(tmp_path / "runs" / OTHER_RUN / "journal.sqlite", "UPDATE keyed SET journal = 'one that the ledger has not'")
    code, out, _ = trader("journal", "verify", OTHER_RUN)
    assert code == 6 and "event 1 is not chained" in " ".join(out.split())


@pytest.mark.parametrize(("key", "words"), [(None, "the settings have none"), (OTHER_KEY, "was begun with the key")])
def test_without_its_key_a_journal_is_read_and_not_vouched_for(
    key: str | None, words: str, keyed: Path, trader: Trader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRADER_JOURNAL__KEY")
    if key is not None:
        monkeypatch.setenv("TRADER_JOURNAL__KEY", key)
    for command in (["journal", "verify", RUN], ["replay", RUN]):
        code, _, err = trader(*command)
        assert code == 3 and words in " ".join(err.split()) and JournalKey(KEY).id in err
    assert trader("journal", "show", RUN)[0] == 0
    assert trader("replay", RUN, "--unverified")[0] == 0
    with pytest.raises(Misconfigured, match=words):
        settings = load_settings(env_file=None, overrides={"broker": {"transport": "in_process"}})
        asyncio.run(run_session(SPEC, settings, journal_path=keyed, resume=True))


def test_a_session_without_a_key_is_resumed_after_one_was_set(
    plain: Path, trader: Trader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRADER_JOURNAL__KEY", KEY)
    settings = load_settings(env_file=None, overrides={"broker": {"transport": "in_process"}})
    result = asyncio.run(run_session(SPEC, settings, journal_path=plain, resume=True))
    assert result.status == "completed"
    assert trader("journal", "verify", RUN)[0] == 0


def test_a_keyed_session_that_died_is_resumed_with_its_key(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRADER_JOURNAL__KEY", KEY)
    settings = load_settings(env_file=None, overrides={"broker": {"transport": "in_process"}})
    with SqliteJournal(plain, read_only=True) as journal:
        lived = list(journal.read())
    plain.unlink()
    with open_journal(plain, settings.journal, read_only=False) as journal:
        for each in lived[:100]:
            journal.append(each)
    result = asyncio.run(run_session(SPEC, settings, journal_path=plain, resume=True))
    assert result.status == "completed"
    with open_journal(plain, settings.journal) as journal:
        found = journal.verify()
        assert found.ok and found.noted_seq == found.rows >= len(lived)


@pytest.mark.parametrize("link", ["snapshot", "snapshot/orders.jsonl"])
def test_snapshots_are_not_written_through_a_link(link: str, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "orders.jsonl").write_text("not to be lost")
    (tmp_path / "snapshot" if "/" in link else tmp_path).mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(target / "orders.jsonl" if "/" in link else target)
    book, none = OrderBook(), Mock()
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        none.is_idle, none.last_seq = True, 10
        keeper = SnapshotKeeper(tmp_path / "snapshot", journal, none, none, {}, book, Summary(), "identity", every=1)
        asyncio.run(keeper.attend())
    assert keeper.taken == 0 and (target / "orders.jsonl").read_text() == "not to be lost"


def test_a_snapshot_is_vouched_for_by_the_key(tmp_path: Path) -> None:
    vouching = Vouching(JournalKey(KEY), tmp_path / "ledger.sqlite")
    path = tmp_path / "journal.sqlite"
    with SqliteJournal(path, vouching=lambda: vouching) as journal:
        journal.append(event(1, payload=SnapshotTaken(digest="a" * 64)))
    edit(path, f"UPDATE events SET payload = replace(payload, '{'a' * 64}', '{'b' * 64}')")
    with SqliteJournal(path, read_only=True, vouching=lambda: vouching) as journal:
        assert journal.verify().reason == "event 1 was changed after it was written"


def test_a_short_key_is_refused(trader: Trader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRADER_JOURNAL__KEY", "hunter2")
    code, _, err = trader("runs", "list")
    assert code == 3 and "at least 32 characters" in err and "hunter2" not in err


@pytest.mark.slow
def test_a_key_in_a_file_makes_journals_keyed_and_stands_in_no_artefact(
    tmp_path: Path, trader: Trader, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    (tmp_path / "key").chmod(0o600)
    monkeypatch.setenv("TRADER_JOURNAL__KEY_FILE", str(tmp_path / "key"))
    monkeypatch.setenv("TRADER_BROKER__TRANSPORT", "in_process")
    assert trader("paper", "--start", "2005-01-03", "--end", "2005-02-28", "-p", "fast=5", "-p", "slow=15")[0] == 0
    code, out, _ = trader("journal", "verify", "latest-paper", "--json")
    assert code == 0 and orjson.loads(out)["key_id"] == JournalKey(KEY).id, "the notebook's kernel got the key"
    artefacts = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "key"]
    assert len(artefacts) > 5
    assert not [path for path in artefacts if KEY.encode() in path.read_bytes()]


# ---- the ledger


def test_a_session_does_not_begin_without_its_ledger(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    vouching = Vouching(JournalKey(KEY), tmp_path / "file" / "ledger.sqlite")
    with pytest.raises(Misconfigured, match="TRADER_JOURNAL__LEDGER_PATH"):
        SqliteJournal(tmp_path / "journal.sqlite", vouching=lambda: vouching)


@pytest.mark.parametrize(
    ("attack", "code", "words"),
    [
        ("UPDATE ledger SET seq = 1 WHERE number = 1", 4, "was changed at row 1"),
        ("DELETE FROM ledger WHERE number = 1", 4, "was changed at row 1"),
        ("CREATE TRIGGER t AFTER INSERT ON ledger BEGIN DELETE FROM ledger; END", 4, "does not belong there"),
        ("DELETE FROM ledger WHERE number > 1", 0, "has its event 0"),
        ("DELETE FROM ledger", 0, "has nothing of it"),
    ],
)
def test_what_is_done_to_the_ledger_shows_but_for_its_end(
    attack: str, code: int, words: str, keyed: Path, tmp_path: Path, trader: Trader
) -> None:
    edit(tmp_path / ".trader" / "ledger.sqlite", attack)
    found, out, err = trader("journal", "verify", RUN)
    assert found == code and words in " ".join((out + err).split())


def test_the_ledger_learns_of_events_within_its_bound(tmp_path: Path) -> None:
    clock = VirtualClock(MOMENT)
    vouching = Vouching(JournalKey(KEY), tmp_path / "ledger.sqlite", clock)

    def noted() -> int | None:
        with SqliteJournal(tmp_path / "journal.sqlite", read_only=True, vouching=lambda: vouching) as reader:
            return reader.verify().noted_seq

    journal = SqliteJournal(tmp_path / "journal.sqlite", vouching=lambda: vouching)
    assert noted() == 0
    append(journal, 1, 2)
    journal.commit()
    assert noted() == 0
    clock.advance_to(MOMENT + timedelta(seconds=NOTE_S))
    journal.commit()
    assert noted() == 2
    append(journal, 3, NOTE_EVENTS + 2)
    journal.commit()
    assert noted() == NOTE_EVENTS + 2
    append(journal, NOTE_EVENTS + 3, NOTE_EVENTS + 3)
    journal.close()
    assert noted() == NOTE_EVENTS + 3


def test_a_ledger_that_is_gone_does_not_stop_trading(tmp_path: Path) -> None:
    clock = VirtualClock(MOMENT)
    vouching = Vouching(JournalKey(KEY), tmp_path / "ledger.sqlite", clock)
    journal = SqliteJournal(tmp_path / "journal.sqlite", vouching=lambda: vouching)
    append(journal, 1, 2)
    clock.advance_to(MOMENT + timedelta(seconds=NOTE_S))
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)) as greedy:
        greedy.execute("BEGIN EXCLUSIVE")
        journal.commit()
        assert journal.committed_seq == 2
    journal.close()
    with SqliteJournal(tmp_path / "journal.sqlite", read_only=True, vouching=lambda: vouching) as reader:
        assert reader.verify().noted_seq == 2, "what could not be noted then is noted at the end"


def test_a_journal_on_a_server_is_keyed_as_well(postgres_server: PostgresServer, tmp_path: Path) -> None:
    import psycopg

    vouching, name = Vouching(JournalKey(KEY), tmp_path / "ledger.sqlite"), "keyed"

    def opened(**options: Any) -> PostgresJournal:
        return PostgresJournal(postgres_server.url, name, vouching=lambda: vouching, **options)

    def change(*statements: str) -> None:
        with psycopg.connect(postgres_server.url) as connection:
            for statement in statements:
                connection.execute(statement)

    with opened() as journal:
        append(journal, 1, 3)
    with psycopg.connect(postgres_server.url) as connection:
        head = connection.execute("SELECT hash FROM journal_heads WHERE journal = 'keyed'").fetchone()
    with opened() as journal:
        append(journal, 4, 6)
        assert journal.verify().ok
    with PostgresJournal(postgres_server.url, name, read_only=True) as reader:
        assert len(list(reader.read())) == 6
        with pytest.raises(Misconfigured, match="settings have none"):
            reader.verify()
    with pytest.raises(Misconfigured, match="settings have none"):
        PostgresJournal(postgres_server.url, name)
    cut = "DELETE FROM journal_events WHERE journal = 'keyed' AND seq > 3"
    link = "SELECT hash FROM journal_events WHERE journal = 'keyed' AND seq = 3"
    change(cut, f"UPDATE journal_heads SET seq = 3, hash = ({link}) WHERE journal = 'keyed'")
    with opened(read_only=True) as reader:
        assert reader.verify().reason == "rows are missing at the end"
    assert head is not None
    change(f"UPDATE journal_heads SET hash = '{head[0]}' WHERE journal = 'keyed'")
    with opened(read_only=True) as reader:
        assert "the ledger of runs has event 6" in reader.verify().reason
    change("DELETE FROM journal_keys", "UPDATE journal_heads SET version = 1 WHERE journal = 'keyed'")
    with opened(read_only=True) as reader:
        assert "this one has none" in reader.verify().reason


# ---- what is no journal


def event(seq: int, **changes: Any) -> Event:
    fields: dict[str, Any] = {
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


def append(journal: SqliteJournal | PostgresJournal, first: int, last: int) -> None:
    for seq in range(first, last + 1):
        journal.append(event(seq))


@contextmanager
def seconds(most: float) -> Iterator[None]:
    """Fail where something takes longer, whatever it is doing."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {most:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, most)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


ENDLESS = """
CREATE VIEW events AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)
SELECT
    i AS seq, 'e' || i AS id, 'clock_ticked' AS type, 'input' AS kind, '2024-03-01T21:00:00Z' AS time,
    '2024-03-01T21:00:00Z' AS recorded_at, 'c' AS correlation_id, NULL AS causation_id, 't' AS source,
    's' AS session_id,
    '{"at":"2024-03-01T21:00:00Z"}' AS payload, '0' AS prev_hash, '0' AS hash
FROM n
"""


def ring(path: Path) -> None:
    """Six pages, each of which leads four hundred times to the next: endless rows in a small file."""
    with closing(sqlite3.connect(path)) as connection:
        size = connection.execute("PRAGMA page_size").fetchone()[0]
        root = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'events'").fetchone()[0]
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
    data, cells = bytearray(path.read_bytes()), 400

    def interior(child: int) -> bytes:
        page, content = bytearray(size), size - 7 * cells
        page[0], page[3:5], page[5:7], page[8:12] = 5, _big(cells, 2), _big(content, 2), _big(child, 4)
        for number in range(cells):
            at = content + 7 * number
            page[12 + 2 * number : 14 + 2 * number] = _big(at, 2)
            page[at : at + 7] = _big(child, 4) + b"\x81\x80\x01"
        return bytes(page)

    child = root
    while data[(child - 1) * size] == 5:
        child = int.from_bytes(data[(child - 1) * size + 8 : (child - 1) * size + 12], "big")
    for number in range(pages + 1, pages + 7):
        data += interior(child)
        child = number
    data[28:32], data[(root - 1) * size : root * size] = _big(child, 4), interior(child)
    path.write_bytes(bytes(data))


def _big(number: int, size: int) -> bytes:
    return number.to_bytes(size, "big")


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def beside(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda path: (make(path.with_name(name)), None)[1]


def sql(*statements: str) -> Callable[[Path], None]:
    return lambda path: edit(path, *statements)


def recomputed(statement: str) -> Callable[[Path], None]:
    return lambda path: (edit(path, statement), recompute(path))[1]


def said(kind: str, name: str, value: object) -> Callable[[Path], None]:
    """Events of a kind say something else, and every hash is right."""

    def change(path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection:
            for seq, text in connection.execute("SELECT seq, payload FROM events WHERE type = ?", (kind,)).fetchall():
                payload = orjson.dumps(orjson.loads(text) | {name: value}, option=orjson.OPT_SORT_KEYS).decode()
                connection.execute("UPDATE events SET payload = ? WHERE seq = ?", (payload, seq))
            connection.commit()
        recompute(path)

    return change


ROLLBACK = bytes.fromhex("d9d505f920a163d7")  # how a rollback journal of SQLite begins
HOSTILE: dict[str, Callable[[Path], None]] = {
    "endless view": sql("ALTER TABLE events RENAME TO real", ENDLESS),
    "trigger": sql("CREATE TRIGGER t AFTER INSERT ON events BEGIN DELETE FROM events WHERE seq < new.seq; END"),
    "index over an expression": sql("CREATE INDEX i ON events (abs(seq))"),
    "pages in a ring": ring,
    "900 MB of zeros": sql("UPDATE events SET payload = zeroblob(900000000) WHERE seq = 3"),
    "40 MB of text": sql("UPDATE events SET payload = printf('%.40000000c', ' ') WHERE seq = 3"),
    "more than an event says": sql(f"UPDATE events SET payload = printf('%.{PAYLOAD_MAX + 1}c', ' ') WHERE seq = 3"),
    "payload of bytes": sql("UPDATE events SET payload = CAST(payload AS BLOB) WHERE seq = 3"),
    "text that is none": sql("UPDATE events SET source = CAST(x'ff' AS TEXT) WHERE seq = 3"),
    "type of 30 MB": sql("UPDATE events SET type = printf('%.30000000c', 'x') WHERE seq = 3"),
    "greatest number": sql("UPDATE events SET seq = 9223372036854775807 WHERE seq = (SELECT max(seq) FROM events)"),
    "negative number": sql("UPDATE events SET seq = -5 WHERE seq = 1"),
    "head that is a word": sql("UPDATE head SET seq = 'many'"),
    "more than the head says": sql("UPDATE head SET seq = 10, hash = (SELECT hash FROM events WHERE seq = 10)"),
    "no database": replaced(lambda path: path.write_bytes(b"hello there " * 10_000)),
    "nothing": replaced(Path.touch),
    "folder": replaced(Path.mkdir),
    "pipe": replaced(os.mkfifo),
    "device": replaced(lambda path: path.symlink_to("/dev/zero")),
    "link to nowhere": replaced(lambda path: path.symlink_to(path.with_name("planted"))),
    "pipe for a WAL": beside("journal.sqlite-wal", os.mkfifo),
    "foreign rollback": beside("journal.sqlite-journal", lambda path: path.write_bytes(ROLLBACK * 9_999)),
    "pipe for a note": beside("journal.json", os.mkfifo),
    "half a JSON": recomputed("UPDATE events SET payload = '{\"at' WHERE seq = 3"),
    "deep JSON": recomputed("UPDATE events SET payload = printf('%.1000000c', '[') WHERE seq = 3"),
    "unknown type": recomputed("UPDATE events SET type = 'not_a_thing' WHERE seq = 3"),
    "amount of gigabytes": said("account_reported", "cash", "1e999999999"),
    "amount that is next to nothing": said("account_reported", "equity", "1e-999999999"),
    "moment out of range": said("bars_closed", "at", "9999-12-31T23:59:59-12:00"),
    "a million wrong stamps": said("history_loaded", "stamps", ["x"] * 1_000_000),
}
# What looks at the journal as a whole meets everything; the others read some of its events.
WHOLE = (["journal", "verify", RUN], ["journal", "show", RUN, "--limit", "0"], ["replay", RUN])
PARTS = (["status", RUN], ["watch", RUN, "--once"], ["summary", RUN], ["runs", "list"], ["kill", RUN, "--by", "me"])


@pytest.mark.parametrize("attack", HOSTILE)
def test_every_command_ends_with_a_sentence(attack: str, plain: Path, trader: Trader) -> None:
    HOSTILE[attack](plain)
    codes = {}
    for command in (*WHOLE, *PARTS, ["journal", "export", RUN, "--to", "events.jsonl"]):
        with seconds(15):
            code, out, err = trader(*command)
        assert "This is a bug" not in err and "Traceback" not in err, (command, err[-500:])
        assert len(out + err) < 200_000
        codes[" ".join(command[:2])] = code
    assert set(codes.values()) <= {0, 4, 6, 7}, codes
    assert codes["runs list"] == 0, "what is wrong with one run is not wrong with the others"
    known = {codes[" ".join(command[:2])] for command in WHOLE}
    assert known & {4, 6}, codes
    assert not plain.with_name("planted").exists()


@pytest.mark.parametrize(
    "attack", ["endless view", "trigger", "pages in a ring", "pipe", "link to nowhere", "half a JSON"]
)
def test_nothing_hostile_is_resumed(attack: str, plain: Path) -> None:
    HOSTILE[attack](plain)
    settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})
    with seconds(15), pytest.raises(BadData):
        asyncio.run(run_session(SPEC, settings, journal_path=plain, resume=True))
    assert not plain.with_name("planted").exists()


def test_a_wal_of_another_file_changes_nothing(plain: Path, trader: Trader) -> None:
    plain.with_name("journal.sqlite-wal").write_bytes(os.urandom(1_000_000))
    with seconds(15):
        assert trader("journal", "verify", RUN)[0] == 0


def test_an_event_that_nobody_could_read_again_is_not_written(tmp_path: Path) -> None:
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        journal.append(event(1))
        with pytest.raises(BadData, match="more than a journal keeps"):
            journal.append(event(2, payload=SessionStarted(parameters={"x": "y" * PAYLOAD_MAX})))
        journal.append(event(2))
        assert journal.verify().rows == 2
