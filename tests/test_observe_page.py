"""The page of a session in a real browser: figures are the journal's, buttons stop, the dead are shown dead."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from tests.venue import holds, new_session_run, wait_for
from trader_lib.config.settings import load_settings
from trader_lib.journal.journal import SqliteJournal
from trader_lib.observe.companions import companions
from trader_lib.observe.page import COOKIE, FolderControls, page_app
from trader_lib.observe.server import MonitorServer
from trader_lib.observe.watch import SessionWatch
from trader_lib.runs.store import RunFolder
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec, StrategyShare
from trader_lib.steering.control import ControlFile
from trader_lib.steering.status import session_status
from trader_lib.trading.events import (
    BarRow,
    BarsClosed,
    CheckOutcome,
    Event,
    FillRecorded,
    PortfolioChanged,
    Reconciled,
    RiskDecided,
    SessionStarted,
    TradingState,
    TradingStateChanged,
)
from trader_lib.trading.orders import OrderRequest, OrderSide
from trader_lib.trading.portfolio import Position

TOKEN = "open-sesame"
PHONE, LAPTOP = {"width": 390, "height": 844}, {"width": 1366, "height": 860}
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"

# A session that takes its time: argument 1 is the run folder, 2 how many bars go fast, 3 seconds a bar then.
SLOW = """
import asyncio, sys, time
from datetime import date
from pathlib import Path
from trader_lib.config.settings import load_settings
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec, StrategyShare
from trader_lib.telemetry.log import configure_logging
folder = Path(sys.argv[1])
settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})
configure_logging(settings.logging.model_copy(update={"terminal": "off"}), folder / "log.jsonl", ())
spec = SessionSpec(params={"fast": 5, "slow": 15}, symbols=("AAPL", "IBM", "MSFT"),
                   start=date(2005, 1, 3), end=date(2012, 12, 31))
def closed(bars, at):
    time.sleep(float(sys.argv[3]) if bars > int(sys.argv[2]) else 0)
asyncio.run(run_session(spec, settings, journal_path=folder / "journal.sqlite", progress=closed))
"""


@contextmanager
def tab(chromium: Any, url: str, viewport: dict[str, int] = LAPTOP) -> Iterator[Any]:
    """A page in a browser of its own, in which no script may fail and nothing may be loaded from elsewhere."""
    context = chromium.new_context(viewport=viewport, is_mobile=viewport is PHONE, has_touch=viewport is PHONE)
    shown, troubles, asked = context.new_page(), [], []
    shown.on("pageerror", lambda error: troubles.append(str(error)))
    shown.on("console", lambda said: troubles.append(said.text) if "Content Security" in said.text else None)
    shown.on("request", lambda request: asked.append(request.url))
    try:
        shown.goto(url)
        shown.wait_for_selector("[data-figure]")
        yield shown
        assert not troubles, troubles
        assert not [address for address in asked if not address.startswith(url)], asked
    finally:
        context.close()


@contextmanager
def served(folder: Path, token: str | None = TOKEN) -> Iterator[MonitorServer]:
    app = page_app(SessionWatch(folder), FolderControls(folder), SecretStr(token) if token else None)
    with MonitorServer(app, "127.0.0.1", 0) as server:
        yield server


@contextmanager
def slow_session(folder: Path, fast: int = 60, bar_s: float = 0.1) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(folder), str(fast), str(bar_s)])
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def figure(shown: Any, name: str) -> str:
    return str(shown.locator(f"[data-figure='{name}']").evaluate("node => node.firstChild.textContent"))


def told(value: Decimal | float) -> str:
    return f"{float(value):,.2f}".replace("-", "−")


def becomes(shown: Any, place: str, words: str, seconds: float = 5.0) -> None:
    """Wait until an element says something; the page's policy forbids what Playwright would wait by."""
    wait_for(lambda: words in shown.locator(place).text_content(), seconds)


