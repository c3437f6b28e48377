"""Prepare the pages of the site from the repository: `python docs/site/pages.py FOLDER [--execute]`, then Sphinx.

Notebooks become chapters, `docs/` keeps its addresses, every module gets a page of its API, and a link that leads out
of the pages goes to the repository's address. Nothing is written beside FOLDER and the cache of executed notebooks.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent
CACHE = ROOT / ".jupyter_cache"
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
    "strategy": ("Strategies", "What a strategy is, four of them, and the check for look-ahead."),
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

# Each page of docs/ is of one kind. A folder of docs/ is a section of a kind, opened by its README.
KINDS = {
    "tutorials": (
        "Tutorials",
        "Begin with the README. Then read [a backtest](../chapters/runs/backtest.ipynb), "
        "[a sweep](../chapters/runs/sweep.ipynb), [a paper session](../chapters/runs/paper_session.ipynb) and "
        "[a replay](../chapters/runs/replay.ipynb) as notebooks.",
        ["README"],
    ),
    "how-to": (
        "How-to guides",
        "One job each, for those who operate a session or work on the package.",
        [
            "docs/commands",
            "docs/data",
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
        ["docs/degradation", "docs/simulation", "docs/security", "docs/decisions/"],
    ),
    "reference": (
        "Reference",
        "What is there, complete and dry.",
        [
            "docs/glossary",
            "api/index",
            "docs/exchange",
            "docs/market-data",
            "docs/figures",
            "docs/benchmarks",
            "CHANGELOG",
        ],
    ),
}

DROPPED_TYPES = re.compile(r"application/(vnd\.trader|vnd\.jupyter\.widget)")
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
            cells.append({**cell, "source": with_diagrams(relinked(site, source, path, page))})
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
    kernel["language_info"] = {"name": "python", "pygments_lexer": "python3"}  # type: ignore[dict-item]
    return {**notebook, "cells": cells, "metadata": kernel}


def origin(site: Site, path: str, module: str | None) -> str:
    """The line under a chapter's title: its module's API and its source."""
    links = [f"[Notebook]({site.address(path)})"]
    if module:
        api = posixpath.relpath(api_name(module), posixpath.dirname(site.pages[path]))
        links = [f"[API of `{module}`]({api}.rst)", *links]
    return "```{container} origin\n" + " · ".join(links) + "\n```"


def shown_output(output: dict[str, Any]) -> dict[str, Any] | None:
    """An output as a page can show it: figures for the site's one plotly.js, nothing of the run's own types."""
    if output["output_type"] == "stream":
        return output if output["name"] == "stdout" else None
    if "data" not in output:
        return output
    data = {kind: value for kind, value in output["data"].items() if not DROPPED_TYPES.match(kind)}
    if figure := data.pop(PLOTLY, None):
        told = json.dumps({"data": figure["data"], "layout": figure["layout"]}).replace("</", "<\\/")
        data = {"text/html": f'<div class="plotly-figure"><script type="application/json">{told}</script></div>'}
    return {**output, "data": data} if data else None


# Running notebooks, once for each content


def executed(path: Path) -> dict[str, Any]:
    """A notebook with its outputs: from the cache where these cells ran before, else from a run in its folder."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    key = hashlib.sha256(json.dumps([sys.version_info[:2], str(path.relative_to(ROOT)), cells]).encode()).hexdigest()
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


def run_notebook(path: Path) -> dict[str, list[Any]]:
    """The outputs of a notebook's cells, by cell id, from a kernel of its own that runs in the notebook's folder."""
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    client = nbclient.NotebookClient(
        notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
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
        pages = [page for page in pages if page in site.pages.values() or page == "api/index"]
        made[f"{kind}/index.md"] = f"# {title}\n{sentence}\n\n{toctree(pages)}"
    return made | {"index.md": front_page(site)}


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
            text = relinked(site, source.read_text(encoding="utf-8"), path, page)
            if page.startswith("docs/") and page.endswith("/README"):
                section = [name for name in site.pages.values() if posixpath.dirname(name) == posixpath.dirname(page)]
                text += "\n" + toctree(sorted(set(section) - {page})).replace(":maxdepth: 1", ":hidden:")
            written[f"{page}.md"] = text
        elif path.endswith(".ipynb"):
            read = load(source) if load else json.loads(source.read_text(encoding="utf-8"))
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
        if old.relative_to(folder).as_posix() not in written:
            old.unlink()
    return site


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
    failures: list[str] = []
    if "--execute" in words:
        paths = [ROOT / path for path in notebooks()]
        failures = asyncio.run(execute_all(paths, at_once=max(2, (os.cpu_count() or 2) // 2)))
    for failure in failures:
        sys.stderr.write(f"{failure}\n")
    if failures:
        sys.stderr.write(f"{len(failures)} notebooks failed; the site is not built.\n")
        return 5
    site = prepare(Path(words[0]), executed if "--execute" in words else None)
    sys.stdout.write(f"{len(site.pages)} pages are prepared in {words[0]}.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
