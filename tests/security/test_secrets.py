"""Keys planted in every setting that takes one, leaked in every way that accidents have, and looked for everywhere."""

import asyncio
import base64
import html
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
import requests

from trader_lib.config.masking import MASKED, in_force, kept_secret
from trader_lib.config.settings import load_settings
from trader_lib.errors.taxonomy import Misconfigured, Misused
from trader_lib.session.session import run_session
from trader_lib.session.spec import SessionSpec
from trader_lib.steering.control import ControlFile

Trader = Callable[..., tuple[int, str, str]]

PLANTED = {
    "APCA_API_KEY_ID": "PKPLANTED0123456789",
    "APCA_API_SECRET_KEY": 'pL4nted/s3cret+"key"\\é0',
    "TRADER_MONITORING__TOKEN": "tok3n-Operator-7731",
    "TRADER_NOTIFY__SMTP_PASSWORD": "smtp-Pass-8899x",
    "TRADER_TELEMETRY__OTLP_HEADERS": "authorization=Bearer 0tlp-Token-3344",
    "TRADER_CACHE__URL": "redis://:r3dis-Passw0rd-55@127.0.0.1:1/0",
}
POSTGRES = "postgresql://ada:p0stgres-Pass-66@127.0.0.1:1/trades"
HOOK_PATH = "/services/T0/B1/h00k-Path-4477"
OPENS = [  # what must be seen nowhere
    PLANTED["APCA_API_KEY_ID"],
    PLANTED["APCA_API_SECRET_KEY"],
    PLANTED["TRADER_MONITORING__TOKEN"],
    PLANTED["TRADER_NOTIFY__SMTP_PASSWORD"],
    "0tlp-Token-3344",
    "r3dis-Passw0rd-55",
    "p0stgres-Pass-66",
    "h00k-Path-4477",
]

LEAKY = """
import base64, logging, os, sys, time
from urllib.parse import quote

import numpy as np
from trader_lib import Strategy
from trader_lib.telemetry.log import get_logger


class Leaky(Strategy):
    note: str = ""

    @property
    def warmup(self):
        return 1

    def targets(self, bars):
        time.sleep(float(os.environ.get("PAUSE_S", "0")))
        if bars.n > 3:
            leak()
        return np.full((bars.n, len(bars.symbols)), 0.5)


def leak():
    key, secret = os.environ["APCA_API_KEY_ID"], os.environ["APCA_API_SECRET_KEY"]
    several = [value for name, value in os.environ.items() if name.startswith(("TRADER_", "APCA_"))]
    told = " | ".join([key, secret, repr(secret), quote(secret, safe=""), *several])
    basic = base64.b64encode(f"{key}:{secret}".encode()).decode()
    print("printed", told)
    for piece in (key[:8], key[8:], "\\n", secret[:9], secret[9:] + "\\n"):
        print(piece, end="", flush=True)
    sys.stderr.write(f"complained {told}\\n")
    if "ipykernel" in sys.modules:  # what is written past Python in one's own shell, nobody can catch
        os.write(2, f"past the notebook {told}\\n".encode())
    get_logger("strategy").warning(f"logged {told}")
    logging.getLogger("some.library").error("sent Authorization: Basic %s", basic)
    cause = KeyError({"headers": {"APCA-API-SECRET-KEY": secret}})
    cause.add_note(f"a note with {secret!r}")
    raise RuntimeError(f"HTTP 401 for {told} ({basic})") from ExceptionGroup("several", [cause, ValueError(told)])
"""


def spellings(value: str) -> set[str]:
    """How a value would be found, worked out without the library; and its halves, for one that was cut."""
    half = len(value) * 2 // 3
    json_text = json.dumps(value)[1:-1]
    plain = {value[:half], value[-half:], json_text, repr(value)[1:-1], html.escape(value), quote(value, safe="")}
    coded = {base64.b64encode(b" " * before + value.encode()).decode()[4:-4] for before in range(3)}
    return plain | {json.dumps(json_text)[1:-1]} | coded


def leaks(content: bytes | str) -> list[str]:
    """The secrets that a content holds."""
    raw = content.encode() if isinstance(content, str) else content
    return [value for value in OPENS if any(text.encode() in raw for text in spellings(value))]


