"""What cannot be shown inside the runner's own notebook: threads, secrets, a kernel that hangs up."""

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
import pytest

from trader_lib.errors.taxonomy import BadData, Interrupted, Misused, RunFailed
from trader_lib.runs.kernel import Outcome, Progress, execute, stop_requests
from trader_lib.runs.result import RESULT_MIME
from trader_lib.runs.runner import kernel_environment, run_notebook
from trader_lib.runs.store import RunFolder, RunStore


def write_template(path: Path, *cells: str) -> Path:
    code = [nbformat.v4.new_code_cell(cell) for cell in cells]
    code[0].metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Tiny"), *code])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(notebook, path)
    return path


PUBLISH = f"display({{{RESULT_MIME!r}: {{'kind': 'backtest', 'order_list_hash': 'sha256:0'}}}}, raw=True)"


def test_environment_reaches_the_kernel_and_stays_out_of_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APCA_API_SECRET_KEY", "SECRET-6f1b")
    template = write_template(
        tmp_path / "t.ipynb", "n = 1", "import os\nassert os.environ['APCA_API_SECRET_KEY'].startswith('SEC')", PUBLISH
    )
    run = run_notebook("backtest", {"n": 2}, store=RunStore(tmp_path / "runs"), template=template)
    for path in run.path.iterdir():
        assert b"SECRET-6f1b" not in path.read_bytes(), path


def test_runs_from_another_thread_without_touching_signals(tmp_path: Path) -> None:
    template = write_template(tmp_path / "t.ipynb", "n = 1", PUBLISH)
    done: list[RunFolder] = []

    def work() -> None:
        with stop_requests() as asked:
            assert asked == []
        done.append(run_notebook("backtest", {}, store=RunStore(tmp_path / "runs"), template=template))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert done and done[0].result().status == "completed"


async def test_runs_inside_a_running_loop(tmp_path: Path) -> None:
    template = write_template(tmp_path / "t.ipynb", "n = 1", PUBLISH)
    run = run_notebook("backtest", {}, store=RunStore(tmp_path / "runs"), template=template)
    assert run.result().status == "completed"


def test_a_killed_kernel_is_noticed_and_the_notebook_kept(tmp_path: Path) -> None:
    template = write_template(tmp_path / "t.ipynb", "n = 1", "import os\nos.kill(os.getpid(), 9)")
    with pytest.raises(
        RunFailed, match=r"failed in cell 2 \(Tiny\), which begins `import os`: its kernel was killed"
    ) as caught:
        run_notebook("backtest", {}, store=RunStore(tmp_path / "runs"), template=template)
    run = caught.value.context["run"]
    assert isinstance(run, RunFolder)
    assert run.notebook.exists() and run.report.exists()
    failure = run.result().failure
    assert failure is not None and failure.cell == 2


def test_a_kernel_killed_between_cells_is_noticed(tmp_path: Path) -> None:
    template = write_template(
        tmp_path / "t.ipynb",
        "n = 1",
        "import threading, os\nthreading.Timer(0.3, os.kill, (os.getpid(), 9)).start()",
        *["import time; time.sleep(0.2)"] * 6,
    )
    with pytest.raises(RunFailed, match="its kernel was killed"):
        run_notebook("backtest", {}, store=RunStore(tmp_path / "runs"), template=template)


def test_a_supervisor_does_not_wait_for_papermill_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trader_lib.runs.kernel as kernel

    class Gone:
        pid, returncode = 0, -9

        def poll(self) -> int:
            return -9

    def hang(notebook: Path, parameters: Any, watch: Any) -> Outcome:
        watch.process, watch.last = Gone(), (4, "Session")
        threading.Event().wait(30)
        return Outcome("completed")

    monkeypatch.setattr(kernel, "_run", hang)
    monkeypatch.setattr(kernel, "NOTICE_S", 0.3)
    outcome = execute(tmp_path / "a", tmp_path / "b", {}, log=tmp_path / "log", environ=os.environ)
    assert (outcome.ending, outcome.cell, outcome.section) == ("died", 4, "Session")
    assert outcome.message == "its kernel was killed"


def test_a_run_that_takes_too_long_is_stopped_and_said_so(tmp_path: Path) -> None:
    template = write_template(tmp_path / "t.ipynb", "n = 1", "import time\ntime.sleep(60)")
    with pytest.raises(RunFailed, match="took longer than 2 s"):
        run_notebook("backtest", {}, store=RunStore(tmp_path / "runs"), template=template, timeout_s=2.0)


