"""Markup in every field that a user, a broker or a received folder can set: shown as text, run nowhere."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import nbformat
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st
from papermill.translators import PythonTranslator
from pydantic import SecretStr

from tests.venue import holds, new_session_run, wait_for
from trader_lib.app.cli import main
from trader_lib.journal.journal import SqliteJournal
from trader_lib.market.synthetic import synthetic_bars
from trader_lib.observe.fold import ViewFold
from trader_lib.observe.page import FolderControls, page_app
from trader_lib.observe.server import MonitorServer
from trader_lib.observe.watch import SessionWatch
from trader_lib.research.backtest import backtest
from trader_lib.risk.limits import Limits
from trader_lib.runs.page import PLOTLY_MIME, render_page
from trader_lib.runs.store import RunStore
from trader_lib.steering.control import ControlFile
from trader_lib.steering.status import session_status
from trader_lib.strategy.registry import load_strategy
from trader_lib.trading.events import (
    AccountReported,
    AgentFailed,
    BarRow,
    BarsClosed,
    CheckOutcome,
    Discrepancy,
    Event,
    FillRecorded,
    OperatorCommand,
    OrderAcknowledged,
    OrderAdopted,
    OrderFailed,
    OrderIntended,
    Payload,
    PortfolioChanged,
    PositionsReported,
    Reconciled,
    RiskDecided,
    SessionEnded,
    SessionStarted,
    StrategyHoldings,
    TradeUpdated,
    TradingState,
    TradingStateChanged,
)
from trader_lib.trading.orders import Order, OrderRequest, OrderSide, OrderStatus
from trader_lib.trading.portfolio import Fill, Position

IMG = "<img src=x onerror=\"pwned=document.title='pwned'\">"
SCRIPT = "</script><script>pwned=document.title='pwned'</script>"
ANCHOR = "<a href=\"javascript:pwned=document.title='pwned'\">x</a>"
LINK = "[x](javascript:pwned=document.title='pwned') `{{7*7}}` ${7*7} &amp; <b>b</b>"
EVERY = f"{IMG} {SCRIPT} {ANCHOR} {LINK}"
FILE = "{{7*7}} <img src=x onerror=alert(1)>"  # as far as the name of a file may go
SYMBOLS = (IMG, SCRIPT, ANCHOR, "GOOD", "BAD")  # the last two are traded, and the last of them is refused

STRATEGY = f"""
from trader_lib.strategy.contract import Strategy


class Evil(Strategy):
    name = {SCRIPT!r}
    label: str = ""
    window: int = 3
    fails_at: int = 0

    @property
    def warmup(self):
        return 3

    def targets(self, bars):
        if bars.n == self.fails_at:
            raise RuntimeError({EVERY!r})
        closes = bars.frame("close")
        weights = (closes > closes.rolling(self.window).mean()) * 0.4
        weights.loc[:, [name not in ("GOOD", "BAD") for name in bars.symbols]] = 0.0
        return weights
"""
ASKED: dict[str, Any] = {
    "strategy": f"{FILE}.py:Evil",
    "params": {"label": EVERY, "fails_at": 40},
    "symbols": list(SYMBOLS),
    "source": "synthetic",
    "start": "2012-01-03",
    "end": "2012-04-30",
    "limits": {"restricted": ["BAD"]},
}
REPLAY = Path(__file__).parents[2] / "nbs" / "runs" / "replay.ipynb"
# A session of it that takes its time: argument 1 is the run folder, 2 what is asked for.
SLOW = """
import asyncio, json, sys, time
from pathlib import Path
from trader_lib.config.settings import load_settings
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.telemetry.log import configure_logging
folder = Path(sys.argv[1])
settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})
configure_logging(settings.logging.model_copy(update={"terminal": "off"}), folder / "log.jsonl", ())
spec = SessionSpec.model_validate(json.loads(sys.argv[2]))
def closed(bars, at):
    time.sleep(0.1 if bars > 45 else 0)
