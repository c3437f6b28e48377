"""`trader data`: from a file on the disk to a backtest, and an answer to what the store holds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trader_lib import sample_bars
from trader_lib.app.cli import main

Trader = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Trader:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRADER_DATA__STORE_PATH", str(tmp_path / "store"))
    capsys.readouterr()

    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def write_csv(path: Path, form: str = "%Y-%m-%d", drop: slice | None = None) -> Path:
    table = sample_bars("IBM", start="2010-01-04", end="2010-06-30").to_frame()
    table["Date"] = table["timestamp"].dt.tz_convert("America/New_York").dt.strftime(form)
    table = table.drop(columns=["symbol", "timestamp"])
    table.drop(index=table.index[drop] if drop else []).to_csv(path, index=False)
    return path


def test_a_csv_becomes_a_backtest_in_two_commands(trader: Trader, tmp_path: Path) -> None:
    file = write_csv(tmp_path / "ibm.csv")
    code, out, err = trader("data", "import", str(file), "--symbol", "ibm", "--json")
    assert code == 0 and err == ""
    assert json.loads(out)["symbols"] == [{"symbol": "IBM", "first": "2010-01-04", "last": "2010-06-30", "bars": 124}]
    code, out, _ = trader(
        "backtest", "--source", "store", "--symbols", "ibm", "-p", "fast=5", "-p", "slow=20", "--json"
    )
    assert code == 0
    assert json.loads(out)["data"]["feed"] == "own"


def test_the_store_says_what_it_holds_and_what_it_lacks(trader: Trader, tmp_path: Path) -> None:
    code, out, err = trader("data", "list")
    assert (code, out) == (0, "") and "trader data import" in err
    file = write_csv(tmp_path / "ibm.csv", drop=slice(10, 13))
    assert trader("data", "import", str(file), "--symbol", "IBM")[0] == 0
    code, out, _ = trader("data", "list", "--json")
    (row,) = json.loads(out)
    assert code == 0 and (row["symbol"], row["adjustment"], row["bars"]) == ("IBM", "all", 121)
    code, out, _ = trader("data", "show", "ibm", "--json")
    (report,) = json.loads(out)
    assert code == 0 and report["missing_sessions"] == 3
    assert report["holes"] == [{"first": "2010-01-19", "last": "2010-01-21", "sessions": 3}]
    code, out, _ = trader("data", "show", "IBM")
    assert code == 0 and "2010-01-19" in out
    code, _, err = trader("data", "show", "IBN")
    assert code == 4 and "Did you mean 'IBM'" in err


def test_a_date_that_can_be_read_in_two_ways_is_asked_about(trader: Trader, tmp_path: Path) -> None:
    file = tmp_path / "ibm.csv"
    file.write_text("Date,Open,High,Low,Close,Volume\n04/01/2010,9,9,9,9,1\n05/01/2010,9,9,9,9,1\n")
    code, out, err = trader("data", "import", str(file), "--symbol", "IBM")
    assert (code, out) == (4, "") and "--date-format '%d/%m/%Y' if days come first" in err
    code, out, _ = trader("data", "import", str(file), "--symbol", "IBM", "--date-format", "%d/%m/%Y", "--json")
    assert code == 0 and json.loads(out)["symbols"][0]["last"] == "2010-01-05"
    assert not list((tmp_path / "store").rglob("*.tmp"))


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (None, 2, "There is no file"),
        ("", 4, "is empty"),
        ("Date,Open,High,Low,Close,Volume\n", 4, "no bar"),
        ("Date,Open,High,Low,Close,Volume\n2010-01-04,9,9,9,9,1\n", 4, "--symbol IBM"),
        ("Date,Ticker,Open,High,Low,Close,Volume\n2010-01-04,\x1b[31m,9,9,9,9,1\n", 4, "is no symbol"),
        ("Date,Ticker,Open,High,Low,Close,Volume\n2010-01-04,../x,9,9,9,9,1\n", 2, "cannot be part"),
    ],
)
def test_a_file_that_cannot_be_taken_leaves_the_store_as_it_was(
    trader: Trader, tmp_path: Path, text: str | None, code: int, words: str
) -> None:
    file = tmp_path / "bars.csv"
    if text is not None:
        file.write_text(text)
    symbol = ("--symbol", "IBM") if words == "no bar" else ()
    found, out, err = trader("data", "import", str(file), *symbol)
    assert (found, out) == (code, "") and words in err and "Traceback" not in err and "\x1b" not in err
    assert not (tmp_path / "store").exists()


def test_symbols_of_other_vendors_pass_through_the_store(trader: Trader, tmp_path: Path) -> None:
    file = tmp_path / "bars.csv"
    rows = [
        f"{day},{symbol},9,9,9,9,1000" for symbol in ("brk.b", "BF/B", "^GSPC") for day in ("2010-01-04", "2010-01-05")
    ]
    file.write_text("\n".join(["date,symbol,open,high,low,close,volume", *rows]))
    assert trader("data", "import", str(file))[0] == 0
    code, out, _ = trader("data", "list", "--json")
    assert code == 0 and {row["symbol"] for row in json.loads(out)} == {"BRK.B", "BF/B", "^GSPC"}
    assert trader("data", "show", "bf/b", "--json")[0] == 0


def test_a_second_file_that_does_not_continue_the_first_names_the_option(trader: Trader, tmp_path: Path) -> None:
    file = write_csv(tmp_path / "ibm.csv")
    assert trader("data", "import", str(file), "--symbol", "IBM")[0] == 0
    lines = file.read_text().replace("2010-", "2011-").splitlines()
    file.write_text("\n".join([lines[0], *lines[1:3]]))
    code, _, err = trader("data", "import", str(file), "--symbol", "IBM")
    assert code == 4 and "import with --replace" in err
    assert trader("data", "import", str(file), "--symbol", "IBM", "--replace")[0] == 0
    assert json.loads(trader("data", "list", "--json")[1])[0]["bars"] == 2


def test_the_file_of_the_readme_is_imported_and_traded(trader: Trader) -> None:
    prices = Path(__file__).parents[1] / "examples" / "ibm.csv"
    code, out, err = trader("data", "import", str(prices), "--symbol", "IBM", "--json")
    assert code == 0, err
    (row,) = json.loads(out)["symbols"]
    assert (row["symbol"], row["bars"], row["first"]) == ("IBM", 250, "2012-01-03")
    code, _, err = trader(
        "backtest", "--source", "store", "--symbols", "IBM", "--start", "2012-02-01", "--end", "2012-12-31"
    )
    assert code == 0, err
