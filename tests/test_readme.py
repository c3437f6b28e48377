"""The README as a new user follows it: every command of its list as it stands, in its order, and the files it names."""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from trader_lib.runs.store import RunStore

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_STEPS = README.partition("## The command line")[2].partition("```bash\n")[2].partition("```")[0].splitlines()


@pytest.mark.slow
def test_the_first_steps_can_be_typed_in_their_order(
    trader: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    assert len(FIRST_STEPS) >= 10 and all(line.startswith("trader ") for line in FIRST_STEPS)
    for line in FIRST_STEPS:
        code, out, err = trader(*shlex.split(line)[1:])
        assert code == 0, f"{line}\n{err}"
        assert out.strip(), line
    result = next(run for run in RunStore(tmp_path / "runs").runs("paper")).result()
    swing = next(row for row in result.strategies if row.name == "swing")
    assert swing.state == "ACTIVE" and swing.orders and not swing.refused, "its limits leave the example running"


def test_the_files_that_the_readme_names_are_there() -> None:
    named = set(re.findall(r"examples/[\w-]+\.\w+", README))
    assert {"examples/dips.py", "examples/research.ipynb", "examples/strategies.toml", "examples/ibm.csv"} <= named
    assert {"examples/review.ipynb", "examples/jobs.toml"} <= named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_strategies_in_the_readme_are_those_of_the_file() -> None:
    assert (ROOT / "examples/strategies.toml").read_text(encoding="utf-8") in README


def test_the_strategy_of_the_readme_the_file_and_the_notebook_order_the_same() -> None:
    from trader_lib import backtest, sample_bars
    from trader_lib.strategy.registry import load_strategy

    bars = sample_bars(["AAPL", "MSFT"], start="2005-01-03", end="2006-12-29")
    block = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "BuyTheDip" in block)
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(block.partition("\n\n\nbars = ")[0], "README.md", "exec"), names)
    kinds = [names["BuyTheDip"], *(load_strategy(f"{ROOT}/examples/{file}:BuyTheDip") for file in FILES)]
    hashes = {backtest(kind(dip=0.03), bars).order_list_hash for kind in kinds}  # type: ignore[operator]
    assert len(hashes) == 1


FILES = ("dips.py", "research.ipynb")
