"""Runbooks: complete, linked, and every command in them one that the command line understands."""

import re
import shlex
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from trader_lib.app.cli import app
from trader_lib.config.settings import ALIASES, PREFIX, SETTING_NAMES
from trader_lib.trading.events import TradingState

ROOT = Path(__file__).parent.parent
BOOKS = sorted((ROOT / "docs/runbooks").glob("*.md"))
PARTS = ["What it means", "How to check", "What to do", "How to come back"]
VARIABLES = {PREFIX + name.replace(".", "__").upper() for name in SETTING_NAMES} | set(ALIASES)


def commands(text: str) -> list[str]:
    """Each `trader …`, in a block or in a line."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`(trader [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line for line in [*lines, *(" ".join(one.split()) for one in inline)] if line.startswith("trader ")]


def understood(command: str) -> bool:
    """Whether the command line knows the command and its options; nothing is run."""
    try:
        app.parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)
    except CycloptsError as error:
        missing = type(error).__name__ == "MissingArgumentError"
        return missing and command in ("trader kill", "trader reduce", "trader resume", "trader notify")
    return True


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_every_command_is_one_that_exists(book: Path) -> None:
    text = book.read_text(encoding="utf-8")
    assert commands(text) or book.stem == "README"
    for command in commands(text):
        assert understood(command), f"{book.name}: {command}"


@pytest.mark.parametrize("wrong", ["trader stop RUN", "trader status RUN --verbose", "trader summary --day"])
def test_check_of_commands_can_fail(wrong: str) -> None:
    assert not understood(wrong)


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_links_lead_somewhere(book: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", book.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (book.parent / target).exists(), f"{book.name} links {target}"


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_settings_that_are_named_exist(book: Path) -> None:
    named = set(re.findall(rf"\b{PREFIX}[A-Z0-9_]+", book.read_text(encoding="utf-8")))
    assert named <= VARIABLES, sorted(named - VARIABLES)


def test_runbook_of_an_alert_has_its_four_parts_and_is_listed() -> None:
    index = (ROOT / "docs/runbooks/README.md").read_text(encoding="utf-8")
    for book in BOOKS:
        text = book.read_text(encoding="utf-8")
        if text.startswith("# Trader"):
            assert re.findall(r"^## (.+)$", text, re.MULTILINE) == PARTS, book.name
        assert book.stem == "README" or f"({book.name})" in index, f"{book.name} is not listed"


def test_messages_name_runbooks_that_exist() -> None:
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "trader_lib").rglob("*.py"))]
    named = {name for source in sources for name in re.findall(r'runbook="([a-z-]+)"', source)}
    notices = (ROOT / "trader_lib/observe/notices.py").read_text(encoding="utf-8")
    named |= set(re.findall(r'return "ERROR", .*, "([a-z-]+)"$', notices, re.MULTILINE)) | {"incident"}
    named |= {state.lower() for state in TradingState if state is not TradingState.ACTIVE}
    assert {"session-down", "scheduled-run", "agent-restarting", "halted"} <= named
    assert named <= {book.stem for book in BOOKS}
