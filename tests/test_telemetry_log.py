"""No secret reaches the file or the terminal, by whatever door it came."""

import asyncio
import base64
import json
import logging
import sys
from datetime import date

import pytest
from loguru import logger
from pydantic import BaseModel, SecretStr, ValidationError

from trader_lib.config.sections import LoggingSettings
from trader_lib.config.settings import load_settings
from trader_lib.telemetry.log import bind_correlation, bind_session, configure_logging, correlation_id, get_logger, mask

KEY, SECRET = "PKEXAMPLE0123456789", 'sÉcret/"quoted"+and$long\\ish'
SETTINGS = load_settings("paper", environ={"APCA_API_KEY_ID": KEY, "APCA_API_SECRET_KEY": SECRET}, env_file=None)


@pytest.fixture(autouse=True)
def quiet_again():
    yield
    configure_logging(LoggingSettings(terminal="off"), None, [])
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if handler.name != "trader_lib"]


class Nested(BaseModel):
    inner: object
    key: SecretStr = SecretStr(SECRET)


class Talkative:
    def __repr__(self) -> str:
        return f"<client {KEY}:{SECRET}>"


class CannotSayItError(Exception):
    def __str__(self) -> str:
        raise ValueError(SECRET)


def raise_it(error: BaseException) -> None:
    local_variable = SECRET
    assert local_variable
    raise error


def doors() -> list[BaseException]:
    cause = ValueError(f"in the cause: {SECRET}")
    chained = RuntimeError({"headers": {"APCA-API-SECRET-KEY": SECRET, "APCA-API-KEY-ID": KEY}})
    chained.__cause__ = cause
    noted = KeyError(SECRET)
    noted.add_note(f"a note with {SECRET!r}")
    group = ExceptionGroup("several", [ConnectionError(SECRET), chained])
    found: list[BaseException] = [chained, noted, group, CannotSayItError(), TimeoutError(Talkative())]
    try:
        Nested(inner=1, key=[SECRET])
    except ValidationError as error:
        found.append(error)
    return found


@pytest.mark.parametrize("terminal", ["text", "json"])
def test_a_secret_reaches_neither_file_nor_terminal(tmp_path, capsys, terminal):
    file = tmp_path / "log.jsonl"
    configure_logging(LoggingSettings(terminal=terminal, level="TRACE"), file, SETTINGS.secrets())
    log = get_logger("execution")
    for error in doors():
        try:
            raise_it(error)
        except BaseException:
            log.exception("failed with {}", type(error).__name__, error=error, also=[str(error.args)])
            logging.getLogger("alpaca.stream").exception("error: %r", error)
    log.info(f"key {KEY} and {SECRET}")
    log.info(
        "fields", nested=[{"a": ({SECRET}, Nested(inner={"deep": [Talkative(), SECRET.encode()]}))}], settings=SETTINGS
    )
    log.bind(client=Talkative(), api_key="unregistered-value").warning("bound")
    log.info("Authorization: Basic {}", base64.b64encode(f"{KEY}:{SECRET}".encode()).decode())
    with bind_correlation(f"c-{SECRET}"), bind_session(f"s-{KEY}"):
        log.info("in the ids")
    output = "".join(capsys.readouterr())
    text = file.read_text(encoding="utf-8")
    spellings = [
        KEY,
        SECRET,
        json.dumps(SECRET)[1:-1],
        repr(SECRET)[1:-1],
        "unregistered-value",
        "UEtFWEFNUExFM",
        "sÉcret",
        "ish",
    ]
    for written in (text, output, "\n".join(str(json.loads(line)) for line in text.splitlines())):
        assert written.count("********") > 15
        for spelling in spellings:
            assert spelling not in written, spelling
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 2 * len(doors()) + 5
    assert set(rows[0]) == {
        "time",
        "level",
        "message",
        "agent",
        "correlation_id",
        "trace_id",
        "session_id",
        "extra",
        "exception",
    }
    assert "raise_it(error)" in rows[0]["exception"]


async def test_ids_follow_the_task_that_bound_them(tmp_path):
    file = tmp_path / "log.jsonl"
    configure_logging(LoggingSettings(terminal="off"), file, [])

    async def inner() -> None:
        await asyncio.sleep(0)
        get_logger("risk").info("inner")

    async def outer(name: str) -> None:
        with bind_correlation(name):
            await asyncio.create_task(inner())

    with bind_session("s"):
        await asyncio.gather(outer("a"), outer("b"))
    get_logger("risk").info("after")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert sorted((row["correlation_id"], row["session_id"]) for row in rows[:2]) == [("a", "s"), ("b", "s")]
    assert (rows[2]["correlation_id"], rows[2]["session_id"], correlation_id.get()) == (None, None, None)


def test_configuring_again_replaces_and_closes_what_was_there(tmp_path):
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    configure_logging(LoggingSettings(terminal="off"), first, [])
    configure_logging(LoggingSettings(terminal="off"), second, [])
    logger.info("once")
    logging.getLogger("other").error("once more")
    assert first.read_text(encoding="utf-8") == "" and len(second.read_text(encoding="utf-8").splitlines()) == 2


def test_a_dead_log_file_is_reported_once_and_stops_nobody(tmp_path, capsys, monkeypatch):
    configure_logging(LoggingSettings(terminal="off"), tmp_path / "log.jsonl", [SECRET])
    (handler,) = logger._core.handlers.values()
    handler._sink._stream._file.close()
    get_logger("risk").info(SECRET)
    get_logger("risk").info(SECRET)
    assert capsys.readouterr().err == "The log file cannot be written any more: ValueError\n"


def test_a_closed_terminal_and_a_broken_record_stop_nobody(capsys, monkeypatch):
    class Hostile(dict):
        def items(self):
            raise RuntimeError(SECRET)

    configure_logging(LoggingSettings(), None, [SECRET])
    get_logger("risk").info("x", data=Hostile())
    assert capsys.readouterr().err == '{"level": "ERROR", "message": "a record could not be written: RuntimeError"}\n'
    monkeypatch.setattr(sys, "stderr", open(__file__, encoding="utf-8"))  # noqa: SIM115
    get_logger("risk").info("into the void")


def test_mask_keeps_what_is_not_secret():
    innocent = {"qty": 3, "price": 1.5, "at": date(2005, 1, 3), "ok": True, "none": None, "symbols": ("IBM", "AAPL")}
    assert mask(innocent, [SECRET, ""]) == {**innocent, "at": "2005-01-03", "symbols": ["IBM", "AAPL"]}
