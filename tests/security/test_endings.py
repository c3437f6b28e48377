"""How a run ends: agents that gave up, a disk that is full, Ctrl-C twice, `kill -9`. Each is really tried.

The disk is refused in three ways: a writer that finds no room, the system's limit on the size of a file, and, for the
superuser, a file system of a few hundred kilobytes.
"""

import asyncio
import errno
import inspect
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from html import unescape
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from numpy.typing import NDArray

from trader_lib.agents.execution import ExecutionAgent
from trader_lib.agents.risk import RiskAgent
from trader_lib.app.cli import main
from trader_lib.config.settings import Settings, load_settings
from trader_lib.errors.taxonomy import BadData, InvariantBroken, Misconfigured, Misused, RunFailed
from trader_lib.journal import files
from trader_lib.journal.journal import SqliteJournal
from trader_lib.journal.scratch import scratch
from trader_lib.market.bars import Bars
from trader_lib.observe.notices import notice_of
from trader_lib.runs import store as run_store
from trader_lib.runs.result import RESULT_MIME
from trader_lib.runs.resume import ensure_resumable
from trader_lib.runs.runner import run_notebook
from trader_lib.runs.store import RunFolder, RunStore
from trader_lib.session.session import SessionResult, run_session
from trader_lib.session.spec import SessionSpec, StrategyShare
from trader_lib.steering.control import who_runs
from trader_lib.strategy.contract import Strategy
from trader_lib.trading.events import Event, SessionEnded

TRADER = str(Path(sys.executable).with_name("trader"))
WHAT = ["--symbols", "AAPL,IBM", "--start", "2005-01-03", "--end", "2005-06-30", "-p", "fast=3", "-p", "slow=8"]
LONG = ["2008-12-31" if word == "2005-06-30" else word for word in WHAT]
PUBLISH = f"display({{{RESULT_MIME!r}: {{'kind': 'backtest', 'order_list_hash': 'sha256:0'}}}}, raw=True)"
BROKEN = '''
import numpy as np
from trader_lib.strategy.contract import Strategy


class Broken(Strategy):
    """Holds for a week, then has no opinion any more."""

    @property
    def warmup(self):
        return 1

    def targets(self, bars):
        if bars.n >= 8:
            raise ZeroDivisionError("no opinion today")
        return np.full((bars.n, len(bars.symbols)), 0.3)
'''


class Broken(Strategy):
    """Holds for a week, then has no opinion any more."""

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars: Bars) -> NDArray[np.float64]:
        if bars.n >= 8:
            raise ZeroDivisionError("no opinion today")
        return np.full((bars.n, len(bars.symbols)), 0.3)


LINE = inspect.getsourcelines(Broken.targets)[1] + 2  # where it raises

SPEC = SessionSpec(
    params={"fast": 3, "slow": 8}, symbols=("AAPL", "IBM"), start=date(2005, 1, 3), end=date(2005, 2, 28)
)
SETTINGS: Settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})


pytestmark = pytest.mark.usefixtures("quiet")


async def session(folder: Path, spec: SessionSpec = SPEC, **more: Any) -> SessionResult:
    return await run_session(spec, SETTINGS, journal_path=folder / "journal.sqlite", **more)


def ended(result: SessionResult) -> Event:
    with SqliteJournal(result.journal_path, read_only=True) as journal:
        (event,) = journal.read(types=[SessionEnded])
    return event


def wait_for(what: Callable[[], bool], seconds: float = 90.0) -> None:
    ends = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < ends, "waited for too long"
        time.sleep(0.02)


# ---- sessions that end well only in name


