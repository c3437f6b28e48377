"""A real Prometheus scrapes what a real session exposed: every panel shows something, and no rule fires."""

import asyncio
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.observed import observed_session, observed_settings

ROOT = Path(__file__).parent.parent
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/trader.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
# What a session in good order over the embedded exchange has no occasion to show.
EMPTY = {
    "Agents that are not well",
    "Circuit breakers that are not closed",
    "Rate limit: calls left",
    "Refusals of risk by check",
}
EMPTY_QUERIES = ("trader_companion_failures_total",)
WAIT_S = 30.0


class Prometheus:
    """Prometheus with our rules over one target."""

    def __init__(self, folder: Path, target: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(ROOT / "deploy/prometheus/rules/*.yaml")]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{target}"]}]
        del config["alerting"]
        file = folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        self.url = f"http://127.0.0.1:{port}/api/v1"
        self.process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={file}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def ask(self, path: str, **parameters: str) -> Any:
        answer = requests.get(f"{self.url}/{path}", params=parameters, timeout=5)
        assert answer.ok, answer.text
        return answer.json()["data"]

    def has(self, expression: str) -> list[Any]:
        found: list[Any] = self.ask("query", query=expression)["result"]
        return found

    def wait_for(self, expression: str) -> None:
        ends = time.monotonic() + WAIT_S
        while time.monotonic() < ends:
            try:
                if self.has(expression):
                    return
            except (requests.RequestException, AssertionError):
                pass
            time.sleep(0.2)
        raise AssertionError(f"{expression} did not come to be within {WAIT_S} s")


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian package prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    _, seen = asyncio.run(observed_session(folder, observed_settings("http")))
    scrape = seen.answers["metrics"]

    class Target(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", scrape.headers["Content-Type"])
            self.end_headers()
            self.wfile.write(scrape.content)

        def log_message(self, *_: object) -> None:
            pass

    target = ThreadingHTTPServer(("127.0.0.1", 0), Target)
    threading.Thread(target=target.serve_forever, daemon=True).start()
    server = Prometheus(folder, target.server_port)
    try:
        server.wait_for("count_over_time(trader_equity_usd[1m]) > 2")
        yield server
    finally:
        server.process.terminate()
        server.process.wait(timeout=30)
        target.shutdown()
        target.server_close()


@pytest.mark.parametrize(("title", "expression"), QUERIES, ids=[f"{n}-{title}" for n, (title, _) in enumerate(QUERIES)])
def test_panel_shows_what_a_session_exposes(prometheus: Prometheus, title: str, expression: str) -> None:
    found = prometheus.has(expression.replace("$__rate_interval", "1m").replace("$instance", ".*"))
    if title in EMPTY or any(name in expression for name in EMPTY_QUERIES):
        assert not found, "something is to be seen that a good session does not show"
    else:
        assert found, "an empty panel"


def test_no_rule_fires_over_a_session_in_good_order(prometheus: Prometheus) -> None:
    (group,) = prometheus.ask("rules")["groups"]
    for rule in group["rules"]:
        assert rule["health"] == "ok", f"{rule['name']}: {rule.get('lastError')}"
        assert rule["state"] == "inactive", rule["name"]
    assert len(group["rules"]) == 21


def test_variable_of_the_dashboard_finds_the_session(prometheus: Prometheus) -> None:
    (instance,) = [one for one in DASHBOARD["templating"]["list"] if one["name"] == "instance"]
    assert instance["query"] == "label_values(trader_session_running, instance)"
    assert len(prometheus.has("trader_session_running")) == 1
