"""What a session shows of itself is what its journal says, and looking costs it nothing."""

import asyncio
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import requests

from tests.observed import SPEC, families, observed_session, observed_settings
from tests.tools.metrics_table import PAGE, with_table
from trader_lib.journal.journal import SqliteJournal
from trader_lib.observe import server as serving
from trader_lib.observe.address import monitor_path, monitor_url
from trader_lib.observe.metering import Meter
from trader_lib.observe.server import MonitorServer, Window, create_app
from trader_lib.risk.limits import Limits
from trader_lib.session.companions import SessionParts
from trader_lib.session.session import run_session
from trader_lib.telemetry.metrics import METRICS, TABLE
from trader_lib.trading.events import BarsClosed, Event

# What a session in good order over HTTP has no occasion to show.
UNSEEN = {
    "trader_risk_refusals_total",
    "trader_rate_limit_calls",
    "trader_rate_limit_headroom_calls",
    "trader_rate_limit_waited_seconds_total",
    "trader_companion_failures_total",
}


pytestmark = pytest.mark.usefixtures("quiet")


async def test_a_session_exposes_the_table_and_nothing_else(tmp_path: Path) -> None:
    _, seen = await observed_session(tmp_path, observed_settings("http"))
    shown = families(seen.answers["metrics"].text)
    ours = {name: one for name, one in shown.items() if name.startswith("trader_")}
    assert set(ours) == set(TABLE) and "process_cpu_seconds_total" in shown
    assert {name for name, one in ours.items() if not one.samples} == UNSEEN
    for metric in METRICS:
        for sample in ours[metric.name].samples:
            assert set(sample.labels) - {"le"} == set(metric.labels), metric.name
            assert sample.labels.keys().isdisjoint({"symbol", "client_order_id"})


async def test_the_figures_are_those_of_the_journal(tmp_path: Path) -> None:
    result, seen = await observed_session(tmp_path, observed_settings("http"))
    shown = families(seen.answers["metrics"].text)

    def figures(name: str) -> dict[tuple[str, ...], float]:
        return {tuple(sample.labels.values()): sample.value for sample in shown[name].samples}

    with SqliteJournal(result.journal_path, read_only=True) as journal:
        written = Counter(event.type for event in journal.read())
    assert figures("trader_events_total") == {(name,): count for name, count in written.items()}
    orders = figures("trader_orders_total")
    assert orders[("intended",)] == orders[("acknowledged",)] == len(result.orders)
    for status in ("filled", "canceled"):
        assert orders[(status,)] == sum(order.status == status for order in result.orders)
    assert figures("trader_bars_total") == {(): result.bars}
    assert figures("trader_equity_usd") == {(): float(result.equity.iloc[-1])}
    assert figures("trader_profit_usd") == {(): pytest.approx(float(result.equity.iloc[-1]) - 100_000)}
    assert figures("trader_journal_events_total") == {(): sum(written.values())}
    assert figures("trader_trading_state") == {("ACTIVE",): 1, ("REDUCING",): 0, ("HALTED",): 0}
    assert figures("trader_broker_calls_total")[("orders",)] == len(result.orders)
    assert figures("trader_breaker_state")[("orders", "closed")] == 1
    handled = {agent.agent: agent.handled for agent in result.health}
    assert figures("trader_agent_events_total")[("risk", "handled")] == handled["risk"]


async def test_the_address_is_in_the_run_folder_while_the_session_runs(tmp_path: Path) -> None:
    _, seen = await observed_session(tmp_path, observed_settings())
    assert seen.note["pid"] == os.getpid() and seen.note["url"].startswith("http://127.0.0.1:")
    assert seen.answers["healthz"].status_code == 200
    assert monitor_url(tmp_path) is None and not monitor_path(tmp_path).exists()
    with pytest.raises(requests.ConnectionError):
        await asyncio.to_thread(requests.get, seen.note["url"], timeout=1)


