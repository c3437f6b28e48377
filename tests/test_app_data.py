"""`trader data`: from a file on the disk to a backtest, and an answer to what the store holds."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.conftest import KEY_ID, SECRET_KEY
from trader_lib import sample_bars
from trader_lib.app.cli import main
from trader_lib.exchange.engine import Exchange, Step
from trader_lib.exchange.server import ExchangeServer
from trader_lib.market import history
from trader_lib.market.store import BarStore

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
    code, out, err = trader("data", "import", str(file), "--symbol", "IBM")
    assert (code, out) == (4, "") and "3 sessions of XNYS" in err and "--gaps 3 carries" in err
    assert trader("data", "import", str(file), "--symbol", "IBM", "--gaps", "2")[0] == 4
    assert trader("data", "import", str(file), "--symbol", "IBM", "--gaps", "3")[0] == 0
    code, out, _ = trader("data", "list", "--json")
    (row,) = json.loads(out)
    assert code == 0 and (row["symbol"], row["adjustment"], row["bars"]) == ("IBM", "all", 124)
    code, out, _ = trader("data", "show", "ibm", "--json")
    (report,) = json.loads(out)
    assert code == 0 and report["missing_sessions"] == 0 and report["content_hash"].startswith("sha256:")
    code, _, err = trader("data", "show", "IBN")
    assert code == 4 and "Did you mean 'IBM'" in err


def test_a_hole_in_a_file_of_the_store_is_shown_and_not_traded(trader: Trader, tmp_path: Path) -> None:
    """A file that an older version wrote, which let holes pass."""
    assert trader("data", "import", str(write_csv(tmp_path / "ibm.csv")), "--symbol", "IBM")[0] == 0
    (stored,) = (tmp_path / "store").rglob("*.parquet")
    table = pd.read_parquet(stored)
    table.drop(index=table.index[10:13]).to_parquet(stored)
    code, out, _ = trader("data", "show", "ibm", "--json")
    (report,) = json.loads(out)
    assert code == 0 and report["missing_sessions"] == 3 and "3 sessions of XNYS" in report["refused"]
    assert report["holes"] == [{"first": "2010-01-19", "last": "2010-01-21", "sessions": 3}]
    code, out, _ = trader("data", "show", "IBM")
    assert code == 0 and "2010-01-19" in out
    code, out, _ = trader("data", "check", "IBM", "--json")
    (found,) = json.loads(out)
    assert code == 1 and [look["kind"] for look in found["findings"]] == ["hole"]
    code, _, err = trader("backtest", "--source", "store", "--symbols", "IBM", "-p", "fast=5", "-p", "slow=20")
    assert code == 4 and "3 sessions of XNYS" in err


def test_raw_prices_are_traded_as_the_import_says_and_a_split_in_them_is_bad_data(
    trader: Trader, tmp_path: Path
) -> None:
    file = write_csv(tmp_path / "ibm.csv")
    table = pd.read_csv(file)
    table.loc[60:, ["open", "high", "low", "close"]] /= 2
    table.to_csv(file, index=False)
    code, _, err = trader("data", "import", str(file), "--symbol", "IBM", "--adjustment", "raw")
    assert code == 0 and "--symbols IBM --adjustment raw" in err
    code, out, err = trader("backtest", "--source", "store", "--symbols", "IBM", "--adjustment", "raw")
    assert (code, out) == (4, "") and "like a split of 2:1" in err and not (tmp_path / "runs").exists()


def test_currencies_are_traded_by_their_own_calendar_and_held_against_another(trader: Trader, tmp_path: Path) -> None:
    hours = pd.date_range("2024-10-27 17:00", "2024-11-08 16:00", freq="h", tz="America/New_York")  # one has 25
    weekday, hour = hours.day_of_week, hours.hour
    open_ = (weekday < 4) | ((weekday == 4) & (hour < 17)) | ((weekday == 6) & (hour >= 17))
    hours, parts = hours[open_], []
    for place, symbol in enumerate(("EURUSD", "GBPUSD")):
        price = (1.1 + 0.02 * np.sin(np.arange(len(hours)) / 7 + place)).round(5)
        figures = dict.fromkeys(("open", "high", "low", "close"), price)
        parts.append(pd.DataFrame({"symbol": symbol, "timestamp": hours, **figures, "volume": 1e6}))
    pd.concat(parts).to_csv(tmp_path / "fx.csv", index=False)
    assert trader("data", "import", str(tmp_path / "fx.csv"), "--timeframe", "1Hour")[0] == 0
    asked = ("--source", "store", "--symbols", "EURUSD", "--timeframe", "1Hour", "-p", "fast=3", "-p", "slow=9")
    code, out, err = trader("backtest", *asked)
    assert (code, out) == (4, "") and "without a session at XNYS" in err and "--calendar" in err
    code, out, err = trader("paper", *asked, "--calendar", "24/7")
    assert code == 2 and "Only `trader backtest` takes --calendar" in err
    code, out, _ = trader("backtest", *asked, "--calendar", "24/7", "--benchmark", "gbpusd", "--json")
    result = json.loads(out)
    assert code == 0 and (result["parameters"]["calendar"], result["parameters"]["benchmark"]) == ("24/7", "GBPUSD")
    assert result["statistics"]["years"] == pytest.approx(13 / 365)
    assert result["notes"][-1].startswith("Against GBPUSD: alpha ")


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


def test_check_says_by_its_exit_code_whether_there_is_something_to_look_at(trader: Trader, tmp_path: Path) -> None:
    file = write_csv(tmp_path / "ibm.csv")
    code, out, err = trader("data", "check", str(file), "--symbol", "IBM")
    assert code == 0 and "2010-01-04" in out and "Nothing to look at" in err
    raw = tmp_path / "aapl.csv"
    sample_bars("AAPL", start="2005-01-03", end="2005-12-30", adjustment="raw").to_frame().to_csv(raw, index=False)
    code, out, _ = trader("data", "check", str(raw), "--adjustment", "raw", "--json")
    (found,) = json.loads(out)
    assert code == 1 and [(look["kind"], look["first"]) for look in found["findings"]] == [("split", "2005-02-28")]
    assert trader("data", "import", str(raw), "--adjustment", "raw")[0] == 0
    code, out, _ = trader("data", "check", "aapl")
    assert code == 1 and "2:1" in out
    assert trader("data", "check")[0] == 1  # all that is stored
    code, _, err = trader("data", "check", "nothere.csv")
    assert code == 2 and "There is no file" in err
    code, _, err = trader("data", "check", "NOTHERE")
    assert code == 4 and "trader data list" in err


def test_check_asks_about_dates_in_the_words_of_the_command(trader: Trader, tmp_path: Path) -> None:
    file = tmp_path / "ibm.csv"
    file.write_text("Date,Open,High,Low,Close,Volume\n04/01/2010,9,9,9,9,1\n05/01/2010,9,9,9,9,1\n")
    code, _, err = trader("data", "check", str(file), "--symbol", "IBM")
    assert code == 4 and "--date-format '%d/%m/%Y' if days come first" in err
    assert trader("data", "check", str(file), "--symbol", "IBM", "--date-format", "%d/%m/%Y")[0] == 0


def test_screen_ranks_what_is_stored(trader: Trader, tmp_path: Path) -> None:
    code, _, err = trader("data", "screen")
    assert code == 0 and "None of 0 symbols" in err
    BarStore(tmp_path / "store").write(sample_bars(["AAPL", "IBM", "MSFT"], start="2010-01-04", end="2010-12-31"))
    code, out, _ = trader("data", "screen", "--by", "price", "--min-price", "30", "--json")
    assert code == 0 and [row["symbol"] for row in json.loads(out)] == ["IBM", "AAPL"]
    code, out, _ = trader("data", "screen", "ibm,msft", "--by", "price", "--ascending", "--top", "1")
    assert code == 0 and "MSFT" in out and "IBM" not in out and "1 of 2 symbols" in out
    code, _, err = trader("data", "screen", "IBN")
    assert code == 4 and "Did you mean 'IBM'" in err
    assert trader("data", "screen", "--top", "-1")[0] == 2


@pytest.mark.parametrize("words", [("fetch", "AAPL", "--start", "2012-01-03"), ("screen", "--source", "alpaca")])
def test_without_keys_alpaca_is_not_asked(trader: Trader, words: tuple[str, ...]) -> None:
    code, out, err = trader("data", *words)
    assert (code, out) == (3, "") and "set APCA_API_KEY_ID and APCA_API_SECRET_KEY" in err


@pytest.fixture
def with_keys(
    exchange_server: ExchangeServer, exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Step]:
    """Keys and addresses of the embedded exchange, which speaks Alpaca's protocol; what is returned plays a day."""
    monkeypatch.setenv("TRADER_BROKER__KEY_ID", KEY_ID)
    monkeypatch.setenv("TRADER_BROKER__SECRET_KEY", SECRET_KEY)
    monkeypatch.setenv("TRADER_BROKER__TRADING_URL", exchange_server.url)
    monkeypatch.setenv("TRADER_BROKER__TRADING_STREAM_URL", exchange_server.trading_stream_url)
    monkeypatch.setenv("TRADER_BROKER__DATA_URL", exchange_server.url)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)

    def next_day() -> Step:
        return exchange_server.call(exchange.advance)

    next_day()
    return next_day


