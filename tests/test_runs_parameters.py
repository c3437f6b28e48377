"""Parameters as papermill reads them, notebooks as people have them, and failures that name their cell."""

import json
import math
from pathlib import Path
from typing import Any

import nbformat
import pytest

from trader_lib.app.cli import main
from trader_lib.app.options import strategy_params
from trader_lib.errors.taxonomy import Misused, RunFailed
from trader_lib.runs.kernel import first_line, strict_json
from trader_lib.runs.result import RESULT_MIME
from trader_lib.runs.runner import run_notebook
from trader_lib.runs.store import RunFolder, RunStore
from trader_lib.runs.templates import Parameter, assigned


def write_notebook(path: Path, *cells: str, **metadata: Any) -> Path:
    """A notebook without a heading and, unless metadata says otherwise, without a kernelspec."""
    code = [nbformat.v4.new_code_cell(cell) for cell in cells]
    code[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=code, metadata=metadata), path)
    return path


def strict(path: Path) -> Any:
    """JSON read by a reader that takes no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path.name} holds a bare {constant}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of a notebook without kernelspec whose parameters came from the command line."""
    folder = tmp_path_factory.mktemp("told")
    notebook = write_notebook(
        folder / "own.ipynb",
        "flag = True\nn: int | None = 3  # how many\nx = 1.0\nm: int | None = None\nlabel: str = 'a'",
        "import json, math\nprint(json.dumps([flag, n, math.isnan(x), m, label]))",
        f"display({{{RESULT_MIME!r}: {{'order_list_hash': '', 'statistics': {{'x': x}}}}}}, raw=True)",
    )
    given = strategy_params(["flag=False", "n=None", "x=nan", "m=5", "label=true story"])
    return run_notebook("notebook", given, store=RunStore(folder / "runs"), template=notebook)


def test_words_of_the_command_line_mean_what_they_mean_to_papermill(told: RunFolder) -> None:
    cells = strict(told.notebook)["cells"]
    printed = "".join(
        "".join(output["text"]) for cell in cells for output in cell.get("outputs", ()) if "text" in output
    )
    assert printed == '[false, null, true, 5, "true story"]\n'


def test_nan_lands_bare_in_no_file_of_a_run(told: RunFolder) -> None:
    for path in (told.notebook, told.params, told.result_file):
        strict(path)
    assert strict(told.params)["parameters"]["x"] == strict(told.result_file)["parameters"]["x"] == "NaN"


def test_a_notebook_keeps_what_json_has_no_number_for_by_its_name() -> None:
    data = {"application/vnd.own+json": {"y": [math.nan, math.inf, 1.0]}}
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("display_data", data)])
    written = strict_json(nbformat.v4.new_notebook(cells=[cell]))
    (output,) = json.loads(written, parse_constant=lambda name: pytest.fail(name))["cells"][0]["outputs"]
    assert output["data"]["application/vnd.own+json"]["y"] == ["NaN", "Infinity", 1.0]


def test_a_failure_names_its_cell_by_number_and_first_line(tmp_path: Path) -> None:
    notebook = write_notebook(tmp_path / "own.ipynb", "n = 1", "# why\n\nratio = n / 0\nratio")
    with pytest.raises(RunFailed) as caught:
        run_notebook("notebook", {}, store=RunStore(tmp_path / "runs"), template=notebook)
    told = "The run failed in cell 2, which begins `ratio = n / 0`: ZeroDivisionError: division by zero. Its notebook"
    assert str(caught.value).startswith(told)
    run = caught.value.context["run"]
    assert isinstance(run, RunFolder)
    failure = run.result().failure
    assert failure is not None and (failure.cell, failure.section, failure.line) == (2, None, "ratio = n / 0")


@pytest.mark.parametrize(
    ("code", "line"),
    [("\n  x = 1\ny", "x = 1"), ("# only\n# words", "# only"), ("a" * 70, "a" * 59 + "…"), ("%%time\nx", "%%time")],
)
def test_first_line_of_a_cell(code: str, line: str) -> None:
    assert first_line(code) == line


@pytest.mark.parametrize("cash", ["inf", "None", "nan", "0", "-5", "0.001", "1e40", "plenty"])
def test_cash_that_cannot_be_is_refused_in_a_sentence(
    cash: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main(["run", "backtest", "-p", f"cash={cash}", "--runs", str(tmp_path / "runs")])
    told = capsys.readouterr().err
    assert code == 2 and "cash: " in told and "USD" in told and "Traceback" not in told
    assert not list((tmp_path / "runs").glob("*"))


def test_a_notebook_in_another_language_is_refused(tmp_path: Path) -> None:
    notebook = write_notebook(
        tmp_path / "r.ipynb", "n <- 1", kernelspec={"name": "ir", "display_name": "R", "language": "R"}
    )
    with pytest.raises(Misused, match="is written in R; only notebooks in Python are run"):
        run_notebook("notebook", {}, store=RunStore(tmp_path / "runs"), template=notebook)


def test_parameters_are_what_a_cell_assigns_at_its_top_level() -> None:
    source = """%matplotlib inline
!date
days: "list[int] | None" = [
    1,
    2,
]  # which # ones
declared: int
a.b = first, second = 1, 2
if True:
    inner = 1
text = "# no comment"
"""
    assert assigned(source) == {
        "days": Parameter("days", "[\n    1,\n    2,\n]", "which # ones"),
        "text": Parameter("text", '"# no comment"', ""),
    }
