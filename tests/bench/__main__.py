"""Measure import, engines, sessions, order path, journal, cache and being watched, each beside a floor or a peer.

Machines are noisy: read the ratios. Nothing here is a test; a figure that worsens is a question, not a failure.
Example: python -m tests.bench --json bench.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

from alpaca.trading.client import TradingClient
from loguru import logger

from tests.bench.recovering import recovering
from tests.bench.scaling import scaling
from tests.bench.streaming import streaming
from tests.bench.sweeping import sweeping
from tests.bench.watching import watching
from tests.bench.workers import workers
from trader_lib.agents.execution import ExecutionAgent
from trader_lib.agents.monitor import MonitorAgent
from trader_lib.agents.portfolio import PortfolioAgent
from trader_lib.agents.risk import RiskAgent
from trader_lib.broker.alpaca import AlpacaBroker
from trader_lib.broker.connection import AlpacaAccess
from trader_lib.broker.simulation import HttpSimulation
from trader_lib.broker.translation import order_to_alpaca
from trader_lib.bus.bus import InProcessBus
from trader_lib.clock.clock import WallClock
from trader_lib.clock.ids import UniqueIds
from trader_lib.config.sections import LoggingSettings, ResilienceSettings
from trader_lib.exchange.engine import Exchange
from trader_lib.exchange.server import ExchangeServer
from trader_lib.journal.journal import SqliteJournal
from trader_lib.market.bars import Bars
from trader_lib.risk.limits import Limits
from trader_lib.session.drivers import Gateway
from trader_lib.telemetry.log import bind_session, configure_logging
from trader_lib.trading.events import BarRow, BarsClosed, CancelProposed, Event, OrderProposed
from trader_lib.trading.orders import Order, OrderRequest, OrderSide, OrderType


class Row(NamedTuple):
    what: str
    figure: float
    unit: str
    against: str
    ratio: float | None


def median_s(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of several calls after one that does not count."""
    call()
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def importing() -> list[Row]:
    """`import trader_lib` in a fresh interpreter, beside one that imports nothing and one that imports pandas."""

    def fresh(code: str) -> float:
        return median_s(lambda: subprocess.run([sys.executable, "-c", code], check=True), 9)

    bare = fresh("pass")
    ours, pandas = fresh("import trader_lib") - bare, fresh("import pandas") - bare
    return [
        Row("import trader_lib", ours * 1e3, "ms", "", None),
        Row("import pandas", pandas * 1e3, "ms", "import trader_lib", pandas / max(ours, 1e-6)),
    ]


def engines(bars_wanted: int) -> list[Row]:
    """One SMA crossover over synthetic one-minute bars: the whole backtest, and vectorbt's from_signals."""
    import numpy as np
    import pandas as pd
    import vectorbt as vbt

    from trader_lib import SmaCross, backtest, synthetic_bars

    years = bars_wanted / (252 * 390)
    bars: Bars = synthetic_bars(["SYN"], date(2010, 1, 4), date(2010 + int(years) + 1, 12, 31), "1Min", seed=1)
    bars = bars.head(min(bars_wanted, bars.n))
    strategy = SmaCross(fast=10, slow=50)
    whole = median_s(lambda: backtest(strategy, bars), 3)
    close = pd.Series(bars.close[:, 0])
    opens = pd.Series(bars.open[:, 0])

    def peer() -> object:
        fast, slow = close.rolling(10).mean(), close.rolling(50).mean()
        up = (fast > slow).to_numpy()
        enter = np.concatenate([[False], up[:-1] & ~np.concatenate([[False], up[:-2]])])
        leave = np.concatenate([[False], ~up[:-1] & np.concatenate([[False], up[:-2]])])
        return vbt.Portfolio.from_signals(close, enter, leave, price=opens, init_cash=100_000).total_return()

    theirs = median_s(peer, 3)
    per_bar = 1e9 / bars.n
    return [
        Row(f"backtest, {bars.n:,} one-minute bars", whole * per_bar, "ns a bar", "", None),
        Row("vectorbt from_signals, the same crossover", theirs * per_bar, "ns a bar", "backtest", theirs / whole),
    ]


def sessions() -> list[Row]:
    """A session of agents over a year of daily bars, by transport, beside the same backtest."""
    from trader_lib import SessionSpec, SmaCross, backtest, load_settings, run_session, sample_bars

    symbols = ["AAPL", "IBM", "MSFT"]
    spec = SessionSpec.model_validate(
        {"strategy": "sma_cross", "symbols": symbols, "start": "2007-01-03", "end": "2007-12-31"}
    )
    bars = sample_bars(symbols)
    floor = median_s(lambda: backtest(SmaCross(), bars, start="2007-01-03", end="2007-12-31").order_list_hash, 3)
    rows = []
    for transport in ("in_process", "http"):
        settings = load_settings(overrides={"broker": {"kind": "simulated", "transport": transport}}, env_file=None)
        took = median_s(lambda settings=settings: asyncio.run(run_session(spec, settings)), 3)
        rows.append(Row(f"session, {transport}", took / 251 * 1e3, "ms a bar", "backtest", took / floor))
    return rows


