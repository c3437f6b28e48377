"""`trader` from the outside: what it refuses, what it leaves, what it prints."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import nbformat
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests

from trader_lib.clock.clock import WallClock
from trader_lib.errors.taxonomy import Misused
from trader_lib.market.sample import sample_bars
from trader_lib.market.store import BarStore
from trader_lib.runs.result import shipped_schema

Trader = Callable[..., tuple[int, str, str]]
MONTH = ("--symbols", "IBM,MSFT", "--start", "2012-01-03", "--end", "2012-02-29", "-p", "fast=3", "-p", "slow=8")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--strategy", "sma_cros"), 2, "Did you mean 'sma_cross'?"),
        (("-p", "fsat=10"), 2, "Did you mean 'fast'?"),
        (("-p", "fast=50", "-p", "slow=10"), 2, "fast"),
        (("--strategy", "nowhere.py:Mine"), 2, "there is no file nowhere.py"),
        (("--symbols", "APPL"), 4, "Did you mean 'AAPL'?"),
        (("--symbols", "IBM,IBM"), 2, "more than once"),
        (("--start", "2031-01-02"), 4, "outside the data"),
        (("--start", "2012-01-03", "--end", "2005-01-03"), 2, "lies before the start"),
        (("--start", "yesterday"), 2, "start"),
        (("--cash", "0"), 2, "cash"),
        (("--slippage-bps", "-1"), 2, "costs.slippage_bps"),
        (("--timeframe", "1Min"), 2, "daily bars"),
        (("--source", "store"), 4, "has no 1Day bars"),
        (("--source", "alpaca", "--start", "2024-01-02", "--end", "2024-02-01"), 3, "need keys"),
        (("--stratgy", "sma_cross"), 2, "--strategy"),
        (("--multiplier", "3"), 2, "multiplier"),
        (("--profile", "reserach"), 2, "research"),
    ],
)
@pytest.mark.parametrize("command", ["backtest", "paper"])
def test_bad_input_is_refused_before_anything_is_made(
    trader: Trader, tmp_path: Path, command: str, arguments: tuple[str, ...], code: int, words: str
) -> None:
    got, out, err = trader(command, *arguments)
    assert (got, out) == (code, ""), err
    assert words in err and "Traceback" not in err and len(err.splitlines()) <= 3
    assert list(tmp_path.iterdir()) == []


def test_missing_alpaca_keys_are_a_matter_of_configuration(trader: Trader, tmp_path: Path) -> None:
    code, out, err = trader("paper", "--broker", "alpaca")
    assert (code, out) == (3, "") and "key" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_session_at_alpaca_takes_the_paper_profile_and_a_day(trader: Trader, monkeypatch: pytest.MonkeyPatch) -> None:
    """In real time, the hour that a run over history may take would end a session before its market closes."""
    seen: dict[str, Any] = {}

    def stopped(kind: str, parameters: dict[str, Any], **how: Any) -> None:
        seen.update(parameters, timeout_s=how["timeout_s"])
        raise Misused("far enough")

    monkeypatch.setattr("trader_lib.runs.runner.run_notebook", stopped)
    for name in ("APCA_API_KEY_ID", "APCA_API_SECRET_KEY"):
        monkeypatch.setenv(name, "for-a-test")
    code, _, err = trader("paper", "--broker", "alpaca")
    assert (code, err) == (2, "far enough\n")
    assert (seen["profile"], seen["timeout_s"]) == ("paper", 86_400)


def test_a_misspelt_setting_is_a_matter_of_configuration(trader: Trader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRADER_BROKER__TRANSPROT", "http")
    code, _, err = trader("config")
    assert code == 3 and "TRADER_BROKER__TRANSPORT" in err


def test_a_port_in_use_is_named(trader: Trader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("TRADER_EXCHANGE__PORT", str(port))
        code, _, err = trader("paper", *MONTH)
    assert code == 3 and f"127.0.0.1:{port}" in err and "TRADER_EXCHANGE__PORT" in err
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_run_folder_is_named(trader: Trader, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    code, _, err = trader("backtest", *MONTH, "--runs", "file")
    assert code == 3 and "cannot be written to" in err and "--runs" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def spoil_nan(columns: dict[str, list[object]]) -> None:
    columns["close"][3000] = float("nan")


def spoil_order(columns: dict[str, list[object]]) -> None:
    for values in columns.values():
        values[3000], values[3001] = values[3001], values[3000]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(None, "cannot be read as Parquet"), (spoil_nan, "missing (NaN)"), (spoil_order, "out of order")],
)
@pytest.mark.parametrize("command", ["backtest", "paper"])
def test_a_store_file_that_cannot_be_trusted_is_named(
    trader: Trader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    spoil: Callable[[dict[str, list[object]]], None] | None,
    words: str,
) -> None:
    monkeypatch.setenv("TRADER_DATA__STORE_PATH", str(tmp_path / "store"))
    bars = sample_bars("IBM")
    (path,) = BarStore(tmp_path / "store").write(bars)
    if spoil is None:
        path.write_bytes(path.read_bytes()[:500])
    else:
        stored = pq.read_table(path)
        columns = stored.to_pydict()
        spoil(columns)
        pq.write_table(pa.table(columns, schema=stored.schema), path)
    feed = bars.provenance.feed
    code, out, err = trader(
        command, "--source", "store", "--feed", feed, "--symbols", "IBM", "--start", "2012-01-03", "--end", "2012-03-30"
    )
    assert (code, out) == (4, "") and path.name in err and words in err and "Traceback" not in err
    assert not (tmp_path / "runs").exists()


OWN = '''
from trader_lib import Strategy

class Mine(Strategy):
    """Hold the first half of whatever went up."""
    share: float = 0.5

    @property
    def warmup(self) -> int:
        return 1

    def targets(self, bars):
        return self.share * (bars.frame("close").diff() > 0).to_numpy(float) / len(bars.symbols)
'''


@pytest.mark.slow
def test_a_users_own_strategy_trades_from_file_and_notebook_and_leaves_no_secret(
    trader: Trader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"APCA_API_KEY_ID": "PKFORBIDDENKEY", "APCA_API_SECRET_KEY": "must-not-be-written-down"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "mine.py").write_text(OWN)
    exported = nbformat.v4.new_code_cell("#| export" + OWN)
    notes = nbformat.v4.new_code_cell("raise SystemExit('a cell without #| export is never run')")
    nbformat.write(nbformat.v4.new_notebook(cells=[exported, notes]), tmp_path / "mine.ipynb")

    what = ("--symbols", "IBM", "--start", "2012-01-03", "--end", "2012-01-31", "-p", "share=0.25", "--json")
    code, out, err = trader("backtest", "--strategy", "mine.py:Mine", *what)
    assert (code, err) == (0, "")
    code, session, err = trader("paper", "--transport", "in_process", "--strategy", "mine.ipynb:Mine", *what)
    assert code == 0 and err.startswith("It names no lookback_max"), err
    assert json.loads(out)["orders"] and json.loads(out)["order_list_hash"] == json.loads(session)["order_list_hash"]

    folder = Path(json.loads(session)["folder"])
    assert {path.name for path in folder.iterdir()} >= {"journal.sqlite", "log.jsonl", "report.html", "result.json"}
    assert not [path.name for path in folder.iterdir() if path.name.endswith(("-wal", "-shm", ".part"))]
    for path in (path for path in (tmp_path / "runs").rglob("*") if path.is_file()):
        written = path.read_bytes()
        assert not [name for name, secret in secrets.items() if secret.encode() in written], path


@pytest.mark.slow
def test_backtest_and_session_place_the_same_orders(trader: Trader, tmp_path: Path) -> None:
    code, out, err = trader("backtest", *MONTH, "--commission-bps", "5", "--json")
    assert (code, err) == (0, "")
    backtest = json.loads(out)
    code, out, err = trader(
        "paper", "--broker", "simulated", "--transport", "in_process", *MONTH, "--commission-bps", "5"
    )
    assert (code, err) == (0, ""), err
    assert "Reconciled" in out and "report.html" in out

    code, out, _ = trader("runs", "compare", "--json")
    compared = json.loads(out)
    assert code == 0 and compared["equal"] is True and compared["differences"] == []
    assert compared["equity_difference"] == "0" and compared["inputs"] == {}
    assert compared["order_list_hash"] == [backtest["order_list_hash"]] * 2
    assert backtest["orders"] and backtest["parameters"]["costs"]["commission_bps"] == 5

    for folder in (tmp_path / "runs").glob("*Z-*"):
        document = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        jsonschema.validate(document, shipped_schema())
        page = (folder / "report.html").read_text(encoding="utf-8")
        for heading in ("Price and orders", "Equity, drawdown, exposure", "Statistics", "Risk decisions", "Provenance"):
            assert heading in page, heading
        assert "Traceback" not in page and "UserWarning" not in page and "vnd.trader" not in page
        assert 'src="http' not in page and '<link rel="stylesheet" href="http' not in page

    code, out, _ = trader("runs", "list", "--json")
    assert code == 0 and {row["kind"] for row in json.loads(out)} == {"backtest", "paper"}
    code, out, _ = trader("runs", "show", "latest-backtest", "--orders", "2")
    assert code == 0 and "Decided" in out

    assert trader("backtest", *MONTH, "--max-order-notional", "1000")[0] == 0
    code, out, _ = trader("runs", "compare")
    assert code == 1 and "limits" in out and "differs" in out
    refused = json.loads(trader("runs", "show", "latest-backtest", "--json")[1])["refusals"]
    assert refused and refused[0]["reasons"] and not refused[0]["symbol"].isspace()


def test_a_strategy_that_breaks_fails_the_run_with_cell_and_reason(trader: Trader, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from trader_lib import Strategy\n"
        "class Mine(Strategy):\n"
        "    @property\n"
        "    def warmup(self): return 1\n"
        "    def targets(self, bars): raise ValueError('no idea')\n"
    )
    code, out, err = trader("backtest", "--strategy", "mine.py:Mine", "--start", "2012-01-03")
    assert code == 5 and "failed" in out
    assert "failed in cell" in err and "no idea" in err and "notebook.ipynb" in err and "Traceback" not in err
    (folder,) = (tmp_path / "runs").glob("*Z-*")
    document = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    jsonschema.validate(document, shipped_schema())
    assert document["status"] == "failed" and document["failure"]["error"] == "ValueError"
    assert "Traceback (most recent" not in (folder / "report.html").read_text(encoding="utf-8")


def test_config_masks_secrets_and_names_sources(trader: Trader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APCA_API_KEY_ID", "PKSECRETKEY")
    monkeypatch.setenv("APCA_API_SECRET_KEY", "very-secret-indeed")
    code, out, _ = trader("config", "--profile", "paper", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0 and rows["broker.kind"] == rows["broker.kind"] | {"value": "alpaca", "source": "profile paper"}
    assert rows["broker.key_id"]["source"] == "environment"
    for shown in (out, trader("config")[1]):
        assert "PKSECRETKEY" not in shown and "very-secret" not in shown and "****" in shown


def test_doctor_finds_this_installation_well(trader: Trader) -> None:
    code, out, _ = trader("doctor", "--json")
    assert code == 0, out
    assert {finding["verdict"] for finding in json.loads(out)} == {"ok"}
    assert "sample data" in trader("doctor")[1]


def test_doctor_reports_a_broken_configuration(trader: Trader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRADER_BROKER__KIND", "alpca")
    code, out, _ = trader("doctor", "--json")
    assert code == 3 and json.loads(out)[-1]["verdict"] == "problem"


def test_doctor_names_what_is_missing_or_damaged(trader: Trader, monkeypatch: pytest.MonkeyPatch) -> None:
    import trader_lib.app.doctor as doctor

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(doctor, "importlib", SimpleNamespace(import_module=absent))
    monkeypatch.setattr(doctor, "shipped_schema", dict)
    found = {row["name"]: row for row in json.loads(trader("doctor", "--json")[1])}
    assert "Install ipykernel again" in found["kernel"]["told"]
    assert "Install the package again" in found["templates"]["told"]
    assert found["compiler"]["verdict"] == "problem" and "ImportError" in found["compiler"]["told"]


def test_doctor_looks_at_the_broker_it_would_use(trader: Trader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APCA_API_KEY_ID", "PKSECRETKEY")
    monkeypatch.setenv("APCA_API_SECRET_KEY", "very-secret-indeed")
    found = {row["name"]: row for row in json.loads(trader("doctor", "--profile", "paper", "--offline", "--json")[1])}
    assert found["broker"]["told"].startswith("alpaca, paper") and "PKSECRET" not in str(found)


def test_strategies_are_listed_with_their_parameters(trader: Trader) -> None:
    listed = {row["name"]: row for row in json.loads(trader("strategies", "--json")[1])}
    assert {"sma_cross", "rsi_reversion", "momentum", "vol_target", "pairs", "opening_range"} <= listed.keys()
    assert (listed["pairs"]["decides"], listed["momentum"]["decides"]) == ("step by step", "by weights")
    assert listed["sma_cross"]["parameters"] == {"fast": 20, "slow": 50}
    assert "sma_cross" in trader("strategies")[1]


def test_empty_store_says_how_to_begin(trader: Trader) -> None:
    assert "No runs yet" in trader("runs", "list")[1]
    code, _, err = trader("runs", "compare")
    assert code == 2 and "no backtest run" in err and "trader backtest" in err


def test_a_bug_is_one_sentence_and_shows_more_when_asked(trader: Trader, monkeypatch: pytest.MonkeyPatch) -> None:
    import trader_lib.app.doctor as doctor

    def broken(profile: str | None, **_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(doctor, "diagnose", broken)
    code, _, err = trader("doctor")
    assert code == 1 and "bug in trader_lib: ZeroDivisionError: oh" in err and "Traceback" not in err
    monkeypatch.setenv("TRADER_DEBUG", "1")
    assert "Traceback" in trader("doctor")[2]
    monkeypatch.setattr(doctor, "diagnose", lambda profile, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    assert trader("doctor")[0] == 130


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from trader_lib.app.cli import main; raise SystemExit(main())", *arguments]


def test_help_answers_without_heavy_imports() -> None:
    code = (
        "import sys; from trader_lib.app.cli import main; main(['--help'])\n"
        "heavy = {'pandas', 'vectorbt', 'plotly', 'papermill', 'alpaca', 'IPython'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_drains_a_session_and_leaves_its_report(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRADER_", "APCA_"))}
    process = subprocess.Popen(
        command("paper", "--transport", "in_process", "--start", "2001-01-03", "-p", "fast=2", "-p", "slow=4"),
        cwd=tmp_path,
        env=clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    clock = WallClock()
    deadline = clock.monotonic() + 90
    while clock.monotonic() < deadline and not trading(tmp_path):
        threading.Event().wait(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Stopping" in err and "Stopped as asked" in err and "Traceback" not in err
    (folder,) = (tmp_path / "runs").glob("*Z-*")
    document = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert document["status"] == "interrupted" and document["failure"] is None
    assert document["reconciliation"]["ok"] is True
    assert not [order for order in document["orders"] if order["status"] in ("new", "accepted", "partially_filled")]
    assert (folder / "report.html").exists() and (folder / "journal.sqlite").exists()
    assert "interrupted" in out


def trading(folder: Path) -> bool:
    """Whether the session's journal has grown beyond its opening."""
    return any(path.stat().st_size > 100_000 for path in folder.glob("runs/*/journal.sqlite*"))