def unlock(shown: Any) -> None:
    shown.fill("#token", TOKEN)
    shown.keyboard.press("Enter")
    shown.wait_for_selector("#act-kill")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A session of a year, ended in good order."""
    run = new_session_run(tmp_path_factory.mktemp("finished"))
    settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})
    spec = SessionSpec(
        params={"fast": 5, "slow": 15}, symbols=("AAPL", "IBM", "MSFT"), start=date(2011, 1, 3), end=date(2011, 12, 30)
    )
    with asyncio.Runner() as runner:
        runner.run(run_session(spec, settings, journal_path=run.journal))
    return run


# ---- in the browser


def test_figures_of_a_finished_run_are_the_journals(finished: RunFolder, chromium: Any) -> None:
    with SqliteJournal(finished.journal, read_only=True) as journal:
        worths = [e.payload for e in journal.read(types=[PortfolioChanged]) if isinstance(e.payload, PortfolioChanged)]
        decided = [e.payload for e in journal.read(types=[RiskDecided]) if isinstance(e.payload, RiskDecided)]
        fills = [e.payload.fill for e in journal.read(types=[FillRecorded]) if isinstance(e.payload, FillRecorded)]
    with served(finished.path) as server, tab(chromium, server.url) as shown:
        shown.wait_for_selector("#chart svg")
        assert figure(shown, "Equity") == told(worths[-1].equity or 0)
        change = (worths[-1].equity or Decimal(0)) - (worths[-2].equity or Decimal(0))
        assert figure(shown, "Day") == (
            f"▲ +{told(change)}" if change > 0 else f"▼ {told(change)}" if change else "0.00"
        )
        assert f"cash {told(worths[-1].cash)}" in shown.locator("[data-figure='Equity']").inner_text()
        rows = shown.locator("#positions tbody tr")
        assert rows.count() == len(worths[-1].positions) > 0
        for place, held in enumerate(worths[-1].positions):
            text = rows.nth(place).inner_text()
            assert text.startswith(held.symbol) and f"{held.qty.normalize():,f}" in text
        first = shown.locator("#fills tbody tr").first.inner_text()
        assert fills[-1].symbol in first and f"{fills[-1].qty.normalize():,f}" in first
        assert shown.locator("#condition").inner_text().endswith("Ended")
        assert shown.locator("#controls").inner_text().startswith("The session has ended")

        shown.locator("#decisions .open").first.click()
        shown.wait_for_selector("tr.more table tr")
        assert shown.locator("tr.more table tr").count() == len(decided[-1].checks)
        assert decided[-1].request.client_order_id in shown.locator("tr.more").inner_text()
        every = shown.locator("#decisions tbody > tr").count()
        shown.locator("#decisions .chip").first.click()
        shown.wait_for_selector("#filter:not([hidden])")
        assert shown.locator("#decisions > table > tbody > tr").count() < every
        shown.locator("#filter button").click()

        lowest = min(float(row.equity or 0) for row in worths)
        assert told(lowest) in shown.locator("#chart").get_attribute("aria-label")
        shown.locator("#chart").focus()
        shown.keyboard.press("ArrowLeft")
        assert told(worths[-2].equity or 0) in shown.locator("#readout").inner_text()


def test_page_halts_and_kills_a_session_that_runs(chromium: Any, tmp_path: Path) -> None:
    run = new_session_run(tmp_path)
    with slow_session(run.path) as process:
        wait_for(lambda: holds(run))
        with served(run.path) as server, tab(chromium, server.url, PHONE) as shown:
            assert shown.locator("#condition").inner_text().endswith("Running")
            before = figure(shown, "Last bar")
            wait_for(lambda: figure(shown, "Last bar") != before, 5)
            shown.fill("#token", "guessed")
            shown.keyboard.press("Enter")
            shown.wait_for_selector("#answer.bad")
            assert not shown.locator("#act-kill").count(), "a wrong token unlocks nothing"
            unlock(shown)
            assert shown.locator("#act-kill").bounding_box()["height"] >= 56, "big enough for a thumb"
            cookie = next(one for one in shown.context.cookies() if one["name"].startswith(COOKIE))
            assert cookie["httpOnly"] and cookie["sameSite"] == "Strict" and TOKEN not in cookie["value"]

            shown.click("#act-reduce")
            assert shown.locator("#flatten-row").is_hidden()
            shown.click("#do")
            assert shown.locator("#confirm").is_visible(), "without a name and a reason nothing is sent"
            shown.fill("#by", "ada")
            shown.fill("#reason", "news")
            shown.keyboard.press("Enter")
            becomes(shown, "#state", "REDUCING")
            shown.wait_for_selector("#act-kill:not([disabled])")

            shown.click("#act-kill")
            shown.click("#cancel")
            assert len(ControlFile.beside(run.journal).commands()) == 1, "going back does nothing"
            shown.click("#act-kill")
            shown.check("#flatten")
            shown.fill("#reason", HOSTILE)
            shown.click("#do")
            becomes(shown, "#state", "HALTED")
            becomes(shown, "#answer", "confirmed")
            becomes(shown, "#positions", "Nothing is held")
            assert HOSTILE in shown.locator("#alerts").inner_text(), "a reason stays text"
            assert "owned" not in shown.title()
            assert process.poll() is None, "it is halted, not ended"
        status = session_status(run.journal)
        assert status.alive and status.state is TradingState.HALTED and not status.positions
        assert [(one.action, one.by) for one in ControlFile.beside(run.journal).commands()] == [
            ("reduce", "ada"),
            ("flatten", "ada"),
        ]


def test_session_that_is_killed_is_shown_dead_within_seconds(chromium: Any, tmp_path: Path) -> None:
    run = new_session_run(tmp_path)
    with slow_session(run.path) as process:
        wait_for(lambda: holds(run))
        with served(run.path) as server, tab(chromium, server.url) as shown:
            assert shown.locator("#condition").inner_text().endswith("Running")
            process.kill()
            process.wait()
            becomes(shown, "#condition", "Dead")
            assert f"trader kill {run.name}" in shown.locator("#alerts").inner_text()
            assert shown.title().startswith("Dead")


@pytest.mark.slow
def test_page_says_that_its_server_is_gone_and_comes_back_with_it(finished: RunFolder, chromium: Any) -> None:
    with served(finished.path) as server:
        port = server.port
        context = chromium.new_context(viewport=LAPTOP)
        shown = context.new_page()
        shown.goto(server.url)
        shown.wait_for_selector("[data-figure]")
        assert not shown.locator("body.lost").count()
    shown.wait_for_selector("body.lost", timeout=15_000)
    assert "lost its server" in shown.locator("#alerts").inner_text()
    app = page_app(SessionWatch(finished.path), None, None)
    with MonitorServer(app, "127.0.0.1", port):
        shown.wait_for_selector("body:not(.lost)", timeout=15_000)
    context.close()


@pytest.mark.parametrize("viewport", [PHONE, LAPTOP], ids=["phone", "laptop"])
def test_page_fits_its_screen_and_is_named_for_those_who_listen(
    viewport: dict[str, int], finished: RunFolder, chromium: Any
) -> None:
    with served(finished.path) as server, tab(chromium, server.url, viewport) as shown:
        shown.wait_for_selector("#chart svg")
        assert shown.evaluate("document.documentElement.scrollWidth") <= viewport["width"], "nothing sticks out"
        assert shown.locator("#decisions").evaluate("node => getComputedStyle(node).overflowX") == "auto"
        assert shown.locator("#state").get_attribute("aria-live") == "polite"
        assert (
            shown.locator("main section").count() == shown.locator("main section h2, main section[aria-label]").count()
        )
        assert "tabular-nums" in shown.evaluate("getComputedStyle(document.body).fontVariantNumeric")
        shown.keyboard.press("Tab")
        assert shown.evaluate("document.activeElement.className") == "skip"


def test_hostile_journal_stays_text_and_live_is_loud(chromium: Any, tmp_path: Path) -> None:
    """Nothing that comes from a symbol, a reason, a name or a log record becomes markup."""
    run, moment = new_session_run(tmp_path), datetime(2026, 1, 5, 21, tzinfo=UTC)
    request = OrderRequest(symbol="IBM", side=OrderSide.BUY, qty=Decimal(5), client_order_id=HOSTILE[:100])
    check = CheckOutcome(name=HOSTILE, passed=False, reason=HOSTILE)
    row = BarRow(open=1, high=1, low=1, close=1, volume=1)
    held = (Position(symbol=HOSTILE, qty=Decimal(3), avg_entry_price=Decimal(1)),)
    payloads = (
        SessionStarted(strategy=HOSTILE, stage="live", symbols=("IBM",)),
        BarsClosed(at=moment, closed_at=moment, bars={HOSTILE: row}),
        PortfolioChanged(cash=Decimal(7), equity=Decimal(10), positions=held),
        RiskDecided(request=request, decided_at=moment, approved=False, checks=(check,)),
        TradingStateChanged(state=TradingState.HALTED, reason=HOSTILE),
        Reconciled(ok=False, differences=(HOSTILE,)),
    )
    with SqliteJournal(run.journal) as journal:
        for seq, payload in enumerate(payloads, start=1):
            names = {"id": str(seq), "seq": seq, "correlation_id": HOSTILE, "source": "test", "session_id": HOSTILE}
            journal.append(Event(time=moment, recorded_at=moment, payload=payload, **names))
    run.log.write_text(json.dumps({"message": HOSTILE, "level": "ERROR", "agent": HOSTILE, "time": HOSTILE}) + "\n")
    with served(run.path) as server, tab(chromium, server.url) as shown:
        shown.locator("#decisions .open").first.click()
        shown.wait_for_selector("tr.more table tr")
        for place in ("#strategy", "#alerts", "#positions", "#decisions", "#happenings", "#books", "#log"):
            assert HOSTILE in shown.locator(place).inner_text(), place
        assert (
            not shown.locator("main script, main img").count() and "owned" not in shown.evaluate("document.title")[:5]
        )
        assert shown.locator("#money").is_visible() and shown.locator("#stage").inner_text() == "LIVE"


# ---- without a browser


def test_session_serves_its_own_page_with_its_agents_health(tmp_path: Path) -> None:
    run = new_session_run(tmp_path)
    overrides = {
        "broker": {"transport": "in_process"},
        "monitoring": {"port": 0, "token": TOKEN, "hosts": "trader.lan"},
    }
    settings = load_settings(environ={}, env_file=None, overrides=overrides)
    answers: dict[str, httpx.Response] = {}

    def closed(bars: int, at: datetime) -> None:
        if bars == 5:
            url = json.loads((run.path / "monitor.json").read_bytes())["url"]
            answers["page"] = httpx.get(url)
            answers["session"] = httpx.get(f"{url}/api/session")
            answers["named"] = httpx.get(url, headers={"host": "trader.lan"})
            answers["stranger"] = httpx.get(url, headers={"host": "evil.example"})

    spec = SessionSpec(params={"fast": 2, "slow": 5}, symbols=("IBM",), start=date(2012, 1, 3), end=date(2012, 2, 29))
    with asyncio.Runner() as runner:
        runner.run(
            run_session(spec, settings, journal_path=run.journal, progress=closed, companions=companions(settings))
        )
    assert answers["page"].status_code == answers["named"].status_code == 200
    assert "script-src 'self'" in answers["page"].headers["content-security-policy"]
    assert answers["stranger"].status_code == 421
    seen = answers["session"].json()
    assert seen["condition"] == "alive" and {one["agent"] for one in seen["agents"]} >= {"risk", "execution"}
    assert all(one["state"] == "ok" for one in seen["agents"])


@pytest.fixture
def client(finished: RunFolder) -> Iterator[httpx.Client]:
    """A client of the page of a finished run, which sends what a browser's own page would."""
    with served(finished.path) as server:
        own = {"origin": server.url, "sec-fetch-site": "same-origin"}
        with httpx.Client(base_url=server.url, headers=own, timeout=30) as found:
            yield found


