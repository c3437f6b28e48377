"""`trader search` as a command: a run folder, a report, the ledger, Ctrl-C, kill -9, resume, and what it refuses."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trader_lib.app.cli import main
from trader_lib.research.trials import LEDGER, TrialLedger
from trader_lib.runs.store import RunFolder, RunStore
from trader_lib.runs.templates import template_parameters, template_path

DAYS = ("--symbols", "IBM", "--start", "2006-01-03", "--end", "2007-12-31")
SPACE = ("--space", "fast=2:40", "--space", "slow=20:120")
FEW = (*SPACE, *DAYS, "--trials", "6", "--folds", "2")


def command(*words: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        "import sys; from trader_lib.app.cli import main; sys.exit(main(sys.argv[1:]))",
        *words,
    ]


@pytest.mark.slow
def test_a_search_leaves_a_study_a_report_a_result_and_an_entry_in_the_ledger(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRADER_RUNS__TRIALS", "true")
    runs = ("--runs", str(tmp_path))
    assert main(("search", *FEW, "--by", "sharpe_ratio,turnover", *runs)) == 0
    run = RunStore(tmp_path).find("latest-search")
    figures = run.result().statistics
    (entry,) = TrialLedger(tmp_path / LEDGER).entries()
    assert entry.kind == "search" and entry.strategy == "sma_cross" and 1 <= entry.count <= 6
    assert figures["trials_done"] == 6 and figures["trials"] == entry.count and figures["trades"]
    assert (run.path / "search" / "search.sqlite").is_file()
    page = run.report.read_text(encoding="utf-8")
    for heading in ("The folds of the best", "Is it luck?", "Trials that nothing beats", "The best ones"):
        assert heading in page
    assert "trials has a Sharpe ratio of" in page and "39 values from 2 to 40" in page and "parcoords" in page
    capsys.readouterr()
    assert main(("search", "--resume", run.name, *runs)) == 2
    assert "every trial already" in capsys.readouterr().err
    assert main(("sweep", "--resume", run.name, *runs)) == 2
    assert "`trader sweep --resume` goes on with its own kind only" in capsys.readouterr().err
    assert main(("search", "--resume", run.name, *SPACE, *runs)) == 2
    assert "keeps its space" in capsys.readouterr().err


def trials_in(folder: Path) -> int:
    """Trials that ended, in the studies of the runs of a folder."""
    done = 0
    for place in folder.glob("*/search/search.sqlite"):
        with sqlite3.connect(f"file:{place}?mode=ro", uri=True) as database:
            try:
                query = "select count(*) from trials where state in ('COMPLETE', 'PRUNED')"
                done += int(database.execute(query).fetchone()[0])
            except sqlite3.OperationalError:
                continue  # its tables are being made
    return done


def begun(folder: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(1800):
        if trials_in(folder) >= 3:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("no trial within a minute and a half")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_search_that_is_stopped_or_killed_goes_on(tmp_path: Path, number: int, code: int) -> None:
    words = command("search", *SPACE, *DAYS, "--trials", "60", "--folds", "2", "--runs", str(tmp_path))
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        begun(tmp_path, process)
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)  # the kernel leads a group of its own, and ends with its parent's socket
        else:
            process.send_signal(number)
        _, said = process.communicate(timeout=120)
        assert process.returncode == code, said
    if number == signal.SIGINT:
        assert "trader search --resume" in said
    kept = trials_in(tmp_path)
    assert 3 <= kept < 60
    assert main(("search", "--resume", "latest-search", "--runs", str(tmp_path))) == 0
    result = RunStore(tmp_path).find("latest-search").result()
    assert result.status == "completed" and result.statistics["trials_done"] == 60 and trials_in(tmp_path) == 60


REFUSED = [
    (("--space", "fats=2:9"), 2, "has no parameter 'fats'; it takes fast, slow. Did you mean 'fast'?"),
    ((), 2, "Nothing varies: give --space NAME=FIRST:LAST:STEP"),
    (("--space", "fast="), 2, "--space fast= should read NAME=FIRST:LAST:STEP"),
    (("--space", "fast=9:2"), 2, "--space fast=9:2 leads nowhere"),
    ((*SPACE, "--by", "sharpe"), 2, "Did you mean 'sharpe_ratio'?"),
    ((*SPACE, "--by", "fees,fees"), 2, "an objective is given twice"),
    ((*SPACE, "--trials", "0"), 2, "trials: "),
    ((*SPACE, "--folds", "0"), 2, "folds: "),
    ((*SPACE, "--storage", "mysql://ada:s3cret@host/db"), 2, "the URL carries a password"),
    ((*SPACE, "--storage", "postgresql://host/db?user=ada&password=s3cret"), 2, "the URL carries a password"),
    ((*SPACE, "--storage", "sqlite:////no/such/folder/db"), 3, "cannot be opened: (sqlite3.OperationalError) unable"),
    ((*SPACE, "--storage", "nosuch://host/db"), 3, "The study 'search' cannot be opened"),
    ((*SPACE, "--trust"), 2, "--trust is for a search that is resumed"),
    (("--space", "fast=50", "--space", "slow=20,30"), 4, "refuses every combination that was tried, the first because"),
    (("--resume", "latest-search"), 2, "There is no search run in"),
]


@pytest.mark.parametrize(("words", "code", "sentence"), REFUSED)
def test_what_cannot_be_searched_is_a_sentence_before_a_folder_is_made(
    words: tuple[str, ...], code: int, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    days = () if "--resume" in words else DAYS
    assert main(("search", *words, *days, "--runs", str(tmp_path))) == code
    said = " ".join(capsys.readouterr().err.split())
    assert sentence in said and "s3cret" not in said
    assert not any(tmp_path.iterdir())


def interrupted(folder: Path) -> RunFolder:
    """A run as a search leaves it that was killed before its study began."""
    run = RunStore(folder).create("search")
    asked = {"space": {"fast": [5, 6], "slow": [20]}, "symbols": ["IBM"], "start": "2006-01-03", "end": "2007-12-31"}
    run.write_params({"kind": "search", "parameters": asked})
    return run


def test_a_study_that_was_removed_is_not_begun_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = interrupted(tmp_path)
    assert main(("search", "--resume", run.name, "--runs", str(tmp_path))) == 4
    assert "There is no study 'search' in" in capsys.readouterr().err
    (run.path / "search").mkdir()
    (run.path / "search" / "search.sqlite").write_text("no database at all, but a text that is long enough" * 9)
    assert main(("search", "--resume", run.name, "--runs", str(tmp_path))) == 3
    assert "file is not a database" in capsys.readouterr().err
    assert not run.report.exists()


def test_a_run_without_the_extra_says_how_to_install_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(extra: str) -> tuple[str, ...]:
        return ("optuna",) if extra == "search" else ()

    monkeypatch.setattr("trader_lib.errors.extras.missing_packages", missing)
    assert main(("search", *FEW, "--runs", str(tmp_path))) == 3
    assert "pip install 'trader_lib[search]'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_search_in_which_no_trial_finishes_fails_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = ("--space", "window=20,30", "--strategy", "vol_target", "-p", "target=0.0000001")
    assert main(("search", *flat, *DAYS, "--trials", "2", "--folds", "2", "--runs", str(tmp_path))) == 5
    said = " ".join(capsys.readouterr().err.split())
    assert "No combination got to the end: the first was given up because: It has no sharpe_ratio" in said
    assert RunStore(tmp_path).find("latest-search").result().status == "failed"


def test_the_template_takes_what_a_search_is_asked_for() -> None:
    from trader_lib.runs.searches import SearchParameters

    backtests = {"calendar", "benchmark", "csv"}
    taken = set(template_parameters(template_path("search")))
    assert taken == (set(SearchParameters.model_fields) | {"run_folder", "resume"}) - backtests
