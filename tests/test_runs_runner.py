"""What cannot be shown inside the runner's own notebook: threads, secrets, a kernel that hangs up."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import nbformat
import pytest

from trader_lib.errors.taxonomy import RunFailed
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
    with pytest.raises(RunFailed, match=r"failed in cell 2 \(Tiny\): its kernel was killed") as caught:
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

    def hang(notebook: Path, output: Path, parameters: Any, watch: Any) -> Outcome:
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
