"""Write the list of metrics in docs/monitoring.md anew, from the table that the sessions use.

Example: python -m tests.tools.metrics_table
"""

from pathlib import Path

from trader_lib.telemetry.metrics import METRICS

PAGE = Path(__file__).parents[2] / "docs" / "monitoring.md"
BEGIN, END = "<!-- metrics: python -m tests.tools.metrics_table -->\n", "<!-- end of metrics -->\n"


def table() -> str:
    """Every metric, as the page lists it."""
    rows = ["| metric | kind | labels: what bounds them | meaning |", "| --- | --- | --- | --- |"]
    for metric in METRICS:
        labels = "; ".join(f"`{name}`: {bound}" for name, bound in metric.labels.items())
        rows.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    """The page with the list as it is now."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
