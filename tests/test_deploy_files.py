"""Image, compose, Kubernetes, systemd: each checked by its own tool or schema, and against the library's settings."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose

from trader_lib.app.cli import app
from trader_lib.config.settings import ALIASES, PREFIX, SECRETS_DIR, SETTING_NAMES, load_settings

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
OVERLAYS = sorted(path.parent for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
VARIABLES = {PREFIX + name.replace(".", "__").upper() for name in SETTING_NAMES} | set(ALIASES) | {SECRETS_DIR}
FILES = [
    path
    for path in [ROOT / "Dockerfile", ROOT / ".dockerignore", *sorted(DEPLOY.rglob("*"))]
    if path.is_file() and (path.parent.name != "secrets" or path.name in ("README.md", ".gitignore"))
]


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str | Path, **more: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_variable_is_a_setting(file: Path) -> None:
    named = set(re.findall(rf"\b{PREFIX}[A-Z0-9_]*[A-Z0-9]\b", file.read_text(encoding="utf-8")))
    named -= {"TRADER_TAG"}  # of the image, read by compose
    named = {name.removesuffix("_FILE") if name not in VARIABLES else name for name in named}
    assert named <= VARIABLES, f"{file.name} sets what nothing reads: {sorted(named - VARIABLES)}"


def test_values_that_are_deployed_are_ones_that_the_settings_take() -> None:
    image = dict(re.findall(rf"({PREFIX}[A-Z_]+)=(\S+)", (ROOT / "Dockerfile").read_text()))
    config = yaml.safe_load((KUBERNETES / "base/configmap.yaml").read_text())["data"]
    keys = {"TRADER_BROKER__KEY_ID": "key", "TRADER_BROKER__SECRET_KEY": "secret"}
    limits = {"TRADER_RISK__MAX_DAILY_LOSS": "0.02", "TRADER_RISK__MAX_ORDER_NOTIONAL": "5000"}
    given = {name: value for name, value in (image | config | keys | limits).items() if name != SECRETS_DIR}
    settings = load_settings(environ=given, env_file=None)
    assert settings.profile == "paper" and settings.monitoring.port == 8080
    overlay = yaml.safe_load((KUBERNETES / "overlays/paper/kustomization.yaml").read_text())
    assert {f"{name}={value}" for name, value in limits.items()} == set(overlay["configMapGenerator"][0]["literals"])


# --- image


def test_dockerfile_has_nothing_to_complain_about() -> None:
    run(tool("hadolint"), ROOT / "Dockerfile")


def test_image_runs_without_privileges_and_says_how_it_is() -> None:
    text = (ROOT / "Dockerfile").read_text()
    last = text[text.rindex("\nFROM ") :]
    assert text.count("\nFROM ") == 2 and "-slim" in last
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE)
    assert "/healthz" in last[last.index("HEALTHCHECK") :]
    assert "pip install" not in last, "what builds stays in the first stage"
    assert text.count("pip install") == text.count("--constraint constraints.txt")


def test_what_the_image_is_made_of_is_let_through_and_nothing_else() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]

    def let_through(path: str) -> bool:
        kept = True
        for rule in rules:
            pattern = rule.removeprefix("!").removeprefix("**/")
            if fnmatch(path, pattern) or path.startswith(f"{pattern}/") or fnmatch(path.rpartition("/")[2], pattern):
                kept = rule.startswith("!")
        return kept

    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for source in " ".join(copied).split():
        assert (ROOT / source).exists() and let_through(source), source
    for secret in (".env", "deploy/secrets/alpaca_key_id", "runs/x/journal.sqlite", ".git/config", "tests/conftest.py"):
        assert not let_through(secret), secret


# --- compose


def filled(text: str) -> str:
    """With the default of each variable."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def composed() -> dict[str, Any]:
    """compose.yaml with what compose.scale.yaml adds, its variables left open."""
    base, more = (yaml.safe_load((DEPLOY / name).read_text()) for name in ("compose.yaml", "compose.scale.yaml"))
    session = base["services"]["session"]
    session["environment"] |= more["services"]["session"]["environment"]
    session["secrets"] = [*session["secrets"], *more["services"]["session"]["secrets"]]
    for part in ("services", "volumes", "secrets"):
        base[part] = more[part] | base[part]
    return base