def test_fetch_fills_the_store_and_goes_on_where_it_ended(
    trader: Trader, with_keys: Callable[[], Step], tmp_path: Path
) -> None:
    code, _, err = trader("data", "fetch", "AAPL")
    assert code == 2 and "--start 2020-01-02" in err
    code, out, err = trader("data", "fetch", "aapl,nothere,ibm", "--start", "2012-01-03", "--json")
    found = json.loads(out)
    assert code == 4 and [row["symbol"] for row in found["symbols"]] == ["AAPL", "IBM"]
    assert (found["feed"], found["adjustment"]) == ("iex", "all")
    assert [row["symbol"] for row in found["refused"]] == ["NOTHERE"]
    assert {row["first"] for row in found["symbols"]} == {"2012-01-03"}
    before = found["symbols"][0]
    assert before["splits"] == 0
    with_keys()
    code, out, err = trader("data", "fetch", "AAPL")
    assert code == 0 and before["last"] in out
    assert "no list of splits and dividends" not in err
    (row,) = (row for row in json.loads(trader("data", "list", "--json")[1]) if row["symbol"] == "AAPL")
    assert row["bars"] == before["bars"] + 1 and row["first"] == "2012-01-03" and row["source"] == "alpaca"
    assert trader("data", "fetch", "AAPL", "--replace", "--json")[0] == 0
    assert trader("backtest", "--source", "store", "--symbols", "AAPL", "-p", "fast=2", "-p", "slow=3")[0] == 0


