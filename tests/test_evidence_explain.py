"""Every kind of order of a session is explained from the journal; what cannot be is refused in a sentence."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.given import Given
from trader_lib.evidence.explain import Explanation, explain
from trader_lib.evidence.gathering import Gathered, gather
from trader_lib.exchange.costs import Costs
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.refusals import insufficient_buying_power
from trader_lib.journal.opening import open_journal
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars
from trader_lib.runs.store import RunFolder, RunStore
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec, StrategyShare
from trader_lib.steering.control import ControlFile
from trader_lib.trading.orders import MARGIN_CALL, Order, OrderRequest

pytestmark = pytest.mark.usefixtures("quiet")

Trader = Callable[..., tuple[int, str, str]]
DAYS: dict[str, Any] = {"symbols": ("AAPL", "IBM"), "start": date(2012, 1, 3), "end": date(2012, 2, 29)}
STEP = Given(weights=tuple((0.5, 0.4) if row % 9 < 5 else (0.1, 0.5) for row in range(60)))
OTHER_FIGURES = "the strategy worked with other figures than the journal holds"


async def gathered(folder: Path, spec: SessionSpec, **more: Any) -> Gathered:
    """Run a session; return what its journal says of its orders."""
    path = folder / "journal.sqlite"
    await run_session(spec, journal_path=path, check=False, **more)
    with open_journal(path) as journal:
        return gather(journal.read())


def every(found: Gathered) -> list[Explanation]:
    """Explain all orders; no quantity of a target order may be other than the rule makes it."""
    explanations = [explain(found, history) for history in found.orders.values()]
    assert not any(OTHER_FIGURES in sentence for one in explanations for sentence in one.sentences())
    return explanations


@pytest.mark.parametrize("case", ["exits", "short", "thin", "fractional", "cash", "dear", "several"])
async def test_the_rule_gives_every_quantity_again(case: str, tmp_path: Path) -> None:
    crash = {"strategy": "rsi_reversion", "start": date(2008, 9, 2), "end": date(2008, 12, 31)}
    quick = {"params": {"fast": 2, "slow": 5}}
    shares = (
        StrategyShare(name="a", strategy="sma_cross", params={"fast": 2, "slow": 5}, symbols=("AAPL",), capital="40%"),
        StrategyShare(name="b", strategy="sma_cross", params={"fast": 3, "slow": 9}, capital="60%", min_trade=0.0),
    )
    cases: dict[str, dict[str, Any]] = {
        "exits": crash | {"params": {"stop_loss": 0.05, "take_profit": 0.08}},
        "short": {},
        "thin": quick | {"costs": Costs(volume_share=0.000002)},
        "fractional": quick | {"fractional": True},
        "cash": quick | {"multiplier": 1},
        "dear": quick | {"costs": Costs(commission_per_share=0.05, slippage_bps=30), "min_trade": 0.0},
        "several": {"strategies": shares, "strategy": "", "params": {}},
    }
    short = {"strategy": Given(weights=tuple((-0.6, 0.9) if row % 7 < 4 else (0.7, -0.5) for row in range(60)))}
    found = await gathered(tmp_path, SessionSpec(**(DAYS | cases[case])), **(short if case == "short" else {}))
    explained = every(found)
    assert len(explained) >= 10
    sized = [one for one in explained if one.history.request and one.history.request.purpose == "entry"]
    assert all(
        "so it was to" in one.parts["decided"][0] or "protective exit" in one.parts["decided"][0] for one in sized
    )
    if case == "exits":
        protecting = [one for one in explained if "It protects the position of" in one.parts["decided"][0]]
        assert protecting and any("stop" in one.parts["decided"][0] for one in protecting)


async def test_buys_beyond_the_cash_are_explained_as_cut(tmp_path: Path) -> None:
    greedy = Given(weights=tuple((0.9, 0.9) for _ in range(60)))
    explained = every(await gathered(tmp_path, SessionSpec(**DAYS), strategy=greedy))
    assert "cost more than there was to spend, so" in explained[0].parts["decided"][1]


async def test_an_order_that_the_broker_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(_exchange: Exchange, _request: OrderRequest, *_more: Any) -> Order:
        raise insufficient_buying_power(Decimal(100), Decimal(49952))

    monkeypatch.setattr(Exchange, "submit", submit)
    first = every(await gathered(tmp_path, SessionSpec(**DAYS), strategy=STEP))[0]
    assert "The broker rejected it (40310000): insufficient buying power" in " ".join(first.parts["sent"])
    assert first.parts["cost"] == ["Nothing filled: it cost nothing."]


async def test_an_operator_who_flattens_and_cancels(tmp_path: Path) -> None:
    def closed(bars: int, _at: datetime) -> None:
        if bars == 12:
            ControlFile.beside(tmp_path / "journal.sqlite").append("flatten", reason="prices", by="ada")

    found = await gathered(tmp_path, SessionSpec(**DAYS), strategy=STEP, progress=closed)
    flat = next(one for one in every(found) if one.history.client_order_id.startswith("flatten-"))
    assert flat.parts["decided"] == ["An operator asked for all positions to be closed."]
    assert flat.parts["saw"] == ["No decision of the strategy is recorded for it."] and "filled" in flat.heading


async def test_a_margin_call_is_the_brokers(tmp_path: Path) -> None:
    table = sample_bars(("AAPL", "IBM"), "2012-01-03", "2012-02-29").to_frame()
    after = (table["symbol"] == "AAPL") & (table["timestamp"] > "2012-01-20T00:00:00Z")
    table.loc[after, ["open", "high", "low", "close"]] *= 3.5
    bars = Bars.from_frame(table, adjustment="split")
    short = Given(weights=tuple((-0.9, 0.0) for _ in range(60)))
    found = await gathered(tmp_path, SessionSpec(**DAYS), strategy=short, bars=bars)
    called = [one for one in every(found) if one.history.client_order_id.startswith(MARGIN_CALL)]
    assert called and "The broker closed a position on a margin call. It was filled." in called[0].heading
    assert called[0].parts["checked"] == ["Risk was not asked, as far as is recorded."]


# ---- the commands


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a session that has ended, made once; each test takes a copy."""
    import asyncio

    run = RunStore(tmp_path_factory.mktemp("evidence")).create("paper")
    run.write_params({"kind": "paper", "parameters": {"broker": "simulated", "transport": "in_process"}})
    spec = SessionSpec(params={"fast": 2, "slow": 5}, costs=Costs(slippage_bps=5), **DAYS)
    asyncio.run(run_session(spec, journal_path=run.journal))
    return run.path


