"""Copy the run templates from nbs/runs, their source, into the package, and write the schema of a run's result."""

from __future__ import annotations

import json
from pathlib import Path

from trader_lib.runs.result import result_schema
from trader_lib.runs.templates import sync_templates

ROOT = Path(__file__).parents[2]

if __name__ == "__main__":
    runs = ROOT / "trader_lib" / "runs"
    sync_templates(ROOT / "nbs" / "runs", runs / "templates")
    schema = json.dumps(result_schema(), indent=2, ensure_ascii=False) + "\n"
    (runs / "schema" / "result.schema.json").write_text(schema, encoding="utf-8")