async def test_a_session_whose_only_strategy_gave_up_is_degraded_and_stays_so_when_asked_again(tmp_path: Path) -> None:
    result = await session(tmp_path, strategy=Broken())
    assert result.status == "degraded" and result.reason == "every bar was played" and result.reconciliation.ok
    raised = f'It was raised in {__file__}, line {LINE}: `raise ZeroDivisionError("no opinion today")`.'
    assert result.down == {"strategy": f"ZeroDivisionError: no opinion today. {raised}"}
    assert result.degraded == f"The strategy agent gave up after ZeroDivisionError: no opinion today. {raised}"
    notice = notice_of(ended(result))
    assert notice is not None and notice.level == "ERROR" and "no opinion today" in notice.text
    assert (notice.title, notice.runbook) == ("Session ended degraded", "agent-down")
    again = await session(tmp_path, strategy=Broken(), resume=True)
    assert (again.status, again.down, again.order_list_hash) == (result.status, result.down, result.order_list_hash)


async def test_one_of_several_that_gave_up_degrades_the_session_and_is_named(tmp_path: Path) -> None:
    shares = (
        StrategyShare(name="trend", strategy="sma_cross", params={"fast": 3, "slow": 8}, capital="50%"),
        StrategyShare(name="swing", strategy="sma_cross", params={"fast": 3, "slow": 8}, capital="50%"),
    )
    spec = SPEC.model_copy(update={"strategies": shares, "params": {}})
    built = {"trend": spec.assignments()[0].strategy, "swing": Broken()}
    result = await session(tmp_path, spec, strategy=built)
    assert result.status == "degraded" and list(result.down) == ["strategy:swing"]
    assert result.degraded.startswith("The strategy:swing agent gave up after ZeroDivisionError")
    assert result.orders_of("trend")


