"""Whatever looks at a session from beside it changes nothing of it, and never takes it along."""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date
from pathlib import Path

import pytest

from trader_lib.config.settings import Settings, load_settings
from trader_lib.journal.journal import SqliteJournal
from trader_lib.session.companions import SessionParts
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.trading.events import Event

SPEC = SessionSpec(params={"fast": 5, "slow": 15}, start=date(2005, 1, 3), end=date(2005, 3, 31))


pytestmark = pytest.mark.usefixtures("quiet")


def settings(transport: str = "in_process") -> Settings:
    return load_settings(environ={}, env_file=None, overrides={"broker": {"transport": transport}})


def journal_in(folder: Path) -> Path:
    folder.mkdir()
    return folder / "journal.sqlite"


class Listener:
    """Counts what it hears, the past apart."""

    def __init__(self) -> None:
        self.heard, self.past = Counter[str](), Counter[str]()
        self.parts: SessionParts | None = None

    @asynccontextmanager
    async def __call__(self, parts: SessionParts) -> AsyncIterator[None]:
        self.parts = parts
        parts.bus.subscribe("listener", (), self._hear)
        yield

    async def _hear(self, event: Event) -> None:
        assert self.parts is not None
        (self.past if self.parts.is_past(event) else self.heard)[event.type] += 1


@pytest.mark.parametrize("transport", ["in_process", "http"])
async def test_a_listener_hears_everything_and_changes_no_byte(transport: str, tmp_path: Path) -> None:
    alone = await run_session(SPEC, settings(transport), journal_path=journal_in(tmp_path / "a"))
    listener = Listener()
    beside = await run_session(
        SPEC, settings(transport), journal_path=journal_in(tmp_path / "b"), companions=[listener]
    )
    assert alone.journal_path.read_bytes() == beside.journal_path.read_bytes()
    with SqliteJournal(beside.journal_path, read_only=True) as journal:
        assert listener.heard == Counter(event.type for event in journal.read())
    assert not listener.past
    assert listener.parts is not None and listener.parts.run_folder == tmp_path / "b"
    assert listener.parts.spec == SPEC and listener.parts.session_id == beside.session_id


async def test_after_a_restart_the_past_is_told_apart(tmp_path: Path) -> None:
    path = journal_in(tmp_path / "a")
    await run_session(SPEC, settings(), journal_path=path)
    with SqliteJournal(path, read_only=True) as journal:
        written = Counter(event.type for event in journal.read())
    listener = Listener()
    await run_session(SPEC, settings(), journal_path=path, resume=True, companions=[listener])
    assert listener.past == written and not listener.heard


async def test_a_companion_that_fails_takes_nothing_with_it(tmp_path: Path) -> None:
    listener = Listener()

    async def fails(event: Event) -> None:
        raise RuntimeError("cannot listen")

    @asynccontextmanager
    async def deaf(parts: SessionParts) -> AsyncIterator[None]:
        parts.bus.subscribe("deaf", (), fails)
        yield
        raise RuntimeError("cannot leave")

    @asynccontextmanager
    async def late(parts: SessionParts) -> AsyncIterator[None]:
        raise RuntimeError("cannot come")
        yield

    alone = await run_session(SPEC, settings(), journal_path=journal_in(tmp_path / "a"))
    beside = await run_session(
        SPEC, settings(), journal_path=journal_in(tmp_path / "b"), companions=[listener, deaf, late]
    )
    assert beside.status == "completed" and alone.journal_path.read_bytes() == beside.journal_path.read_bytes()
    assert listener.parts is not None and listener.parts.failed == {"deaf": 1, "late": 1}
