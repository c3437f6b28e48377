"""The schedule with real processes, a real alarm clock, and two schedulers on one store."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pytest

from trader_lib.app.firings import ALIVE_S, KEPT, Firing, Firings
from trader_lib.app.jobs import Job, JobFile, read_jobs
from trader_lib.app.schedule import MAIN, CommandAttempt, Outcome, Scheduler, keep
from trader_lib.clock.clock import WallClock
from trader_lib.runs.store import RunStore

CLOCK = WallClock()
FILE = """
[[job]]
name = "hello"
notebook = "hello.ipynb"
cron = "* * * * *"
calendar = ""
grace_s = 86400
parameters = {{ n = {n} }}
"""


def write_notebook(path: Path, *cells: str) -> Path:
    code = [nbformat.v4.new_code_cell(cell) for cell in cells]
    code[0].metadata["tags"] = ["parameters"]
    made = nbformat.v4.new_notebook(cells=code)
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(made, path)
    return path


@pytest.fixture
def jobs(tmp_path: Path) -> JobFile:
    write_notebook(tmp_path / "hello.ipynb", "n = 1", "assert n > 0, 'n should be positive'\nprint('hello', n)")
    (tmp_path / "jobs.toml").write_text(FILE.format(n=7))
    return read_jobs(tmp_path / "jobs.toml")


def some_minutes_ago(firings: Firings, job: Job) -> None:
    firings.take(job, CLOCK.now() - timedelta(minutes=3))


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("TRADER_", "APCA_"))}


def test_two_schedulers_on_one_store_run_a_job_once(tmp_path: Path, jobs: JobFile) -> None:
    store = tmp_path / "schedule.sqlite"
    some_minutes_ago(Firings(store, "before"), jobs.jobs[0])
    command = [sys.executable, "-c", MAIN, "schedule", "run", "jobs.toml", "--once", "--store", str(store), "--json"]
    both = [
        subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    told = [json.loads(process.communicate(timeout=120)[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    done = [firing for found in told for firing in found if firing["state"] == "done"]
    assert len(done) == 1 and len(RunStore(tmp_path / "runs").runs("notebook")) == 1
    assert RunStore(tmp_path / "runs").find(done[0]["run"]).result().parameters == {"n": 7}
    history = Firings(store, "after").history()
    assert sorted({firing.state for firing in history}) == ["done", "missed"]


def test_a_failed_job_is_tried_again_and_alerts_once(tmp_path: Path, jobs: JobFile) -> None:
    job = jobs.jobs[0].model_copy(update={"parameters": {"n": -1}, "retries": 1, "retry_delay_s": 0.0})
    firings, alerts = Firings(tmp_path / "s.sqlite", "one"), list[str]()
    some_minutes_ago(firings, job)
    runs = RunStore(tmp_path / "runs")
    scheduler = Scheduler(jobs, firings, CommandAttempt(jobs, runs.path), CLOCK, runs=runs, alert=alerts.append)
    failed = next(firing for firing in scheduler.attend(job) if firing.state == "failed")
    assert failed.exit_code == 5 and "n should be positive" in failed.reason and len(runs.runs()) == 2
    assert len([text for text in alerts if "failed" in text]) == 1
    assert next(firing for firing in firings.history() if firing.state == "failed").attempts == 2


def test_a_stop_lets_the_run_end_in_good_order(tmp_path: Path, jobs: JobFile) -> None:
    here = tmp_path / "here"
    slow = f"import time\nfrom pathlib import Path\nPath({str(here)!r}).touch()\ntime.sleep(60)"
    write_notebook(tmp_path / "hello.ipynb", "n = 1", slow)
    stop, runs, job = threading.Event(), RunStore(tmp_path / "runs"), jobs.jobs[0]
    firings = Firings(tmp_path / "s.sqlite", "one")
    some_minutes_ago(firings, job)
    scheduler = Scheduler(jobs, firings, CommandAttempt(jobs, runs.path), CLOCK, runs=runs, stop=stop)
    thread = threading.Thread(target=scheduler.attend, args=[job])
    thread.start()
    until = time.monotonic() + 60
    while not here.exists() and time.monotonic() < until:
        time.sleep(0.05)
    stop.set()
    thread.join(60)
    assert firings.history()[0].state == "interrupted" and runs.runs()[0].result().status == "interrupted"


class Often:
    """Moments a quarter of a second apart."""

    def after(self, moment: datetime, until: datetime | None = None) -> Iterator[datetime]:
        due = datetime.fromtimestamp((moment.timestamp() // 0.25 + 1) * 0.25, UTC)
        while until is None or due <= until:
            yield due
            due += timedelta(seconds=0.25)

    def next(self, moment: datetime) -> datetime:
        return next(self.after(moment))


def often(name: str, **fields: object) -> Job:
    job = Job.model_validate({"name": name, "notebook": "backtest", "at": "close", "grace_s": 5.0, **fields})
    job.__dict__["moments"] = Often()
    return job


def test_the_alarm_clock_wakes_the_scheduler_at_its_moments(tmp_path: Path) -> None:
    job, stop, ran = often("often", catch_up="all"), threading.Event(), list[str]()

    def attempt(job: Job, resume: str, stopping: threading.Event) -> Outcome:
        ran.append(job.name)
        if len(ran) == 4:
            stop.set()
        return Outcome(0)

    firings = Firings(tmp_path / "s.sqlite", "one")
    jobs = JobFile(path=tmp_path / "jobs.toml", jobs=(job,))
    jobs.jobs[0].__dict__["moments"] = Often()
    scheduler = Scheduler(jobs, firings, attempt, CLOCK, runs=RunStore(tmp_path / "runs"), stop=stop)
    guard = threading.Timer(30, stop.set)
    guard.start()
    keep(scheduler, CLOCK, stop)
    guard.cancel()
    done = [firing.due for firing in firings.history() if firing.state == "done"]
    assert len(ran) >= 4 and len(done) == len(set(done)) == len(ran)


@pytest.mark.parametrize(("overlap", "states"), [("skip", ["done", "skipped"]), ("wait", ["done", "done"])])
def test_what_happens_while_the_last_run_goes_on(tmp_path: Path, overlap: str, states: list[str]) -> None:
    job = often("often", overlap=overlap)
    entered, leave = threading.Event(), threading.Event()

    def attempt(job: Job, resume: str, stopping: threading.Event) -> Outcome:
        entered.set()
        leave.wait(30)
        return Outcome(0)

    def waits(seconds: float) -> bool:
        leave.set()
        return threading.Event().wait(0.05)

    firings = Firings(tmp_path / "s.sqlite", "one")
    jobs = JobFile(path=tmp_path / "jobs.toml", jobs=(job,))
    scheduler = Scheduler(jobs, firings, attempt, CLOCK, runs=RunStore(tmp_path / "runs"), wait=waits)
    firings.take(job, CLOCK.now() - timedelta(seconds=0.3))
    first = threading.Thread(target=scheduler.attend, args=[job])
    first.start()
    assert entered.wait(10)
    threading.Event().wait(0.3)
    second = scheduler.attend(job)
    leave.set()
    first.join(10)
    found = [firing.state for firing in firings.history() if firing.state != "missed"]
    assert sorted(found) == sorted(states) and second


def test_a_session_that_failed_is_resumed_and_not_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, resumed = often("session", notebook="paper", retries=2, retry_delay_s=0.0), list[str]()
    answers = [Outcome(5, "20260105T211500Z-paper-0a1b2c"), Outcome(5, "20260105T211600Z-paper-1a1b2c"), Outcome(0)]

    def attempt(job: Job, resume: str, stopping: threading.Event) -> Outcome:
        resumed.append(resume)
        return answers.pop(0)

    firings, runs = Firings(tmp_path / "s.sqlite", "one"), RunStore(tmp_path / "runs")
    died = runs.path / "20260105T211500Z-paper-0a1b2c"
    died.mkdir(parents=True)
    scheduler = Scheduler(JobFile(path=tmp_path / "j.toml", jobs=(job,)), firings, attempt, CLOCK, runs=runs)
    firings.take(job, CLOCK.now() - timedelta(seconds=0.3))
    assert [firing.state for firing in scheduler.attend(job)][-1] == "done"
    assert resumed == ["", died.name, ""]  # the third: the second's folder is not there


def test_what_a_dead_scheduler_had_in_hand_is_told_by_the_next(tmp_path: Path) -> None:
    job, alerts = often("often"), list[str]()
    before = Firings(tmp_path / "s.sqlite", "dead")
    long_ago = CLOCK.now() - timedelta(seconds=ALIVE_S + 10)
    before.take(job, long_ago - timedelta(seconds=0.3))
    taken, _ = before.take(job, long_ago)
    assert before.begin(taken[-1], long_ago, alone=True)
    scheduler = Scheduler(
        JobFile(path=tmp_path / "j.toml", jobs=(job,)),
        Firings(tmp_path / "s.sqlite", "alive"),
        lambda job, resume, stop: Outcome(0),
        CLOCK,
        runs=RunStore(tmp_path / "runs"),
        alert=alerts.append,
    )
    scheduler.beat()
    scheduler.beat()
    assert len(alerts) == 1 and "its scheduler died" in alerts[0]


Trader = Callable[..., tuple[int, str, str]]


def test_the_command_line_of_the_schedule(trader: Trader, tmp_path: Path) -> None:
    code, out, _ = trader("schedule", "example")
    (tmp_path / "jobs.toml").write_text(out)
    assert code == 0
    code, out, _ = trader("schedule", "check", "jobs.toml", "--count", "2", "--json")
    assert code == 0 and {row["job"] for row in json.loads(out)} == {"session", "review"}
    code, out, _ = trader("schedule", "run", "jobs.toml", "--once")
    assert code == 0 and "Nothing was due" in out
    (tmp_path / "jobs.toml").write_text("[[job]]\nname='a'\nnotebook='b.ipynb'\nat='open'")
    code, _, err = trader("schedule", "check", "jobs.toml")
    assert code == 2 and "There is no notebook" in err
    code, out, _ = trader("schedule", "history", "--json")
    assert code == 0 and json.loads(out) == []


def test_a_schedule_that_is_kept_ends_on_sigterm(tmp_path: Path, jobs: JobFile) -> None:
    command = [sys.executable, "-c", MAIN, "schedule", "run", "jobs.toml"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "hello: next at" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_run_takes_a_notebook_of_ones_own_and_the_templates(trader: Trader, tmp_path: Path) -> None:
    write_notebook(tmp_path / "own.ipynb", "n = 1", "assert n > 0, 'n should be positive'\nprint('hello', n)")
    code, out, _ = trader("run", "own.ipynb", "-p", "n=3", "--json")
    assert code == 0 and json.loads(out)["kind"] == "notebook" and json.loads(out)["parameters"] == {"n": 3}
    code, out, err = trader("run", "own.ipynb", "-p", "n=-1", "--json")
    assert code == 5 and "n should be positive" in err and json.loads(out)["status"] == "failed"
    code, _, err = trader("run", "own.ipynb", "--seed", "3")
    assert code == 2 and "takes no parameter 'seed'" in err  # an option that is not read is refused
    code, _, err = trader("run", "own.ipynb", "-p", "m=1")
    assert code == 2 and "takes no parameter 'm'" in err
    code, _, err = trader("run", "backtest", "-p", "broker=simulated")
    assert code == 2 and "neither broker nor transport" in err
    (tmp_path / "given.json").write_text("[]")
    assert trader("run", "own.ipynb", "--parameters", "given.json")[0] == 2
    assert trader("run", "own.ipynb", "--parameters", "absent.json")[0] == 2
    (tmp_path / "given.json").write_text(json.dumps({"symbols": "IBM", "start": "2012-01-03", "end": "2012-03-01"}))
    code, out, _ = trader("run", "backtest", "--parameters", "given.json", "-p", "strategy=sma_cross", "--json")
    assert code == 0 and json.loads(out)["data"]["symbols"] == ["IBM"]
    code, out, _ = trader("runs", "list", "--kind", "notebook", "--json")
    assert code == 0 and len(json.loads(out)) == 2


def test_a_failed_job_reaches_the_webhook(trader: Trader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TRADER_NOTIFY__WEBHOOK_URL", f"http://127.0.0.1:{server.server_port}/hook")
    write_notebook(tmp_path / "hello.ipynb", "n = 1", "raise ValueError('no data today')")
    (tmp_path / "jobs.toml").write_text(FILE.format(n=7))
    job = read_jobs(tmp_path / "jobs.toml").jobs[0]
    Firings(tmp_path / "s.sqlite", "before").take(job, CLOCK.now() - timedelta(minutes=1))
    code, _, err = trader("schedule", "run", "jobs.toml", "--once", "--store", "s.sqlite")
    server.shutdown()
    server.server_close()
    assert code == 5 and "no data today" in err
    assert len(told) == 1 and "A scheduled job needs you" in told[0] and "no data today" in told[0]


def test_a_long_sleep_is_told_once_and_counted_within_bounds(tmp_path: Path) -> None:
    job = Job(name="often", notebook="backtest", cron="* * * * *", calendar="")
    firings, alerts = Firings(tmp_path / "s.sqlite", "one"), list[str]()
    jobs = JobFile(path=tmp_path / "j.toml", jobs=(job,))
    runs = RunStore(tmp_path / "runs")
    scheduler = Scheduler(jobs, firings, lambda job, run, stop: Outcome(0), CLOCK, runs=runs, alert=alerts.append)
    firings.take(job, CLOCK.now() - timedelta(days=400))
    missed = scheduler.attend(job)
    assert len(alerts) == 1 and f"due {KEPT - 1} times" in alerts[0]
    assert [firing.state for firing in missed].count("done") == 1 and len(missed) == KEPT


def test_runs_that_take_every_thread_do_not_stop_the_heart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trader_lib.app.schedule.THREADS", 1)
    monkeypatch.setattr("trader_lib.app.schedule.ALIVE_S", 0.6)  # a beat each tenth of a second
    job, stop, beats, busy = often("often"), threading.Event(), list[float](), threading.Event()

    def attempt(job: Job, resume: str, stopping: threading.Event) -> Outcome:
        busy.set()
        stopping.wait(20)
        return Outcome(0)

    class Counted(Firings):
        def beat(self, now: datetime) -> list[Firing]:
            if busy.is_set():
                beats.append(time.monotonic())
            if len(beats) == 3:
                stop.set()
            return super().beat(now)

    jobs = JobFile(path=tmp_path / "jobs.toml", jobs=(job,))
    jobs.jobs[0].__dict__["moments"] = Often()
    firings = Counted(tmp_path / "s.sqlite", "one")
    scheduler = Scheduler(jobs, firings, attempt, CLOCK, runs=RunStore(tmp_path / "runs"), stop=stop)
    guard = threading.Timer(30, stop.set)
    guard.start()
    keep(scheduler, CLOCK, stop)
    guard.cancel()
    assert len(beats) >= 3
