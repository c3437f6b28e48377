"""Real parts for tests: bars that were traded, the embedded exchange, and its server on a free port."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from loguru import logger

from tests.browser import launched
from tests.servers import PostgresServer, RedisServer
from trader_lib.app.cli import main
from trader_lib.broker.connection import AlpacaAccess
from trader_lib.config.sections import ResilienceSettings
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.market.bars import Bars
from trader_lib.market.sample import sample_bars

# Where a failure holds up somebody else's change, the same examples are tried every time; at home, new ones.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("home", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "home")

os.environ.setdefault("TRADER_RUNS__TRIALS", "false")  # what tests try is no trial of a strategy
KEY_ID, SECRET_KEY = "test-key", "test-secret"


@pytest.fixture
def quiet() -> Iterator[None]:
    """No log lines of the library's own, which would fill what a failing test shows."""
    logger.disable("trader_lib")
    yield
    logger.enable("trader_lib")


@pytest.fixture(scope="session")
def daily_bars() -> Bars:
    """Three symbols' days of January and February 2012."""
    return sample_bars(["AAPL", "IBM", "MSFT"], start="2012-01-03", end="2012-02-29")


@pytest.fixture
def exchange(daily_bars: Bars) -> Exchange:
    """An exchange that knows five days and has not played one."""
    return Exchange(daily_bars, start_index=5)


@pytest.fixture
def exchange_server(exchange: Exchange) -> Iterator[ExchangeServer]:
    """The exchange behind Alpaca's protocol on loopback; look inside through `exchange_server.call`."""
    with ExchangeServer(exchange, key_id=KEY_ID, secret_key=SECRET_KEY) as server:
        yield server


@pytest.fixture
def alpaca_access(exchange_server: ExchangeServer) -> AlpacaAccess:
    """Addresses and keys of the server, as the alpaca-py adapter takes them."""
    return AlpacaAccess(
        key_id=KEY_ID,
        secret_key=SECRET_KEY,
        trading_url=exchange_server.url,
        data_url=exchange_server.url,
        trading_stream_url=exchange_server.trading_stream_url,
        data_stream_url=exchange_server.data_stream_url,
        resilience=ResilienceSettings(reads_timeout_s=5.0, orders_timeout_s=5.0, reads_attempts=2).for_simulation(),
    )


@pytest.fixture
def trader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in an empty folder without any configuration: exit code, standard output, standard error."""
    for name in list(os.environ):
        if name.startswith(("TRADER_", "APCA_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis on a free port that keeps nothing; the test is skipped where there is none."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL on a free port over a new cluster; the test is skipped where there is none."""
    server = PostgresServer()
    yield server
    server.stop()


@pytest.fixture
def chromium() -> Iterator[Any]:
    """A browser in which a page may try what it likes."""
    yield from launched()