def leaks_below(folder: Path) -> dict[str, list[str]]:
    """The files that hold secrets, with which."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return {str(path.relative_to(folder)): found for path in files if (found := leaks(path.read_bytes()))}


class Sink:
    """A web server that keeps what it is sent; with `echo` it refuses all and repeats the headers that it got."""

    def __init__(self, *, echo: bool = False) -> None:
        self.bodies: list[bytes] = []
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sink.bodies.append(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
                said = json.dumps({"code": 40310000, "message": f"not with {dict(self.headers)}"}) if echo else "ok"
                self.send_response(422 if echo else 200)
                self.send_header("Content-Length", str(len(said.encode())))
                self.end_headers()
                self.wfile.write(said.encode())

            do_GET = do_POST  # noqa: N815 - the server looks for this name

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def planted(trader: Trader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trader]:
    """A folder with the strategy that leaks, and an environment full of secrets; what was in force before stays so."""
    (tmp_path / "leaky.py").write_text(LEAKY, encoding="utf-8")
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    with kept_secret(*PLANTED.values(), POSTGRES):
        yield trader


WHAT = ("--symbols", "IBM", "--start", "2005-01-03", "--end", "2005-01-31", "--strategy", "leaky.py:Leaky")


@pytest.mark.slow
def test_a_failed_backtest_leaves_no_secret_anywhere(
    planted: Trader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRADER_JOURNAL__URL", POSTGRES)
    monkeypatch.setenv("TRADER_DEBUG", "1")
    code, out, err = planted("backtest", *WHAT)
    assert code == 5 and MASKED in err and leaks(out + err) == []
    (run,) = (tmp_path / "runs").glob("*Z-*")
    for name in ("notebook.ipynb", "kernel.log", "result.json"):  # the leak did happen
        assert MASKED in (run / name).read_text(encoding="utf-8"), name
    (tmp_path / "leaky.py").unlink()
    assert leaks_below(tmp_path) == {}
    for command in (
        ("runs", "show", "latest"),
        ("runs", "show", "--json"),
        ("runs", "list"),
        ("config",),
        ("doctor", "--offline"),
    ):
        _, out, err = planted(*command)
        assert out and leaks(out + err) == [], command


def look(runs: Path, seen: list[str], stop: threading.Event) -> None:
    """Ask a session's monitor for everything that it shows without a login, for as long as it runs."""
    while not stop.is_set():
        for note in runs.glob("*/monitor.json"):
            with suppress(OSError, ValueError):
                url = json.loads(note.read_bytes())["url"]
                for path in (
                    "/healthz",
                    "/readyz",
                    "/metrics",
                    "/api/session",
                    "/api/operator",
                    "/api/log?correlation=",
                ):
                    with suppress(urllib.error.HTTPError), urllib.request.urlopen(url + path, timeout=2) as answer:
                        seen.append(answer.read().decode())
        time.sleep(0.05)


