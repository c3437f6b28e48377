"""How-to and concept pages: their code runs, their commands exist, each concept has its diagram, terms and bounds."""

import ast
import asyncio
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from trader_lib.market.sample import sample_bars

DOCS = Path(__file__).parent.parent / "docs"
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))
CONCEPTS = sorted((DOCS / "concepts").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language, those inside of lists included."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", page.read_text(encoding="utf-8"), re.M | re.S)
    return ["\n".join(line.removeprefix(indent) for line in code.splitlines()) for indent, code in found]


def download(symbols: list[str], start: str, end: str, auto_adjust: bool) -> pd.DataFrame:
    """A frame as yfinance gives it: a column for each field and symbol, plain dates."""
    assert auto_adjust
    bars = sample_bars(symbols, start=start, end=pd.Timestamp(end) - pd.Timedelta(days=1))
    fields = ["close", "high", "low", "open", "volume"]
    frame = pd.concat({field.title(): bars.frame(field) for field in fields}, axis=1, names=["Price", "Ticker"])
    frame.index = frame.index.tz_convert("America/New_York").tz_localize(None).normalize().rename("Date")
    return frame


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_the_code_of_a_how_to_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: None) -> None:
    """Block after block, in one place, in an empty folder; a test function in it is called with its fixture."""
    yfinance = ModuleType("yfinance")
    yfinance.download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yfinance", yfinance)
    monkeypatch.chdir(tmp_path)
    module = ModuleType("how_to")
    monkeypatch.setitem(sys.modules, "how_to", module)
    names: dict[str, Any] = module.__dict__
    for source in blocks(page, "python"):
        code = compile(source, page.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        if running := eval(code, names):
            asyncio.run(running)
    if test := names.get("test_my_bot_buys_once"):
        from trader_lib.exchange.testing import AlpacaExchange, serve_sample

        with serve_sample() as server:
            test(AlpacaExchange(server))


@pytest.mark.parametrize("page", [*HOW_TO, *CONCEPTS], ids=lambda page: page.stem)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    from trader_lib.app.cli import app

    for block in blocks(page, "bash"):
        for line in block.splitlines():
            words = re.findall(r'"[^"]*"|\S+', line)
            assert words[0] == "trader", line
            app.parse_args([word.strip('"') for word in words[1:]], print_error=False, exit_on_error=False)
    for block in blocks(page, "toml"):
        tomllib.loads(block)


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_a_how_to_asks_one_question_and_answers_it_shortly(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# How do I ") and lines[0].endswith("?")
    assert not any(line.startswith("## ") for line in lines) and len(lines) < 60


@pytest.mark.parametrize("page", CONCEPTS, ids=lambda page: page.stem)
def test_a_concept_has_its_diagram_its_terms_and_what_it_does_not_do(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(blocks(page, "mermaid")) == 1 and not blocks(page, "bash") and not blocks(page, "python")
    assert re.findall(r"^## (Terms|What it does not do)$", text, re.M) == ["Terms", "What it does not do"]
