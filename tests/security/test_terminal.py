"""Text that a folder, a broker or an error brings along is shown on the terminal, and never obeyed by it."""

import asyncio
import contextlib
import io
import json
import unicodedata
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console

import trader_lib.app.views as views
from trader_lib.app.watch import picture
from trader_lib.config.settings import load_settings
from trader_lib.errors.taxonomy import TraderError
from trader_lib.journal.journal import SqliteJournal
from trader_lib.observe.watch import SessionWatch
from trader_lib.runs.cells import refusal_rows
from trader_lib.runs.result import RunResult, read_result
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.trading.events import Event

RUN = "20260105T210000Z-paper-abcdef"
EVIL = "\x1b[2J\x9b31m\u202e\x07\x7f\u2066[red]r[/red][link=https://e.example]l[/link]"
SHORT = "\x1b[2J\x9b"
SEEN = r"\x1b[2J\x9b31m\u202e\x07\x7f\u2066"
Trader = Callable[..., tuple[int, str, str]]


def leaves(document: Any) -> Iterator[tuple[Any, Any]]:
    """Each place of a JSON document that holds a text, as its container and key."""
    for key, value in list(document.items()) if isinstance(document, dict) else list(enumerate(document)):
        if isinstance(value, str):
            yield document, key
        elif isinstance(value, dict | list):
            yield from leaves(value)


def poisoned(document: Any, check: Callable[[Any], object]) -> Any:
    """The document with something evil at the end of every text that may hold it."""
    for container, key in leaves(document):
        before = container[key]
        container[key] = before + EVIL
        try:
            check(document)
        except (TraderError, ValueError):
            container[key] = before
    return document