def test_the_exchange_says_where_it_listens(trader: Trader) -> None:
    def stop_once_served() -> None:
        pause = threading.Event()
        while not any(thread.name == "exchange-server" for thread in threading.enumerate()):
            pause.wait(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop_once_served, daemon=True).start()
    code, out, _ = trader("exchange", "--symbols", "IBM", "--start", "2012-01-03", "--speed", "stepped")
    assert code == 0 and "Serving IBM at http://127.0.0.1:" in out and "2012-01-03 09:30 in New York" in out
    assert "/simulation/step" in out and "alpaca-py: TradingClient(" in out and "APCA_API_BASE_URL=" in out
    assert "npm" in out


@pytest.mark.parametrize(
    ("option", "words"),
    [(("--speed", "fast"), "60x"), (("--faults", "stormy"), "storm"), (("--quota", "-1"), "0 for none")],
)
def test_an_option_of_the_exchange_that_makes_no_sense_is_refused(
    trader: Trader, option: tuple[str, str], words: str
) -> None:
    code, _, err = trader("exchange", "--symbols", "IBM", *option)
    assert code == 2 and words in err


def test_the_exchange_is_served_alone_until_it_is_stopped(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRADER_", "APCA_"))}
    what = ("--symbols", "IBM", "--start", "2012-01-03", "--end", "2012-01-31", "--speed", "real", "--control")
    process = subprocess.Popen(
        command("exchange", *what, "--json"),
        cwd=tmp_path,
        env=clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    while not lines or lines[-1] != "}\n":
        lines.append(process.stdout.readline())
        assert lines[-1], "the exchange ended before it served"
    served = json.loads("".join(lines))
    keys = {"APCA-API-KEY-ID": served["key_id"], "APCA-API-SECRET-KEY": served["secret_key"]}
    step = requests.post(f"{served['url']}/simulation/advance", headers=keys, timeout=10).json()
    account = requests.get(f"{served['url']}/v2/account", headers=keys, timeout=10).json()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, ""), out
    assert step["bars"] == 1 and float(account["equity"]) == 100_000
