"""Tax lots: whatever is traded, cents and shares add up; what the journals cannot say is refused or noted."""

import json
import shutil
from collections.abc import Callable
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.given import Given
from trader_lib.evidence.lot_reading import LOT_EVENTS, AccountRecord, account_record, book_of
from trader_lib.evidence.lots import WINDOW, LotBook, Method, Split, Trade, apply_split, apply_trade, cents
from trader_lib.exchange.costs import Costs
from trader_lib.journal.opening import open_journal
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars
from trader_lib.runs.store import RunStore
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec

pytestmark = pytest.mark.usefixtures("quiet")

Trader = Callable[..., tuple[int, str, str]]
BEGIN = date(2025, 1, 6)
DEALS = st.lists(
    st.tuples(
        st.integers(0, 40),  # days since the one before
        st.integers(-30, 30).filter(bool),  # shares
        st.integers(800, 1200),  # cents a share
        st.integers(0, 3),  # fee, cents
    ),
    min_size=1,
    max_size=25,
)


def trades(deals: list[tuple[int, int, int, int]]) -> list[Trade]:
    day, found = BEGIN, []
    for number, (days, qty, price, fee) in enumerate(deals):
        day += timedelta(days=days)
        name = f"t{number}"
        found.append(Trade(name, name, "X", day, Decimal(qty), Decimal(price) / 100, Decimal(fee) / 100))
    return found


@given(DEALS, st.sampled_from(["fifo", "lifo", "highest"]))
def test_cents_and_shares_add_up_whatever_is_traded(deals: list[tuple[int, int, int, int]], method: Method) -> None:
    book, cash, shares = LotBook(method), Decimal(0), Decimal(0)
    for trade in trades(deals):
        cash -= cents(trade.qty * trade.price) + trade.fee
        shares += trade.qty
        apply_trade(book, trade)
        lots = book.lots["X"]
        assert book.held("X") == shares and len({lot.qty > 0 for lot in lots}) <= 1
        basis = sum((lot.basis if lot.qty > 0 else -lot.basis for lot in lots), Decimal(0))
        assert cash + basis == sum((gain.reported for gain in book.gains), Decimal(0))
    for gain in book.gains:
        assert 0 <= gain.disallowed <= max(-gain.gain, Decimal(0)), "no more than the loss, and nothing of a gain"
    matched = sum((lot.qty.copy_abs() for lot in book.lots["X"] if lot.replaces), Decimal(0))
    assert matched <= sum((gain.qty for gain in book.gains if gain.disallowed), Decimal(0))


@given(DEALS)
def test_a_loss_without_a_purchase_nearby_stands(deals: list[tuple[int, int, int, int]]) -> None:
    book, made = LotBook(), trades(deals)
    for trade in made:
        apply_trade(book, trade)
    for gain in book.gains:
        near = [one for one in made if abs(one.day - gain.closed) <= WINDOW and one.id not in {gain.trade, gain.lot}]
        if not any((one.qty < 0) == gain.is_short for one in near):
            assert gain.disallowed == 0


@given(DEALS, st.sampled_from(["2", "1.5", "0.1", "3"]))
def test_a_split_keeps_what_was_paid(deals: list[tuple[int, int, int, int]], ratio: str) -> None:
    book, made = LotBook(), trades(deals)
    for trade in made:
        apply_trade(book, trade)
    before = sum((lot.basis for lot in book.lots["X"]), Decimal(0)), book.held("X"), len(book.gains)
    apply_split(book, Split("X", made[-1].day, Decimal(ratio), Decimal(10)))
    sold = sum((gain.basis if not gain.is_short else gain.proceeds for gain in book.gains[before[2] :]), Decimal(0))
    after = sum((lot.basis for lot in book.lots["X"]), Decimal(0))
    moved = sum((gain.disallowed for gain in book.gains[before[2] :]), Decimal(0))
    assert abs(before[0] - sold - after) <= moved and book.held("X") == int(before[1] * Decimal(ratio))


async def journalled(folder: Path, strategy: Given, **more: Any) -> AccountRecord:
    path, bars = folder / "journal.sqlite", more.pop("bars", None)
    days = {"symbols": ("AAPL", "IBM"), "start": date(2012, 1, 3), "end": date(2012, 2, 29)}
    spec = SessionSpec(**(days | more))
    played = sample_bars(spec.symbols) if bars is None else bars
    await run_session(spec, bars=played, strategy=strategy, journal_path=path, check=False)
    with open_journal(path) as journal:
        return account_record(journal.read(types=LOT_EVENTS))