class StampedBroker:
    """The alpaca-py adapter, and when its last submission returned."""

    def __init__(self, broker: AlpacaBroker) -> None:
        self._broker = broker
        self.returned = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broker, name)

    async def submit(self, request: OrderRequest) -> Order:
        order = await self._broker.submit(request)
        self.returned = time.perf_counter()
        return order


ORDERS = 150  # of each kind, in turns
WARM_UP = 20  # turns that do not count
DAYS = {"start": "2012-01-03", "end": "2012-02-29"}


def _bars() -> Bars:
    from trader_lib import sample_bars

    return sample_bars(["AAPL", "IBM", "MSFT"], **DAYS)


def serve_exchange() -> None:
    """Serve the embedded exchange in a process of its own until stdin ends; its addresses go to stdout."""
    logger.remove()
    with ExchangeServer(Exchange(_bars(), start_index=5), key_id="bench", secret_key="bench") as server:
        print(server.url, server.trading_stream_url, server.data_stream_url, flush=True)
        sys.stdin.read()


@contextmanager
def exchange_elsewhere() -> Iterator[AlpacaAccess]:
    """The embedded exchange behind its HTTP and websocket server, in another process, as a broker is."""
    code = "from tests.bench.__main__ import serve_exchange; serve_exchange()"
    server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None
    try:
        url, trading_stream, data_stream = server.stdout.readline().split()
        yield AlpacaAccess(
            key_id="bench",
            secret_key="bench",
            trading_url=url,
            data_url=url,
            trading_stream_url=trading_stream,
            data_stream_url=data_stream,
            resilience=ResilienceSettings().for_simulation(),
        )
    finally:
        server.stdin.close()
        server.wait(10)


async def _order_path(folder: Path) -> dict[str, list[float]]:
    """Seconds an order took: by alpaca-py alone, and from the decision through risk and journal to the answer."""
    bars, limits = _bars(), Limits(max_orders=100_000)
    took: dict[str, list[float]] = {"alone": [], "disk": [], "process": [], "power": []}
    with exchange_elsewhere() as access:
        adapter = AlpacaBroker(access, symbols=bars.symbols, timeframe="1Day")
        await adapter.start()
        control = HttpSimulation(access.trading_url or "", "bench", "bench")
        step = await control.advance()
        client = TradingClient("bench", "bench", url_override=access.trading_url)  # as alpaca-py comes
        clock = WallClock()
        broker = StampedBroker(adapter)
        pipes = {}
        for durability in ("process", "power"):
            journal = SqliteJournal(folder / f"{durability}.sqlite", durability)
            bus = InProcessBus(clock, UniqueIds(), journal, "bench")
            agents = (  # as in a session
                MonitorAgent(bus, clock),
                PortfolioAgent(bus, clock),
                ExecutionAgent(bus, clock, broker, journal.commit),
                RiskAgent(bus, clock, limits, bars.head(5)),
            )
            for agent in agents:
                await agent.start()
            Gateway(bus, broker, UniqueIds()).start()
            rows = {symbol: BarRow(**values._asdict()) for symbol, values in bars.rows(5).items()}
            said = {"source": "bench", "correlation_id": "bench"}
            await bus.publish(await adapter.account(), **said)
            await bus.publish(BarsClosed(at=step.bar_at, closed_at=step.closed_at, bars=rows), **said)
            await bus.idle()
            pipes[durability] = (bus, journal, agents)
        for turn in range(ORDERS + WARM_UP):
            for kind in sorted(took, reverse=bool(turn % 2)):
                name = f"{kind}-{turn}"
                request = OrderRequest(
                    symbol="IBM",
                    side=OrderSide.BUY,
                    qty=Decimal(1),
                    type=OrderType.LIMIT,
                    limit_price=Decimal(100) + turn * Decimal("0.01"),  # never the same order twice
                    client_order_id=name,
                )
                began = time.perf_counter()
                if kind == "disk":
                    with (folder / "synced").open("ab") as file:
                        began = time.perf_counter()
                        file.write(bytes(4096))
                        file.flush()
                        os.fsync(file.fileno())
                        took[kind].append(time.perf_counter() - began)
                elif kind == "alone":
                    order = client.submit_order(order_to_alpaca(request))
                    took[kind].append(time.perf_counter() - began)
                    client.cancel_order_by_id(order.id)
                else:
                    bus, journal, _ = pipes[kind]
                    proposal = OrderProposed(request=request, reference_price=180.0, decided_at=step.bar_at)
                    await bus.publish(proposal, source="strategy", correlation_id=name)
                    await bus.idle()
                    took[kind].append(broker.returned - began)
                    cancel = CancelProposed(client_order_id=name, reason="bench", decided_at=step.bar_at)
                    await bus.publish(cancel, source="strategy", correlation_id=name)
                    await bus.idle()
                    for _ in range(2):  # as a session's driver does, every second at least
                        journal.commit()
                await adapter.inbox.pump()
        for bus, journal, agents in pipes.values():
            for agent in agents:
                await agent.stop()
            await bus.close()
            journal.close()
        await control.stop()
        await adapter.stop()
    return {kind: seconds[WARM_UP:] for kind, seconds in took.items()}


