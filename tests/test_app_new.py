"""What `trader new` makes: a project that runs at once, and a strategy whose own test passes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lessons import play

Trader = Callable[..., tuple[int, str, str]]
BIN = Path(sys.executable).parent


def test_a_new_project_is_whole_and_its_notebook_runs(trader: Trader, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = trader("new", "my_project")
    place = Path(out.strip())
    assert code == 0 and "make demo" in err
    assert {path.name for path in place.iterdir()} == {
        *("my_project.ipynb", "test_my_project.py", "jobs.toml", "Makefile", "README.md", "requirements.txt"),
        *(".env.example", ".gitignore", ".github"),
    }
    assert ".env" in (place / ".gitignore").read_text().split()
    monkeypatch.chdir(place)
    played = play(Path("my_project.ipynb"))
    assert len(played["result"].orders) > 10 and played.figures == 1 and not played["result"].look_ahead
    code, out, err = trader("schedule", "check", "jobs.toml")
    assert code == 0 and "nightly" in out, err


def test_a_name_that_is_none_and_a_place_that_is_taken_are_refused(trader: Trader) -> None:
    code, _, err = trader("new", "My-Project")
    assert code == 2 and "Did you mean 'my_project'?" in err and not list(Path().iterdir())
    Path("mine").mkdir()
    Path("test_dip.py").write_text("mine")
    assert trader("new", "mine")[0] == trader("new", "strategy", "dip")[0] == 2
    assert not list(Path("mine").iterdir()) and not Path("dip.ipynb").exists()
    assert Path("test_dip.py").read_text() == "mine"


@pytest.mark.slow
def test_a_new_project_passes_its_test_and_runs_its_demo(trader: Trader) -> None:
    place = Path(trader("new", "desk")[1].strip())
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    for target, seen in {"test": "3 passed", "demo": "Equity at the end is equal to the cent"}.items():
        done = subprocess.run(["make", target], cwd=place, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0 and seen in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_new_strategy_passes_its_test(trader: Trader) -> None:
    code, out, _ = trader("new", "strategy", "buy_the_dip")
    assert code == 0 and out.split() == ["buy_the_dip.ipynb", "test_buy_the_dip.py"]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_buy_the_dip.py"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr
