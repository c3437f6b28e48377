"""Prepare the pages of the site from the repository: `python docs/site/pages.py FOLDER [--execute]`, then Sphinx.

Notebooks become chapters, lessons become the course, `docs/` keeps its addresses, every module gets a page of its API,
and a link that leads out of the pages goes to the repository's address. Lessons always run; chapters run with
--execute. Nothing is written beside FOLDER and the cache of executed notebooks.
"""

from __future__ import annotations

import ast
import asyncio
import configparser
import hashlib
import html
import json
import os
import posixpath
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent
CACHE = ROOT / ".jupyter_cache"
COURSE = "trader_lib/course"  # of the repository, where the lessons ship with the package
CELL_TIMEOUT_S = 300
SHOWN_VALUE_MAX = 80  # characters; a longer constant is read in its source

# The rooms in the order in which they explain themselves: each imports from the rows above its own.
ROOMS = {
    "errors": ("Errors", "What can go wrong, sorted by what to do about it."),
    "clock": ("Clock", "Time, trading sessions and identifiers, all of which can be set."),
    "config": ("Settings", "What is set, where it came from, and what is masked."),
    "telemetry": ("Telemetry", "Logs, traces and metrics under one correlation id."),
    "resilience": ("Resilience", "Retries, rate limits and breakers, within bounds."),
    "rules": (
        "Rules",
        "What decides a number: matching, account, sizing, exits and checks, compiled, for every engine.",
    ),
    "trading": ("Trading", "Orders, fills, positions, events, and the order list with its hash."),
    "market": ("Market data", "Bars and where they come from: sample, synthetic, stored, Alpaca's."),
    "strategy": ("Strategies", "What a strategy is, five of them, and the check for look-ahead."),
    "risk": ("Risk", "Limits as people set them, and what an order is refused for, in a sentence."),
    "exchange": ("Exchange", "An account, a book and a server that speaks Alpaca's protocol."),
    "research": (
        "Research",
        "The compiled engine, backtests, sweeps and walk-forward, their statistics, figures and reports.",
    ),
    "bus": ("Bus", "Events in order, within one process or between several."),
    "journal": ("Journal", "The hash-chained record of a session, and how it is read and verified."),
    "broker": ("Brokers", "One interface to Alpaca and to the embedded exchange."),
    "agents": ("Agents", "Market data, strategy, risk, execution, portfolio and monitor."),
    "recovery": ("Recovery", "A journal read back: what a session had done, sent and known when it stopped."),
    "steering": ("Steering", "What an operator does to a session from outside, and what the session's folder shows."),
    "session": ("Sessions", "How agents, a broker and a clock become a session, are driven, and reconciled."),
    "replay": ("Replay", "A session compared with itself, replayed, and with the backtest of the same strategy."),
    "evidence": (
        "Evidence",
        "What a journal proves: why an order was sent, what it cost, and where a session differs from its backtest.",
    ),
    "observe": ("Observation", "What looks at a session from beside it: metrics, health, pages, messages."),
    "runs": ("Runs", "Notebooks as runs: templates, parameters, results, comparisons."),
    "app": ("Application", "The command line, the demo and the scheduler."),
}

HOW_TO = (
    "yfinance",
    "own-strategy",
    "fractions",
    "cap-a-loss",
    "compare-versions",
    "journal-to-pandas",
    "test-a-bot",
    "several-accounts",
    "cron",
    "rotate-keys",
)
CONCEPTS = (
    "order",
    "time-and-bars",
    "parity",
    "agents-and-bus",
    "journal",
    "trading-states",
    "account",
    "recovery",
    "determinism",
    "provenance",
)

