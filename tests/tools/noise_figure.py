"""Draw docs/images/noise.svg: what passes where nothing is, and what is found where an edge is, counted beside theory.

Run it with `.venv/bin/python -m tests.tools.noise_figure`; it prints the numbers that docs/verdict.md states.
"""

import math
import sys
from html import escape
from pathlib import Path

import numpy as np

from trader_lib.research.overfitting import deflated_sharpe, probabilistic_sharpe
from trader_lib.research.power import power
from trader_lib.research.verdict import shape_of

TARGET = Path(__file__).parents[2] / "docs/images/noise.svg"
SESSIONS, STRATEGIES, AMONG = 756, 1_000, 20
INK, PALE, GRID, OURS, OTHER = "#1f2937", "#6b7280", "#e5e7eb", "#1d4ed8", "#dc2626"
WIDE, HIGH, LEFT, TOP = 330, 230, 56, 44
Points = list[tuple[float, float]]


def show(text: str) -> None:
    """Print a line of numbers."""
    sys.stdout.write(f"{text}\n")


def noise(chance: np.random.Generator) -> tuple[Points, Points, Points]:
    """Shares that pass at each level: single ones, the best of twenty counted alone, and with all counted."""
    drawn = chance.standard_t(5, (SESSIONS, STRATEGIES)) * 0.01
    single = np.array([probabilistic_sharpe(own, SESSIONS, *shape) for own, *shape in map(shape_of, drawn.T)])
    groups = chance.standard_t(5, (400, SESSIONS, AMONG)) * 0.01
    best = [shape_of(group[:, group.mean(axis=0).argmax()]) for group in groups]
    alone = np.array([probabilistic_sharpe(own, SESSIONS, *shape) for own, *shape in best])
    among = np.array([deflated_sharpe(own, SESSIONS, *shape, AMONG, 1 / (SESSIONS - 1)) for own, *shape in best])
    levels = np.linspace(0.0, 1.0, 41)
    curves = [[(x, float((found >= 1 - x).mean())) for x in levels] for found in (single, alone, among)]
    return curves[0], curves[1], curves[2]


def edges(chance: np.random.Generator, years: int) -> tuple[Points, Points]:
    """Shares that are found by true annual Sharpe ratio, and what theory gives."""
    ratios, count = np.linspace(0.0, 3.0, 13), 252 * years
    found = []
    for annual in ratios:
        drawn = annual / 252**0.5 + chance.normal(0, 1, (count, STRATEGIES))
        sure = [probabilistic_sharpe(own, count, *shape) for own, *shape in map(shape_of, drawn.T)]
        found.append((float(annual), float(np.mean(np.array(sure) >= 0.95))))
    fine = np.linspace(0.0, 3.0, 61)
    return found, [(float(x), power(float(x) / 252**0.5, count)) for x in fine]


def panel(x: float, title: str, across: str, up: str, most: float, ticks: list[float]) -> str:
    """Axes of one panel at a place, with its title."""
    lines = [f"<text x='{x + LEFT}' y='{TOP - 18}' font-weight='600' fill='{INK}'>{escape(title)}</text>"]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = TOP + HIGH * (1 - share)
        lines.append(f"<line x1='{x + LEFT}' x2='{x + LEFT + WIDE}' y1='{y}' y2='{y}' stroke='{GRID}'/>")
        lines.append(f"<text x='{x + LEFT - 8}' y='{y + 4}' text-anchor='end' fill='{PALE}'>{share:.0%}</text>")
    for tick in ticks:
        at = x + LEFT + WIDE * tick / most
        text = f"{tick:.0%}" if most == 1 else f"{tick:g}"
        lines.append(f"<text x='{at}' y='{TOP + HIGH + 18}' text-anchor='middle' fill='{PALE}'>{text}</text>")
    lines.append(
        f"<text x='{x + LEFT + WIDE / 2}' y='{TOP + HIGH + 38}' text-anchor='middle' fill='{INK}'>{across}</text>"
    )
    lines.append(f"<text x='{x + LEFT}' y='{TOP - 4}' fill='{PALE}'>{up}</text>")
    return "".join(lines)


def line(x: float, points: Points, most: float, color: str, dash: str = "") -> str:
    """A curve in a panel."""
    places = " ".join(f"{x + LEFT + WIDE * a / most:.1f},{TOP + HIGH * (1 - b):.1f}" for a, b in points)
    return f"<polyline points='{places}' fill='none' stroke='{color}' stroke-width='2' stroke-dasharray='{dash}'/>"


def dots(x: float, points: Points, most: float, color: str) -> str:
    """Points in a panel."""
    return "".join(
        f"<circle cx='{x + LEFT + WIDE * a / most:.1f}' cy='{TOP + HIGH * (1 - b):.1f}' r='3' fill='{color}'/>"
        for a, b in points
    )


def label(x: float, y: float, text: str, color: str) -> str:
    """A word beside a curve."""
    return f"<text x='{x}' y='{y}' fill='{color}'>{escape(text)}</text>"


def draw() -> str:
    """The figure as SVG; prints its numbers."""
    chance = np.random.Generator(np.random.PCG64(2026))
    single, alone, among = noise(chance)
    shares = [{round(x, 3): y for x, y in curve}[0.05] for curve in (single, alone, among)]
    error = 1.96 * math.sqrt(0.05 * 0.95 / STRATEGIES)
    show(f"at 5%: {shares[0]:.1%} of {STRATEGIES:,} pass (±{error:.1%})")
    show(f"best of {AMONG}: {shares[1]:.1%} if it is counted alone, {shares[2]:.1%} if all are")
    parts = [
        panel(
            0,
            f"Noise: {STRATEGIES:,} strategies, 3 years",
            "level of the test",
            "share that passes",
            1,
            [0, 0.25, 0.5, 0.75, 1],
        )
    ]
    parts += [
        line(0, [(0, 0), (1, 1)], 1, PALE, "4 4"),
        line(0, single, 1, OURS),
        line(0, alone, 1, OTHER),
        line(0, among, 1, "#059669"),
    ]
    parts += [
        label(LEFT + 70, TOP + 20, f"best of {AMONG}, counted alone", OTHER),
        label(LEFT + 150, TOP + 130, "each by itself", OURS),
    ]
    parts.append(label(LEFT + 120, TOP + 215, f"best of {AMONG}, all counted", "#059669"))
    x = LEFT + WIDE + 20
    parts.append(panel(x, "An edge: found at 5%", "true Sharpe ratio a year", "share that passes", 3, [0, 1, 2, 3]))
    for years, color in ((1, "#0e7490"), (3, OURS), (10, INK)):
        found, theory = edges(chance, years)
        parts += [line(x, theory, 3, color), dots(x, found, 3, color)]
        listed = ", ".join(
            f"{a:g}: {b:.1%} ({power(a / 252**0.5, 252 * years):.1%})" for a, b in found if a in (0.5, 1.0, 2.0)
        )
        show(f"{years} years: {listed}")
        parts.append(
            label(
                x + LEFT + WIDE - 130,
                TOP + HIGH - 60 + 16 * (1, 3, 10).index(years),
                f"{years} year{'s' if years > 1 else ''}, line: theory",
                color,
            )
        )
    size = f"viewBox='0 0 {x + LEFT + WIDE + 16} {TOP + HIGH + 50}'"
    style = "font-family='Inter, Segoe UI, Roboto, Helvetica, Arial, sans-serif' font-size='12'"
    ground = "<rect width='100%' height='100%' fill='#fff'/>"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} {style}>{ground}{''.join(parts)}</svg>\n"


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