@pytest.mark.parametrize("agent", [RiskAgent, ExecutionAgent])
async def test_risk_or_execution_that_is_down_degrades_the_session(
    agent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = agent.reactions

    def reactions(self: Any) -> Any:
        def contradiction(_: Event) -> Any:
            raise InvariantBroken("two books for one account")

        return dict.fromkeys(table(self), contradiction)

    monkeypatch.setattr(agent, "reactions", reactions)
    result = await session(tmp_path)
    assert result.status == "degraded" and "two books for one account" in result.down[agent.name]
    assert not result.orders


async def test_a_failure_that_an_agent_recovered_from_leaves_the_session_completed(tmp_path: Path) -> None:
    class Stumbling(Broken):
        def targets(self, bars: Bars) -> NDArray[np.float64]:
            if bars.n == 8:
                raise ZeroDivisionError("no opinion today")
            return np.full((bars.n, len(bars.symbols)), 0.3)

    result = await session(tmp_path, strategy=Stumbling())
    assert (result.status, result.degraded, ended(result).payload.down) == ("completed", "", {})  # type: ignore[attr-defined]


async def test_a_session_that_was_stopped_is_interrupted_and_still_names_who_gave_up(tmp_path: Path) -> None:
    def stop(count: int, _: datetime) -> None:
        if count == 25:
            os.kill(os.getpid(), signal.SIGINT)
        if count >= 25:
            time.sleep(0.02)  # signals have their turn every 10 ms

    result = await session(tmp_path, strategy=Broken(), progress=stop)
    assert result.status == "interrupted" and list(result.down) == ["strategy"]


def test_an_end_of_an_older_journal_names_nobody() -> None:
    assert SessionEnded.model_validate_json(b'{"reason": "every bar was played", "equity": "1"}').degraded == ""


@pytest.mark.slow
def test_a_degraded_run_fails_for_scripts_and_says_so_wherever_it_is_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text(BROKEN)
    runs = ["--runs", str(tmp_path / "runs")]
    what = ["--strategy", "broken.py:Broken", "--symbols", "AAPL", "--start", "2005-01-03", "--end", "2005-01-31"]
    assert main(["paper", "--transport", "in_process", *what, *runs]) == RunFailed.exit_code == 5
    line = BROKEN.splitlines().index('            raise ZeroDivisionError("no opinion today")') + 1
    raised = f'It was raised in broken.py, line {line}: `raise ZeroDivisionError("no opinion today")`.'
    reason = f"The strategy agent gave up after ZeroDivisionError: no opinion today. {raised}"
    told = capsys.readouterr()
    assert f"The session ended degraded. {reason} Its report is" in told.err
    run = RunStore(tmp_path / "runs").find("latest-paper")
    result = run.result()
    assert result.status == "degraded" and result.failure is not None and result.orders
    assert (result.failure.error, result.failure.message, result.failure.cell) == ("AgentDown", reason, None)
    assert reason in unescape(run.report.read_text(encoding="utf-8"))

    def printed(*words: str) -> str:
        main([*words, *runs])
        return capsys.readouterr().out

    assert json.loads(printed("runs", "list", "--json"))[0]["status"] == "degraded"
    assert f"Ended early: {reason}" in printed("runs", "show", "latest-paper")
    assert json.loads(printed("status", "latest-paper", "--json"))["degraded"] == reason
    status = printed("status", "latest-paper")
    assert "ended degraded: every bar was played" in status and reason in status
    assert "■ ended degraded" in printed("watch", "latest-paper", "--once")
    assert json.loads(printed("watch", "latest-paper", "--once", "--json"))["degraded"] == reason
    assert f"It ended degraded. {reason}" in printed("summary", "latest-paper")
    with pytest.raises(Misused, match="has ended already"):
        ensure_resumable(run)


# ---- a disk that is full


def template(path: Path, *cells: str) -> Path:
    code = [nbformat.v4.new_code_cell(cell) for cell in cells]
    code[0].metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Tiny"), *code])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(notebook, path)
    return path


def refuse(monkeypatch: pytest.MonkeyPatch, names: set[str], after: int = 0) -> None:
    """From the given write of these files on, the disk takes the first half of a file and no more."""
    write, seen = files.write_whole, [0]

    def written(path: Path, content: bytes) -> None:
        if path.name in names:
            seen[0] += 1
            if seen[0] > after:
                half = path.with_name(f".{path.name}.part")
                half.write_bytes(content[: len(content) // 2])
                half.unlink()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(run_store, "write_whole", written)


def whole(folder: Path) -> set[str]:
    """The files of a run folder; each of them can be read to its end."""
    for path in folder.iterdir():
        if path.suffix in {".json", ".ipynb"}:
            json.loads(path.read_bytes())
        if path.suffix == ".html":
            assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
        assert not path.name.endswith(".part")
    return {path.name for path in folder.iterdir()} - {"kernel.log"}  # there only if Jupyter had something to say


@pytest.mark.parametrize(
    ("refused", "after", "left"),
    [
        ({"notebook.ipynb"}, 0, {"params.json", "result.json"}),
        ({"notebook.ipynb"}, 4, {"params.json", "notebook.ipynb", "result.json"}),  # a report of half a run is none
        ({"report.html"}, 0, {"params.json", "notebook.ipynb", "result.json"}),
        ({"result.json"}, 0, {"params.json", "notebook.ipynb", "report.html"}),
        ({"notebook.ipynb", "report.html", "result.json"}, 4, {"params.json", "notebook.ipynb"}),
    ],
)
def test_a_disk_that_fills_up_ends_the_run_with_the_reason_and_half_a_file_nowhere(
    refused: set[str], after: int, left: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = template(tmp_path / "t.ipynb", "n = 1", PUBLISH)
    refuse(monkeypatch, refused, after)
    with pytest.raises(RunFailed, match="No space left on device") as caught:
        run_notebook("backtest", {}, store=RunStore(tmp_path / "runs"), template=source)
    assert "Make room" in caught.value.message and "start it again" in caught.value.message
    run = caught.value.context["run"]
    assert isinstance(run, RunFolder) and whole(run.path) == left
    if "result.json" in left:
        result = run.result()
        assert result.status == "failed" and result.failure is not None
        assert "No space left on device" in result.failure.message


def test_a_disk_that_is_full_at_the_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = template(tmp_path / "t.ipynb", "n = 1", PUBLISH)
    refuse(monkeypatch, {"params.json"})
    with pytest.raises(Misconfigured, match=r"No space left on device\). Make room there"):
        run_notebook("backtest", {}, store=RunStore(tmp_path / "runs"), template=source)
    assert not list((tmp_path / "runs").glob("*Z-*"))


def test_a_report_that_cannot_be_made_does_not_cost_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trader_lib.runs.page as page

    def bug(_: Path) -> str:
        raise KeyError("template")

    monkeypatch.setattr(page, "render_page", bug)
    source = template(tmp_path / "t.ipynb", "n = 1", PUBLISH)
    with pytest.raises(RunFailed, match=r"The report could not be made \(KeyError") as caught:
        run_notebook("backtest", {}, store=RunStore(tmp_path / "runs"), template=source)
    run = caught.value.context["run"]
    assert isinstance(run, RunFolder) and run.result().order_list_hash == "sha256:0"


def backtested(runs: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The order list hash of the same strategy over the same days, from a disk with room."""
    capsys.readouterr()
    assert main(["backtest", *WHAT, "--runs", str(runs), "--json"]) == 0
    return str(json.loads(capsys.readouterr().out)["order_list_hash"])


@pytest.mark.slow
def test_a_session_whose_files_may_not_grow_fails_with_the_reason_and_resumes_to_the_same_orders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """RLIMIT_FSIZE: the system refuses the write, as a full disk does, without any privilege."""
    runs = ["--runs", str(tmp_path / "runs")]
    process = subprocess.run(
        [TRADER, "paper", "--transport", "in_process", *WHAT, *runs],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 5, process.stderr
    assert "This is a bug" not in process.stderr and "The run failed" in process.stderr
    run = RunStore(tmp_path / "runs").find("latest-paper")
    whole(run.path)
    assert main(["paper", "--resume", run.name, *runs]) == 0
    assert run.result().order_list_hash == backtested(tmp_path / "others", capsys)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 600 kB, where the system lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if os.geteuid() != 0 or mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full_ends_the_session_with_the_reason_and_it_resumes_with_room(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = ["--runs", str(small_disk / "runs")]
    assert main(["paper", "--transport", "in_process", *WHAT, *runs]) == 5
    told = capsys.readouterr().err
    run = RunStore(small_disk / "runs").find("latest-paper")
    assert "disk is full" in told and "open entries were canceled at the broker" in told
    assert f"Make room there. `trader paper --resume {run.name}` then goes on" in told
    assert "result.json" not in whole(run.path)
    assert main(["runs", "list", "--json", *runs]) == 0
    assert json.loads(capsys.readouterr().out)[0]["status"] == "incomplete"
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    assert main(["paper", "--resume", run.name, *runs]) == 0
    assert run.result().status == "completed"
    assert run.result().order_list_hash == backtested(tmp_path / "others", capsys)


# ---- Ctrl-C


def moments(runs: Path) -> dict[str, Callable[[], bool]]:
    """When Ctrl-C is pressed."""

    def session_ended() -> bool:
        for path in runs.glob("*/journal.sqlite"):
            try:
                with SqliteJournal(path, read_only=True) as journal:
                    return bool(journal.last([SessionEnded]))
            except (BadData, Misconfigured):  # it is not ready to be read
                return False
        return False

    return {
        "before the kernel is there": lambda: bool(list(runs.glob("*/params.json"))),
        "while it trades": lambda: any(path.stat().st_size > 200_000 for path in runs.glob("*/journal.sqlite-wal")),
        "while the report is written": session_ended,
    }


@pytest.mark.slow
@pytest.mark.parametrize("moment", list(moments(Path())))
def test_ctrl_c_twice_in_quick_succession_keeps_journal_result_and_notebook(moment: str, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    process = subprocess.Popen(
        [TRADER, "paper", "--transport", "in_process", *LONG, "--runs", str(runs)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    reached = moments(runs)[moment]
    wait_for(lambda: reached() or process.poll() is not None)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, told = process.communicate(timeout=90)
    assert process.returncode == 130 and "Killed" not in told, told
    run = RunStore(runs).find("latest-paper")
    result = run.result()
    assert result.status == "interrupted" and {"notebook.ipynb", "report.html"} <= whole(run.path)
    if moment == "before the kernel is there":
        assert not run.journal.exists() and result.order_list_hash is None
        return
    assert result.failure is None and result.order_list_hash and result.reconciliation and result.reconciliation.ok
    with SqliteJournal(run.journal, read_only=True) as journal:
        assert journal.verify().ok and journal.last([SessionEnded])


def test_a_session_that_was_killed_before_it_had_a_result_is_resumed_even_if_its_journal_has_an_end(
    tmp_path: Path,
) -> None:
    """Killed by a third Ctrl-C between the end of the session and its report."""
    store = RunStore(tmp_path / "runs")
    run = store.create("paper")
    asyncio.run(session(run.path))
    assert run.journal.is_file()
    document = {"kind": "paper", "status": "interrupted", "parameters": {}, "versions": {}}
    moment = datetime(2026, 11, 27, tzinfo=UTC).isoformat()
    run.result_file.write_text(json.dumps(document | {"started_at": moment, "ended_at": moment}))
    ensure_resumable(run)
    run.result_file.write_text(
        json.dumps(document | {"started_at": moment, "ended_at": moment, "order_list_hash": "x"})
    )
    with pytest.raises(Misused, match="has ended already"):
        ensure_resumable(run)


# ---- kill -9


def scratch_folders(temporary: Path) -> list[str]:
    return [path.name for path in temporary.glob("trader-*/*") if path.is_dir()]


def test_what_a_killed_run_left_in_the_temporary_folder_goes_with_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = Path("/tmp") / f"endings-{os.getpid()}"  # pytest's own is too long for the name of a socket
    temporary.mkdir()
    environ = {**os.environ, "TMPDIR": str(temporary), "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter")}
    here = tmp_path / "here"
    source = template(tmp_path / "t.ipynb", "n = 1", f"open({str(here)!r}, 'w').close()\nimport time\ntime.sleep(60)")
    command = [TRADER, "run", str(source), "--runs", str(tmp_path / "runs")]
    try:
        process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(here.exists)
        (left,) = scratch_folders(temporary)
        assert left.startswith(f"kernel-{process.pid}-")
        process.kill()
        process.wait(30)
        assert scratch_folders(temporary) == [left], "nobody could clean up"
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        with scratch("next") as folder:
            assert scratch_folders(temporary) == [folder.name]
        assert not scratch_folders(temporary)
        assert [path.name for path in temporary.iterdir()] == [f"trader-{os.getuid()}"]
        assert not list((tmp_path / "jupyter").glob("kernel-*.json")), "the connection file lay in the folder, too"
    finally:
        shutil.rmtree(temporary)


def test_a_folder_of_a_process_that_lives_is_kept_whatever_number_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock says who lives. A number in a name says nothing: it may be somebody else's by now."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch("one") as mine:
        renamed = mine.rename(mine.with_name("kernel-999999999-x"))  # no process has this number
        foreign = mine.with_name(f"kernel-{os.getpid()}-y")  # a number that lives, and nobody holds the lock
        foreign.mkdir()
        (foreign / "owner.lock").touch()
        (mine.parent / "note.txt").touch()
        (tmp_path / "elsewhere").mkdir()
        (mine.parent / "link").symlink_to(tmp_path / "elsewhere")
        with scratch("two"):
            assert renamed.is_dir() and not foreign.exists()
            assert (mine.parent / "note.txt").exists() and (tmp_path / "elsewhere").is_dir()
        renamed.rename(mine)


def test_the_simulated_journal_that_was_given_no_place_lies_among_the_temporary_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = asyncio.run(run_session(SPEC, SETTINGS))
    assert result.journal_path.parent.name.startswith(f"session-{os.getpid()}-")
    assert not who_runs(result.journal_path.with_name("session.lock"))[0]
    with scratch("next"):
        assert result.orders, "it stays as long as its process"
