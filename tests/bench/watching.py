"""What it costs a session to be watched: alone, metered and scraped, traced, and both, in turns in one run."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests

from trader_lib import SessionSpec, load_settings
from trader_lib.observe.address import monitor_url
from trader_lib.observe.companions import companions
from trader_lib.session.companions import SessionParts
from trader_lib.session.session import run_session

SPEC = SessionSpec.model_validate(
    {"strategy": "sma_cross", "symbols": ["AAPL", "IBM", "MSFT"], "start": "2007-01-03", "end": "2007-12-31"}
)
SCRAPE_S = 1.0  # fifteen times as often as Prometheus does by default


@dataclass
class Cost:
    """CPU seconds of a session: of its own thread, and of all threads. events: that it published."""

    thread_s: float
    process_s: float
    events: int


@contextmanager
def collector() -> Iterator[str]:
    """An OTLP collector that takes and forgets."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def session_cost(sections: dict[str, Any]) -> Cost:
    """Run a session with what the sections ask for beside it."""
    settings = load_settings(overrides={"broker": {"transport": "in_process"}} | sections, env_file=None, environ={})
    events = 0

    @asynccontextmanager
    async def scraper(parts: SessionParts) -> AsyncIterator[None]:
        nonlocal events
        over, url = threading.Event(), monitor_url(parts.run_folder)

        def scrape() -> None:
            while url is not None and not over.wait(SCRAPE_S):
                requests.get(f"{url}/metrics", timeout=5)

        thread = threading.Thread(target=scrape, daemon=True)
        thread.start()
        yield
        events = parts.bus.last_seq
        over.set()

    began, whole = time.thread_time(), time.process_time()
    asyncio.run(run_session(SPEC, settings, companions=[*companions(settings), scraper]))
    return Cost(time.thread_time() - began, time.process_time() - whole, events)


def watching(row: Callable[..., Any], repeats: int = 5) -> list[Any]:
    """CPU a bar and events a second of CPU, alone and watched: medians; a ratio is the median of each turn's."""
    with collector() as url:
        shown, sent = {"monitoring": {"port": 0}}, {"telemetry": {"otlp_endpoint": url}}
        ways: dict[str, dict[str, Any]] = {
            "alone": {},
            "metered and scraped": shown,
            "traced": sent,
            "metered, scraped and traced": shown | sent,
        }
        for sections in ways.values():
            session_cost(sections)  # imports and compiles
        turns = [{name: session_cost(sections) for name, sections in ways.items()} for _ in range(repeats)]
    rows = []
    for name in ways:
        costs = [turn[name] for turn in turns]
        for what, figure in (("session's thread", "thread_s"), ("all threads", "process_s")):
            taken = statistics.median(getattr(cost, figure) for cost in costs)
            ratio = statistics.median(getattr(turn[name], figure) / getattr(turn["alone"], figure) for turn in turns)
            against = ("", None) if name == "alone" else ("alone", ratio)
            rows.append(row(f"{name}, {what}", taken / 251 * 1e3, "CPU ms/bar", *against))
        a_second = statistics.median(cost.events / cost.thread_s for cost in costs)
        rows.append(row(f"{name}", a_second, "events/CPU s", "", None))
    return rows
