"""What ties the settings to the files and rooms around them."""

import ast
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import trader_lib
from trader_lib.config.example import example_env
from trader_lib.config.sections import RiskSettings
from trader_lib.config.settings import SETTING_NAMES, explain, load_settings
from trader_lib.errors.taxonomy import Misconfigured

ROOT = Path(__file__).parent.parent
KEYS = {"APCA_API_KEY_ID": "PK-EXAMPLE", "APCA_API_SECRET_KEY": "s3cret"}


def test_env_example_documents_every_setting_as_it_is():
    assert (ROOT / ".env.example").read_text(encoding="utf-8") == example_env(), (
        "write it anew: python -c 'from trader_lib.config.example import example_env; print(example_env(), end=\"\")'"
        " > .env.example"
    )
    for name in SETTING_NAMES:
        assert f"#TRADER_{name.replace('.', '__').upper()}=" in example_env()
    assert "# None\n" not in example_env(), "a setting has no description"


@pytest.mark.parametrize("profile", ["research", "paper", "live"])
def test_packaged_profiles_load(profile):
    settings = load_settings(profile, environ=KEYS, env_file=None)
    assert settings.profile == profile
    assert (files("trader_lib.config") / "profiles" / f"{profile}.toml").is_file()


@pytest.mark.parametrize("profile", ["paper", "live"])
def test_profiles_for_alpaca_ask_for_keys(profile):
    with pytest.raises(Misconfigured, match="2 problems") as caught:
        load_settings(profile, environ={}, env_file=None)
    assert caught.value.exit_code == 3
    assert len(caught.value.context["problems"]) == 2


def test_risk_settings_are_the_risk_rooms_limits():
    limits = pytest.importorskip("trader_lib.risk.limits").Limits
    assert list(RiskSettings.model_fields) == list(limits.model_fields)
    assert RiskSettings().model_dump() == limits().model_dump()


def test_process_environment_and_dot_env_of_the_working_folder_are_read(tmp_path):
    (tmp_path / ".env").write_text("TRADER_BUS__QUEUE_MAX=7\nTRADER_BUS__PUT_TIMEOUT_S=2\n", encoding="utf-8")
    code = "from trader_lib.config.settings import load_settings; print(load_settings().bus.model_dump())"
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("TRADER_", "APCA_"))}
    environ |= {"TRADER_BUS__QUEUE_MAX": "9", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.stdout.strip() == "{'queue_max': 9, 'put_timeout_s': 2.0, 'url': None}", done.stderr


def test_nobody_else_reads_the_environment():
    package = Path(trader_lib.__file__).parent
    excused = {
        "runs/kernel.py",  # pass it on to the process that they start, without looking into it
        "runs/runner.py",
        "session/agent_process.py",
        "session/permit.py",  # the number of a descriptor that it inherits, which is no setting
        "strategy/fresh.py",  # pass it on to the process that asks a strategy anew
        "strategy/trust.py",  # what a kernel may run, from the process that started it; no setting either
        "telemetry/progress.py",  # whether to draw a bar, asked before settings are loaded
        "app/cli.py",  # asks for TRADER_DEBUG when settings could not be loaded
    }
    readers = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {node.attr} if isinstance(node, ast.Attribute) else set()
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                names = {alias.name for alias in node.names}
            if names & {"environ", "getenv"}:
                readers.add(path.relative_to(package).as_posix())
    assert readers - excused == {"config/settings.py"}


def test_no_message_and_no_explanation_shows_a_key():
    settings = load_settings("paper", environ=KEYS, env_file=None)
    shown = f"{settings!r} {settings} {explain(settings)} {settings.model_dump()} {settings.model_dump_json()}"
    assert "s3cret" not in shown and "PK-EXAMPLE" not in shown
    with pytest.raises(Misconfigured) as caught:
        load_settings(
            "paper", environ=KEYS | {"TRADER_BROKER__KEY": "s3cret", "TRADER_BROKER__PAPER": "s3cret"}, env_file=None
        )
    told = f"{caught.value!r} {caught.value.context} {caught.value.__cause__!r}"
    assert "s3cret" not in told and "TRADER_BROKER__PAPER (environment)" in told
