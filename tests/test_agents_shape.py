"""An agent is a state and plain functions: nothing but the shells awaits, and no cell is longer than a screen."""

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "trader_lib" / "agents").glob("[a-z]*.py"))
NOTEBOOKS = sorted((ROOT / "nbs" / "agents").glob("*.ipynb"))
AT_THE_BROKER = {"ask_broker"}  # where an effect becomes a call
LINES_MAX = 60


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_functions_of_agents_neither_await_nor_reach_for_bus_clock_or_broker(module: Path) -> None:
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.AsyncFunctionDef):
            assert node.name in AT_THE_BROKER, f"{node.name} awaits: yield an effect instead"
        if isinstance(node, ast.FunctionDef):
            named = {arg.annotation.id for arg in node.args.args if isinstance(arg.annotation, ast.Name)}
            assert not named & {"Bus", "Clock", "Broker"}, f"{node.name} is given {named & {'Bus', 'Clock', 'Broker'}}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_every_field_of_a_state_says_what_it_is(module: Path) -> None:
    lines = module.read_text().splitlines()
    for node in ast.parse(module.read_text()).body:
        if not isinstance(node, ast.ClassDef) or not node.name.endswith("State") or node.name == "LocalState":
            continue
        fields = [each for each in node.body if isinstance(each, ast.AnnAssign) and not _is_config(each)]
        silent = [ast.unparse(each.target) for each in fields if "#" not in lines[(each.end_lineno or 1) - 1]]
        assert not {*silent} - {"market", "book", "holdings"}, f"{node.name}: say in a comment what {silent} are"


def _is_config(field: ast.AnnAssign) -> bool:
    return isinstance(field.target, ast.Name) and field.target.id.startswith("__")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_exported_cells_fit_on_a_screen(notebook: Path) -> None:
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.startswith("#| export"):
            assert len(source.splitlines()) - 1 <= LINES_MAX, f"{notebook.stem}: cell {cell['id']}"
