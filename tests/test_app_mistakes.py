"""Mistakes of the first hour: each gets the sentence that says what was meant, and the exit code of its kind."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from trader_lib import Bars, SmaCross, Strategy, backtest, sample_bars
from trader_lib.app.cli import page_sentence
from trader_lib.app.options import usage_hint
from trader_lib.errors.taxonomy import Misused

Trader = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ("backtest --fast 10", 2, "A strategy's own parameter is given with -p: -p fast=10."),
        ("backtest --fast=10", 2, "A strategy's own parameter is given with -p: -p fast=10."),
        ("backtest sma_cross", 2, "The strategy is an option: trader backtest --strategy sma_cross."),
        ("paper sma_cross", 2, "The strategy is an option: trader paper --strategy sma_cross."),
        ("backtest --symbols AAPL_MSFT", 2, "Symbols are separated by commas: --symbols AAPL,MSFT."),
        ("backtest --start 03/01/2005", 2, "--start 03/01/2005 is not a date. Write year-month-day"),
        ("paper --end 2005-13-01", 2, "--end 2005-13-01 is not a date."),
        ("backtest -p fast=abc", 2, "fast: input should be a valid integer"),
        ("backtest -p fast", 2, "-p fast should read -p NAME=VALUE"),
        ("backtest --leverage 9", 2, "leverage: Input should be less than or equal to 4."),
        ("backtest --min-trade 2", 2, "min_trade: Input should be less than 1."),
        ("run dips.py", 2, "A strategy in it is run by `trader backtest --strategy dips.py:CLASS`."),
        ("run nowhere.ipynb", 2, "There is no notebook nowhere.ipynb."),
        ("run backtest -p fast=abc", 2, "one of params: `trader backtest -p fast=VALUE`."),
        ("run backtest -p symbol=AAPL", 2, "takes no parameter 'symbol'. Did you mean 'symbols'?"),
        ("live", 2, "trader live --account NUMBER."),
        ("backtest --csv nowhere.csv", 2, "nowhere.csv"),
        ("backtest --csv a.csv --source store", 2, "--csv and --source each say where the bars come from"),
        ("paper --csv ibm.csv", 2, "A session takes its bars from a source: `trader data import FILE --symbol SYMBOL`"),
        (
            "backtest -p fats=10",
            2,
            "Strategy 'sma_cross' has no parameter 'fats'; it takes fast, slow. Did you mean 'fast'?",
        ),
        ("backtest --strategy sma_crss", 2, "Did you mean 'sma_cross'?"),
        ("backtest --symbols APPL", 4, "Did you mean 'AAPL'?"),
        ("resume latest-paper", 2, "--by"),
        ("runs show nowhere", 2, "`trader runs list` shows all of them."),
    ],
)
def test_a_mistake_is_answered_with_what_was_meant(
    trader: Trader, tmp_path: Path, arguments: str, code: int, sentence: str
) -> None:
    words = [word.replace("AAPL_MSFT", "AAPL MSFT") for word in arguments.split()]
    got, out, err = trader(*words)
    assert (got, out) == (code, ""), err
    assert sentence in err
    assert "Traceback" not in err and "pydantic" not in err and len(err.splitlines()) <= 3
    assert list(tmp_path.iterdir()) == []


def test_commas_with_blanks_after_them_are_no_mistake(trader: Trader) -> None:
    code, _, err = trader("backtest", "--symbols", "AAPL, MSFT", "--start", "2031-01-02")
    assert code == 4 and "outside the data" in err  # the symbols were understood


def test_nothing_is_guessed_about_a_command_that_takes_no_strategy() -> None:
    assert usage_hint(["runs", "list", "--fast", "10"], "Unknown option: --fast.") == ""
    assert usage_hint([], "") == ""
    assert usage_hint(["backtest", "--cash"], 'Parameter "--cash" requires an argument.') == ""


def test_doctor_calls_a_bad_setting_one(trader: Trader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRADER_RISK__MAX_ORDERS", "abc")
    code, out, _ = trader("doctor", "--offline")
    assert code == 3 and "TRADER_RISK__MAX_ORDERS" in out


def test_config_without_keys_shows_what_it_can(trader: Trader) -> None:
    code, out, err = trader("config", "--profile", "paper")
    assert code == 3 and "broker.key_id: is needed for broker.kind=alpaca" in err
    assert "runs.path" in out and "profile paper" in out and "broker.kind" not in out


def test_a_bad_setting_leaves_config_nothing_to_show(trader: Trader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRADER_RISK__MAX_ORDERS", "abc")
    code, out, err = trader("config")
    assert (code, out) == (3, "") and "TRADER_RISK__MAX_ORDERS" in err


def test_an_ended_session_takes_no_command(trader: Trader, tmp_path: Path) -> None:
    words = ("--transport", "in_process", "--symbols", "AAPL", "--start", "2012-01-03", "--end", "2012-02-01")
    assert trader("paper", *words, "-p", "fast=2", "-p", "slow=5")[0] == 0
    journal = next((tmp_path / "runs").glob("*/journal.sqlite"))
    before = journal.read_bytes()
    for command in (("kill", "latest-paper", "--flatten"), ("resume", "latest-paper", "--by", "ada")):
        code, out, _ = trader(*command)
        assert code == 7 and "has ended (every bar was played): there is no session to steer." in out
    assert journal.read_bytes() == before and not list(journal.parent.glob("*control*"))


RAISES = """
import numpy as np
from trader_lib import Bars, Strategy