@pytest.mark.usefixtures("with_keys")
def test_fetch_says_where_a_server_has_no_list_of_splits(trader: Trader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "alpaca_actions", lambda *asked: None)
    code, _, err = trader("data", "fetch", "AAPL", "--start", "2012-01-03")
    assert code == 0 and "no list of splits and dividends; stored without: AAPL." in err
    code, out, _ = trader("data", "fetch", "IBM", "--start", "2012-01-03", "--json")
    assert code == 0 and json.loads(out)["symbols"][0]["splits"] is None


@pytest.mark.usefixtures("with_keys")
def test_history_that_was_adjusted_since_is_replaced_on_request(trader: Trader, tmp_path: Path) -> None:
    assert trader("data", "fetch", "IBM", "--start", "2012-01-03")[0] == 0
    (stored,) = (tmp_path / "store").rglob("*.parquet")
    table = pd.read_parquet(stored)
    table[["open", "high", "low", "close"]] /= 2
    table.to_parquet(stored)
    code, _, err = trader("data", "fetch", "IBM")
    assert code == 4 and "--replace" in err and "replace=True" not in err
    assert trader("data", "fetch", "IBM", "--start", "2012-01-03", "--replace")[0] == 0


@pytest.mark.usefixtures("with_keys")
def test_screen_reads_alpacas_assets(trader: Trader) -> None:
    code, out, err = trader("data", "screen", "--source", "alpaca", "--days", "6000", "--json")
    rows = json.loads(out)
    assert code == 0, err
    assert {row["symbol"] for row in rows} == {"AAPL", "IBM", "MSFT"}
    assert {row["missing_sessions"] for row in rows} == {0}
    assert [row["dollar_volume"] for row in rows] == sorted((row["dollar_volume"] for row in rows), reverse=True)
