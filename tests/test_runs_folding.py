"""An executed template opens at its result: the source of its plumbing is folded, that of its sections is not."""

import nbformat
import pytest

from trader_lib.runs.kernel import fold_plumbing
from trader_lib.runs.templates import template_path


@pytest.mark.parametrize("kind", ["backtest", "paper"])
def test_only_the_plumbing_of_a_template_is_folded(kind: str) -> None:
    notebook = nbformat.read(template_path(kind), as_version=4)  # type: ignore[arg-type]
    fold_plumbing(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    folded = [bool(cell.metadata.get("jupyter", {}).get("source_hidden")) for cell in code]
    assert folded[:2] == [True, True], "the parameters, and what reads them"
    assert folded.count(True) < folded.count(False)
    assert all(len(cell.source.splitlines()) < 12 for cell, hidden in zip(code, folded, strict=True) if not hidden)


def test_a_notebook_of_the_users_own_stays_as_it_is() -> None:
    own = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("day = 1", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell("day = 2", metadata={"tags": ["injected-parameters"]}),
        ]
    )
    fold_plumbing(own)
    assert [cell.metadata.get("jupyter") for cell in own.cells] == [None, None]
