"""One trace a decision: over threads, over the wire to a collector, and the same ids in every process."""

import asyncio
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from loguru import logger
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.observed import SPEC, observed_settings
from tests.servers import RedisServer
from trader_lib.config.sections import BrokerSettings, BusSettings, LoggingSettings
from trader_lib.config.settings import Settings
from trader_lib.journal.journal import SqliteJournal
from trader_lib.observe.companions import companions
from trader_lib.observe.traces import traced
from trader_lib.session.agent_process import Supervisor, agent_command
from trader_lib.session.session import SessionResult, run_session
from trader_lib.telemetry.log import configure_logging, trace_id_of
from trader_lib.telemetry.tracing import Tracing, root_id_of, span_id_of
from trader_lib.trading.events import BarsClosed, FillRecorded, OrderProposed

pytestmark = pytest.mark.usefixtures("quiet")


async def traced_session(
    folder: Path, transport: str = "in_process", **more: Any
) -> tuple[SessionResult, tuple[ReadableSpan, ...]]:
    memory = InMemorySpanExporter()

    def into_memory(parts: Any) -> Tracing:
        return Tracing(memory, immediately=True, after_seq=parts.inputs.past.last_seq)

    result = await run_session(
        SPEC,
        observed_settings(transport, monitoring={}),
        journal_path=folder / "journal.sqlite",
        companions=[traced(into_memory)],
        **more,
    )
    return result, memory.get_finished_spans()


def hexadecimal(span: ReadableSpan) -> tuple[str, str, str | None]:
    """Trace, span and parent."""
    context = span.get_span_context()
    return f"{context.trace_id:032x}", f"{context.span_id:016x}", f"{span.parent.span_id:016x}" if span.parent else None


async def test_over_http_a_trace_leads_through_the_thread_that_called_the_broker(tmp_path: Path) -> None:
    result, spans = await traced_session(tmp_path, "http")
    known = {hexadecimal(span)[:2]: span for span in spans}
    called = [span for span in spans if span.name == "thread" and (span.attributes or {}).get("function") == "_submit"]
    assert len(called) == len(result.orders)
    for span in called:
        path = [span.name]
        trace, _, parent = hexadecimal(span)
        while parent is not None:
            above = known[trace, parent]
            path.append(above.name)
            parent = hexadecimal(above)[2]
        assert path == ["thread", "broker orders", "submit", "execution", "risk", "strategy", "decision"]


async def test_every_fill_ends_the_trace_that_its_bar_began(tmp_path: Path) -> None:
    result, spans = await traced_session(tmp_path)
    with SqliteJournal(result.journal_path, read_only=True) as journal:
        fills = list(journal.read(types=[FillRecorded]))
        bars = [event.correlation_id for event in journal.read(types=[BarsClosed])]
    found = {(span.attributes or {}).get("trader.execution_id"): span for span in spans if span.name == "fill"}
    for event in fills:
        assert isinstance(event.payload, FillRecorded)
        span = found[event.payload.fill.execution_id]
        assert hexadecimal(span)[0] == trace_id_of(event.correlation_id)
        assert (span.end_time or 0) >= (span.start_time or 0)
    roots = {hexadecimal(span)[:2] for span in spans if span.parent is None}
    assert roots == {(trace_id_of(cause), root_id_of(cause)) for cause in bars}


async def test_tracing_changes_no_byte_of_the_journal(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    settings = observed_settings(monitoring={})
    alone = await run_session(SPEC, settings, journal_path=tmp_path / "a" / "journal.sqlite")
    beside, _ = await traced_session(tmp_path / "b")
    assert alone.journal_path.read_bytes() == beside.journal_path.read_bytes()


async def test_what_was_traced_before_a_restart_is_not_traced_again(tmp_path: Path) -> None:
    await traced_session(tmp_path)
    _, again = await traced_session(tmp_path, resume=True)
    assert again == ()


async def test_another_process_derives_the_same_trace(tmp_path: Path) -> None:
    """It is given one event, as a bus between processes would give it, and handles it."""
    result, spans = await traced_session(tmp_path)
    with SqliteJournal(result.journal_path, read_only=True) as journal:
        event = next(iter(journal.read(types=[OrderProposed])))
    code = (
        "import sys\n"
        "from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter\n"
        "from trader_lib.telemetry.tracing import Tracing, handling, use_tracing\n"
        "from trader_lib.trading.events import Event\n"
        "memory = InMemorySpanExporter()\n"
        "use_tracing(Tracing(memory, immediately=True))\n"
        "with handling('risk', Event.from_json(sys.stdin.buffer.read())):\n"
        "    pass\n"
        "(span,) = memory.get_finished_spans()\n"
        "print(f'{span.context.trace_id:032x} {span.context.span_id:016x} {span.parent.span_id:016x}')\n"
    )
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", code], input=event.to_json(), capture_output=True, check=True
    )
    here = [hexadecimal(span) for span in spans if span.name == "risk"]
    assert tuple(done.stdout.decode().split()) in here
    assert done.stdout.decode().split()[1] == span_id_of(event.id, "risk")