asyncio.run(run_session(spec, settings, journal_path=folder / "journal.sqlite", progress=closed))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a name of its kind, entered, with a strategy in it that is called as no strategy should be."""
    made = tmp_path / FILE
    made.mkdir()
    (made / f"{FILE}.py").write_text(STRATEGY)
    (made / "asked.json").write_text(json.dumps(ASKED | {"check_strategy": False}))  # it raises on purpose
    for name in [name for name in os.environ if name.startswith(("TRADER_", "APCA_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(made)
    return made


@contextmanager
def tab(chromium: Any, address: str, *, stopped: bool = False) -> Iterator[Any]:
    """A page in which nothing happens that was planted. stopped: whether its policy had to step in."""
    context = chromium.new_context(viewport={"width": 1366, "height": 860})
    shown, troubles, violations, asked = context.new_page(), list[str](), list[str](), list[str]()
    shown.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
    shown.on("pageerror", lambda error: troubles.append(str(error)))
    shown.on("console", lambda said: violations.append(said.text) if said.type == "error" else None)
    shown.on("request", lambda request: asked.append(request.url))
    shown.on("requestfailed", lambda request: asked.remove(request.url) if request.failure == "csp" else None)
    try:
        shown.goto(address)
        shown.wait_for_selector("main")
        before = shown.url
        yield shown
        shown.wait_for_timeout(300)
        assert shown.evaluate("typeof pwned") == "undefined" and shown.title() != "pwned"
        assert not troubles, troubles
        assert bool(violations) is stopped, violations
        assert shown.url == before and not [url for url in asked if not url.startswith(address)], asked
    finally:
        context.close()


def is_text_only(shown: Any) -> bool:
    """Whether nothing of what was planted became an element."""
    planted = "main img, main a[href^=javascript], main script:not([type='application/json'])"
    return not shown.locator(planted).count()


def drawn(shown: Any) -> list[str]:
    """The texts of the figures of a report, once every figure is there."""
    figures = shown.locator("main .figure").count()
    wait_for(lambda: shown.locator("main .figure svg.main-svg").count() >= figures, 20)
    return list(shown.locator("main .figure svg text").all_text_contents())


def save(notebook: Any, path: Path) -> str:
    nbformat.write(notebook, path)
    report = path.with_suffix(".html")
    report.write_text(render_page(path), encoding="utf-8")
    return report.as_uri()


# ---- reports


def test_report_of_a_backtest_result_shows_markup_as_text(place: Path, chromium: Any) -> None:
    bars = synthetic_bars(SYMBOLS, "2012-01-03", "2012-04-30", "1Day")
    strategy = load_strategy(f"{FILE}.py:Evil").model_validate({"label": EVERY})
    limits = Limits(restricted=frozenset({"BAD"}))
    report = backtest(strategy, bars, limits=limits).report(place / f"{FILE}.html")
    with tab(chromium, report.as_uri()) as shown:
        assert shown.title() == f"Backtest of {SCRIPT}" == shown.locator("h1").inner_text()
        assert EVERY in shown.locator("main").inner_text()
        assert set(SYMBOLS) <= set(drawn(shown)), "plotly drops tags and follows links unless they are escaped"
        assert is_text_only(shown)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["backtest", "paper"])
def test_report_of_a_run_shows_markup_as_text(kind: str, place: Path, chromium: Any) -> None:
    assert main(["run", kind, "--parameters", "asked.json"]) == 0
    (run,) = RunStore(place / "runs").runs()
    with tab(chromium, run.report.as_uri()) as shown:
        text = shown.locator("main").inner_text()
        for planted in (EVERY, *SYMBOLS):
            assert planted in shown.locator(".lead").inner_text(), planted
            assert planted in shown.locator(".facts").first.inner_text(), planted
        assert set(SYMBOLS) <= set(drawn(shown))
        assert "BAD is on the restricted list" in text, text
        if kind == "paper":
            assert f"RuntimeError: {EVERY}" in text, "why an agent failed"
        assert is_text_only(shown)


@pytest.mark.slow
def test_page_of_a_session_and_its_replay_show_markup_as_text(place: Path, chromium: Any) -> None:
    """While it runs, after an operator has stopped it with words like these, and told again in a notebook."""
    run = new_session_run(place)
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(run.path), json.dumps(ASKED)])
    try:
        wait_for(lambda: holds(run))
        with served(run.path) as server, tab(chromium, server.url) as shown:
            wait_for(lambda: EVERY in shown.locator("#happenings").inner_text())
            assert shown.locator("#strategy").inner_text() == SCRIPT
            ControlFile.beside(run.journal).append("halt", reason=EVERY, by=EVERY[:60])
            wait_for(lambda: f"{EVERY}" in shown.locator("#alerts").inner_text(), 20)
            assert EVERY[:60] in shown.locator("#happenings").inner_text()
            assert session_status(run.journal).alive
            process.wait(60)
            wait_for(lambda: "Ended" in shown.locator("#condition").inner_text(), 20)
            assert is_text_only(shown)
    finally:
        process.kill()
        process.wait()
    asked = {"run": str(run.journal), "runs_folder": str(place), "params": {"label": EVERY, "window": 7}}
    (place / "replay.json").write_text(json.dumps(asked))
    assert main(["run", str(REPLAY), "--parameters", "replay.json"]) == 0
    (told,) = RunStore(place / "runs").runs("notebook")
    with tab(chromium, told.report.as_uri()) as shown:
        text = shown.locator("main").inner_text()
        assert repr(EVERY) in text and SCRIPT in text, text
        assert is_text_only(shown)


@contextmanager
def served(folder: Path) -> Iterator[MonitorServer]:
    app = page_app(SessionWatch(folder), FolderControls(folder), SecretStr("open-sesame"))
    with MonitorServer(app, "127.0.0.1", 0) as server:
        yield server


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5))
def test_parameter_that_is_written_into_a_notebook_stays_data(value: Any) -> None:
    found: dict[str, Any] = {}
    exec(PythonTranslator.codify({"planted": value}), found)
    assert found["planted"] == value


# ---- the page


def hostile_payloads(moment: datetime) -> tuple[Payload, ...]:
    """One of each kind that the page reads, with markup in every text."""
    text, one = EVERY, Decimal(1)
    request = OrderRequest(symbol="IBM", side=OrderSide.BUY, qty=one, client_order_id=EVERY[:128], strategy=ANCHOR)
    order = Order(
        id=text,
        client_order_id=text,
        symbol=text,
        side=OrderSide.BUY,
        qty=one,
        status=OrderStatus.NEW,
        submitted_at=moment,
    )
    check = CheckOutcome(name=text, passed=False, reason=text, scope=text)
    fill = Fill(
        execution_id=text,
        order_id=text,
        client_order_id=text,
        symbol=text,
        side=OrderSide.BUY,
        qty=one,
        price=one,
        timestamp=moment,
        strategy=text,
    )
    held = (Position(symbol=text, qty=one, avg_entry_price=one),)
    books = tuple(StrategyHoldings(strategy=name, cash=one, equity=one, positions=held) for name in (ANCHOR, SCRIPT))
    row = BarRow(open=1, high=1, low=1, close=1, volume=1)
    differs = Discrepancy(kind="quantity", symbol=text, client_order_id=text, sentence=text)
    return (
        SessionStarted(strategy=text, stage=text, symbols=(text,), timeframe=text, parameters={text: text}),
        AccountReported(cash=one, equity=one, buying_power=one, status=text),
        BarsClosed(at=moment, closed_at=moment, bars={text: row}),
        PositionsReported(positions=held),
        RiskDecided(request=request, decided_at=moment, approved=False, checks=(check,)),
        OrderIntended(request=request, decided_at=moment),
        OrderFailed(client_order_id=request.client_order_id, reason=text, outcome="rejected"),
        OrderAcknowledged(client_order_id=text, order=order),
        OrderAdopted(order=order, remaining=one),
        TradeUpdated(event=text, order=order, execution_id=text, timestamp=moment),
        FillRecorded(fill=fill),
        PortfolioChanged(cash=one, equity=one, positions=held, strategies=books),
        OperatorCommand(action="halt", reason=text, by=text),
        TradingStateChanged(state=TradingState.HALTED, reason=text),
        TradingStateChanged(state=TradingState.HALTED, reason=text, strategy=ANCHOR),
        Reconciled(ok=False, differences=(text,), discrepancies=(differs,)),
        AgentFailed(agent=text, error=text),
        SessionEnded(reason=text),
    )


def received(place: Path) -> Path:
    """A run folder as a stranger might send it."""
    folder, moment = place / FILE, datetime(2026, 1, 5, 21, tzinfo=UTC)
    folder.mkdir()
    with SqliteJournal(folder / "journal.sqlite") as journal:
        for seq, payload in enumerate(hostile_payloads(moment), start=1):
            journal.append(
                Event(
                    id=f"{EVERY} {seq}",
                    seq=seq,
                    time=moment,
                    recorded_at=moment,
                    correlation_id=ANCHOR,
                    source=EVERY,
                    session_id=EVERY,
                    payload=payload,
                )
            )
    names = ("message", "level", "agent", "time", "exception")
    (folder / "log.jsonl").write_text(
        json.dumps(dict.fromkeys(names, EVERY) | {"correlation_id": ANCHOR, "extra": {EVERY: EVERY}}) + "\n"
    )
    figures = {"kind": EVERY, "status": EVERY, "order_list_hash": EVERY, "statistics": {EVERY: EVERY}}
    (folder / "result.json").write_text(json.dumps(figures | {"failure": {"message": EVERY}}))
    return folder


def test_page_of_a_received_folder_shows_markup_as_text(place: Path, chromium: Any) -> None:
    folder = received(place)
    planted = {type(payload) for payload in hostile_payloads(datetime(2026, 1, 5, tzinfo=UTC))}
    assert planted == set(ViewFold.TYPES), "plant in each kind that the page reads"
    with served(folder) as server, tab(chromium, server.url) as shown:
        shown.locator("#decisions .open").first.click()
        shown.wait_for_selector("tr.more table tr")
        places = "alerts positions open_orders strategies decisions fills happenings agents books result log"
        for name in places.split():
            text = shown.locator(f"#{name}").text_content()
            assert EVERY in text or ANCHOR in text, name
        assert shown.evaluate("document.documentElement.scrollWidth") <= 1366, "nothing pushes the rest out of sight"
        shown.locator("#log .chip").first.click()
        shown.wait_for_selector("#filter:not([hidden])")
        assert ANCHOR in shown.locator("#filter").inner_text()
        assert FILE in shown.locator("#run").inner_text() and ANCHOR in shown.locator("#strategy").inner_text()
        assert is_text_only(shown)


# ---- where an escape is forgotten


def test_policy_stops_what_a_notebook_displays_as_markup(place: Path, chromium: Any) -> None:
    """Markup that a user's own notebook displays is no text; what it carries along still runs nowhere."""
    new = nbformat.v4
    there = "https://away.invalid/"
    away = f"<meta http-equiv=refresh content='0;url={there}'><link rel=preconnect href={there}>"
    loaded = f"<img src={there}a.png><iframe src={there}></iframe>"
    sent = f"<form action={there}><button id=send>send</button></form><a id=link href='javascript:pwned=1'>x</a>"
    figure = json.loads(go.Figure(go.Scatter(y=[1, 2]), layout={"title": SCRIPT}).to_json())
    outputs = [
        new.new_output("display_data", {"text/html": IMG + SCRIPT + away + loaded + sent}),
        new.new_output("display_data", {"text/markdown": f"**{EVERY}**"}),
        new.new_output("display_data", {"image/svg+xml": f"<svg xmlns='http://www.w3.org/2000/svg'>{SCRIPT}</svg>"}),
        new.new_output("display_data", {PLOTLY_MIME: {"data": [{"type": {}}], "layout": {"xaxis": 5}}}),
        new.new_output("display_data", {PLOTLY_MIME: figure}),
        new.new_output("stream", name="stdout", text=EVERY),
        new.new_output("execute_result", {"text/plain": EVERY}),
        new.new_output("error", ename=EVERY, evalue=EVERY),
    ]
    cells = [new.new_markdown_cell(f"# {EVERY}"), new.new_code_cell("1", outputs=outputs)]
    address = save(new.new_notebook(cells=cells), place / f"{FILE}.ipynb")
    with tab(chromium, address, stopped=True) as shown:
        assert len(drawn(shown)) > 3
        shown.evaluate("for (const one of document.querySelectorAll('#link, #send')) one.click()")
        text = shown.locator("main").inner_text()
        assert text.count(EVERY) >= 4 and "does not run" in text and "<meta" in text
        assert text.count("This figure could not be drawn.") == 1, "and the next one is"


def test_figures_that_need_a_compiler_are_drawn(place: Path, chromium: Any) -> None:
    """plotly's WebGL traces, which a page permits where it has one of them, and an animated figure."""
    new = nbformat.v4
    frames = [go.Frame(data=[go.Scatter(y=[2, 1])], name="later")]
    figures = [go.Figure(go.Scattergl(y=[1, 2], mode="markers")), go.Figure(go.Scatter(y=[1, 2]), frames=frames)]
    outputs = [new.new_output("display_data", {PLOTLY_MIME: json.loads(figure.to_json())}) for figure in figures]
    address = save(new.new_notebook(cells=[new.new_code_cell("1", outputs=outputs)]), place / "figures.ipynb")
    with tab(chromium, address) as shown:
        drawn(shown)
        assert shown.locator("main .figure canvas").count()
