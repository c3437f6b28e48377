"""The bundled sample is what its source says, and complete."""

import importlib.util
from datetime import date
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from trader_lib.clock.sessions import TradingCalendar
from trader_lib.market.sample import SAMPLE_SYMBOLS, sample_bars

ROOT = Path(__file__).parents[1]
FILE = ROOT / "trader_lib" / "market" / "data" / "sample_daily.parquet"


def test_builder_script_reproduces_the_committed_file() -> None:
    pytest.importorskip("bokeh_sampledata")
    spec = importlib.util.spec_from_file_location(
        "build_sample_data", ROOT / "tests" / "tools" / "build_sample_data.py"
    )
    assert spec and spec.loader
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    assert pq.read_table(FILE).equals(builder.build())


def test_content_is_pinned_by_hash() -> None:
    assert sample_bars().content_hash == "sha256:3e726981eb0ee28107773e97aa03dbe5dc1368390aa295d6f9187161b599aeea"
    assert (
        sample_bars(adjustment="raw").content_hash
        == "sha256:8633a5cfd827e4e018b3997b3d584128b36f37106fef4b0ef4d6b327d4c009f5"
    )


@pytest.mark.parametrize("symbol", SAMPLE_SYMBOLS)
def test_every_session_of_the_exchange_has_its_bar(symbol: str) -> None:
    bars = sample_bars([symbol])
    sessions = TradingCalendar().sessions(bars.day(0), bars.day(-1))
    assert [session.date for session in sessions] == [bars.day(row) for row in range(bars.n)]


def test_adjusted_returns_have_no_split_in_them() -> None:
    raw, adjusted = (sample_bars(["AAPL"], adjustment=how).frame()["AAPL"].pct_change() for how in ("raw", "all"))
    assert raw.min() < -0.49
    assert adjusted.idxmin().date() == date(2000, 9, 29)  # the profit warning of September 2000, a real fall of 52 %


def test_file_is_small_and_attributed() -> None:
    assert FILE.stat().st_size < 300_000
    notes = (FILE.parent / "README.md").read_text(encoding="utf-8")
    assert "Quandl WIKI Prices" in notes
    assert "public domain" in notes