def test_listener_gets_the_picture_and_then_beats(client: httpx.Client, finished: RunFolder) -> None:
    events: list[str] = []
    with client.stream("GET", "/api/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("event:"):
                events.append(line.partition(": ")[2])
            if line.startswith("data: {"):
                assert json.loads(line[6:])["run"] == finished.name
            if len(events) == 3:
                break
    assert events == ["view", "beat", "beat"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/static/../page.py", 404),
        ("/static/dashboard.html", 404),
        ("/static/%2e%2e/page.py", 404),
        ("/api/decisions?order=none", 404),
        ("/api/log?correlation=none", 200),
        ("/static/icon.svg", 200),
        ("/openapi.json", 404),
    ],
)
def test_only_what_belongs_to_the_page_is_served(client: httpx.Client, path: str, status: int) -> None:
    assert client.get(path).status_code == status


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b'{"token": "open-sesame"}', {"content-type": "text/plain"}, 415),
        (b'{"token": "' + b"x" * 5000 + b'"}', {"content-type": "application/json"}, 413),
        (b'{"token": "open-sesame"}', {"content-type": "application/json", "origin": "http://evil.example"}, 403),
        (b'{"token": "open-sesame"}', {"content-type": "application/json", "sec-fetch-site": "same-site"}, 403),
        (b'{"token": "wrong"}', {"content-type": "application/json"}, 403),
        (b'{"token": 1}', {"content-type": "application/json"}, 422),
        (b'{"token": "open-sesame"}', {"content-type": "application/json"}, 200),
    ],
)
def test_what_does_not_look_like_the_pages_own_click_unlocks_nothing(
    client: httpx.Client, body: bytes, headers: dict[str, str], status: int
) -> None:
    answer = client.post("/api/unlock", content=body, headers=headers)
    assert answer.status_code == status and any(name.startswith(COOKIE) for name in answer.cookies) is (status == 200)
    assert "open-sesame" not in answer.text and "x" * 100 not in answer.text


