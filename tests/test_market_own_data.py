"""Prices in the shapes that people have them: each is taken whole, or refused with the way out."""

from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from trader_lib import Bars, sample_bars
from trader_lib.errors.taxonomy import BadData, Misused, TraderError
from trader_lib.market.store import BarStore

WORDS = ("Open", "High", "Low", "Close", "Volume")


@pytest.fixture(scope="module")
def known() -> Bars:
    return sample_bars(["IBM", "MSFT"], start="2010-03-01", end="2010-03-31")


def yahoo(bars: Bars, symbol: str) -> pd.DataFrame:
    """One symbol as yfinance downloads it: an index of dates, columns with capitals."""
    table = bars.sel([symbol]).to_frame()
    days = pd.DatetimeIndex(table["timestamp"]).tz_convert("America/New_York").tz_localize(None)
    return table[["open", "high", "low", "close", "volume"]].set_axis(WORDS, axis=1).set_index(days.rename("Date"))


def by_ticker(bars: Bars) -> pd.DataFrame:
    return pd.concat({symbol: yahoo(bars, symbol) for symbol in bars.symbols}, axis=1, names=["Ticker", "Price"])


def joined(bars: Bars) -> pd.DataFrame:
    wide = by_ticker(bars)
    return wide.set_axis([f"{symbol}_{word}" for symbol, word in wide.columns], axis=1).reset_index()


class Arrowlike:
    """What polars' frame is to this library: something that speaks Arrow's protocol."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)


class LazyFrame:
    """polars' plan of a frame, which is one once it is collected."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def collect(self) -> Arrowlike:
        return Arrowlike(self._table)


def bar_set(bars: Bars) -> Any:
    from alpaca.data.models.bars import BarSet

    letters = dict(zip("ohlcv", ("open", "high", "low", "close", "volume"), strict=True))
    raw: dict[str, list[dict[str, Any]]] = {}
    for row in bars.to_frame().to_dict("records"):
        figures = {letter: row[name] for letter, name in letters.items()}
        raw.setdefault(row["symbol"], []).append({"t": row["timestamp"].isoformat(), **figures, "n": 1, "vw": 1.0})
    return BarSet(raw)