class Broken(Strategy):
    @property
    def warmup(self) -> int:
        return 2

    def targets(self, bars: Bars) -> np.ndarray:
        return {}["nothing"]
"""


def test_a_strategy_that_raises_is_reported_with_its_file_and_line(trader: Trader, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RAISES)
    code, _, err = trader("backtest", "--strategy", "mine.py:Broken", "--symbols", "AAPL")
    line = RAISES.splitlines().index('        return {}["nothing"]') + 1
    assert code == 5 and f"KeyError: 'nothing'. It was raised in mine.py, line {line}" in err


def test_a_csv_file_is_backtested_as_it_is(trader: Trader, tmp_path: Path) -> None:
    examples = Path(__file__).parents[1] / "examples"
    code, out, err = trader("backtest", "--csv", str(examples / "ibm.csv"), "-p", "fast=5", "-p", "slow=20", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["data"]["source"] == "file" and result["data"]["symbols"] == ["IBM"] and result["orders"]
    notebook = json.loads((Path(result["folder"]) / "notebook.ipynb").read_text())
    figures = [one["data"] for cell in notebook["cells"] for one in cell.get("outputs", ()) if "data" in one]
    drawn = [data for data in figures if "application/vnd.plotly.v1+json" in data]
    assert len(drawn) == 2 and all(data["image/png"].startswith("iVBOR") for data in drawn)
    assert len(result["curve"]) > 100


@pytest.fixture(scope="module")
def bars() -> Bars:
    return sample_bars(["AAPL"], start="2006-01-03", end="2006-12-29")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"bars": pd.DataFrame({"close": [1.0]})}, "backtest needs Bars, not a DataFrame"),
        ({"cash": "abc"}, "The account cannot start with 'abc': give an amount in USD, such as 100_000."),
        ({"cash": None}, "The account cannot start with None: give an amount in USD"),
        ({"costs": {"commision_bps": 1}}, "costs has no 'commision_bps'. Did you mean 'commission_bps'?"),
        ({"costs": {"commission_bps": -1}}, "costs.commission_bps: Input should be greater than or equal to 0."),
        ({"costs": 3}, "costs takes Costs or a dict, not a int."),
        ({"limits": {"max_order": 1}}, "limits has no 'max_order'."),
        ({"limits": {"max_drawdown": 7}}, "limits.max_drawdown: Input should be less than 1."),
        ({"strategy": "sma_cross"}, "backtest needs a strategy object"),
        ({"strategy": SmaCross}, "backtest needs a strategy object"),
    ],
)
def test_a_mistake_in_python_is_answered_with_what_was_meant(bars: Bars, given: dict[str, Any], sentence: str) -> None:
    asked: dict[str, Any] = {"strategy": SmaCross(fast=3, slow=8), "bars": bars, **given}
    with pytest.raises(Misused) as raised:
        backtest(**asked)
    assert sentence in raised.value.message


def test_costs_and_limits_may_be_dicts(bars: Bars) -> None:
    from trader_lib import Costs, Limits

    strategy = SmaCross(fast=3, slow=8)
    typed = backtest(strategy, bars, costs=Costs(commission_bps=5), limits=Limits(max_order_qty=100))
    plain = backtest(strategy, bars, costs={"commission_bps": 5}, limits={"max_order_qty": 100})
    assert plain.costs == typed.costs and plain.limits == typed.limits
    assert plain.order_list_hash == typed.order_list_hash


def test_a_misspelt_parameter_names_the_one_that_was_meant() -> None:
    with pytest.raises(ValueError, match=r"SmaCross has no parameter 'fats'\. .*Did you mean 'fast'\?"):
        SmaCross(fats=3)  # type: ignore[call-arg]


def test_a_strategy_without_its_warmup_is_told_what_to_define() -> None:
    class Hasty(Strategy):
        def targets(self, bars: Bars) -> Any:
            return bars.close * 0.0

    with pytest.raises(Misused, match=r"Strategy Hasty cannot be built: define warmup\."):
        Hasty()  # type: ignore[abstract]


def test_help_and_refused_options_wait_for_no_compiler() -> None:
    """numba, numpy and pandas are most of a second; nobody needs them to read a help page."""
    code = "import sys, trader_lib.app.cli as c; c.main(['--help']); c.main(['backtest', '--symbols', 'A B'])"
    code += "; assert 'numpy' not in sys.modules; c.main(['backtest', '-p', 'fats=3'])"
    heavy = "sys.exit(' '.join({'numba', 'pandas', 'plotly', 'papermill', 'alpaca'} & set(sys.modules)) or 0)"
    ran = subprocess.run([sys.executable, "-c", f"{code}; {heavy}"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_address_of_the_page_is_said_and_a_port_in_use_as_well() -> None:
    assert "trader dashboard" in page_sentence("127.0.0.1", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be listened on" in page_sentence("127.0.0.1", port)
    assert page_sentence("127.0.0.1", port) == f"The session's page: http://127.0.0.1:{port}/"


def test_a_session_says_where_its_page_is(trader: Trader, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_asked: Any, **_how: Any) -> None:
        raise Misused("far enough")

    monkeypatch.setattr("trader_lib.runs.runner.run_notebook", stopped)
    monkeypatch.setenv("TRADER_MONITORING__PORT", "0")
    words = ("paper", "--transport", "in_process", "--symbols", "AAPL", "--start", "2012-01-03", "--end", "2012-03-01")
    code, _, err = trader(*words)
    assert code == 2 and "The session's page is on a free port" in err and "far enough" in err
