"""A journal whose process dies at a write and whose disk fills up, and which knows what is safe."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.simulation.plan import Death, Full
from trader_lib.journal.journal import SqliteJournal
from trader_lib.trading.events import AgentFailed, Event, OrderIntended, ReplaceIntended


class Died(BaseException):
    """The process is dead: nothing that it does has an effect any more."""


class Record:
    """What is known of all lives of a session: which intents are safe, who failed, how often something was written.

    seconds: since the market opened. dies: called when the process dies.
    """

    def __init__(
        self, deaths: tuple[Death, ...], full: tuple[Full, ...], seconds: Callable[[], float], dies: Callable[[], None]
    ) -> None:
        self._deaths, self._full, self._seconds, self.dies = list(deaths), full, seconds, dies
        self.room_made = False
        self.down_s = 0.0  # of the last death
        self.writes = 0
        self.intents: dict[int, int] = {}  # number of an intent: writes until it
        self.safe: dict[str, OrderIntended] = {}
        self.moves: dict[str, ReplaceIntended] = {}  # safe as well
        self.failures: list[str] = []
        self.refused = 0  # writes, by a full disk

    def due(self) -> Death | None:
        """The death that this write is."""
        for death in self._deaths:
            since = 0 if death.after == "start" else self.intents.get(death.number)
            number = death.number if death.after == "start" else death.plus
            if since is not None and self.writes == since + number:
                self._deaths.remove(death)
                self.down_s = death.down_s
                return death
        return None

    def fullness(self) -> Full | None:
        """How the disk is full just now."""
        if self.room_made:
            return None
        return next((full for full in self._full if full.at_s <= self._seconds() < full.at_s + full.for_s), None)


class Disk:
    """A connection to SQLite on a disk that may be full."""

    def __init__(self, connection: sqlite3.Connection, record: Record) -> None:
        self._connection, self._record = connection, record

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        writes = statement.lstrip().startswith(("INSERT", "COMMIT", "PRAGMA wal"))
        full = self._record.fullness() if writes else None
        if full is not None:
            self._record.refused += 1
            if full.rolls_back and self._connection.in_transaction:
                self._connection.rollback()
            raise sqlite3.OperationalError("database or disk is full")
        return self._connection.execute(statement, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


class WatchedJournal(SqliteJournal):
    """One life's journal."""

    def __init__(self, path: Path, record: Record) -> None:
        super().__init__(path)
        self._connection = Disk(self._connection, record)  # type: ignore[assignment]
        self._record = record
        self._fresh: list[OrderIntended] = []
        self._fresh_moves: list[ReplaceIntended] = []
        self.is_dead = False

    def append(self, event: Event) -> None:
        death = self._write_number()
        if death is None or death.written:
            super().append(event)
            if isinstance(event.payload, OrderIntended):
                self._fresh.append(event.payload)
                self._record.intents.setdefault(len(self._record.intents) + 1, self._record.writes)
            elif isinstance(event.payload, ReplaceIntended):
                self._fresh_moves.append(event.payload)
            elif isinstance(event.payload, AgentFailed):
                self._record.failures.append(f"{event.payload.agent}: {event.payload.error}")
        if death is not None:
            self._die()

    def commit(self) -> None:
        death = self._write_number() if self._seq != self._committed and not self.is_dead else None
        if death is None or death.written:
            if self.is_dead:
                raise Died
            super().commit()
            self._record.safe.update((intent.request.client_order_id, intent) for intent in self._fresh)
            self._record.moves.update((intent.request.client_order_id, intent) for intent in self._fresh_moves)
            self._fresh.clear()
            self._fresh_moves.clear()
        if death is not None:
            self._die()

    def _write_number(self) -> Death | None:
        if self.is_dead:
            raise Died
        self._record.writes += 1
        return self._record.due()

    def _die(self) -> None:
        self.is_dead = True
        self._record.dies()
        raise Died

    def close(self) -> None:
        if not self.is_dead:
            super().close()
            return
        if not self._closed:
            self._closed = True
            self._connection.close()  # what was not committed is gone
