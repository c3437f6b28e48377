"""Alert rules, their unit tests, routing and dashboard: each by its own tool, and against the table of metrics."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from trader_lib.telemetry.metrics import TABLE

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
RULES = sorted((DEPLOY / "prometheus/rules").glob("*.yaml"))
RULE_TESTS = sorted((DEPLOY / "prometheus/tests").glob("*.yaml"))
DASHBOARDS = sorted((DEPLOY / "grafana/dashboards").glob("*.json"))
ALERTMANAGER = DEPLOY / "alertmanager/alertmanager.yml"
RUNBOOK = "https://github.com/trader-lib/trader_lib/blob/main/docs/runbooks/"

ALERTS: list[dict[str, Any]] = [
    rule for file in RULES for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]
]
QUERIES = [
    (f"{board.stem}: {panel['title']}", target["expr"])
    for board in DASHBOARDS
    for panel in json.loads(board.read_text())["panels"]
    for target in panel.get("targets", ())
]
ADDED = {"job", "instance"}  # by the scrape
SUFFIXES = ("_bucket", "_sum", "_count")


def run(*command: str | Path) -> str:
    name = str(command[0])
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed (Debian packages prometheus, prometheus-alertmanager)")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def metrics_of(expression: str) -> dict[str, set[str]]:
    """Metric → the labels by which an expression selects or groups."""
    grouped = {name for inside in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for name in _names(inside)}
    found: dict[str, set[str]] = {}
    for name, selector in re.findall(r"\b(trader_\w+|up\b)(?:\{([^}]*)\})?", expression):
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
        found.setdefault(name, set()).update(labels | grouped)
    return found


def _names(inside: str) -> list[str]:
    return [name.strip() for name in inside.split(",") if name.strip()]


def base_of(name: str) -> tuple[str, set[str]]:
    """The metric in the table, and the labels that its form adds."""
    for suffix in SUFFIXES:
        if name.endswith(suffix) and name.removesuffix(suffix) in TABLE:
            assert TABLE[name.removesuffix(suffix)].kind == "histogram", f"{name} is no histogram"
            return name.removesuffix(suffix), {"le"} if suffix == "_bucket" else set()
    return name, set()


def check(where: str, expression: str) -> None:
    used = metrics_of(expression)
    assert used, f"{where}: {expression} asks for no metric"
    known: set[str] = set(ADDED)
    for name in used:
        if name == "up":
            continue
        base, extra = base_of(name)
        assert base in TABLE, f"{where}: there is no metric {name}"
        known |= set(TABLE[base].labels) | extra
    for name, labels in used.items():
        assert labels <= known, f"{where}: {name} has no label {sorted(labels - known)}"
        if name != "up":
            base, extra = base_of(name)
            selected = set(re.findall(rf"\b{name}\{{([^}}]*)\}}", expression))
            own = {label for inside in selected for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside)}
            assert own <= set(TABLE[base].labels) | extra | ADDED, f"{where}: {name} is not labelled {sorted(own)}"


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_rule_asks_for_metrics_that_a_session_exposes(alert: dict[str, Any]) -> None:
    check(alert["alert"], alert["expr"])


@pytest.mark.parametrize(("where", "expression"), QUERIES, ids=[f"{n}-{where}" for n, (where, _) in enumerate(QUERIES)])
def test_panel_asks_for_metrics_that_a_session_exposes(where: str, expression: str) -> None:
    check(where, expression)


@pytest.mark.parametrize(
    "wrong",
    [
        "trader_orders > 0",
        'trader_orders_total{status="filled"} > 0',
        "sum by (symbol) (trader_equity_usd)",
        "rate(trader_equity_usd_bucket[5m])",
        'trader_equity_usd{state="HALTED"} and trader_trading_state == 1',
    ],
)
def test_check_of_names_can_fail(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check("wrong", wrong)


def test_labels_values_in_rules_are_ones_that_the_table_names() -> None:
    for alert in ALERTS:
        for name, selector in re.findall(r"\b(trader_\w+)\{([^}]*)\}", alert["expr"]):
            for label, values in re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', selector):
                told = TABLE[base_of(name)[0]].labels.get(label, "")
                if label in ("state", "outcome", "stage", "stream"):
                    assert set(values.split("|")) <= set(re.split(r",\s*", told)), f"{alert['alert']}: {label}={values}"


def test_rules_are_valid() -> None:
    assert "SUCCESS" in run("promtool", "check", "rules", *RULES)


def test_rules_fire_and_stay_silent_where_they_should() -> None:
    assert "SUCCESS" in run("promtool", "test", "rules", *RULE_TESTS)


def test_every_rule_is_tried_both_ways() -> None:
    tried: dict[str, set[bool]] = {}
    for file in RULE_TESTS:
        for case in yaml.safe_load(file.read_text())["tests"]:
            for one in case["alert_rule_test"]:
                tried.setdefault(one["alertname"], set()).add(bool(one["exp_alerts"]))
    assert tried == {alert["alert"]: {True, False} for alert in ALERTS}


def test_every_rule_says_how_urgent_it_is_and_where_its_runbook_lies() -> None:
    for alert in ALERTS:
        assert alert["labels"]["severity"] in ("page", "ticket"), alert["alert"]
        url = alert["annotations"]["runbook_url"]
        assert url.startswith(RUNBOOK), alert["alert"]
        assert (ROOT / "docs/runbooks" / url.removeprefix(RUNBOOK)).is_file(), f"{alert['alert']} has no runbook"
    assert len({alert["annotations"]["runbook_url"] for alert in ALERTS}) == len(ALERTS)


def test_queries_of_the_dashboard_are_valid(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m").replace("$instance", ".*")}
        for number, (_, expression) in enumerate(QUERIES)
    ]
    file = tmp_path / "dashboard.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(QUERIES)} rules found" in run("promtool", "check", "rules", file)


def test_dashboard_can_be_provisioned() -> None:
    for file in DASHBOARDS:
        board = json.loads(file.read_text())
        ids = [panel["id"] for panel in board["panels"]]
        assert len(ids) == len(set(ids)) and board["uid"] and "id" not in board
        for panel in board["panels"]:
            place = panel["gridPos"]
            assert place["x"] >= 0 and place["x"] + place["w"] <= 24
        variables = {variable["name"] for variable in board["templating"]["list"]}
        used = set(re.findall(r"\$\{?(\w+)", file.read_text())) - {"__rate_interval", "__all"}
        assert used <= variables


def test_prometheus_configuration_is_valid() -> None:
    run("promtool", "check", "config", "--syntax-only", DEPLOY / "prometheus/prometheus.yml")


def test_pages_and_tickets_go_different_ways() -> None:
    run("amtool", "check-config", ALERTMANAGER)
    for severity, receiver in (("page", "pages"), ("ticket", "tickets")):
        routed = run("amtool", "config", "routes", "test", f"--config.file={ALERTMANAGER}", f"severity={severity}")
        assert receiver in routed.split()