# Each page of docs/ is of one kind. A folder of docs/ is a section of a kind, opened by its README.
KINDS = {
    "tutorials": (
        "Tutorials",
        "Begin with the [README](../README.md), then take the course: each lesson is a page, a notebook to download, "
        "and a copy by `trader course NAME`. What a run leaves is shown by "
        "[a backtest](../chapters/runs/backtest.ipynb), "
        "[a sweep](../chapters/runs/sweep.ipynb), [a paper session](../chapters/runs/paper_session.ipynb) and "
        "[a replay](../chapters/runs/replay.ipynb).",
        ["README", "course/"],
    ),
    "how-to": (
        "How-to guides",
        "One question each at first, then one job each: operating sessions, and working on the package.",
        [
            *(f"docs/how-to/{page}" for page in HOW_TO),
            "docs/commands",
            "docs/data",
            "docs/event-strategies",
            "docs/timeframes",
            "docs/indicators",
            "docs/sweeps",
            "docs/verdict",
            "docs/checks",
            "docs/explain",
            "docs/parity",
            "docs/shortfall",
            "docs/lots",
            "docs/operations",
            "docs/schedule",
            "docs/monitoring",
            "docs/deploy",
            "docs/scale",
            "CONTRIBUTING",
            "docs/runbooks/",
        ],
    ),
    "concepts": (
        "Concepts",
        "How it works and why it is as it is.",
        [
            *(f"docs/concepts/{page}" for page in CONCEPTS),
            "docs/degradation",
            "docs/simulation",
            "docs/security",
            "docs/decisions/",
        ],
    ),
    "reference": (
        "Reference",
        "What is there, complete and dry.",
        [
            "docs/glossary",
            "docs/orders",
            "api/index",
            "docs/exchange",
            "docs/market-data",
            "docs/costs",
            "docs/figures",
            "docs/benchmarks",
            "CHANGELOG",
        ],
    ),
}

