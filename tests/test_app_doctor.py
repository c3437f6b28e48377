"""The doctor at a broker that answers, one that refuses, one that is not there, and one with another clock."""

import json
import shutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

import trader_lib.app.doctor as doctor
from trader_lib.clock.clock import VirtualClock
from trader_lib.config.settings import load_settings
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.market.sample import sample_bars

Trader = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def server() -> Iterator[ExchangeServer]:
    bars = sample_bars(["AAPL"])
    with ExchangeServer(Exchange(bars, bars.n - 5), key_id="key", secret_key="secret") as running:
        yield running


def told(trader: Trader, *arguments: str) -> dict[str, dict[str, str]]:
    return {row["name"]: row for row in json.loads(trader("doctor", "--profile", "paper", "--json", *arguments)[1])}


def given(server: ExchangeServer, secret: str = "secret") -> dict[str, str]:
    keys = {"TRADER_BROKER__KEY_ID": "key", "TRADER_BROKER__SECRET_KEY": secret}
    addresses = {
        "TRADER_BROKER__TRADING_URL": server.url,
        "TRADER_BROKER__TRADING_STREAM_URL": server.trading_stream_url,
    }
    return keys | {"TRADER_BROKER__KIND": "alpaca"} | addresses


def test_a_clock_that_differs_from_the_brokers_is_a_warning(
    trader: Trader, server: ExchangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given(server).items():
        monkeypatch.setenv(name, value)
    broker = told(trader)["broker"]
    assert broker["verdict"] == "warning" and "ahead of the broker's" in broker["told"]


def test_a_broker_that_takes_the_keys_is_fine(server: ExchangeServer) -> None:
    settings = load_settings(environ=given(server), env_file=None)
    assert "the keys are taken" in doctor.check_broker(settings, VirtualClock(server.exchange.now))


def test_an_account_that_may_not_trade_is_a_warning(server: ExchangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(environ=given(server), env_file=None)
    monkeypatch.setattr(
        "alpaca.trading.client.TradingClient.get_account",
        lambda self: SimpleNamespace(status="ACCOUNT_CLOSED", account_number="PA1"),
    )
    with pytest.raises(doctor.Doubt, match="the account is ACCOUNT_CLOSED"):
        doctor.check_broker(settings, VirtualClock(server.exchange.now))


def test_wrong_keys_and_a_silent_address_are_problems(
    trader: Trader, server: ExchangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given(server, "wrong-secret").items():
        monkeypatch.setenv(name, value)
    refused = told(trader)["broker"]
    assert refused["verdict"] == "problem" and "wrong-secret" not in str(refused)
    monkeypatch.setenv("TRADER_BROKER__TRADING_URL", "http://127.0.0.1:9")
    assert told(trader)["broker"]["verdict"] == "problem"
    assert told(trader, "--offline")["broker"]["told"].endswith("(not tried)")


def test_a_disk_that_is_nearly_full_is_a_warning(trader: Trader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    code, out, _ = trader("doctor", "--json")
    found = {row["name"]: row for row in json.loads(out)}
    assert code == 0 and found["disk"]["verdict"] == "warning" and "Only 5 MB" in found["disk"]["told"]