async def test_a_share_is_chosen_by_trace(tmp_path: Path) -> None:
    memory = InMemorySpanExporter()
    await run_session(
        SPEC,
        observed_settings(monitoring={}),
        journal_path=tmp_path / "journal.sqlite",
        companions=[traced(lambda parts: Tracing(memory, immediately=True, share=0.5))],
    )
    kept = memory.get_finished_spans()
    whole = {span.get_span_context().trace_id for span in kept if span.parent is None}
    assert 10 < len(whole) < 52, "of the quarter's 61 bars"
    for span in kept:
        assert span.get_span_context().trace_id in whole, "a trace is kept as a whole or not at all"


async def test_the_log_names_the_trace(tmp_path: Path) -> None:
    logger.enable("trader_lib")
    configure_logging(LoggingSettings(terminal="off"), tmp_path / "log.jsonl", [])
    try:
        result, spans = await traced_session(tmp_path)
    finally:
        logger.remove()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    fills = [row for row in rows if row["message"].startswith("Filled: ")]
    assert len(fills) == sum(order.status == "filled" for order in result.orders)
    traces = {hexadecimal(span)[0] for span in spans if span.name == "fill"}
    assert {row["trace_id"] for row in fills} == traces


# ---- over OTLP


class Collector:
    """Takes traces over HTTP, as an OpenTelemetry collector does. status: what it answers."""

    def __init__(self, status: int = 200) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.headers.append({"path": self.path} | {k.lower(): v for k, v in self.headers.items()})
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Collector":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spans_by_process(self) -> list[tuple[str, Any]]:
        """Each span and the agent whose process made it; "session" for the session's own."""
        found = []
        for resource in (one for request in self.requests for one in request.resource_spans):
            about = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
            process = about.get("trader.agent", "session")
            found += [(process, span) for scope in resource.scope_spans for span in scope.spans]
        return found

    @property
    def spans(self) -> list[Any]:
        return [span for _, span in self.spans_by_process()]


def to_collector(url: str, **more: Any) -> Settings:
    return observed_settings(monitoring={}, telemetry={"otlp_endpoint": url, "otlp_timeout_s": 1.0} | more)


async def test_a_collector_gets_every_decision_over_otlp(tmp_path: Path) -> None:
    with Collector() as collector:
        settings = to_collector(collector.url, otlp_headers="authorization=Bearer secret-token")
        result = await run_session(
            SPEC, settings, journal_path=tmp_path / "journal.sqlite", companions=companions(settings)
        )
    with SqliteJournal(result.journal_path, read_only=True) as journal:
        bars = {trace_id_of(event.correlation_id) for event in journal.read(types=[BarsClosed])}
        fills = sum(1 for _ in journal.read(types=[FillRecorded]))
    assert {span.trace_id.hex() for span in collector.spans if not span.parent_span_id} == bars
    assert len([span for span in collector.spans if span.name == "fill"]) == fills
    assert {head["path"] for head in collector.headers} == {"/v1/traces"}
    assert {head["authorization"] for head in collector.headers} == {"Bearer secret-token"}
    about = {pair.key: pair.value.string_value for pair in collector.requests[0].resource_spans[0].resource.attributes}
    assert about["service.name"] == "trader" and about["service.instance.id"] == result.session_id


async def test_a_collector_that_refuses_or_is_gone_costs_the_session_nothing_but_its_traces(tmp_path: Path) -> None:
    with Collector(status=400) as refusing:
        gone = "http://127.0.0.1:9"
        for number, url in enumerate((refusing.url, gone)):
            settings, folder = to_collector(url), tmp_path / str(number)
            folder.mkdir()
            result = await run_session(
                SPEC, settings, journal_path=folder / "journal.sqlite", companions=companions(settings)
            )
            assert result.status == "completed" and result.reconciliation.ok
            assert result.wall_s < 60


@pytest.mark.slow
async def test_over_redis_one_trace_leads_through_four_processes(redis_server: RedisServer, tmp_path: Path) -> None:
    with Collector() as collector:
        settings = to_collector(collector.url)
        settings = settings.model_copy(update={"bus": BusSettings.model_validate({"url": redis_server.url})})
        settings = settings.model_copy(update={"broker": BrokerSettings(transport="http")})
        told = {"TRADER_BUS__URL": redis_server.url, "TRADER_TELEMETRY__OTLP_ENDPOINT": collector.url}
        told["TRADER_LOGGING__LEVEL"] = "WARNING"
        keeper, stop = Supervisor(("strategy", "risk", "execution"), agent_command, told), asyncio.Event()
        running = asyncio.create_task(keeper.run(stop))
        try:
            playing = run_session(
                SPEC, settings, journal_path=tmp_path / "journal.sqlite", companions=companions(settings)
            )
            result = await asyncio.wait_for(playing, 150)
            await asyncio.wait({running}, timeout=30)  # they send what is left
        finally:
            stop.set()
            await running
    spans = collector.spans_by_process()
    ids = {(span.trace_id, span.span_id): (span, process) for process, span in spans}
    fills = [(span, process) for process, span in spans if span.name == "fill"]
    assert len(fills) == sum(order.status == "filled" for order in result.orders)
    for span, process in fills:
        path, processes = [span.name], [process]
        while span.parent_span_id:
            span, process = ids[span.trace_id, span.parent_span_id]
            path.append(span.name)
            processes.append(process)
        assert path == ["fill", "execution", "risk", "strategy", "decision"]
        assert processes == ["session", "execution", "risk", "strategy", "session"]