DROPPED_TYPES = re.compile(r"application/(vnd\.trader|vnd\.jupyter\.widget)")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and cursor of a terminal
LINE_MAX = 72  # characters of a text output that a page shows in one line
PLOTLY = "application/vnd.plotly.v1+json"
DIAGRAM = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\])\((?!https?:|mailto:|#)([^()\s#]+)(#[^()\s]+)?\)")


class SiteError(Exception):
    """The repository cannot become a site as it is; the sentence says what to change."""


@dataclass
class Site:
    """What the site is made of. `pages` maps a file of the repository to its page, without the ending."""

    root: Path = ROOT
    pages: dict[str, str] = field(default_factory=dict)
    copies: set[str] = field(default_factory=set)

    @property
    def home(self) -> str:
        """The address under which the site is published."""
        return f"{self.settings['doc_host']}{self.settings['doc_baseurl']}/"

    @property
    def settings(self) -> configparser.SectionProxy:
        parser = configparser.ConfigParser(delimiters=["="])
        parser.read(self.root / "settings.ini", encoding="utf-8")
        return parser["DEFAULT"]

    def address(self, path: str) -> str:
        """Where a file or folder of the repository is shown on its host."""
        kind = "tree" if (self.root / path).is_dir() else "blob"
        return f"{self.settings['git_url']}/{kind}/{self.settings['branch']}/{path}"


# What there is


def chapter_name(notebook: str) -> str:
    """The page of a notebook: its path without the number that only orders it."""
    room, name = Path(notebook).parts[-2:]
    return f"chapters/{room}/{re.sub(r'^[0-9]+_', '', name.removesuffix('.ipynb'))}"


def notebooks(root: Path = ROOT) -> list[str]:
    """Every notebook, by room in reading order, then by number."""
    found = sorted(path.relative_to(root).as_posix() for path in (root / "nbs").glob("*/*.ipynb"))
    order = list(ROOMS)
    for path in found:
        if path.split("/")[1] not in ROOMS:
            raise SiteError(f"{path} is in a room without a title: add the room to ROOMS in docs/site/pages.py.")
    return sorted(found, key=lambda path: (order.index(path.split("/")[1]), path))


def lessons(root: Path = ROOT) -> list[str]:
    """Every notebook of the course, in order."""
    return sorted(path.relative_to(root).as_posix() for path in (root / COURSE).glob("*.ipynb"))


def lesson_name(path: str) -> str:
    """What a lesson is called: its file without the number that only orders it."""
    return re.sub(r"^[0-9]+_", "", Path(path).stem)


def modules(root: Path = ROOT) -> dict[str, str]:
    """Every public module with the notebook that it is exported from."""
    found = {}
    for path in sorted((root / "trader_lib").glob("*/*.py")):
        if path.name.startswith("_"):
            continue
        header = re.search(r"File to edit: \.\./\.\./(\S+\.ipynb)", path.read_text(encoding="utf-8"))
        if header is None:
            raise SiteError(f"{path} does not name its notebook: run make export.")
        found[".".join(path.relative_to(root).with_suffix("").parts)] = header[1]
    return found


def documents(root: Path = ROOT) -> list[str]:
    """Every Markdown page of docs/, and those beside it that readers look for."""
    kept = [path.relative_to(root).as_posix() for path in sorted((root / "docs").rglob("*.md"))]
    kept = [path for path in kept if not path.startswith("docs/site/")]
    return ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", *kept]


def kind_of(page: str) -> str:
    """The kind that a page of docs/ belongs to, by its name without the ending."""
    for kind, (_, _, members) in KINDS.items():
        for member in members:
            if page == member or (member.endswith("/") and page.startswith(member)):
                return kind
    raise SiteError(f"{page}.md has no kind: add it to KINDS in docs/site/pages.py, under one of {', '.join(KINDS)}.")


def survey(root: Path = ROOT) -> Site:
    """Which file becomes which page; refuses what has no place."""
    site = Site(root)
    for path in documents(root):
        page = path.removesuffix(".md")
        kind_of(page)
        site.pages[path] = page
    for path in notebooks(root):
        page = chapter_name(path)
        if page in site.pages.values():
            raise SiteError(f"{path} would have the page of another notebook, {page}: rename one.")
        site.pages[path] = page
    for path in lessons(root):
        site.pages[path] = f"course/{lesson_name(path)}"
        site.copies.add(path)
    for module in modules(root):
        site.pages[module.replace(".", "/") + ".py"] = api_name(module)
    return site


def api_name(module: str) -> str:
    return "api/" + "/".join(module.split(".")[1:])


# Links


def relinked(site: Site, text: str, source: str, page: str) -> str:
    """Markdown whose links lead to pages where there are pages, and to the repository's host otherwise."""

    def target(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        return f"({where(site, path, page, match[1])}{match[2] or ''})"

    return "".join(LINK.sub(target, part) if prose else part for prose, part in fenced(text))


def at_home(site: Site, text: str, page: str) -> str:
    """A lesson's links to the published site, which lead somewhere from a copy as well, as links between pages."""
    files = {name: path for path, name in site.pages.items()}

    def target(match: re.Match[str]) -> str:
        if match[1] not in files:
            raise SiteError(f"{page} links to {match[0]}, which is no page of the site: correct the link.")
        return f"({where(site, files[match[1]], page, match[1])}{match[2] or ''})"

    return re.sub(rf"\({re.escape(site.home)}([^()\s#]+)\.html(#[^()\s]+)?\)", target, text)


def where(site: Site, path: str, page: str, written: str) -> str:
    here = posixpath.dirname(page) or "."
    folders = {
        "nbs": "chapters/index",
        "docs/decisions": "docs/decisions/README",
        "docs/runbooks": "docs/runbooks/README",
    }
    if path in site.pages or path in folders:
        ending = ".rst" if path.endswith(".py") else ".ipynb" if path.endswith(".ipynb") else ".md"
        return posixpath.relpath((site.pages.get(path) or folders[path]) + ending, here)
    if not (site.root / path).exists():
        return written  # Sphinx reports it
    if Path(path).suffix in {".png", ".svg", ".jpg"}:
        site.copies.add(path)
        return posixpath.relpath(path, here)
    return site.address(path)


def fenced(text: str) -> Iterator[tuple[bool, str]]:
    """The text in parts, each with whether it is prose; code between fences is not."""
    inside, part = False, ""
    for line in text.splitlines(keepends=True):
        if re.match(r"\s*(```|~~~)", line):
            if inside:
                yield False, part + line
            else:
                yield True, part
            part, inside = ("" if inside else line), not inside
        else:
            part += line
    yield not inside, part


# Chapters


def shown_source(source: str) -> str:
    """A cell without the lines that only nbdev reads."""
    return "\n".join(line for line in source.split("\n") if not line.startswith("#|")).strip("\n")


def with_diagrams(text: str) -> str:
    """Return Markdown with Mermaid diagrams as HTML: figures.js draws them, or else their source shows."""
    return DIAGRAM.sub(
        lambda found: f'```{{raw}} html\n<pre class="diagram">{html.escape(found[1].rstrip())}</pre>\n```', text
    )


def only_imports(source: str) -> bool:
    """Whether a cell holds nothing but imports, and which of them are exported, so that a page can fold it."""
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a magic or a shell line
        return False
    lines = [line for line in body if not (isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "_all_")]
    return bool(lines) and all(isinstance(line, (ast.Import, ast.ImportFrom)) for line in lines)


def chapter(site: Site, path: str, notebook: dict[str, Any], module: str | None) -> dict[str, Any]:
    """A notebook as a page: directives dropped, imports folded, links led, outputs in types that pages can show."""
    page, cells = site.pages[path], []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cells.append({**cell, "source": with_diagrams(at_home(site, relinked(site, source, path, page), page))})
        elif shown := shown_source(source):
            tags = [*cell["metadata"].get("tags", []), *(["hide-cell"] if only_imports(shown) else [])]
            outputs = [kept for output in cell.get("outputs", []) if (kept := shown_output(output))]
            cells.append({**cell, "source": shown, "metadata": {"tags": tags}, "outputs": outputs})
    title = next((at for at, cell in enumerate(cells) if cell["cell_type"] == "markdown"), None)
    if title is None or not cells[title]["source"].lstrip().startswith("# "):
        raise SiteError(f"{path} does not begin with a title: its first Markdown cell must start with '# '.")
    heading, _, rest = cells[title]["source"].lstrip().partition("\n")
    opening = {**cells[title], "source": f"{heading}\n\n{origin(site, path, module)}\n\n{rest}"}
    cells = [opening, *cells[:title], *cells[title + 1 :]]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    kernel["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}  # type: ignore[dict-item]
    return {**notebook, "cells": cells, "metadata": kernel}


def origin(site: Site, path: str, module: str | None) -> str:
    """The line under a chapter's title: its module's API and its source; under a lesson's, how to have it."""
    links = [f"[Notebook]({site.address(path)})"]
    if path in lessons(site.root):
        links = [f"{{download}}`Download this notebook </{path}>`", f"`trader course {lesson_name(path)}`"]
    if module:
        api = posixpath.relpath(api_name(module), posixpath.dirname(site.pages[path]))
        links = [f"[API of `{module}`]({api}.rst)", *links]
    return "```{container} origin\n" + " · ".join(links) + "\n```"


def shown_output(output: dict[str, Any]) -> dict[str, Any] | None:
    """An output as a page can show it: figures for the site's one plotly.js, nothing of the run's own types."""
    if output["output_type"] == "stream":
        if output["name"] != "stdout":
            return None
        text = ESCAPES.sub("", "".join(output["text"])).replace("\r\n", "\n")
        return as_sentences(text) if is_prose(text) else {**output, "text": text}
    if "data" not in output:
        return output
    if set(output["data"]) == {"text/plain"} and is_prose(text := "".join(output["data"]["text/plain"])):
        return as_sentences(text)
    data = {kind: value for kind, value in output["data"].items() if not DROPPED_TYPES.match(kind)}
    if figure := data.pop(PLOTLY, None):
        told = json.dumps({"data": figure["data"], "layout": figure["layout"]}).replace("</", "<\\/")
        data = {"text/html": f'<div class="plotly-figure"><script type="application/json">{told}</script></div>'}
    return {**output, "data": data} if data else None


def is_prose(text: str) -> bool:
    """Whether a text has lines too long for a page and no columns that breaking them would destroy."""
    return not re.search(r"[│┃]|\S {3,}\S", text) and any(len(line) > LINE_MAX for line in text.splitlines())


def as_sentences(text: str) -> dict[str, Any]:
    """A text as an output whose lines are broken where the page ends."""
    shown = f'<pre class="sentences">{html.escape(text.strip())}</pre>'
    return {"output_type": "display_data", "metadata": {}, "data": {"text/html": shown}}


# Running notebooks, once for each content


def executed(path: Path) -> dict[str, Any]:
    """A notebook with its outputs: from the cache where these cells ran before, else from a run in its folder.

    A lesson says what the package does, so it runs again whenever the package has changed.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    of = [sys.version_info[:2], str(path.relative_to(ROOT)), cells, *([library_digest()] if is_lesson(path) else [])]
    key = hashlib.sha256(json.dumps(of).encode()).hexdigest()
    kept = CACHE / f"{key}.json"
    if not kept.exists():
        ran = run_notebook(path)
        CACHE.mkdir(exist_ok=True)
        half = kept.with_suffix(f".{os.getpid()}.half")
        half.write_text(json.dumps(ran), encoding="utf-8")
        half.replace(kept)
    outputs = json.loads(kept.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell.update({"outputs": outputs[cell["id"]]} if cell["id"] in outputs else {})
    return notebook  # type: ignore[no-any-return]


def is_lesson(path: Path) -> bool:
    return path.parent == ROOT / COURSE


def is_source(path: Path) -> bool:
    """Whether a file belongs to the package; what Python and numba keep beside it does not, nor do other lessons."""
    return "__pycache__" not in path.parts and path.parent != ROOT / COURSE


@cache
def library_digest() -> str:
    """What the package consists of, as one hash: its modules, data and templates."""
    files = sorted(path for path in (ROOT / "trader_lib").rglob("*") if path.is_file() and is_source(path))
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()


def run_notebook(path: Path) -> dict[str, list[Any]]:
    """The outputs of a notebook's cells, by cell id, from a kernel of its own that runs in the notebook's folder.

    A lesson runs in an empty folder, as with a reader, and finds the command `trader`.
    """
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    os.environ["COLUMNS"] = "100"
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with tempfile.TemporaryDirectory(prefix="trader-lesson-") as empty:
        place = {"metadata": {"path": empty if is_lesson(path) else str(path.parent)}}
        nbclient.NotebookClient(notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources=place).execute()
    return {cell["id"]: cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"}


async def execute_all(paths: list[Path], at_once: int) -> list[str]:
    """Run the notebooks that the cache does not hold; return a sentence for each that fails."""
    slots, failures = asyncio.Semaphore(at_once), []

    async def one(path: Path) -> None:
        async with slots:
            words = [sys.executable, str(SITE / "pages.py"), "--only", str(path)]
            process = await asyncio.create_subprocess_exec(*words, stderr=asyncio.subprocess.PIPE)
            _, said = await process.communicate()
            if process.returncode:
                failures.append(f"{path.relative_to(ROOT)}: {said.decode(errors='replace').strip()[-2000:]}")

    await asyncio.gather(*(one(path) for path in paths))
    return sorted(failures)


# Index pages


def toctree(pages: list[str], depth: int = 1) -> str:
    return f"```{{toctree}}\n:maxdepth: {depth}\n\n" + "\n".join(f"/{page}" for page in pages) + "\n```\n"


def index_pages(site: Site) -> dict[str, str]:
    """The pages that list others: front page, kinds, rooms and the API."""
    rooms: dict[str, list[str]] = {room: [] for room in ROOMS}
    for path in notebooks(site.root):
        rooms[path.split("/")[1]].append(site.pages[path])
    rooms = {room: members for room, members in rooms.items() if members}
    made = {f"chapters/{room}/index.md": room_page(room, members) for room, members in rooms.items()}
    lead = "The notebooks that the package is exported from, room by room: each room builds on those before it.\n"
    made["chapters/index.md"] = room_list("Chapters", lead, "chapters", rooms)
    apis: dict[str, list[str]] = {room: [] for room in ROOMS}
    for module in modules(site.root):
        apis[module.split(".")[1]].append(api_name(module))
    apis = {room: members for room, members in apis.items() if members}
    made |= {f"api/{room}/index.md": room_page(room, members, api=True) for room, members in apis.items()}
    lead = "Every public module. The names that most notebooks need are imported from `trader_lib` itself.\n"
    made["api/index.md"] = room_list("API", lead + top_level(site), "api", apis)
    for kind, (title, sentence, members) in KINDS.items():
        pages = [member + "README" if member.endswith("/") else member for member in members]
        course = [site.pages[path] for path in lessons(site.root)] if "course/" in members else []
        pages = [page for page in pages if page in site.pages.values() or page == "api/index"] + course
        tree = toctree(pages).replace(":maxdepth: 1", ":hidden:") if course else toctree(pages)
        made[f"{kind}/index.md"] = f"# {title}\n{sentence}\n\n{lesson_table(site) if course else ''}{tree}"
    return made | {"index.md": front_page(site)}


def lesson_table(site: Site) -> str:
    """The lessons of the course, each with what it says of itself."""
    rows = ["| lesson | what it shows |", "| --- | --- |"]
    for path in lessons(site.root):
        first = json.loads((site.root / path).read_text(encoding="utf-8"))["cells"][0]["source"]
        title, summary = (line.strip().lstrip("#> ") for line in first[:2])
        rows.append(f"| [{title}](../{site.pages[path]}.ipynb) | {summary} |")
    return "\n".join(rows) + "\n\n"


def room_page(room: str, members: list[str], *, api: bool = False) -> str:
    title, sentence = ROOMS[room]
    return f"# {f'trader_lib.{room}' if api else title}\n{sentence}\n\n{toctree(members)}"


def room_list(title: str, lead: str, folder: str, rooms: dict[str, list[str]]) -> str:
    rows = "\n".join(
        f"| [{f'trader_lib.{room}' if folder == 'api' else ROOMS[room][0]}]({room}/index.md) | {ROOMS[room][1]} |"
        for room in rooms
    )
    hidden = toctree([f"{folder}/{room}/index" for room in rooms]).replace(":maxdepth: 1", ":hidden:")
    return f"# {title}\n{lead}\n| room | what it is about |\n| --- | --- |\n{rows}\n\n{hidden}"


def top_level(site: Site) -> str:
    """The names that `trader_lib` itself offers, each with the page of its module."""
    text = (site.root / "trader_lib/__init__.py").read_text(encoding="utf-8")
    (homes,) = (
        ast.literal_eval(line.value)
        for line in ast.parse(text).body
        if isinstance(line, ast.Assign) and getattr(line.targets[0], "id", "") == "HOMES"
    )
    return "\n" + ", ".join(f"{{py:obj}}`~trader_lib.{homes[name]}.{name}`" for name in sorted(homes)) + "\n"


def front_page(site: Site) -> str:
    """The promise, the output of `make demo` and a figure, all from the README, and a door for each reader."""
    readme = (site.root / "README.md").read_text(encoding="utf-8")
    promise = re.search(r"\*\*(.+?)\*\*\s+(.+?)\n\n", readme, re.S)
    demo = re.search(r"```text\n(.+?)```", readme, re.S)
    figure = re.search(r"!\[(.+?)\]\((docs/images/.+?)\)", readme)
    if not (promise and demo and figure):
        raise SiteError(
            "README.md needs a bold promise, the output of make demo in ```text, and a figure of docs/images."
        )
    site.copies.add(figure[2])
    text = (SITE / "front.md").read_text(encoding="utf-8")
    parts = {"PROMISE": promise[1], "EXPLAINED": promise[2], "DEMO": demo[1], "ALT": figure[1], "FIGURE": figure[2]}
    for name, value in parts.items():
        text = text.replace("{" + name + "}", value)
    return relinked(site, text, "index.md", "index")


def api_page(site: Site, module: str, notebook: str) -> str:
    """The page of a module: where it is explained, then every public name."""
    up = "/" + site.pages[notebook]
    source = site.address(module.replace(".", "/") + ".py")
    lines = [module, "=" * len(module), "", ".. container:: origin", ""]
    lines += [f"   :doc:`Chapter <{up}>` · `Source <{source}>`__", "", f".. automodule:: {module}"]
    lines += ["   :members:", "   :undoc-members:", "   :show-inheritance:", "   :member-order: bysource"]
    values = constants(site.root / (module.replace(".", "/") + ".py"))
    lines += [f"   :exclude-members: {', '.join(['model_config', 'model_post_init', *values])}", ""]
    for name, value in values.items():
        if not value.startswith(("TypeVar(", "ParamSpec(")):
            shown = [f"   :value: {value}"] if len(value) <= SHOWN_VALUE_MAX and "\n" not in value else []
            lines += [f".. py:data:: {module}.{name}", *shown, ""]
    return "\n".join(lines)


def constants(path: Path) -> dict[str, str]:
    """The public values of a module by name, as written; autodoc would show the docstrings of their types."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    values = {}
    for line in body:
        if isinstance(line, (ast.Assign, ast.AnnAssign)) and line.value is not None:
            target = line.targets[0] if isinstance(line, ast.Assign) else line.target
            values[ast.unparse(target)] = line.value
    public = ast.literal_eval(values["__all__"]) if "__all__" in values else []
    return {name: ast.unparse(values[name]) for name in public if name in values}


# Writing


def prepare(folder: Path, load: Callable[[Path], dict[str, Any]] | None = None) -> Site:
    """Write every source page into a folder, unchanged ones untouched, and drop what is no page any more.

    `load` reads a notebook from its path, with outputs or without.
    """
    site, written = survey(), {}
    module_of = {notebook: module for module, notebook in modules().items()}
    for path, page in site.pages.items():
        source = site.root / path
        if path.endswith(".md"):
            text = with_diagrams(relinked(site, source.read_text(encoding="utf-8"), path, page))
            if page.startswith("docs/") and page.endswith("/README"):
                section = [name for name in site.pages.values() if posixpath.dirname(name) == posixpath.dirname(page)]
                text += "\n" + toctree(sorted(set(section) - {page})).replace(":maxdepth: 1", ":hidden:")
            written[f"{page}.md"] = text
        elif path.endswith(".ipynb"):
            read = (load or as_stored)(source)
            written[f"{page}.ipynb"] = json.dumps(chapter(site, path, read, module_of.get(path)), indent=1)
    for module, notebook in modules().items():
        written[f"{api_name(module)}.rst"] = api_page(site, module, notebook)
    written |= index_pages(site)
    for name, text in written.items():
        write(folder / name, text)
    for name in site.copies:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(site.root / name, folder / name)
    for old in [*folder.rglob("*.md"), *folder.rglob("*.ipynb"), *folder.rglob("*.rst")]:
        if old.relative_to(folder).as_posix() not in written | dict.fromkeys(site.copies):
            old.unlink()
    return site


def as_stored(path: Path) -> dict[str, Any]:
    """A notebook as it lies in the repository, without outputs."""
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def main(words: list[str]) -> int:
    if words[:1] == ["--only"]:
        executed(Path(words[1]).resolve())
        return 0
    if not words or set(words[1:]) - {"--execute"}:
        sys.stderr.write("Use: python docs/site/pages.py FOLDER [--execute]\n")
        return 2
    whole = "--execute" in words
    paths = [ROOT / path for path in [*(notebooks() if whole else []), *lessons()]]
    failures = asyncio.run(execute_all(paths, at_once=max(2, (os.cpu_count() or 2) // 2)))
    for failure in failures:
        sys.stderr.write(f"{failure}\n")
    if failures:
        sys.stderr.write(f"{len(failures)} notebooks failed; the site is not built.\n")
        return 5
    site = prepare(Path(words[0]), lambda path: executed(path) if whole or is_lesson(path) else as_stored(path))
    sys.stdout.write(f"{len(site.pages)} pages are prepared in {words[0]}.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
