"""Several strategies at the command line: a file of them, a run that shows each, and a replay that asks one."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from trader_lib.app.options import read_strategies
from trader_lib.session.spec import SessionSpec

Trader = Callable[..., tuple[int, str, str]]

STRATEGIES = """
[trend]
strategy = "sma_cross"
params = { fast = 3, slow = 8 }
symbols = ["AAPL", "IBM"]
capital = "60%"

[swing]
strategy = "rsi_reversion"
params = { period = 3, entry = 45.0 }
symbols = ["MSFT"]
capital = 30000
limits = { max_order_notional = 20000 }
"""
DAYS = ("--start", "2005-01-03", "--end", "2005-02-28", "--broker", "simulated", "--transport", "in_process")


@pytest.mark.slow
def test_two_strategies_from_a_file_are_traded_shown_and_replayed(trader: Trader, tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text(STRATEGIES)
    code, out, err = trader("paper", "--strategies", "two.toml", *DAYS, "--json")
    assert code == 0, err
    result = json.loads(out)
    trend, swing = result["strategies"]
    assert (trend["name"], trend["capital"], trend["symbols"]) == ("trend", "60000", ["AAPL", "IBM"])
    assert (swing["name"], swing["capital"], swing["strategy"]) == ("swing", "30000", "rsi_reversion")
    for row in (trend, swing):
        assert row["orders"] == sum(order.get("strategy") == row["name"] for order in result["orders"])
        assert row["refused"] == sum(no["strategy"] == row["name"] for no in result["refusals"])
    assert trend["orders"] and swing["refused"] and result["reconciliation"]["ok"]
    gained = sum(float(row["equity_end"]) - float(row["capital"]) for row in (trend, swing))
    assert abs(float(result["equity_end"]) - 100_000 - gained) <= 0.02
    assert result["parameters"]["strategies"][0]["params"] == {"fast": 3, "slow": 8}

    report = next((tmp_path / "runs").glob("*-paper-*/report.html")).read_text(encoding="utf-8")
    assert "trend: sma_cross(fast=3, slow=8); swing: rsi_reversion(" in report and "60,000.00" in report
    code, out, _ = trader("runs", "show", "latest", "--orders", "3")
    assert code == 0 and "trend + swing" in out and "60,000.00" in out and "Strategy" in out
    code, out, _ = trader("status", "latest", "--json")
    assert [one["strategy"] for one in json.loads(out)["strategies"]] == ["trend", "swing"]
    code, out, _ = trader("journal", "show", "latest", "--type", "fill_recorded", "--limit", "1")
    assert code == 0 and "trend: buy" in out
    asked = (
        "--symbols",
        "MSFT",
        "--cash",
        "30000",
        "-p",
        "period=3",
        "-p",
        "entry=45",
        "--max-order-notional",
        "20000",
    )
    code, _, err = trader("backtest", "--strategy", "rsi_reversion", *asked, *DAYS[:4])
    assert code == 0, err
    code, out, _ = trader("runs", "compare", "latest-backtest", "latest-paper", "--of", "swing")
    assert code == 0 and "Equity at the end is equal to the cent." in out
    code, out, _ = trader("runs", "compare", "latest-backtest", "latest-paper")
    assert code == 1
    code, _, err = trader("runs", "compare", "latest-backtest", "latest-paper", "--of", "swimg")
    assert code == 2 and "Did you mean 'swing'" in err
    code, out, _ = trader("replay", "latest-paper")
    assert code == 0 and "The replay agrees" in out
    code, out, _ = trader("replay", "latest-paper", "-p", "fast=4", "--of", "trend")
    assert code == 0 and "sma_cross {'fast': 4, 'slow': 8}" in out
    code, _, err = trader("replay", "latest-paper", "-p", "fast=4", "--of", "trent")
    assert code == 2 and "say with --of" in err and "Did you mean 'trend'" in err


def test_what_is_wrong_with_the_file_is_said_before_anything_is_made(trader: Trader, tmp_path: Path) -> None:
    cases = {
        "Did you mean 'params'": STRATEGIES.replace("params =", "parms =", 1),
        "120,000.00 USD together": STRATEGIES.replace('"60%"', "90000"),
        "Did you mean 'sma_cross'": STRATEGIES.replace('"sma_cross"', '"sma_corss"'),
    }
    for told, text in cases.items():
        (tmp_path / "two.toml").write_text(text)
        code, _, err = trader("paper", "--strategies", "two.toml", *DAYS)
        assert code == 2 and told in err, err
    (tmp_path / "two.toml").write_text(STRATEGIES)
    code, _, err = trader("paper", "--strategies", "two.toml", "--strategy", "momentum", *DAYS)
    assert code == 2 and "not both" in err
    code, _, err = trader("paper", "--strategies", "two.toml", "--symbols", "AAPL,IBM", *DAYS)
    assert code == 2 and "swing is to trade MSFT" in err
    assert not list((tmp_path / "runs").glob("*-paper-*"))


@pytest.mark.parametrize("page", ["README.md", "docs/operations.md"])
def test_the_file_in_the_documentation_is_taken(page: str, tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8")
    block = next(block for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL) if "[trend]" in block)
    (tmp_path / "strategies.toml").write_text(block)
    spec = SessionSpec.model_validate({"strategies": read_strategies(tmp_path / "strategies.toml")})
    assert [one.label for one in spec.assignments()] == ["trend", "swing"] and spec.symbols == ("AAPL", "IBM", "MSFT")
