"""The course: every lesson runs as it is, shows what its text says, and reaches a reader as a page and as a file."""

import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lessons import Played, play
from trader_lib.app.course import course_folder, lessons
from trader_lib.telemetry.progress import can_redraw

LESSONS = sorted(course_folder().glob("*.ipynb"))
Trader = Callable[..., tuple[int, str, str]]


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: None) -> Callable[[str], Played]:
    """Run a lesson in an empty folder, without any configuration."""
    for name in list(os.environ):
        if name.startswith(("TRADER_", "APCA_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return lambda name: play(next(path for path in LESSONS if path.stem.partition("_")[2] == name))


def test_own_data(played: Callable[[str], Played]) -> None:
    lesson = played("own_data")
    kept = lesson["store"].read(["IBM", "MSFT"])
    assert lesson["bars"].content_hash == lesson["sample"].content_hash == kept.content_hash
    assert "no bar between 2010-01-15 and 2010-02-02" in lesson.text and "the high is below" in lesson.text
    assert "jump" in lesson.text and "no_volume" in lesson.text and lesson.figures == 1


def test_first_strategy(played: Callable[[str], Played]) -> None:
    lesson = played("first_strategy")
    assert "Did you mean 'dip'?" in lesson.text and "(1007, 2)" in lesson.text
    orders, fills = lesson["result"].orders_frame, lesson["result"].fills_frame
    assert len(orders) == 100 and (fills["bar"].iloc[:4].to_numpy() > orders["decided_at"].iloc[:4].to_numpy()).all()
    assert lesson.figures == 2


def test_look_ahead(played: Callable[[str], Played]) -> None:
    lesson = played("look_ahead")
    assert lesson["too_good"].look_ahead and lesson["too_good"].equity_end > 10 * lesson["honest"].equity_end
    assert "it saw bars after 2005-01-03" in lesson.text and not lesson["honest"].look_ahead
    assert "bars that were enough here: 44" in lesson.text
    assert lesson["start"].first is None and "none found in" in lesson.text and lesson.figures == 1


def test_backtest(played: Callable[[str], Played]) -> None:
    lesson = played("backtest")
    free, paid = lesson["free"], lesson["result"]
    assert free.order_list_hash.startswith("sha256:22e6e504c34") and paid.equity_end < free.equity_end
    assert paid.statistics["buy_and_hold_return"] > paid.statistics["total_return"]  # as the text says
    assert "Buys were cut to the money there was" in lesson.text and lesson.text.endswith("True\n")
    assert lesson["sheet"].stat().st_size > 1e6 and lesson.figures == 1


def test_session(played: Callable[[str], Played]) -> None:
    lesson = played("session")
    assert len(lesson["session"].orders) == 51 and "The books agree" in lesson.text and "True True" in lesson.text
    kinds = [type(event.payload).__name__ for event in lesson["story"]]
    order = ["BarsClosed", "TargetsDecided", "OrderProposed", "RiskDecided", "OrderIntended", "OrderAcknowledged"]
    assert [kind for kind in dict.fromkeys(kinds) if kind in order] == order and kinds[-1] == "FillRecorded"
    assert len(lesson["decided"].checks) > 5 and "numbered without a gap" in lesson.text and lesson.figures == 1


@pytest.mark.slow
def test_sweep(played: Callable[[str], Played]) -> None:
    lesson = played("sweep")
    best = lesson["best"]
    assert best["sharpe_ratio"] > 1 and best["total_return"] > 1, "the best of the nonsense should look fine"
    assert lesson["judged"]["Luck"].colour == "red" and not lesson["judged"].passed
    assert len(lesson["lucky"].frame) == 55 and lesson.figures == 2


def test_limits(played: Callable[[str], Played]) -> None:
    lesson = played("limits")
    assert lesson["bounded"].refused > len(lesson["bounded"].orders) > 0
    halted, plain = lesson["halted"].statistics["max_drawdown"], lesson["plain"].statistics["max_drawdown"]
    assert halted < 2 * plain < 0, "a halt that sells nothing falls on, as the text says"
    assert "Did you mean 'max_drawdown'?" in lesson.text and lesson.figures == 2
    purposes = lesson["safe"].orders_frame.groupby("purpose")["status"].agg(set)
    assert any("filled" in statuses for purpose, statuses in purposes.items() if purpose != "entry")


def test_paper_alpaca(played: Callable[[str], Played]) -> None:
    lesson = played("paper_alpaca")
    broker = lesson["settings"].broker
    assert broker.stage == "paper" and broker.secret_key.get_secret_value() not in lesson.text
    assert lesson["session"].status == "completed" and lesson["session"].orders and lesson["session"].reconciliation.ok
    assert "broker" in lesson.text and lesson.shown[-2] == "True"


def test_resume(played: Callable[[str], Played]) -> None:
    lesson = played("resume")
    assert 0 < len(lesson["stopped"].orders) < len(lesson["planned"].orders)
    assert lesson["resumed"].order_list_hash == lesson["planned"].order_list_hash
    assert 0 < lesson["events_then"] < lesson["same"].events
    assert lesson["same"].agrees and not lesson["other"].agrees


def test_several(played: Callable[[str], Played]) -> None:
    lesson = played("several")
    assert "{'trend': True, 'swing': True}" in lesson.text and lesson.figures == 1
    assert "research" in lesson.text and "New York" in lesson.text


@pytest.mark.slow
def test_night(played: Callable[[str], Played]) -> None:
    lesson = played("night")
    assert "ended: every bar was played" in lesson.text and "The books agree with the broker's." in lesson.text
    assert "Test message" in lesson["received"][0]["text"] and "numbered without a gap" in lesson.text


def test_each_lesson_has_a_test_of_its_own() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for lesson in lessons():
        assert f"\ndef test_{lesson.name}(" in text, f"{lesson.file} is not tested"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_is_clean_numbered_and_leads_to_the_next(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    number, following = int(path.stem[:2]), LESSONS[LESSONS.index(path) + 1 :]
    assert "".join(cells[0]["source"]).startswith(f"# {number} · ")
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    assert all(re.fullmatch("[0-9a-f]{8}", cell["id"]) and set(cell["metadata"]) <= {"tags"} for cell in cells)
    last = "".join(cells[-1]["source"])
    assert "## Next" in last and (not following or f"trader course {following[0].stem.partition('_')[2]}`" in last)


def test_no_bar_is_drawn_where_a_notebook_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    assert can_redraw()
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert not can_redraw()


def test_trader_course_lists_copies_and_writes_over_nothing(trader: Trader) -> None:
    code, out, _ = trader("course")
    assert code == 0 and all(lesson.name in out for lesson in lessons())
    code, out, err = trader("course", "first_strategy")
    assert code == 0 and out.strip() == "02_first_strategy.ipynb" and "jupyter lab 02_first_strategy.ipynb" in err
    assert Path(out.strip()).read_bytes() == (course_folder() / out.strip()).read_bytes()
    Path(out.strip()).write_text("mine")
    code, _, err = trader("course", "first_strategy")
    assert code == 2 and "is there already" in err and Path("02_first_strategy.ipynb").read_text() == "mine"
    code, _, err = trader("course", "first_stratgy")
    assert code == 2 and "Did you mean 'first_strategy'?" in err