SWAY = Given(weights=tuple((-0.4, 0.6) if row % 6 < 3 else (0.5, -0.4) for row in range(60)))


async def test_long_and_short_lots_come_to_what_the_account_has(tmp_path: Path) -> None:
    costs = Costs(slippage_bps=5, commission_per_share=0.02)
    record = await journalled(tmp_path, SWAY, costs=costs)
    book, _ = book_of([record])
    assert any(gain.is_short for gain in book.gains) and any(not gain.is_short for gain in book.gains)
    cash = Decimal(100_000) - sum(
        cents(one.qty * one.price) + one.fee for one in record.happened if isinstance(one, Trade)
    )
    basis = sum(lot.basis if lot.qty > 0 else -lot.basis for lots in book.lots.values() for lot in lots)
    assert cash + basis == 100_000 + sum(gain.reported for gain in book.gains)


async def test_a_split_of_a_session_splits_its_lots(tmp_path: Path) -> None:
    bars = sample_bars(("AAPL", "IBM"), "2005-02-01", "2005-03-31", adjustment="raw")
    days = {"start": date(2005, 2, 1), "end": date(2005, 3, 31), "adjustment": "raw"}
    record = await journalled(tmp_path, SWAY, bars=bars, **days)
    assert any(isinstance(one, Split) for one in record.happened)
    book, _ = book_of([record])
    mine = [one for one in record.happened if isinstance(one, Trade) and one.symbol == "AAPL"]
    ratios = [2 if one.day <= date(2005, 2, 25) else 1 for one in mine]
    assert book.held("AAPL") == sum(one.qty * ratio for one, ratio in zip(mine, ratios, strict=True))


async def test_a_delisted_share_is_sold_at_what_it_paid(tmp_path: Path) -> None:
    table = sample_bars(("AAPL", "IBM"), "2012-01-03", "2012-02-29").to_frame()
    gone = (table["symbol"] == "IBM") & (table["timestamp"] > "2012-02-01T00:00:00Z")
    bars, hold = Bars.from_frame(table[~gone], adjustment="split"), Given(weights=((0.4, 0.4),))
    book, _ = book_of([await journalled(tmp_path, hold, bars=bars)])
    last = [gain for gain in book.gains if gain.trade.startswith("delisted:IBM")]
    assert last and book.held("IBM") == 0


def test_the_command_writes_years_and_refuses_in_sentences(tmp_path: Path, trader: Trader) -> None:
    import asyncio

    run = RunStore(tmp_path / "runs").create("paper")
    spec = SessionSpec(
        params={"fast": 2, "slow": 5}, symbols=("AAPL", "IBM"), start=date(2011, 11, 1), end=date(2012, 2, 29)
    )
    asyncio.run(run_session(spec, journal_path=run.journal))
    code, out, err = trader("lots", "latest-paper", "--json", "--csv", "taxes")
    found = json.loads(out)
    assert code == 0 and found["gains"] and "lots-2011.csv" in err and "lots-2012.csv" in err
    assert len(Path("taxes/lots-2011.csv").read_text().splitlines()) == 1 + sum(
        row["sold"].startswith("2011") for row in found["gains"]
    )
    code, out, _ = trader("lots", "latest-paper", "--year", "2012", "--method", "lifo")
    assert code == 0 and "Realized, lifo" in out
    Path("file").write_text("")
    for words, wanted, sentence in (
        (("lots", "nope"), 2, "There is no run 'nope'"),
        (("lots", "latest-paper", "latest-paper"), 2, "named more than once"),
        (("lots", "latest-paper", "--method", "specific"), 2, "go together"),
        (("lots", "latest-paper", "--lots", "no.csv"), 2, "go together"),
        (("lots", "latest-paper", "--method", "specific", "--lots", "no.csv"), 4, "is no file of lots"),
        (("lots", "latest-paper", "--csv", "file"), 3, "cannot be written to"),
    ):
        code, _, err = trader(*words)
        assert code == wanted and sentence in " ".join(err.split()), (words, code, err)
    shutil.rmtree(run.path)
    assert trader("lots")[0] == 2