def order_path() -> list[Row]:
    """Decision to wire and back, beside alpaca-py's own submit_order to the same server, and the disk, in turns."""
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        configure_logging(LoggingSettings(terminal="off"), log, ["the key's secret"])
        with bind_session("bench"):
            took = asyncio.run(_order_path(Path(folder)))
        logger.remove()
        sent = [json.loads(line) for line in log.read_text().splitlines()]
        assert sum(row["message"].startswith("Sent: ") for row in sent) == 2 * (ORDERS + WARM_UP)
    rows = []
    for kind, seconds in took.items():
        assert min(seconds) > 0.0, f"an order of {kind} was not sent"
        floors = {"alone": "alpaca-py submit_order", "disk": "4 KiB written and synced"}
        label = floors.get(kind, f"decision to wire, journal {kind}")
        for share in (50, 99):
            figure = _percentile(seconds, share)
            ratio = None if kind in floors else figure / _percentile(took["alone"], share)
            rows.append(Row(f"{label}, p{share}", figure * 1e3, "ms", "alpaca-py", ratio))
    return rows


def _percentile(seconds: list[float], share: int) -> float:
    return statistics.quantiles(seconds, n=100)[share - 1]


def journal_throughput() -> list[Row]:
    """Events a second into the journal: a commit for each, and for every hundred."""
    rows = []
    at = datetime(2012, 1, 3, 5, tzinfo=UTC)
    row = BarRow(open=1.0, high=2.0, low=0.5, close=1.5, volume=100.0)
    payload = BarsClosed(at=at, closed_at=at, bars={"AAPL": row, "IBM": row, "MSFT": row})
    for durability in ("process", "power"):
        for batch, count in ((1, 2_000), (100, 10_000)):
            with TemporaryDirectory() as folder, SqliteJournal(Path(folder) / "j.sqlite", durability) as journal:
                began = time.perf_counter()
                for seq in range(1, count + 1):
                    journal.append(
                        Event(
                            id=str(seq),
                            seq=seq,
                            time=at,
                            recorded_at=at,
                            correlation_id="c",
                            source="bench",
                            session_id="bench",
                            payload=payload,
                        )
                    )
                    if seq % batch == 0:
                        journal.commit()
                took = time.perf_counter() - began
            rows.append(Row(f"journal {durability}, commit every {batch}", count / took, "events/s", "", None))
    return rows


EVENTS = 1_000_000
BARS = int(os.environ.get("BENCH_BARS", "20000"))  # of `minutes`


def calls_saved() -> list[Row]:
    """Calls that the adapter's cache answered in a session over HTTP."""
    from trader_lib import SessionSpec, load_settings, run_session

    seen = []
    stop = AlpacaBroker.stop

    async def watched(broker: AlpacaBroker) -> None:
        seen.append(broker.cache.stats())
        await stop(broker)

    spec = SessionSpec.model_validate(
        {"strategy": "sma_cross", "symbols": ["AAPL", "IBM", "MSFT"], "start": "2007-01-03", "end": "2007-12-31"}
    )
    settings = load_settings(overrides={"broker": {"kind": "simulated", "transport": "http"}}, env_file=None)
    with patch.object(AlpacaBroker, "stop", watched):
        asyncio.run(run_session(spec, settings))
    saved, asked = seen[0].saved, seen[0].saved + seen[0].misses
    return [
        Row("account, positions, assets, clock: asked", float(asked), "calls", "", None),
        Row("of these saved by the cache", float(saved), "calls", "asked", saved / asked),
    ]


PARTS = {
    "import": importing,
    "engines": lambda: engines(1_000_000),
    "sessions": sessions,
    "minutes": lambda: streaming(Row, BARS),
    "orders": order_path,
    "journal": journal_throughput,
    "cache": calls_saved,
    "recovery": lambda: recovering(Row, EVENTS),
    "watching": lambda: watching(Row),
    "sweeping": lambda: sweeping(Row),
    "workers": lambda: workers(Row),
    "scaling": lambda: scaling(Row),
}

LONG = {"recovery"}  # takes minutes, and runs when it is named


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", choices=[*PARTS, []], help="only these parts")
    parser.add_argument("--json", type=Path, help="write the figures to a file too")
    chosen = parser.parse_args()
    logger.remove()  # sessions speak to the terminal; the table is what is wanted
    asked = chosen.part or [name for name in PARTS if name not in LONG]
    rows = [row for name in asked for row in PARTS[name]()]
    for row in rows:
        beside = f"{row.ratio:8.1f} × {row.against}" if row.ratio is not None else ""
        print(f"{row.what:<50}{row.figure:>12.2f} {row.unit:<10}{beside}")
    if chosen.json:
        chosen.json.write_text(json.dumps([row._asdict() for row in rows], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