async def test_looking_changes_no_byte_of_the_journal(tmp_path: Path) -> None:
    """Not even a visitor who asks, and never reads the answer."""
    (tmp_path / "a").mkdir()
    alone = await run_session(SPEC, observed_settings(), journal_path=tmp_path / "a" / "journal.sqlite")
    rude: list[socket.socket] = []

    @asynccontextmanager
    async def rude_visitor(parts: SessionParts) -> AsyncIterator[None]:
        port = int((monitor_url(parts.run_folder) or "").rpartition(":")[2])
        for _ in range(5):
            rude.append(socket.create_connection(("127.0.0.1", port)))
            rude[-1].sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3 + b"GET /metr")
        yield

    watched, _ = await observed_session(tmp_path / "b", observed_settings(), beside=[rude_visitor])
    for connection in rude:
        connection.close()
    assert alone.journal_path.read_bytes() == watched.journal_path.read_bytes()


async def test_a_port_that_is_taken_costs_the_figures_and_not_the_session(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = observed_settings(monitoring={"port": taken.getsockname()[1]})
        failed: list[SessionParts] = []

        @asynccontextmanager
        async def see(parts: SessionParts) -> AsyncIterator[None]:
            failed.append(parts)
            yield

        from trader_lib.observe.companions import companions

        result = await run_session(
            SPEC, settings, journal_path=tmp_path / "journal.sqlite", companions=[*companions(settings), see]
        )
    assert result.status == "completed" and failed[0].failed == {"monitoring": 1}


async def test_after_a_restart_gauges_are_as_they_were_and_counters_begin_anew(tmp_path: Path) -> None:
    first, _ = await observed_session(tmp_path, observed_settings())
    _, seen = await observed_session(tmp_path, observed_settings(), resume=True)
    shown = families(seen.answers["metrics"].text)
    assert [sample.value for sample in shown["trader_equity_usd"].samples] == [float(first.equity.iloc[-1])]
    assert sum(sample.value for sample in shown["trader_orders_total"].samples) == 0
    assert not shown["trader_fills_total"].samples


# ---- a loop that does not turn


async def test_a_loop_that_stands_is_not_ready_and_then_not_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "READING_MAX_S", 0.05)
    seen: dict[str, Any] = {}

    @asynccontextmanager
    async def stand(parts: SessionParts) -> AsyncIterator[None]:
        yield
        meter = Meter(parts)
        deaf = SimpleNamespace(call_soon_threadsafe=lambda *_: None)
        app = create_app(Window(meter, cast("asyncio.AbstractEventLoop", deaf)), parts)
        with MonitorServer(app, "127.0.0.1", 0) as server:
            for name, path in (("ready", "readyz"), ("metrics", "metrics"), ("alive", "healthz"), ("dead", "healthz")):
                meter.beaten_at -= 60 if name == "dead" else 0
                seen[name] = await asyncio.to_thread(requests.get, f"{server.url}/{path}", timeout=5)

    await observed_session(tmp_path, observed_settings(), beside=[stand])
    assert seen["ready"].status_code == 503 and "event loop: does not answer" in seen["ready"].text
    assert seen["alive"].status_code == 200 and seen["dead"].status_code == 503
    assert families(seen["metrics"].text)["trader_event_loop_lag_seconds"].samples[0].value >= 0


async def test_readings_are_shared_by_all_who_look(tmp_path: Path) -> None:
    readings = 0

    @asynccontextmanager
    async def crowd(parts: SessionParts) -> AsyncIterator[None]:
        nonlocal readings
        yield
        meter = Meter(parts)
        take = meter.snapshot

        def counted() -> Any:
            nonlocal readings
            readings += 1
            return take()

        meter.snapshot = counted  # type: ignore[method-assign]
        window = Window(meter, asyncio.get_running_loop())
        readings = 0
        await asyncio.gather(*(window.read() for _ in range(200)))

    await observed_session(tmp_path, observed_settings(), beside=[crowd])
    assert readings == 1


async def test_a_meter_that_fails_is_an_error_of_the_scrape_alone(tmp_path: Path) -> None:
    @asynccontextmanager
    async def broken(parts: SessionParts) -> AsyncIterator[None]:
        yield
        meter = Meter(parts)
        window = Window(meter, asyncio.get_running_loop())

        def fail() -> Any:
            raise ZeroDivisionError

        meter.snapshot = fail  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            await window.read()

    result, _ = await observed_session(tmp_path, observed_settings(), beside=[broken])
    assert result.status == "completed"


