"""A report of several runs as people look at it: every line drawn, nothing sideways on a phone."""

from pathlib import Path
from typing import Any

import pytest

from trader_lib.market.sample import sample_bars
from trader_lib.research.backtest import backtest
from trader_lib.research.side_by_side import side_by_side
from trader_lib.strategy.sma_cross import SmaCross


@pytest.mark.slow
def test_runs_are_drawn_on_a_laptop_and_a_phone(tmp_path: Path, chromium: Any) -> None:
    prices = sample_bars(["IBM"], start="2009-01-02")
    runs = [backtest(SmaCross(fast=fast, slow=50), prices, trials=False) for fast in (5, 10, 20)]
    page = side_by_side(runs, tmp_path / "runs.html", names=["<b>one</b>", "two", "three"])
    errors: list[str] = []
    for width in (1280, 390):
        tab = chromium.new_page(viewport={"width": width, "height": 900})
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        tab.goto(page.as_uri())
        tab.wait_for_selector(".main-svg")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("document.querySelectorAll('.scatterlayer .trace').length") == 6
        assert "<b>one</b>" in tab.inner_text("main") and not errors
        tab.close()
