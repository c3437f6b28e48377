"""The shipped templates and schema are the sources', and templates take what runs are asked for."""

import json
from pathlib import Path

import pytest

from trader_lib.runs.parameters import RunParameters
from trader_lib.runs.result import Kind, result_schema, shipped_schema
from trader_lib.runs.runner import RUN_FOLDER
from trader_lib.runs.templates import TEMPLATES, template_parameters, template_path

SOURCES = Path(__file__).parents[1] / "nbs" / "runs"
BACKTEST_ONLY = {"benchmark", "calendar", "csv"}
SESSION_ONLY = {"broker", "transport", RUN_FOLDER, "resume"}


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_shipped_template_equals_its_source(kind: Kind) -> None:
    assert template_path(kind).read_bytes() == (SOURCES / TEMPLATES[kind]).read_bytes(), (
        "run sync_templates(Path('nbs/runs'), Path('trader_lib/runs/templates'))"
    )


def test_template_parameters_are_those_of_the_model() -> None:
    asked = set(RunParameters.model_fields)
    assert set(template_parameters(template_path("backtest"))) == asked
    assert set(template_parameters(template_path("paper"))) == (asked | SESSION_ONLY) - BACKTEST_ONLY


def test_every_template_parameter_is_explained() -> None:
    for kind in TEMPLATES:
        for parameter in template_parameters(template_path(kind)).values():
            assert parameter.help, f"{kind}: {parameter.name}"


def test_templates_carry_no_outputs_and_the_tag() -> None:
    for kind in TEMPLATES:
        cells = json.loads(template_path(kind).read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") for cell in cells)
        assert ["parameters" in cell["metadata"].get("tags", ()) for cell in cells].count(True) == 1


def test_shipped_schema_equals_the_model() -> None:
    assert shipped_schema() == result_schema()


def test_schema_names_everything_that_a_result_must_carry() -> None:
    named = set(shipped_schema()["properties"])  # type: ignore[call-overload]
    assert {"order_list_hash", "orders", "statistics", "parameters", "data", "seed", "versions"} <= named