@pytest.mark.parametrize("name", ["compose.yaml", "compose.scale.yaml"])
def test_compose_file_follows_the_specification(name: str) -> None:
    PyCompose.from_json(json.dumps(yaml.safe_load(filled((DEPLOY / name).read_text()))))


def test_check_of_compose_files_can_fail() -> None:
    with pytest.raises(ValueError, match=r"restrat|unknown"):
        PyCompose.from_json('{"services": {"session": {"image": "trader", "restrat": "always"}}}')


def test_compose_names_only_what_it_declares() -> None:
    whole = composed()
    for name, service in whole["services"].items():
        for secret in service.get("secrets", ()):
            assert (secret["source"] if isinstance(secret, dict) else secret) in whole["secrets"], name
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in whole["volumes"] or (DEPLOY / source).exists(), f"{name} mounts {source}"
        assert set(service.get("depends_on", ())) <= set(whole["services"])
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name} is open to the network"
        ours = name in ("session", "schedule", "agents")
        assert ours or re.search(r":v?\d", service["image"]), f"{name} is not pinned"
    needed = {"session", "redis", "postgres", "prometheus", "grafana", "collector"}
    assert needed <= set(whole["services"])
    listed = (DEPLOY / "secrets/README.md").read_text()
    for secret in whole["secrets"].values():
        assert f"`{Path(secret['file']).name}`" in listed


def test_secrets_reach_the_session_as_files_that_the_settings_read(tmp_path: Path) -> None:
    values = {
        "TRADER_BROKER__KEY_ID": "key",
        "TRADER_BROKER__SECRET_KEY": "secret",
        "TRADER_MONITORING__TOKEN": "a-token-that-is-long-enough",
        "TRADER_NOTIFY__WEBHOOK_URL": "https://hooks.example.com/T/B",
        "TRADER_JOURNAL__URL": "postgresql://trader:word@postgres/trader",
    }
    session = composed()["services"]["session"]
    targets = {secret["target"] for secret in session["secrets"]}
    assert targets == set(values)
    for name in targets:
        (tmp_path / name).write_text(values[name])
        (tmp_path / name).chmod(0o400)
    environ = {name: value for name, value in session["environment"].items() if "${" not in value}
    settings = load_settings(environ=environ | {SECRETS_DIR: str(tmp_path)}, env_file=None)
    assert settings.notify.is_on and settings.journal.url is not None and settings.bus.url is not None
    keys = yaml.safe_load((KUBERNETES / "overlays/paper/secret.example.yaml").read_text())["stringData"]
    assert set(keys) <= targets


# --- Kubernetes


def built(overlay: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(run(tool("kubectl"), "kustomize", overlay)))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_overlay_builds_what_kubernetes_takes(overlay: Path) -> None:
    found = built(overlay)
    for one in found:
        kubernetes_validate.validate(one, "1.32", strict=True)
    kinds = {one["kind"] for one in found}
    assert {
        "Deployment",
        "CronJob",
        "ConfigMap",
        "PersistentVolumeClaim",
        "NetworkPolicy",
        "PodDisruptionBudget",
    } <= kinds
    assert "Secret" not in kinds, "no secret in git"


def manifests() -> Iterator[dict[str, Any]]:
    for file in sorted(KUBERNETES.rglob("*.yaml")):
        if file.name != "kustomization.yaml" and "overlays" not in file.parts:
            yield from yaml.safe_load_all(file.read_text())
    yield yaml.safe_load((KUBERNETES / "overlays/paper/secret.example.yaml").read_text())