@pytest.fixture
def run(recorded: Path, tmp_path: Path) -> RunFolder:
    """A copy of the recorded session, where commands look for runs."""
    return RunFolder(Path(shutil.copytree(recorded, tmp_path / "runs" / recorded.name)))


def change(run: RunFolder, statement: str) -> None:
    with sqlite3.connect(run.journal) as database:
        database.execute(statement)
    database.close()


def test_explain_and_parity_answer_in_words_and_in_json(run: RunFolder, trader: Trader) -> None:
    code, out, _ = trader("explain", "latest-paper", "sma_cross-IBM-20120103")
    assert code == 0 and "What it cost" in out and "so it was to buy 317" in out
    code, out, _ = trader("explain", "latest-paper", "sma_cross-IBM-20120103", "--json")
    found = json.loads(out)
    assert code == 0 and found["sizing"]["allowed"] == 317 and len(found["checks"]) == 18
    code, out, _ = trader("explain", run.name[:20])
    assert code == 0 and "Name one: trader explain RUN ORDER" in out
    code, out, _ = trader("parity", "latest-paper", "--json", "--html", "parity.html")
    assert (
        code == 0 and json.loads(out)["difference"] == "0" and "Parity of sma_cross" in Path("parity.html").read_text()
    )


def test_a_named_backtest_without_slippage_is_the_fill_price(run: RunFolder, trader: Trader) -> None:
    parameters = {"strategy": "sma_cross", "params": {"fast": 2, "slow": 5}, "symbols": ["AAPL", "IBM"]}
    backtest = RunStore(run.path.parent).create("backtest")
    backtest.write_params({"kind": "backtest", "parameters": parameters | {"start": "2011-01-03", "end": "2012-12-31"}})
    code, out, _ = trader("parity", "latest-paper", "latest-backtest", "--json")
    found = json.loads(out)
    assert code == 0 and set(found["by_cause"]) == {"fill price"} and found["unexplained"] == "0"
    assert found["notes"] == [f"{backtest.name} ran again from 2012-01-03 to 2012-02-29, the session's days."]
    backtest.params.write_text('{"parameters": {"strategy": "sma_cross", "cash": "much"}}')
    code, _, err = trader("parity", "latest-paper", "latest-backtest")
    assert code == 4 and "does not say what the backtest was asked for" in err


