"""Messages to real receivers on loopback: a web server, and a mail server that wants STARTTLS and a password."""

import asyncio
import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult
from pydantic import SecretStr

from trader_lib.agents.strategy import StrategyAgent
from trader_lib.bus.bus import InProcessBus
from trader_lib.clock.clock import VirtualClock, WallClock
from trader_lib.clock.ids import SeededIds
from trader_lib.clock.sessions import TradingCalendar
from trader_lib.config.sections import NotifySettings
from trader_lib.config.settings import Settings, load_settings
from trader_lib.errors.taxonomy import Misconfigured, Rejected, Retryable, RunFailed
from trader_lib.journal.journal import SqliteJournal
from trader_lib.market.bars import Bars
from trader_lib.observe.channels import Mail, Message
from trader_lib.observe.telling import notifications
from trader_lib.runs.store import RunStore
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.telemetry.log import configure_logging
from trader_lib.trading.events import OrderIntended, SessionEnded

Trader = Callable[..., tuple[int, str, str]]
TOKEN = "T0K3N-of-the-webhook"
PASSWORD = "correct-horse-battery"


class Hook:
    """A webhook that keeps what it is told and answers as it is set."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.answers: list[tuple[int, str]] = []  # the next ones; 200 when there are none
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, said = hook.answers.pop(0) if hook.answers else (200, "ok")
                if status == 200:
                    hook.bodies.append(body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(said)))
                if status in (301, 302):
                    self.send_header("Location", "http://127.0.0.1:1/elsewhere")
                self.end_headers()
                self.wfile.write(said.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/{TOKEN}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()
    yield hook
    hook.close()


class Postbox:
    """What a mail server took, and the answers to the next recipients."""

    def __init__(self) -> None:
        self.mails: list[str] = []
        self.answers: list[str] = []

    async def handle_RCPT(  # noqa: N802
        self, server: Any, session: Any, envelope: Any, address: str, options: Any
    ) -> str:
        answer = self.answers.pop(0) if self.answers else "250 OK"
        if answer.startswith("250"):
            envelope.rcpt_tos.append(address)
        return answer

    async def handle_DATA(  # noqa: N802
        self, server: Any, session: Any, envelope: Any
    ) -> str:
        self.mails.append(envelope.content.decode())
        return "250 OK"


class MailServer(Controller):
    """A mail server on a free port; with a context it wants STARTTLS, and then a name and a password."""

    def __init__(self, postbox: Postbox, context: ssl.SSLContext | None) -> None:
        super().__init__(postbox, hostname="127.0.0.1", port=0)
        self._context = context

    def factory(self) -> SMTP:
        if self._context is None:
            return SMTP(self.handler)
        return SMTP(
            self.handler,
            tls_context=self._context,
            require_starttls=True,
            auth_required=True,
            authenticator=lambda *given: AuthResult(success=given[-1].password == PASSWORD.encode(), handled=False),
        )

    def _trigger_server(self) -> None:
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1, and its key in the same file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: no certificate for the mail server")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout key.pem -out cert.pem -subj /CN=localhost"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1"], cwd=folder, check=True, capture_output=True
    )
    both = folder / "both.pem"
    both.write_bytes((folder / "cert.pem").read_bytes() + (folder / "key.pem").read_bytes())
    return both


@pytest.fixture
def postbox() -> Postbox:
    return Postbox()


@pytest.fixture
def mail_server(certificate: Path, postbox: Postbox) -> Iterator[MailServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = MailServer(postbox, context)
    server.start()
    yield server
    server.stop()


def by_mail(port: int, **changes: Any) -> NotifySettings:
    given: dict[str, Any] = {
        "smtp_host": "127.0.0.1",
        "smtp_port": port,
        "smtp_user": "bot",
        "smtp_password": PASSWORD,
        "email_from": "bot@example.com",
        "email_to": "ada@example.com,bob@example.com",
        "timeout_s": 5,
    }
    return NotifySettings(**(given | changes))


def message() -> Message:
    return Message("m-1", "Trading is HALTED", "Equity fell by 5 % – look.", WallClock().now())


def test_test_message_reaches_the_webhook_and_its_answer_is_shown(
    trader: Trader, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRADER_NOTIFY__WEBHOOK_URL", hook.url)
    monkeypatch.setenv("TRADER_NOTIFY__WEBHOOK_FORM", "discord")
    code, out, err = trader("notify", "test")
    assert (code, out) == (0, "webhook: sent. HTTP 200: ok\n")
    assert "Test message" in hook.bodies[0]["content"]
    hook.answers = [(404, f"no such hook {TOKEN} at {hook.url}")]
    code, out, err = trader("notify", "test", "--json")
    answer = json.loads(out)[0]
    assert code == 1 and not answer["ok"] and "HTTP 404" in answer["said"] and hook.url not in out + err


def test_nobody_to_tell_is_a_sentence_with_the_way_out(trader: Trader) -> None:
    code, _, err = trader("notify", "test")
    assert code == 2 and "TRADER_NOTIFY__WEBHOOK_URL" in err


def test_redirect_is_not_followed(trader: Trader, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRADER_NOTIFY__WEBHOOK_URL", hook.url)
    hook.answers = [(302, "")]
    code, out, _ = trader("notify", "test")
    assert code == 1 and "HTTP 302" in out and not hook.bodies


def test_mail_goes_out_under_starttls_and_a_login(mail_server: MailServer, certificate: Path, postbox: Postbox) -> None:
    trusting = ssl.create_default_context(cafile=str(certificate))
    said = Mail(by_mail(mail_server.port), trusting).send(message())
    assert said == "accepted for ada@example.com, bob@example.com"
    (mail,) = postbox.mails
    assert "Subject: Trading is HALTED" in mail and "Message-ID: <m-1@trader-lib.invalid>" in mail


def test_mail_server_whose_certificate_nobody_vouches_for_gets_neither_password_nor_mail(
    mail_server: MailServer, postbox: Postbox
) -> None:
    with pytest.raises(Misconfigured, match="certificate is not trusted"):
        Mail(by_mail(mail_server.port)).send(message())
    assert postbox.mails == []


def test_wrong_password_is_said_without_it(mail_server: MailServer, certificate: Path) -> None:
    trusting = ssl.create_default_context(cafile=str(certificate))
    with pytest.raises(Misconfigured) as caught:
        Mail(by_mail(mail_server.port, smtp_password="wrong-password"), trusting).send(message())
    assert "wrong-password" not in str(caught.value)


def test_mail_server_without_starttls_gets_nothing(postbox: Postbox) -> None:
    server = MailServer(postbox, None)
    server.start()
    try:
        with pytest.raises(Misconfigured, match="does not offer"):
            Mail(by_mail(server.port)).send(message())
        assert postbox.mails == []
        plain = by_mail(server.port, smtp_security="none", smtp_user=None, smtp_password=None)
        postbox.answers = ["250 OK", "550 no such user"]
        assert Mail(plain).send(message()) == "accepted, but not for bob@example.com"
        postbox.answers = ["451 greylisted", "550 no such user"]
        with pytest.raises(Retryable, match=r"bob@example\.com: 550"):
            Mail(plain).send(message())
        postbox.answers = ["550 no such user"] * 2
        with pytest.raises(Rejected):
            Mail(plain).send(message())
    finally:
        server.stop()
    with pytest.raises(Retryable, match="did not answer"):
        Mail(by_mail(server.port)).send(message())


# --- beside a session

SPEC = SessionSpec(
    params={"fast": 3, "slow": 8}, symbols=("AAPL", "IBM"), start=date(2012, 1, 20), end=date(2012, 2, 29)
)


def settings_for(url: str, **notify: Any) -> Settings:
    given = {"webhook_url": SecretStr(url), "simulated": True, "timeout_s": 2.0, "attempts": 1, **notify}
    return load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}, "notify": given})


async def test_session_tells_its_end_and_its_day_and_trades_as_if_alone(
    hook: Hook, daily_bars: Bars, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.sqlite"
    settings = settings_for(hook.url)
    told = await run_session(SPEC, settings, bars=daily_bars, journal_path=journal, companions=[notifications()])
    alone = await run_session(SPEC, settings, bars=daily_bars)
    assert told.order_list_hash == alone.order_list_hash and told.orders
    with SqliteJournal(journal, read_only=True) as beside, SqliteJournal(alone.journal_path, read_only=True) as without:
        assert beside.last_hash == without.last_hash, "the journals are the same to the byte"
    text = "\n".join(body["text"] for body in hook.bodies)
    assert "Session ended" in text and "Wednesday 29 February 2012" in text
    assert f"Equity {told.equity_end:,.2f} USD" in text

    before = len(hook.bodies)
    await run_session(SPEC, settings, bars=daily_bars, journal_path=journal, resume=True, companions=[notifications()])
    assert len(hook.bodies) == before, "the past of a resumed session is not told again"


async def test_failing_agent_is_told_once_with_the_count_of_its_repetitions(
    hook: Hook, daily_bars: Bars, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no idea")

    monkeypatch.setattr(StrategyAgent, "_on_bars", broken)
    await run_session(SPEC, settings_for(hook.url), bars=daily_bars, companions=[notifications()])
    parts = "\n".join(body["text"] for body in hook.bodies).split("The strategy agent failed\n")
    assert "ValueError: no idea" in "".join(parts)
    assert "more in the last 300 s." in "".join(parts)


async def test_dead_webhook_costs_the_session_nothing_and_no_secret_reaches_the_log(
    daily_bars: Bars, tmp_path: Path
) -> None:
    settings = settings_for(f"http://127.0.0.1:9/services/{TOKEN}")
    log = tmp_path / "log.jsonl"
    configure_logging(settings.logging.model_copy(update={"terminal": "off", "level": "TRACE"}), log, ())
    result = await run_session(
        SPEC, settings, bars=daily_bars, journal_path=tmp_path / "journal.sqlite", companions=[notifications()]
    )
    with SqliteJournal(tmp_path / "journal.sqlite", read_only=True) as journal:
        assert journal.last([SessionEnded]), "the session ended in good order"
    alone = await run_session(SPEC, settings, bars=daily_bars)
    assert result.order_list_hash == alone.order_list_hash
    written = log.read_text(encoding="utf-8")
    assert "A message by webhook was given up" in written and TOKEN not in written


async def test_summary_command_says_what_the_journal_holds(trader: Trader, daily_bars: Bars, tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})
    result = await run_session(SPEC, settings, bars=daily_bars, journal_path=path)
    with SqliteJournal(path, read_only=True) as journal:
        days = {event.time.date() for event in journal.read(types=[OrderIntended])}
    told = [_summary(trader, path, "--day", str(day)) for day in sorted(days)]
    assert sum(one["orders"] for one in told) == len(result.orders)
    last = _summary(trader, path)
    assert last["equity"] == f"{result.equity_end.normalize():f}" and last["day"] == "2012-02-29"
    code, out, _ = trader("summary", str(path))
    assert code == 0 and out.splitlines()[0] == "Wednesday 29 February 2012, sma_cross (simulated)"
    code, _, err = trader("summary", str(path), "--day", "2012-02-20")
    assert code == 2 and "Nothing happened in this session on 2012-02-20" in err


def _summary(trader: Trader, path: Path, *more: str) -> dict[str, Any]:
    code, out, err = trader("summary", str(path), "--json", *more)
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_session_whose_process_dies_is_announced_by_the_one_that_ran_it(
    trader: Trader, hook: Hook, daily_bars: Bars, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRADER_NOTIFY__WEBHOOK_URL", hook.url)
    monkeypatch.setenv("TRADER_NOTIFY__SIMULATED", "true")
    settings = load_settings(environ={}, env_file=None, overrides={"broker": {"transport": "in_process"}})
    run = RunStore(tmp_path / "runs").create("paper")

    def killed(*_: object, **__: object) -> None:
        raise RunFailed("The run failed: its kernel was killed.", run=run)

    monkeypatch.setattr("trader_lib.runs.runner.run_notebook", killed)
    monkeypatch.setattr("trader_lib.app.views.show_run", lambda *_, **__: None)
    for kind, told in (("paper", 1), ("backtest", 1)):
        code, _, _ = trader(kind, "--symbols", "AAPL")
        assert code == 5 and len(hook.bodies) == told, "a backtest calls nobody"
    assert "its kernel was killed" in hook.bodies[0]["text"] and f"--resume {run.name}" in hook.bodies[0]["text"]

    asyncio.run(run_session(SPEC, settings, bars=daily_bars, journal_path=run.journal))
    trader("paper", "--symbols", "AAPL")
    assert len(hook.bodies) == 1, "the session ended and has said so itself"


async def test_day_is_told_after_the_close_while_the_session_goes_on(
    hook: Hook, daily_bars: Bars, tmp_path: Path
) -> None:
    path = tmp_path / "journal.sqlite"
    settings = settings_for(hook.url, simulated=False)
    await run_session(SPEC, settings, bars=daily_bars, journal_path=path)
    clock = VirtualClock(datetime(2012, 2, 29, 20, 50, tzinfo=UTC))
    bus = InProcessBus(clock, SeededIds("bus"), None, "sma-1")
    parts: Any = SimpleNamespace(
        settings=settings,
        run_folder=tmp_path,
        spec=SPEC,
        inputs=SimpleNamespace(is_simulated=False, journal_path=path),
        bus=bus,
        journal=None,
        calendar=TradingCalendar(),
    )
    async with notifications(clock=clock)(parts):
        for minute in range(50, 75):
            clock.advance_to(datetime(2012, 2, 29, 20, 0, tzinfo=UTC) + timedelta(minutes=minute))
            await asyncio.sleep(0.05)
            if minute == 64:
                assert not hook.bodies, "the close is at 21:00, the last bars come a little later"
        assert len(hook.bodies) == 1 and "Wednesday 29 February 2012" in hook.bodies[0]["text"]
        path.rename(tmp_path / "gone")
        clock.advance_to(datetime(2012, 3, 1, 22, 0, tzinfo=UTC))
        await asyncio.sleep(0.1)
    assert len(hook.bodies) == 1, "a day that cannot be summed up is a line in the log"
    await bus.close()
