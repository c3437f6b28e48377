"""The page about the figures names each of them once, under its group and with its unit."""

import re
from pathlib import Path

from trader_lib.research.figures import FIGURES

PAGE = (Path(__file__).parent.parent / "docs/figures.md").read_text(encoding="utf-8")


def rows() -> dict[str, tuple[str, list[str]]]:
    """Figures of the page by name, each with the heading above it and its other cells."""
    found: dict[str, tuple[str, list[str]]] = {}
    heading = ""
    for line in PAGE.splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif match := re.match(r"\| `(\w+)` \| (.+) \|$", line):
            assert match[1] not in found, f"{match[1]} is explained twice"
            found[match[1]] = (heading, [cell.strip() for cell in match[2].split(" | ")])
    return found


def test_every_figure_has_a_row_with_its_group_and_unit() -> None:
    assert {name: (group, cells[0]) for name, (group, cells) in rows().items()} == {
        name: (figure.group, figure.unit) for name, figure in FIGURES.items()
    }


def test_every_row_says_how_and_when_there_is_none() -> None:
    for name, (_group, (_unit, how, none, *_source)) in rows().items():
        assert how and none, name


def test_figures_are_explained_in_the_order_in_which_they_are_shown() -> None:
    assert list(rows()) == list(FIGURES)