def test_kernel_environment_keeps_the_users_choice_of_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    assert kernel_environment()["PYTHONWARNINGS"] == "default"
    monkeypatch.delenv("PYTHONWARNINGS")
    assert kernel_environment()["PYTHONWARNINGS"] == "ignore"


def test_params_record_what_was_asked(tmp_path: Path) -> None:
    template = write_template(tmp_path / "t.ipynb", "n = 1\nrun_folder = ''", PUBLISH)
    seen: list[Progress] = []
    run = run_notebook("backtest", {"n": 7}, store=RunStore(tmp_path / "runs"), template=template, report=seen.append)
    document = json.loads(run.params.read_text(encoding="utf-8"))
    assert document["kind"] == "backtest" and document["parameters"] == {"n": 7}
    assert seen and seen[-1].cells == 3


def test_two_runs_at_once_in_one_folder_do_not_meet(tmp_path: Path) -> None:
    template = write_template(tmp_path / "t.ipynb", "n = 1", PUBLISH)
    store = RunStore(tmp_path / "runs")
    done: list[RunFolder] = []
    threads = [
        threading.Thread(target=lambda: done.append(run_notebook("backtest", {}, store=store, template=template)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [run.result().status for run in done] == ["completed", "completed"]


def test_runs_that_start_at_once_do_not_refuse_the_folder_to_each_other(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    with ThreadPoolExecutor(8) as pool:
        for made in [pool.submit(store.check) for _ in range(400)]:
            made.result()
    assert list(store.path.iterdir()) == []


def interrupt_when(path: Path, times: int = 1) -> threading.Thread:
    """Send SIGINT to this process once a file is there, and again whenever it was handled."""

    def work() -> None:
        pause = threading.Event()
        while not path.exists():
            pause.wait(0.02)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            pause.wait(1.0)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_one_interrupt_reaches_the_kernel_and_the_notebook_goes_on(tmp_path: Path) -> None:
    here = tmp_path / "here"
    drains = f"""
import time
from pathlib import Path
try:
    Path({str(here)!r}).touch()
    time.sleep(60)
except KeyboardInterrupt:
    print('drained')
"""
    template = write_template(tmp_path / "t.ipynb", "n = 1", drains, PUBLISH)
    said: list[str] = []
    thread = interrupt_when(here)
    with pytest.raises(Interrupted, match="the session drained") as caught:
        run_notebook("backtest", {}, store=RunStore(tmp_path / "runs"), template=template, said=said.append)
    thread.join()
    run = caught.value.context["run"]
    assert isinstance(run, RunFolder)
    assert run.result().status == "interrupted" and run.result().order_list_hash == "sha256:0"
    assert "drained" in run.report.read_text(encoding="utf-8")
    assert len(said) == 1 and "Ctrl-C again waits 20 s at most" in said[0]


def test_a_third_interrupt_kills(tmp_path: Path) -> None:
    here = tmp_path / "here"
    deaf = f"""
import signal, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.SIG_IGN)
Path({str(here)!r}).touch()
time.sleep(60)
"""
    template = write_template(tmp_path / "t.ipynb", "n = 1", deaf)
    said: list[str] = []
    thread = interrupt_when(here, times=3)
    with pytest.raises(Interrupted, match="before it had a result"):
        run_notebook("backtest", {}, store=RunStore(tmp_path / "runs"), template=template, said=said.append)
    thread.join()
    assert said[-1] == "Killed."


def test_an_interrupt_before_the_kernel_is_there_starts_no_cell(tmp_path: Path) -> None:
    here = tmp_path / "here"
    template = write_template(tmp_path / "t.ipynb", "n = 1", f"open({str(here)!r}, 'w')")
    started = tmp_path / "runs"
    thread = interrupt_when(started)
    with pytest.raises(Interrupted, match="Stopped as asked"):
        run_notebook("backtest", {}, store=RunStore(started), template=template)
    thread.join()
    assert not here.exists()


def test_a_notebook_that_is_none_fails_in_words(tmp_path: Path) -> None:
    broken = tmp_path / "t.ipynb"
    broken.write_text("{")
    with pytest.raises(Misused, match="is not a notebook"):
        run_notebook("backtest", {}, store=RunStore(tmp_path / "runs"), template=broken)
    assert not (tmp_path / "runs").exists()


def test_a_schema_of_another_version_is_refused(tmp_path: Path) -> None:
    run = RunStore(tmp_path / "runs").create("backtest")
    run.result_file.write_text('{"schema_version": 2}')
    with pytest.raises(BadData, match="not the result of a run: schema_version"):
        run.result()