def test_click_needs_cookie_proof_name_and_reason(client: httpx.Client, finished: RunFolder) -> None:
    wish = {"action": "halt", "by": "ada", "reason": "a test"}
    assert client.post("/api/steer", json=wish).status_code == 403
    csrf = client.post("/api/unlock", json={"token": TOKEN}).json()["csrf"]
    assert client.get("/api/operator").json() == {"buttons": True, "csrf": csrf}
    assert client.get("/api/operator", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert client.post("/api/steer", json=wish).status_code == 403, "the cookie alone is not enough"
    own = {"x-trader-csrf": csrf}
    for wrong in ({"by": " "}, {"reason": ""}, {"action": "resume"}, {"action": "flatten"}, {"other": 1}):
        assert client.post("/api/steer", json={**wish, **wrong}, headers=own).status_code == 422, wrong
    assert not ControlFile.beside(finished.journal).commands()
    answer = client.post("/api/steer", json=wish, headers=own).json()
    assert answer["done"] and answer["state"] == "HALTED" and "not running" in answer["told"][-1]
    (command,) = ControlFile.beside(finished.journal).commands()
    assert (command.action, command.by, command.reason) == ("halt", "ada", "a test")
    client.post("/api/lock", json={})
    assert client.get("/api/operator").json() == {"buttons": True, "csrf": None}
    ControlFile.beside(finished.journal).path.unlink()


def test_without_a_token_there_are_no_buttons(finished: RunFolder) -> None:
    with served(finished.path, token=None) as server:
        own = {"origin": server.url}
        assert httpx.get(f"{server.url}/api/operator").json() == {"buttons": False, "csrf": None}
        for path in ("unlock", "steer", "lock"):
            assert httpx.post(f"{server.url}/api/{path}", json={}, headers=own).status_code in {404, 405}


def test_several_strategies_each_show_their_state_and_what_is_theirs(tmp_path: Path, request: Any) -> None:
    """One of two was halted by its own drawdown; both hold the same symbol."""
    run = new_session_run(tmp_path)
    settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})
    shares = (
        StrategyShare(name="trend", strategy="sma_cross", params={"fast": 5, "slow": 20}, capital="50%"),
        StrategyShare(
            name="quick",
            strategy="sma_cross",
            params={"fast": 2, "slow": 5},
            capital="40%",
            limits={"max_drawdown": 0.01},
        ),
    )
    spec = SessionSpec(strategies=shares, symbols=("AAPL", "IBM"), start=date(2012, 1, 3), end=date(2012, 3, 30))
    with asyncio.Runner() as runner:
        runner.run(run_session(spec, settings, journal_path=run.journal))
    with SqliteJournal(run.journal, read_only=True) as journal:
        (worth,) = (event.payload for event in journal.last([PortfolioChanged]))
    assert isinstance(worth, PortfolioChanged) and any(one.positions for one in worth.strategies)
    view = SessionWatch(run.path).look_whole()
    assert view.state is TradingState.ACTIVE, "the account goes on"
    assert {row.name: str(row.state) for row in view.strategies} == {"trend": "ACTIVE", "quick": "HALTED"}
    assert {(row.strategy, row.symbol, row.qty) for row in view.positions} == {
        (one.strategy, held.symbol, held.qty) for one in worth.strategies for held in one.positions if held.qty
    }
    assert {row.strategy for row in view.decisions} == {row.strategy for row in view.fills} == {"trend", "quick"}
    chromium = request.getfixturevalue("chromium")
    with served(run.path) as server, tab(chromium, server.url) as shown:
        assert shown.locator("#strategy").inner_text() == "trend, quick"
        rows = shown.locator("#strategies tbody tr")
        assert rows.count() == 2
        for place, one in enumerate(worth.strategies):
            assert told(one.equity) in rows.nth(place).inner_text()
        for place in ("#strategies tbody tr:last-child", "#alerts"):
            assert (
                "HALTED" in shown.locator(place).inner_text()
                and "below its highest" in shown.locator(place).inner_text()
            )


def test_a_server_leaves_in_good_order_while_pages_listen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = new_session_run(tmp_path)
    with served(run.path) as server, httpx.stream("GET", f"{server.url}/api/events", timeout=10) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: view"
        server.__exit__()
        assert list(lines), "the rest of the stream, and its end"
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")], caplog.text