# ---- what is not asked for


def test_what_is_not_asked_for_is_not_imported() -> None:
    code = (
        "import sys\n"
        "from trader_lib.config.settings import load_settings\n"
        "from trader_lib.observe.companions import companions\n"
        "import trader_lib.session.session\n"
        "assert companions(load_settings(environ={}, env_file=None)) == ()\n"
        "print(*{name.split('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"prometheus_client", "opentelemetry", "fastapi", "sse_starlette"} & set(done.stdout.split())


async def test_server_serves_ipv6_too() -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    from fastapi import FastAPI

    app = FastAPI()
    try:
        server = MonitorServer(app, "::1", 0)
    except Exception as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")
    with server:
        answer = await asyncio.to_thread(requests.get, f"{server.url}/none", timeout=5)
    assert answer.status_code == 404 and server.url.startswith("http://[::1]:")


async def test_events_are_heard_without_waiting(tmp_path: Path) -> None:
    """The meter's handler never yields, so the bus never waits for it."""
    waits: list[Event] = []

    @asynccontextmanager
    async def probe(parts: SessionParts) -> AsyncIterator[None]:
        meter = Meter(parts)

        async def hear(event: Event) -> None:
            steps = meter.hear(event).__await__()
            waits.extend(event for _ in steps)

        parts.bus.subscribe("probe", (), hear)
        yield

    await observed_session(tmp_path, observed_settings(), beside=[probe])
    assert not waits


def test_the_documentation_lists_every_metric_as_it_is() -> None:
    assert PAGE.read_text(encoding="utf-8") == with_table(PAGE.read_text(encoding="utf-8")), (
        "write it anew: python -m tests.tools.metrics_table"
    )


async def test_a_session_that_trades_is_alive_and_ready(tmp_path: Path) -> None:
    asked: list[asyncio.Task[requests.Response]] = []

    @asynccontextmanager
    async def ask_midway(parts: SessionParts) -> AsyncIterator[None]:
        async def on_bars(event: Event) -> None:
            if event.seq > 100 and not asked:
                for path in ("readyz", "healthz"):
                    url = f"{monitor_url(parts.run_folder)}/{path}"
                    asked.append(asyncio.create_task(asyncio.to_thread(requests.get, url, timeout=10)))

        parts.bus.subscribe("asker", [BarsClosed], on_bars)
        yield
        await asyncio.wait(asked, timeout=9)

    long = SPEC.model_copy(update={"end": date(2006, 12, 29)})
    await observed_session(tmp_path, observed_settings("http"), beside=[ask_midway], spec=long)
    ready, alive = (task.result() for task in asked)
    assert ready.status_code == alive.status_code == 200, ready.text
    found = ready.json()["findings"]
    for name in ("agent risk", "agent execution", "broker orders", "stream trading", "stream data", "disk"):
        assert found[name]["ok"], name


async def test_refusals_are_counted_by_check_and_a_restricted_state_is_shown(tmp_path: Path) -> None:
    limits = Limits(restricted=frozenset({"IBM"}), max_drawdown=0.02)
    spec = SPEC.model_copy(update={"limits": limits, "end": date(2005, 12, 30)})
    result, seen = await observed_session(tmp_path, observed_settings(), spec=spec)
    shown = families(seen.answers["metrics"].text)
    refused = {sample.labels["check"]: sample.value for sample in shown["trader_risk_refusals_total"].samples}
    failed = Counter(name for refusal in result.refusals for name in refusal.checks)
    assert refused == failed and {"RESTRICTED", "TRADING_STATE"} <= set(refused)
    outcomes = {sample.labels["outcome"]: sample.value for sample in shown["trader_orders_total"].samples}
    assert outcomes["refused"] == len(result.refusals) > 0
    states = {sample.labels["state"]: sample.value for sample in shown["trader_trading_state"].samples}
    assert states["ACTIVE"] == 0 and sum(states.values()) == 1