@pytest.mark.slow
def test_a_session_whose_strategy_leaks_leaves_no_secret_anywhere(
    planted: Trader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    stop = threading.Event()
    with Sink() as sink:
        settings = {
            "MONITORING__PORT": "0",
            "NOTIFY__WEBHOOK_URL": sink.url + HOOK_PATH,
            "NOTIFY__SIMULATED": "true",
            "TELEMETRY__OTLP_ENDPOINT": sink.url,
            "BROKER__TRANSPORT": "in_process",
        }
        for name, value in settings.items():
            monkeypatch.setenv(f"TRADER_{name}", value)
        monkeypatch.setenv("PAUSE_S", "0.2")
        looking = threading.Thread(target=look, args=(tmp_path / "runs", seen, stop))
        looking.start()
        try:
            _, out, err = planted("paper", *WHAT)
        finally:
            stop.set()
            looking.join()
        monkeypatch.setenv("PAUSE_S", "0")
        assert leaks(out + err) == []
        (run,) = (tmp_path / "runs").glob("*Z-*")
        for name in ("journal.sqlite", "log.jsonl", "notebook.ipynb", "report.html"):  # the leak did happen
            assert MASKED.encode() in (run / name).read_bytes(), name
        assert any("restart" in text and MASKED in text for text in seen), "the page showed the failure"
        assert leaks("".join(seen)) == []
        commands = [
            ("status",), ("status", "--json"), ("journal", "show", "--limit", "0"), ("journal", "show", "--json"),
            ("journal", "export"), ("journal", "export", "--to", "events.parquet"), ("journal", "verify"),
            ("runs", "show", "latest", "--json"), ("summary",), ("watch", "--once"), ("notify", "test"),
            ("kill", "latest", "--reason", f"the key {PLANTED['APCA_API_KEY_ID']} is out"),
        ]  # fmt: skip
        for command in commands:
            code, out, err = planted(*command)
            assert code in {0, 1, 7} and leaks(out + err) == [], (command, code, err)
        replayed = subprocess.run(
            [sys.executable, "-c", "from trader_lib.app.cli import main; main(['replay', 'latest'])"],
            capture_output=True,
            check=True,
        )
        assert b"Came out the same" in replayed.stdout, "what is masked is compared masked"
        assert b"printed" in replayed.stdout and b"logged" in replayed.stderr, "the strategy ran in the same process"
        assert leaks(replayed.stdout + replayed.stderr) == []
        bodies = b"\n".join(sink.bodies)
    assert b"agent failed" in bodies and b"trader.strategy" in bodies and MASKED.encode() in bodies
    assert leaks(bodies) == []
    (tmp_path / "leaky.py").unlink()
    assert leaks_below(tmp_path) == {}


@pytest.mark.slow
def test_a_broker_that_repeats_the_keys_it_was_given_does_not_put_them_into_a_run(
    planted: Trader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Sink(echo=True) as sink:
        for name in ("TRADING_URL", "DATA_URL"):
            monkeypatch.setenv(f"TRADER_BROKER__{name}", sink.url)
        monkeypatch.setenv("TRADER_BROKER__TRADING_STREAM_URL", sink.url.replace("http", "ws", 1))
        monkeypatch.setenv("TRADER_RESILIENCE__READS_ATTEMPTS", "1")
        code, out, err = planted("paper", "--broker", "alpaca", *WHAT[:2])
        assert code in {3, 5} and leaks(out + err) == []
        assert sink.bodies, "it was asked"
        _, out, err = planted("doctor", "--profile", "paper")
        assert leaks(out + err) == []
    (tmp_path / "leaky.py").unlink()
    (tmp_path / "runs").mkdir(exist_ok=True)
    (tmp_path / "runs" / "looked").touch()
    assert leaks_below(tmp_path) == {}


def test_a_parameter_that_holds_a_secret_is_refused_before_anything_is_written(
    planted: Trader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, token = PLANTED["APCA_API_KEY_ID"], PLANTED["TRADER_MONITORING__TOKEN"]
    (tmp_path / "own.ipynb").write_text(
        json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8"
    )
    for command in (
        ("backtest", *WHAT, "-p", f"note={key}"),
        ("paper", *WHAT, "-p", f"note=my {token}"),
        ("backtest", *WHAT, "-p", f"{key}=1"),
        ("run", "own.ipynb", "-p", f"x={key}"),
    ):
        code, out, err = planted(*command)
        assert code == 2 and "holds a secret of the settings" in err and leaks(out + err) == [], command
    assert not (tmp_path / "runs").exists()


def test_a_notebook_with_a_key_in_its_text_is_refused(planted: Trader, tmp_path: Path) -> None:
    key = PLANTED["APCA_API_KEY_ID"]
    cell = {"cell_type": "code", "id": "00000000", "metadata": {}, "source": f"KEY = {key!r}", "outputs": []}
    notebook = {"cells": [{**cell, "execution_count": None}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "own.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    code, out, err = planted("run", "own.ipynb")
    assert code == 2 and "own.ipynb holds a secret" in err and leaks(out + err) == []
    assert not (tmp_path / "runs").exists()


async def test_a_session_handed_a_secret_as_parameter_writes_nothing(planted: Trader, tmp_path: Path) -> None:
    spec = SessionSpec(strategy="leaky.py:Leaky", symbols=("IBM",), params={"note": PLANTED["APCA_API_KEY_ID"]})
    with pytest.raises(Misused, match="The parameter params holds a secret"):
        await run_session(spec, load_settings(), journal_path=tmp_path / "journal.sqlite")
    assert not (tmp_path / "journal.sqlite").exists()


def test_neither_a_file_that_does_not_run_nor_a_bug_with_its_traceback_shows_a_secret(
    planted: Trader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = PLANTED["APCA_API_SECRET_KEY"]
    raising = "import os\nraise ValueError('made with ' + repr(os.environ['APCA_API_SECRET_KEY']))\n"
    (tmp_path / "broken.py").write_text(raising, encoding="utf-8")
    code, out, err = planted("backtest", "--strategy", "broken.py:Any")
    assert code != 0 and MASKED in err and leaks(out + err) == []

    def fail(*_: object, **__: object) -> None:
        connected_with = secret
        raise RuntimeError({"headers": {"APCA-API-SECRET-KEY": connected_with}})

    monkeypatch.setattr("trader_lib.app.views.list_runs", fail)
    monkeypatch.setenv("TRADER_DEBUG", "1")
    code, out, err = planted("runs", "list", "--runs", str(tmp_path))
    assert code == 1 and "Traceback" in err and "This is a bug" in err and leaks(out + err) == []


def test_an_operator_s_reason_is_masked_and_the_command_obeyed(planted: Trader, tmp_path: Path) -> None:
    file = ControlFile(tmp_path / "control.jsonl")
    file.append("halt", reason=f"key {PLANTED['APCA_API_KEY_ID']} leaked", by="ada")
    assert file.is_halted() and leaks(file.path.read_bytes()) == []
    assert file.commands()[0].reason == f"key {MASKED} leaked"


async def test_the_embedded_exchange_opens_for_its_own_secret_alone(tmp_path: Path) -> None:
    answers: list[int] = []
    known: list[str] = []

    @asynccontextmanager
    async def stranger(parts):
        """Knows what `/healthz` shows to everybody: the session's id."""
        known.extend(in_force().values)
        url = f"http://127.0.0.1:{port}/v2/account"
        for secret in (parts.session_id, "simulated", "", known[-1]):
            given = {"APCA-API-KEY-ID": "simulated", "APCA-API-SECRET-KEY": secret}
            answered = await asyncio.to_thread(requests.get, url, headers=given, timeout=5)
            answers.append(answered.status_code)
        yield

    with Sink() as free:
        port = int(free.url.rpartition(":")[2])
    overrides = {"broker": {"transport": "http"}, "exchange": {"port": port}}
    settings = load_settings(environ={}, env_file=None, overrides=overrides)
    spec = SessionSpec(symbols=("IBM",), params={"fast": 2, "slow": 4}, start="2005-01-03", end="2005-01-14")
    results = [
        await run_session(spec, settings, journal_path=tmp_path / name, companions=[stranger])
        for name in ("first.sqlite", "second.sqlite")
    ]
    assert answers == [401, 401, 401, 200] * 2
    first, second = known[-1], known[-1 - len(known) // 2]
    assert first != second and len(first) == 43, "a secret for each server"
    assert not {first, second} & set(in_force().values), "and forgotten with it"
    assert results[0].session_id == results[1].session_id
    assert results[0].order_list_hash == results[1].order_list_hash, "no order depends on it"
    assert not any(secret.encode() in content for content in contents(tmp_path) for secret in (first, second))


def contents(folder: Path) -> list[bytes]:
    """Of every file below a folder."""
    return [path.read_bytes() for path in folder.rglob("*") if path.is_file()]


def test_secrets_come_in_force_with_the_settings_also_with_settings_that_are_wrong() -> None:
    environ = {"TRADER_NOTIFY__WEBHOOK_URL": "ftp://nowhere/of-No-Us3-1234", "TRADER_JOURNAL__URL": POSTGRES}
    text = "p0stgres-Pass-66 at ftp://nowhere/of-No-Us3-1234"
    assert in_force().text(text) == text
    with pytest.raises(Misconfigured):
        load_settings(environ=environ, env_file=None)
    assert in_force().text(text) == f"{MASKED} at {MASKED}"
    with kept_secret(*environ.values()):  # which forgets them at its end
        pass
    assert in_force().text(text) == text


def test_ordinary_words_are_left_alone_so_that_no_number_and_no_name_is_damaged() -> None:
    words = ("simulated", "100000", "2005-01-03", "sma_cross", "key", "IBM")
    with kept_secret(*words):
        text = json.dumps({"stage": "simulated", "cash": "100000", "at": "2005-01-03", "strategy": "sma_cross"})
        assert in_force().text(text) == text and in_force().raw(text.encode()) == text.encode()
