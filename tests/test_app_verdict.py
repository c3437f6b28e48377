"""`trader verdict` judges runs that are there: a page, lights in result.json, and no code that a folder names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trader_lib.config.settings import load_settings
from trader_lib.research.backtest import backtest
from trader_lib.research.trials import LEDGER, Trial, TrialLedger
from trader_lib.runs.parameters import RunParameters
from trader_lib.runs.result import RunResult
from trader_lib.runs.searches import SearchParameters, run_search
from trader_lib.runs.store import RunFolder, RunStore
from trader_lib.runs.sweeps import SweepParameters, run_sweep

Trader = Callable[..., tuple[int, str, str]]
WHAT: dict[str, Any] = {"symbols": ["IBM"], "start": "2004-01-02", "end": "2007-12-31"}
MOMENT = "2026-11-28T09:00:00Z"


def left(folder: Path, kind: Any, asked: RunParameters, order_list_hash: str | None) -> RunFolder:
    """What a run leaves that a verdict reads."""
    run = RunStore(folder).create(kind)
    run.write_params({"kind": kind, "parameters": asked.values()})
    document = {"kind": kind, "status": "completed", "started_at": MOMENT, "ended_at": MOMENT, "versions": {}}
    run.write_result(RunResult.model_validate({**document, "parameters": {}, "order_list_hash": order_list_hash}))
    return run


def backtest_left(folder: Path, **more: Any) -> RunFolder:
    asked = RunParameters(**{**WHAT, "params": {"fast": 10, "slow": 50}, **more})
    bars = asked.load_bars(load_settings())
    result = backtest(asked.build_strategy(), bars, start=asked.start, end=asked.end, trials=False)
    return left(folder, "backtest", asked, result.order_list_hash)


def test_a_backtest_gets_its_lights_beside_its_result(trader: Trader, tmp_path: Path) -> None:
    run = backtest_left(tmp_path / "runs")
    ledger = TrialLedger(tmp_path / "runs" / LEDGER)
    ledger.enter(Trial(MOMENT, "sweep", "sma_cross", ("IBM",), "1Day", "2004-01-02", "2007-12-31", 500, "k"))
    code, out, err = trader("verdict", "latest-backtest", "--markets", "20", "--json")
    assert code == 0, err
    document = json.loads(out)
    lights = {one["name"]: one for one in document["lights"]}
    assert lights["Luck"]["colour"] == "red" and "500 trials" in lights["Luck"]["reason"]
    assert document["colour"] == "red" and document["sentence"].startswith("No: ")
    kept = run.result()
    assert kept.verdict is not None and kept.verdict.model_dump(mode="json") == document
    page = (run.path / "verdict.html").read_text(encoding="utf-8")
    assert "What would change it" in page and "<script" not in page
    assert len(ledger.entries()) == 1, "judging is no trial"


def test_it_says_what_would_change_it_on_the_screen(trader: Trader, tmp_path: Path) -> None:
    backtest_left(tmp_path / "runs")
    code, out, _ = trader("verdict", "latest", "--markets", "20", "--trials", "1")
    assert code == 0 and "Other markets" in out and "To change it" in " ".join(out.replace("│", " ").split())


def test_a_sweep_is_judged_with_what_choosing_was_worth(trader: Trader, tmp_path: Path) -> None:
    asked = SweepParameters(**WHAT, grid={"fast": [5, 10, 20], "slow": [50, 100]})
    run = left(tmp_path / "runs", "sweep", asked, None)
    run_sweep(asked, asked.load_bars(load_settings()), str(run.path), trials=False, shown=False)
    code, out, err = trader("verdict", "latest-sweep", "--markets", "20", "--json")
    assert code == 0, err
    names = [one["name"] for one in json.loads(out)["lights"]]
    assert {"Luck", "Overfitting", "All combinations", "Out of sample", "Neighbours"} <= set(names)


def test_a_search_is_judged_with_all_its_trials_counted(trader: Trader, tmp_path: Path) -> None:
    asked = SearchParameters(**WHAT, space={"fast": range(2, 20), "slow": range(20, 90)}, trials=12, folds=2)
    run = left(tmp_path / "runs", "search", asked, None)
    found = run_search(asked, asked.load_bars(load_settings()), str(run.path), ledger=False, shown=False)
    code, out, err = trader("verdict", "latest-search", "--markets", "20", "--json")
    assert code == 0, err
    luck = {one["name"]: one for one in json.loads(out)["lights"]}["Luck"]
    assert 2 <= found.tried <= 12 and f"the best of {found.tried} trials" in luck["reason"]


def test_a_run_that_comes_out_differently_is_not_judged(trader: Trader, tmp_path: Path) -> None:
    run = backtest_left(tmp_path / "runs")
    run.write_result(run.result().model_copy(update={"order_list_hash": "sha256:" + 64 * "0"}))
    code, _, err = trader("verdict", "latest", "--markets", "20")
    assert code == 4 and "does not come out as it did" in err
    assert run.result().verdict is None and not (run.path / "verdict.html").exists()


def test_code_that_a_folder_names_is_not_run_without_trust(trader: Trader, tmp_path: Path) -> None:
    run = backtest_left(tmp_path / "runs")
    (run.path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    given = json.loads(run.params.read_bytes())
    given["parameters"]["strategy"] = f"{run.path / 'evil.py'}:Evil"
    run.write_params(given)
    code, _, err = trader("verdict", "latest")
    assert code == 2 and "Nothing of it was run" in err and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("verdict",), 2, "Say which run is judged"),
        (("verdict", "no-such-run"), 2, "There is no run"),
        (("verdict", "latest-paper"), 2, "a verdict is about"),
        (("verdict", "latest-backtest", "latest-backtest"), 2, "one of each"),
        (("verdict", "latest-backtest", "--trials", "0"), 2, "0 trials are none"),
        (("verdict", "latest-backtest", "--by", "sharp_ratio"), 2, "Did you mean 'sharpe_ratio'"),
    ],
)
def test_bad_input_gets_a_sentence(
    trader: Trader, tmp_path: Path, words: tuple[str, ...], code: int, sentence: str
) -> None:
    backtest_left(tmp_path / "runs")
    left(tmp_path / "runs", "paper", RunParameters(**WHAT), None)
    found, _, err = trader(*words)
    assert (found, sentence in err) == (code, True), err


def test_a_run_with_a_broken_result_is_bad_data(trader: Trader, tmp_path: Path) -> None:
    run = backtest_left(tmp_path / "runs")
    run.result_file.write_text('{"kind": "backt')
    assert trader("verdict", "latest")[0] == 4
    run.params.write_text("{}")
    assert trader("verdict", "latest")[0] == 4
