"""Splits, dividends and factors that come with prices go with them: through frames, files, the store and cuts."""

import pickle
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from trader_lib.errors.taxonomy import BadData, Misused
from trader_lib.market.actions import Announced, announced
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars
from trader_lib.market.store import BarStore
from trader_lib.strategy.contract import Strategy, target_weights


@pytest.fixture(scope="module")
def raw() -> Bars:
    return sample_bars("AAPL,IBM", "2005-02-22", "2005-03-04", adjustment="raw")


def same(one: Bars, other: Bars) -> bool:
    return one.content_hash == other.content_hash and one.actions_hash == other.actions_hash != ""


def yahoo(bars: Bars) -> pd.DataFrame:
    """One symbol as yfinance gives it: no split is 0, prices are split-adjusted."""
    table = bars.sel(["AAPL"]).to_frame(actions=True).drop(columns=["symbol", "factor"])
    names = {"split": "Stock Splits", "dividend": "Dividends", "timestamp": "Date"}
    table["split"] = table["split"].replace(1.0, 0.0)
    return table.rename(columns={name: name.capitalize() for name in table} | names).set_index("Date")


def test_frames_files_and_the_store_keep_them(raw: Bars, tmp_path: Path) -> None:
    assert raw.actions.split[4].tolist() == [2.0, 1.0] and raw.day(4) == date(2005, 2, 28)
    table = raw.to_frame(actions=True)
    assert same(Bars.from_frame(table), raw)
    table.to_csv(tmp_path / "bars.csv", index=False)
    table.to_parquet(tmp_path / "bars.parquet")
    assert same(Bars.read(tmp_path / "bars.csv"), raw) and same(Bars.read(tmp_path / "bars.parquet"), raw)
    store = BarStore(tmp_path / "store")
    for kind in (raw, sample_bars("AAPL,IBM", "2005-02-22", "2005-03-04")):
        store.write(kind)
        assert same(store.read("AAPL,IBM", adjustment=kind.provenance.adjustment), kind)
    assert same(Bars.from_frame(yahoo(raw), symbols="AAPL"), raw.sel(["AAPL"]))
    assert same(pickle.loads(pickle.dumps(raw)), raw)


def test_yahoo_s_adjusted_prices(raw: Bars) -> None:
    table = yahoo(raw)
    table.loc[table.index[:4], ["Open", "High", "Low", "Close"]] /= 2.0
    bars = Bars.from_frame(table, symbols="AAPL", adjustment="split", volume="adjusted")
    assert bars.actions.factor[:, 0].tolist() == [0.5] * 4 + [1.0] * 5 and bars.actions.volume == "adjusted"
    with pytest.raises(BadData, match=r"the prices do not show it .* Say adjustment='split'"):
        Bars.from_frame(table, symbols="AAPL")
    with pytest.raises(Misused, match="There is no volume='yes'"):
        Bars.from_frame(table, symbols="AAPL", adjustment="split", volume="yes")


def test_cuts_keep_the_rows_that_they_keep(raw: Bars) -> None:
    assert raw.head(4).actions.split.tolist() == [[1, 1]] * 4
    assert raw.rows_between(4, 6).actions.split.tolist() == [[2, 1], [1, 1]]
    assert raw.sel(["IBM", "AAPL"]).actions.split[4].tolist() == [1, 2]
    assert raw.between("2005-02-28").actions.split[0].tolist() == [2, 1]
    assert raw.without_actions().actions is None and raw.without_actions().content_hash == raw.content_hash


def test_strategies_do_not_see_them(raw: Bars) -> None:
    class Looks(Strategy):
        @property
        def warmup(self) -> int:
            return 1

        def targets(self, bars: Bars) -> np.ndarray:
            assert bars.actions is None
            return np.zeros((bars.n, 2))

    target_weights(Looks(), raw)


def test_alpaca_s_announcements_are_placed(raw: Bars) -> None:
    split = SimpleNamespace(symbol="AAPL", ex_date=date(2005, 2, 28), new_rate=2.0, old_rate=1.0)
    paid = SimpleNamespace(symbol="IBM", ex_date=date(2005, 2, 26), rate=0.18)  # a Saturday
    answer = SimpleNamespace(data={"forward_splits": [split], "cash_dividends": [paid]})
    assert announced(answer) == (Announced("IBM", paid.ex_date, dividend=0.18), Announced("AAPL", split.ex_date, 2.0))
    bars = raw.without_actions().with_actions(announced(answer))
    assert bars.actions_hash != raw.actions_hash and (bars.actions.split == raw.actions.split).all()
    assert bars.actions.dividend[4].tolist() == [0.0, 0.18]
    with pytest.raises(BadData, match="the prices do not show it"):
        raw.without_actions().with_actions([Announced("IBM", split.ex_date, 2.0)])


def test_one_volume_a_reading(raw: Bars, tmp_path: Path) -> None:
    store = BarStore(tmp_path)
    store.write(sample_bars("AAPL", "2005-02-22", "2005-03-04"))
    adjusted = sample_bars("IBM", "2005-02-22", "2005-03-04").to_frame(actions=True)
    store.write(Bars.from_frame(adjusted, adjustment="all", volume="adjusted", feed="wiki", source="sample"))
    assert store.read("IBM").actions.volume == "adjusted"
    with pytest.raises(BadData, match="of shares as traded and of adjusted shares"):
        store.read("AAPL,IBM")


def test_what_is_no_number_is_named() -> None:
    table = sample_bars("IBM", "2005-02-22", "2005-02-25").to_frame().assign(split="two")
    with pytest.raises(BadData, match="A figure in split is not a number"):
        Bars.from_frame(table)