def poisoned_event(event: Event) -> Event:
    payload = orjson.loads(event.payload.to_json())
    poisoned(payload, lambda changed: type(event.payload).model_validate_json(orjson.dumps(changed)))
    changed = type(event.payload).model_validate_json(orjson.dumps(payload))
    return event.model_copy(update={"payload": changed, "source": event.source + EVIL})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose journal and result are poisoned wherever they hold a text of any content."""
    run = tmp_path_factory.mktemp("recorded") / RUN
    run.mkdir()
    spec = SessionSpec.model_validate(
        {"symbols": ("IBM", "AAPL"), "params": {"fast": 3, "slow": 8}, "start": date(2005, 1, 3)}
        | {"end": date(2005, 2, 28), "limits": {"restricted": ["AAPL"]}}
    )
    settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})
    found = asyncio.run(run_session(spec, settings, journal_path=run / "honest.sqlite"))
    with (
        SqliteJournal(run / "honest.sqlite", read_only=True) as honest,
        SqliteJournal(run / "journal.sqlite") as journal,
    ):
        for event in honest.read():
            journal.append(poisoned_event(event))
    result = RunResult.model_validate(
        {"kind": "paper", "status": "failed", "started_at": "2026-01-05T21:00:00Z", "ended_at": "2026-01-05T21:00:00Z"}
        | {"parameters": spec.values(), "versions": {"python": "3"}, "orders": found.orders}
        | {
            "refusals": refusal_rows(found.refusals),
            "failure": {"error": "Odd", "section": "Session", "message": "odd"},
        }
    )
    document = poisoned(
        json.loads(result.to_json()), lambda changed: RunResult.model_validate_json(orjson.dumps(changed))
    )
    document["statistics"] = {f"total_return{EVIL}": 0.1, "trades": EVIL}
    document["parameters"]["params"] = {f"fast{EVIL}": EVIL}
    (run / "result.json").write_bytes(orjson.dumps(document))
    (run / "log.jsonl").write_text(
        json.dumps({"level": "ERROR", "message": EVIL, "agent": EVIL, "time": "2026-01-05"}) + "\n"
    )
    assert len(read_result(run / "result.json").orders) > 2 and found.refusals
    return run


def is_harmless(text: str) -> bool:
    """Whether a terminal only shows a text: an independent look at every character."""
    return not any(unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} and c not in "\n\t" for c in text)


COMMANDS = {
    "list": ("runs", "list"),
    "show": ("runs", "show", RUN, "--orders", "5"),
    "compare": ("runs", "compare", RUN, RUN),
    "events": ("journal", "show", RUN, "--limit", "0"),
    "export": ("journal", "export", RUN),
    "status": ("status", RUN),
    "watch": ("watch", RUN, "--once"),
}


@pytest.mark.parametrize("json_", [False, True])
@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_folder_brings_is_shown_and_not_obeyed(trader: Trader, recorded: Path, name: str, json_: bool) -> None:
    more = ("--json",) if json_ and name != "export" else ()
    _, out, err = trader(*COMMANDS[name], "--runs", str(recorded.parent), *more)
    assert is_harmless(out) and is_harmless(err), name
    if json_ or name == "export":
        written = json.loads(out) if name != "export" else [json.loads(line) for line in out.splitlines()]
        assert EVIL.encode() in orjson.dumps(written).replace(b"\\u001b", b"\x1b").replace(b"\\u0007", b"\x07")
    else:
        assert SEEN in "".join(out.translate(str.maketrans("", "", "\n │┃")).split()), out


@pytest.mark.parametrize(
    "command", [("replay", RUN), ("replay", RUN, "--json"), ("journal", "verify", RUN), ("summary", RUN)]
)
def test_what_cannot_be_read_is_said_harmlessly(trader: Trader, recorded: Path, command: tuple[str, ...]) -> None:
    _, out, err = trader(*command, "--runs", str(recorded.parent))
    assert out + err and is_harmless(out) and is_harmless(err)


@pytest.mark.parametrize("width", [60, 100, 160])
def test_the_picture_of_a_session_on_a_terminal_holds_no_escape_but_its_own(recorded: Path, width: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, legacy_windows=False)
    console.print(picture(SessionWatch(recorded).look_whole(), width))
    shown = screen.getvalue()
    assert "\x1b[" in shown  # colours of its own
    for obeyed in ("\x1b[2J", "\x9b", "\u202e", "\x07", "\x1b]8", "\u2066"):
        assert obeyed not in shown


def test_what_is_typed_or_set_is_quoted_harmlessly(trader: Trader, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (("runs", "show", EVIL), ("backtest", "--strategy", EVIL), ("run", f"{EVIL}.ipynb"), (EVIL,)):
        code, out, err = trader(*command)
        assert code == 2 and err and is_harmless(out) and is_harmless(err)
    monkeypatch.setenv(f"TRADER_ODD{SHORT}", EVIL)
    code, out, err = trader("config")
    assert code == 3 and r"\x1b[2J\x9b" in err and is_harmless(out) and is_harmless(err)


@pytest.mark.parametrize("debug", ["", "1"])
def test_an_error_of_any_text_is_printed_harmlessly(
    trader: Trader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, debug: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(EVIL)

    monkeypatch.setattr(views, "list_runs", fail)
    monkeypatch.setenv("TRADER_DEBUG", debug)
    code, out, err = trader("runs", "list", "--runs", str(tmp_path))
    assert code == 1 and SEEN in err and is_harmless(err) and not out
    assert ("Traceback" in err) is bool(debug)


def test_what_a_kernel_says_is_printed_harmlessly(trader: Trader, tmp_path: Path) -> None:
    source = f"import sys\nprint({EVIL!r})\nprint({EVIL!r}, file=sys.stderr)\nraise RuntimeError({EVIL!r})"
    cell = {"cell_type": "code", "source": source, "metadata": {}, "outputs": [], "execution_count": None, "id": "a"}
    heading = {"cell_type": "markdown", "source": f"# {EVIL}", "metadata": {}, "id": "b"}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    notebook = tmp_path / "odd.ipynb"
    notebook.write_text(json.dumps({"cells": [heading, cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    code, out, err = trader("run", str(notebook))
    assert code == 5 and SEEN in err and is_harmless(err)
    assert is_harmless(out) and SEEN in "".join(out.split())


def test_a_table_on_a_terminal_reads_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    from trader_lib.app import console

    with contextlib.redirect_stdout(io.StringIO()) as out:
        console.print_table(["[red]Name#"], [("[link=https://e.example]x[/link]",)], title="[bold]T[/bold]")
        console.print_facts({"[red]name": "[/]"}, title="[blink]T")
    for text in ("[red]Name", "[link=https://e.example]x[/link]", "[bold]T[/bold]", "[red]name", "[/]", "[blink]T"):
        assert text in out.getvalue()
