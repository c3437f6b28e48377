"""The store on a disk that fails."""

import os
from pathlib import Path

import pytest

from trader_lib.errors.taxonomy import BadData, Misconfigured, Misused
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars
from trader_lib.market.store import BarStore


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BarStore(tmp_path)
    (path,) = store.write(sample_bars("IBM", "2005-01-03", "2005-12-30"))
    before = path.read_bytes()

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(Misconfigured, match="No space left"):
        store.write(sample_bars("IBM", "2005-01-03", "2006-12-29"))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["IBM.parquet"]


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Misconfigured, match=r"data\.store_path"):
        BarStore(tmp_path / "file").write(sample_bars("IBM", "2005-01-03", "2005-12-30"))


def test_nothing_is_written_if_one_symbol_is_refused(tmp_path: Path) -> None:
    store = BarStore(tmp_path)
    store.write(sample_bars("MSFT", "2005-01-03", "2005-12-30"))
    with pytest.raises(BadData, match="share none"):
        store.write(sample_bars("IBM,MSFT", "2007-01-03", "2007-12-31"))
    assert [entry.symbol for entry in store.entries()] == ["MSFT"]


def test_symbol_without_a_bar_is_left_out(tmp_path: Path) -> None:
    store = BarStore(tmp_path)
    store.write(sample_bars("FB,IBM", "2005-01-03", "2005-12-30"))
    assert [entry.symbol for entry in store.entries()] == ["IBM"]


def test_older_bars_merge_in_front(tmp_path: Path) -> None:
    store = BarStore(tmp_path)
    store.write(sample_bars("IBM", "2006-01-03", "2006-12-29"))
    store.write(sample_bars("IBM", "2005-01-03", "2006-01-03"))
    whole = sample_bars("IBM", "2005-01-03", "2006-12-29")
    assert store.read("IBM", feed="wiki").content_hash == whole.content_hash


def test_synthetic_stays_marked_and_apart(tmp_path: Path) -> None:
    store = BarStore(tmp_path)
    table = sample_bars("IBM", "2005-01-03", "2005-12-30").to_frame()
    store.write(Bars.from_frame(table, source="synthetic", feed="x", synthetic=True))
    assert store.read("IBM", feed="x", adjustment="raw").provenance.synthetic


@pytest.mark.parametrize("name", ["../IBM", "", ".hidden", "a/../b", "/etc", "a\\b", "a\x00b", "x" * 40])
def test_no_key_climbs_out_of_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(Misused, match="cannot be part"):
        BarStore(tmp_path).file(name, "1Day", "sip", "all")