@pytest.mark.parametrize("manifest", list(manifests()), ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_manifest_follows_the_schema(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, "1.32", strict=True)


def test_check_of_manifests_can_fail() -> None:
    wrong = {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": "x"},
        "spec": {"maxUnavail": 0},
    }
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.32", strict=True)


def test_two_sessions_never_run_at_once_and_no_pod_has_more_rights_than_it_needs() -> None:
    by_kind = {one["kind"]: one for one in manifests()}
    deployment = by_kind["Deployment"]["spec"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    pods = [deployment["template"]["spec"], by_kind["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        (container,) = pod["containers"]
        rights = container["securityContext"]
        assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
        assert rights["capabilities"] == {"drop": ["ALL"]}
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    (session,) = pods[0]["containers"]
    assert {session[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness")} == {"/healthz"}
    assert session["readinessProbe"]["httpGet"]["path"] == "/readyz"


# --- systemd


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_unit_is_valid_and_hardened(unit: Path, tmp_path: Path) -> None:
    """With /bin/true in place of what is installed on the real machine."""
    text = re.sub(r"^(ExecStart(?:Pre)?=)\S+", r"\1/bin/true", unit.read_text(), flags=re.MULTILINE)
    (tmp_path / unit.name).write_text(text)
    analyze = tool("systemd-analyze")
    done = subprocess.run([analyze, "verify", tmp_path / unit.name], capture_output=True, text=True)
    assert done.returncode == 0 and unit.name not in done.stderr, done.stderr
    said = run(analyze, "security", "--offline=true", tmp_path / unit.name)
    exposure = re.search(r"Overall exposure level for \S+ (\d+\.\d)", said)
    assert exposure is not None and float(exposure[1]) < 3.0, said[-200:]


# --- the commands in all of them


def commands() -> list[tuple[str, list[str]]]:
    compose = composed()["services"]
    words = [filled(word) for word in compose["session"]["command"]]
    found = [("compose session", ["paper", *words])]
    found += [(f"compose {name}", compose[name]["command"]) for name in ("schedule", "agents")]
    for one in manifests():
        if one["kind"] == "Deployment":
            found.append(("Deployment", ["paper", *one["spec"]["template"]["spec"]["containers"][0]["args"]]))
        if one["kind"] == "CronJob":
            pod = one["spec"]["jobTemplate"]["spec"]["template"]["spec"]
            found.append(("CronJob", pod["containers"][0]["args"]))
    patch = yaml.safe_load((KUBERNETES / "overlays/paper/session.yaml").read_text())
    found.append(("overlay", ["paper", *patch["spec"]["template"]["spec"]["containers"][0]["args"]]))
    for unit in UNITS:
        text = unit.read_text()
        arguments = re.search(r'"SESSION_ARGS=(.*)"', text)
        for line in re.findall(r"^ExecStart(?:Pre)?=\S*/(trader.*)$", text, re.MULTILINE):
            words = line.replace("$SESSION_ARGS", arguments[1] if arguments else "").split()
            found.append((unit.stem, ["paper", *words[1:]] if words[0] == "trader-session" else words[1:]))
    return found


@pytest.mark.parametrize(("where", "words"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_command_is_one_that_exists(where: str, words: list[str]) -> None:
    app.parse_args(words, exit_on_error=False, print_error=False)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ('{"condition": "dead"}', "paper --resume latest-paper"),
        ('{"condition": "ended"}', "paper --broker alpaca"),
        ("", "paper --broker alpaca"),
    ],
    ids=["dead", "ended", "none"],
)
def test_session_goes_on_where_it_died_and_begins_anew_otherwise(tmp_path: Path, status: str, expected: str) -> None:
    """With a `trader` that says how the latest session is, and what it was called with."""
    fake = tmp_path / "trader"
    fake.write_text(f"#!/bin/sh\n[ \"$1\" = status ] && {{ printf '%s' '{status}'; exit 7; }}\necho \"$@\"\n")
    fake.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = run(tool("sh"), DEPLOY / "session.sh", "--broker", "alpaca", env=environ)
    assert said.strip() == expected
    trusting = run(
        tool("sh"), DEPLOY / "session.sh", "--broker", "alpaca", env=environ | {"SESSION_TRUST": "sha256:ab"}
    )
    assert trusting.strip() == expected + (" --trust=sha256:ab" if "--resume" in expected else "")


@pytest.mark.parametrize("jobs", sorted(DEPLOY.rglob("jobs.toml")), ids=lambda path: path.parent.name)
def test_jobs_are_ones_that_the_scheduler_takes(trader: Callable[..., tuple[int, str, str]], jobs: Path) -> None:
    code, out, err = trader("schedule", "check", str(jobs))
    assert code == 0 and "review" in out, err


def test_yaml_is_tidy() -> None:
    rules = "{extends: relaxed, rules: {line-length: {max: 130}, key-duplicates: enable, indentation: {spaces: 2}}}"
    files = [file for file in FILES if file.suffix in (".yaml", ".yml")]
    run(tool("yamllint"), "--strict", "-d", rules, *files)


def test_links_of_the_guide_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "docs/deploy.md").read_text(encoding="utf-8")):
        assert (ROOT / "docs" / target).exists(), target