def test_what_cannot_be_explained_is_refused_in_a_sentence(run: RunFolder, trader: Trader) -> None:
    backtest = RunStore(run.path.parent).create("backtest")
    backtest.write_params({"kind": "backtest", "parameters": {}})
    for words, code, sentence in (
        (("explain", "nope"), 2, "There is no run 'nope'"),
        (("explain", "latest-paper", "sma"), 2, "Give more of the id"),
        (("explain", "latest-paper", "nope"), 2, "has no order 'nope'"),
        (("explain", "latest-backtest"), 2, "has no journal: only sessions write one"),
        (("parity", "latest-backtest"), 2, "has no journal: only sessions write one"),
        (("parity", "latest-paper", "latest-paper"), 2, "is a paper, not a backtest"),
        (("parity", "latest-paper", "--of", "trend"), 2, "It has one strategy: leave --of out."),
        (("parity", "latest-paper", "--bound", "-1"), 2, "--bound -1 is no amount"),
        (("parity", "latest-paper", "--html", "no/such/folder.html"), 2, "cannot be written"),
    ):
        found, _, err = trader(*words)
        assert found == code and sentence in " ".join(err.split()), (words, found, err)


def test_a_journal_that_was_changed_is_not_explained(run: RunFolder, trader: Trader) -> None:
    change(run, "UPDATE events SET payload = replace(payload, '52.8488', '52.8489') WHERE type = 'bars_closed'")
    for words in (("explain", "latest-paper", "sma_cross-IBM-20120103"), ("parity", "latest-paper")):
        code, out, _ = trader(*words)
        assert code == 6 and "the chain is broken" in out
    assert trader("explain", "latest-paper", "sma_cross-IBM-20120103", "--unverified")[0] == 0


def test_a_journal_of_another_version_is_refused_with_its_version(run: RunFolder, trader: Trader) -> None:
    change(
        run, "UPDATE events SET payload = replace(payload, '\"seed\":0', '\"seeds\":0') WHERE type = 'session_started'"
    )
    for words in (("explain", "latest-paper", "sma_cross-IBM-20120103"), ("parity", "latest-paper")):
        code, _, err = trader(*words, "--unverified")
        assert (code == 4 and "session_started" in err) or "Replay it with the version that wrote it" in err, err


def test_more_than_the_bound_without_a_cause_is_exit_code_1(run: RunFolder, trader: Trader) -> None:
    change(run, "UPDATE events SET payload = json_set(payload, '$.equity', '99000') WHERE type = 'portfolio_changed'")
    code, out, _ = trader("parity", "latest-paper", "--unverified")
    assert code == 1 and "have no cause, which is more than the bound of 1.00 USD" in " ".join(out.split())
    assert trader("parity", "latest-paper", "--unverified", "--bound", "1e6")[0] == 0