SHAPES: dict[str, Callable[[Bars], Any]] = {
    "long": lambda bars: bars.to_frame(),
    "long with index": lambda bars: bars.to_frame().set_index(["symbol", "timestamp"]),
    "capitals": lambda bars: bars.to_frame().rename(columns=str.title),
    "ticker and date": lambda bars: bars.to_frame().rename(columns={"symbol": "Ticker", "timestamp": "Date"}),
    "yfinance by ticker": by_ticker,
    "yfinance by price": lambda bars: by_ticker(bars).swaplevel(axis=1).sort_index(axis=1),
    "joined labels": joined,
    "a frame a symbol": lambda bars: {symbol: yahoo(bars, symbol) for symbol in bars.symbols},
    "a frame a field": lambda bars: {name: bars.frame(name.lower()) for name in WORDS},
    "Arrow": lambda bars: pa.Table.from_pandas(bars.to_frame()),
    "Arrow's protocol": lambda bars: Arrowlike(pa.Table.from_pandas(bars.to_frame())),
    "polars' LazyFrame": lambda bars: LazyFrame(pa.Table.from_pandas(bars.to_frame())),
    "BarSet": bar_set,
    "BarSet.df": lambda bars: bar_set(bars).df,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_bars(known: Bars, shape: str) -> None:
    assert Bars.from_frame(SHAPES[shape](known), symbols=["IBM", "MSFT"]).content_hash == known.content_hash


@pytest.mark.parametrize("shape", ["long", "yfinance by price", "joined labels", "capitals"])
@pytest.mark.parametrize("name", ["bars.csv", "bars.csv.gz", "bars.parquet"])
def test_files_give_the_same_bars(known: Bars, tmp_path: Path, shape: str, name: str) -> None:
    table, path = SHAPES[shape](known), tmp_path / name
    if name.endswith("parquet"):
        table.to_parquet(path)
    else:
        table.to_csv(path, index=shape == "yfinance by price")
    bars = Bars.read(path, symbols="IBM,MSFT")
    assert bars.content_hash == known.content_hash
    assert (bars.provenance.source, bars.provenance.feed) == ("file", "own")


def one(stamps: list[Any], symbol: str = "A", **more: Any) -> pd.DataFrame:
    figures = dict.fromkeys(("open", "high", "low", "close"), 9.0)
    return pd.DataFrame({"symbol": symbol, "timestamp": stamps, **figures, "volume": 100.0, **more})


def test_slashed_dates_are_asked_about_and_never_guessed() -> None:
    texts = [f"{day:02d}/01/2024" for day in (2, 3, 4, 5, 8, 9, 10, 11, 12)]
    with pytest.raises(BadData, match=r"date_format='%d/%m/%Y' if days come first, date_format='%m/%d/%Y'"):
        Bars.from_frame(one(texts))
    bars = Bars.from_frame(one(texts), date_format="%d/%m/%Y")
    assert (bars.day(0), bars.day(-1)) == (date(2024, 1, 2), date(2024, 1, 12))
    proved = Bars.from_frame(one(["12/01/2024", "15/01/2024"]))
    assert (proved.day(0), proved.day(-1)) == (date(2024, 1, 12), date(2024, 1, 15))


@pytest.mark.parametrize(
    "stamps",
    [
        [datetime(2024, 3, 8, tzinfo=UTC), datetime(2024, 3, 11, tzinfo=UTC)],
        ["2024-03-08T00:00:00Z", "2024-03-11T00:00:00Z"],
        ["2024-03-08 00:00:00-05:00", "2024-03-11 00:00:00-04:00"],
        [1709856000, 1710115200],
        [1709856000_000, 1710115200_000],
        [1709856000_000_000, 1710115200_000_000],
        [1709856000_000_000_000, 1710115200_000_000_000],
        ["1709856000", "1710115200"],
        [20240308, 20240311],
        list(pd.DatetimeIndex(["2024-03-08", "2024-03-11"], tz="Europe/Berlin")),
    ],
)
def test_daily_bars_belong_to_the_day_that_their_stamp_names(stamps: list[Any]) -> None:
    bars = Bars.from_frame(one(stamps))
    assert [bars.day(row) for row in range(2)] == [date(2024, 3, 8), date(2024, 3, 11)]


def test_times_across_summer_time_survive_a_csv(tmp_path: Path) -> None:
    when = pd.DatetimeIndex(["2024-03-08 15:59", "2024-03-11 09:30"], tz="America/New_York")
    path = tmp_path / "minutes.csv"
    one(list(when)).to_csv(path, index=False)
    assert "-05:00" in path.read_text() and "-04:00" in path.read_text()
    assert Bars.read(path, timeframe="1Min").index.tolist() == when.tz_convert("UTC").tolist()
    one([str(stamp)[:19] for stamp in when]).to_csv(path, index=False)
    with pytest.raises(BadData, match="timezone='America/New_York'"):
        Bars.read(path, timeframe="1Min")
    assert Bars.read(path, timeframe="1Min", timezone="America/New_York").index.tolist() == when.tolist()


@pytest.mark.parametrize("symbol", ["NA", "nan", "null", "None", "TRUE", "0005"])
def test_no_ticker_is_lost_on_the_way_from_a_csv(tmp_path: Path, symbol: str) -> None:
    path = tmp_path / "bars.csv"
    pd.concat([one(["2024-01-02", "2024-01-03"], name) for name in ("AAPL", symbol)]).to_csv(path, index=False)
    bars = Bars.read(path)
    assert bars.symbols == ("AAPL", symbol) and np.isfinite(bars.close).all()


def test_a_ticker_that_pandas_lost_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "bars.csv"
    one(["2024-01-02"], "NA").to_csv(path, index=False)
    with pytest.raises(BadData, match=r"keep_default_na=False"):
        Bars.from_frame(pd.read_csv(path))


def test_numeric_tickers_keep_their_rows() -> None:
    bars = Bars.from_frame(pd.concat([one(["2024-01-02"]).assign(symbol=symbol) for symbol in (700, 5)]))
    assert bars.symbols == ("700", "5") and np.isfinite(bars.close).all()


def test_one_symbol_as_text_is_one_symbol() -> None:
    assert Bars.from_frame(one(["2024-01-02"], "IBM"), symbols="IBM").symbols == ("IBM",)


@pytest.mark.parametrize(
    ("table", "options", "kind", "words"),
    [
        (one(["2024-01-02"], "IBM"), {"symbols": ["IBM", "IBN"]}, BadData, "Did you mean 'IBM'"),
        (one(["2024-01-02"], "IBM"), {"symbols": ""}, Misused, "none, empty or repeat"),
        (one(["2024-01-02"]), {"gaps": "ffill"}, Misused, "ffill"),
        (one(["2024-01-02", "2024-01-03", "2024-01-02"]), {}, BadData, "rows 1 and 3"),
        (one(["2024-01-02", "tomorrow"]), {}, BadData, "'tomorrow'"),
        (one(["2024-01-02", "today"]), {}, BadData, "'today'"),
        (one(["2024-01-02", "2024-02-30"]), {}, BadData, "'2024-02-30'"),
        (one(["2024-01-02", ""]), {}, BadData, "timestamp is missing"),
        (one([0, 1]), {}, BadData, "date_format='ms'"),
        (one(["2024-01-02"], Close=9.0), {}, BadData, "'close', 'Close' are all close"),
        (one(["2024-01-02"]).drop(columns="symbol"), {}, BadData, "symbols='IBM'"),
        (one(["2024-01-02"], symbol="").assign(symbol=""), {}, BadData, "empty symbol"),
        (one(["2024-01-02"]).assign(close="nine"), {}, BadData, "not a number"),
        (one(["2024-01-02"])[["symbol", "timestamp", "close"]], {}, BadData, "no column open, high, low, volume"),
        (one(["2024-11-03 01:30"]), {"timeframe": "1Min", "timezone": "America/New_York"}, BadData, "summer time"),
        (one(["2024-01-02 10:00"]), {"timeframe": "1Min", "timezone": "New York"}, Misused, "no time zone 'New York'"),
        ({"A": one([]), "B": one(["2024-01-02"])}, {}, BadData, "no bar of this symbol"),
        (one(["9999-01-02"]), {}, BadData, "1678 to 2262"),
        (one([np.inf, 1.7e9]), {}, BadData, "infinite"),
        (one(["2024-01-02"]).assign(symbol=[["A"]]), {}, BadData, "no texts"),
        (one(["2024-01-02"]).assign(symbol="A,B"), {}, BadData, "is no symbol"),
        (one(["2024-01-02"]).assign(symbol="A\nB"), {}, BadData, "is no symbol"),
        (pd.Series([1.0]), {}, Misused, "mapping from symbol to frame"),
        ([1, 2], {}, Misused, "mapping from symbol to frame"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(
    table: Any, options: dict[str, Any], kind: type[TraderError], words: str
) -> None:
    with pytest.raises(kind) as refused:
        Bars.from_frame(table, **options)
    assert words in str(refused.value)


def test_rounding_noise_is_repaired_and_counted_and_a_cent_is_refused() -> None:
    table = one(["2024-01-02", "2024-01-03"]).assign(open=110.375, high=110.375, low=110.375, close=110.375)
    table.loc[1, "high"] = np.nextafter(110.375, 0.0)
    bars = Bars.from_frame(table)
    assert bars.high.max() == bars.high.min() == 110.375 and bars.provenance.repaired == 1
    table.loc[1, "high"] = 110.365
    with pytest.raises(BadData, match="the high is below"):
        Bars.from_frame(table)


@pytest.mark.parametrize("symbol", ["brk.b", "BF/B", "^GSPC", "EURUSD=X", "BRK-B", "ES=F"])
def test_what_from_frame_gives_is_storable_and_read_without_naming_its_kind(tmp_path: Path, symbol: str) -> None:
    store = BarStore(tmp_path)
    bars = Bars.from_frame(one(["2024-01-02", "2024-01-03"], symbol))
    (path,) = store.write(bars)
    assert path.parent == tmp_path / "own" / "raw" / "1Day"
    assert store.read([symbol]).content_hash == bars.content_hash
    assert [entry.symbol for entry in store.entries()] == [symbol]


def test_a_store_with_two_kinds_asks_which(tmp_path: Path) -> None:
    store = BarStore(tmp_path)
    for adjustment in ("raw", "all"):
        store.write(Bars.from_frame(one(["2024-01-02", "2024-01-03"], "IBM"), adjustment=adjustment))
    with pytest.raises(BadData, match="feed own, adjustment all; feed own, adjustment raw"):
        store.read("IBM")
    with pytest.raises(BadData, match=r"with adjustment split\. It has IBM: feed own"):
        store.read("IBM", adjustment="split")
    assert store.read("IBM", adjustment="raw").provenance.adjustment == "raw"


def test_bars_of_1985_trade() -> None:
    from trader_lib import SmaCross, backtest

    days = pd.bdate_range("1985-06-03", "1985-06-28")
    prices = np.linspace(100.0, 110.0, len(days))
    table = one(list(days), "IBM").assign(open=prices, high=prices, low=prices, close=prices, volume=1e6)
    assert backtest(SmaCross(fast=2, slow=5), Bars.from_frame(table)).orders


def test_hourly_fx_passes_the_day_of_25_hours() -> None:
    from trader_lib import SmaCross, backtest
    from trader_lib.clock.sessions import TradingCalendar

    hours = pd.date_range("2024-11-01", "2024-11-06", freq="h", tz="UTC")
    price = 1.1 + 0.01 * np.sin(np.arange(len(hours)) / 5)
    table = one(list(hours), "EURUSD").assign(open=price, high=price, low=price, close=price, volume=1e9)
    bars = Bars.from_frame(table, timeframe="1Hour")
    assert backtest(SmaCross(fast=2, slow=5), bars, calendar=TradingCalendar("24/7")).orders


def test_a_csv_with_an_unnamed_index_is_read_by_it(known: Bars, tmp_path: Path) -> None:
    path = tmp_path / "ibm.csv"
    yahoo(known, "IBM").rename_axis(None).to_csv(path)
    assert Bars.read(path, symbols="IBM").content_hash == known.sel(["IBM"]).content_hash
