"""The site: every notebook, page and module has its place; it builds without a warning and works without a network."""

import asyncio
import importlib.util
import json
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.browser import launched

ROOT = Path(__file__).parent.parent
IMPORTS = 'import re\nfrom a import b\n_all_ = ["b"]'
PHONE = {"width": 390, "height": 844}


def load_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs/site/pages.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


pages = load_pages()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared pages of this repository."""
    folder = tmp_path_factory.mktemp("site") / "pages"
    pages.prepare(folder)
    return folder


def listed(sources: Path) -> Counter[str]:
    """How often each page is in a table of contents."""
    found: Counter[str] = Counter()
    for path in sources.rglob("*.md"):
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            found.update(line.lstrip("/") for line in tree.splitlines() if line and not line.startswith(":"))
    return found


def test_each_page_is_in_one_table_of_contents(sources: Path) -> None:
    written = {path.relative_to(sources).with_suffix("").as_posix() for path in sources.rglob("*.*")}
    written = {page for page in written if not page.startswith(("docs/images/", "trader_lib/course/"))}
    assert listed(sources) == Counter(dict.fromkeys(written - {"index"}, 1))


def test_each_notebook_document_and_public_module_has_a_page(sources: Path) -> None:
    for path in (ROOT / "nbs").glob("*/*.ipynb"):
        assert (sources / f"{pages.chapter_name(path.relative_to(ROOT).as_posix())}.ipynb").exists(), path
    for path in [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("[dr]*s/*.md")]:
        assert (sources / path.relative_to(ROOT)).exists(), path
    modules = [path for path in (ROOT / "trader_lib").glob("*/*.py") if not path.name.startswith("_")]
    assert len(modules) > 100
    for path in modules:
        room, name = path.parent.name, path.stem
        assert f".. automodule:: trader_lib.{room}.{name}\n" in (sources / f"api/{room}/{name}.rst").read_text()


def test_a_modules_constants_are_shown_as_written(sources: Path) -> None:
    text = (sources / "api/trading/orders.rst").read_text()
    assert ".. py:data:: trader_lib.trading.orders.MAGNITUDE_MAX\n   :value: " in text
    assert ".. py:data:: trader_lib.trading.orders.OrderRequest" not in text


def test_chapters_follow_the_order_of_rooms_and_numbers(sources: Path) -> None:
    text = (sources / "chapters/trading/index.md").read_text()
    assert re.findall(r"/chapters/trading/(\w+)", text)[:3] == ["capability", "orders", "portfolio"]
    rooms = re.findall(r"^/chapters/(\w+)/index$", (sources / "chapters/index.md").read_text(), re.M)
    assert rooms == list(pages.ROOMS)


def test_links_lead_to_pages_or_to_the_repository() -> None:
    site = pages.survey()
    host = site.settings["git_url"]
    for written, led in {
        "[a](../nbs/session/07_companions.ipynb)": "[a](../chapters/session/companions.ipynb)",
        "[a](../deploy/compose.yaml)": f"[a]({host}/blob/main/deploy/compose.yaml)",
        "[a](../deploy)": f"[a]({host}/tree/main/deploy)",
        "[a](../README.md#the-stages)": "[a](../README.md#the-stages)",
        "[a](decisions)": "[a](decisions/README.md)",
        "[a](https://example.com/x.md)": "[a](https://example.com/x.md)",
        "[a](nowhere.md)": "[a](nowhere.md)",
        "```\n[a](../deploy)\n```\n": "```\n[a](../deploy)\n```\n",
    }.items():
        assert pages.relinked(site, written, "docs/operations.md", "docs/operations") == led
    assert (
        pages.relinked(site, "![f](images/session-page.png)", "docs/x.md", "docs/x") == "![f](images/session-page.png)"
    )
    assert site.copies - set(pages.lessons()) == {"docs/images/session-page.png"}


def cell(source: str, *outputs: dict[str, Any]) -> dict[str, Any]:
    return {"cell_type": "code", "id": "00000000", "metadata": {}, "source": [source], "outputs": list(outputs)}


def test_a_chapter_hides_what_only_nbdev_reads_and_folds_imports() -> None:
    title = {"cell_type": "markdown", "id": "00000001", "metadata": {}, "source": ["# Orders\n", "Why."]}
    figure = {
        "output_type": "display_data",
        "metadata": {},
        "data": {pages.PLOTLY: {"data": ["</script>"], "layout": {}}},
    }
    own = {"output_type": "display_data", "metadata": {}, "data": {"application/vnd.trader.run+json": {}}}
    noise = {"output_type": "stream", "name": "stderr", "text": "a warning"}
    code = [cell("#| default_exp x"), cell(IMPORTS), cell("#| export\nx = 1", figure, own, noise)]
    notebook = {"cells": [code[0], title, *code[1:]], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    shown = pages.chapter(pages.survey(), "nbs/trading/01_orders.ipynb", notebook, "trader_lib.trading.orders")["cells"]
    assert [part["source"] for part in shown[1:]] == [IMPORTS, "x = 1"]
    assert re.match(r"# Orders\n\n.*api/trading/orders\.rst.*\n\nWhy\.", shown[0]["source"], re.S)
    assert [part["metadata"]["tags"] for part in shown[1:]] == [["hide-cell"], []]
    (output,) = shown[2]["outputs"]
    assert output["data"]["text/html"].count("</script>") == 1  # the one that ends it


def test_a_diagram_is_html_for_the_sites_own_script() -> None:
    text = "Before.\n```mermaid\nflowchart LR\n    a -->|<b>| c\n```\nAfter.\n```text\nmermaid\n```"
    shown = pages.with_diagrams(text)
    assert '```{raw} html\n<pre class="diagram">flowchart LR\n    a --&gt;|&lt;b&gt;| c</pre>\n```\nAfter.' in shown
    assert shown.endswith("```text\nmermaid\n```")


def test_a_lesson_is_a_page_with_its_file_and_its_command(sources: Path) -> None:
    text = (sources / "course/first_strategy.ipynb").read_text()
    assert "{download}`Download this notebook </trader_lib/course/02_first_strategy.ipynb>`" in text
    assert "`trader course first_strategy`" in text
    for path in (ROOT / "trader_lib/course").glob("*.ipynb"):
        assert (sources / "trader_lib/course" / path.name).read_bytes() == path.read_bytes()
    index = (sources / "tutorials/index.md").read_text()
    assert "| [2 · A first strategy](../course/first_strategy.ipynb) | A strategy is a class:" in index
    site = pages.survey()
    assert (
        pages.at_home(site, f"[a]({site.home}docs/data.html#splits)", "course/own_data")
        == "[a](../docs/data.md#splits)"
    )
    with pytest.raises(pages.SiteError, match=r"links to .*nowhere.*, which is no page"):
        pages.at_home(site, f"[a]({site.home}nowhere.html)", "course/own_data")


def test_long_sentences_are_broken_and_tables_are_not() -> None:
    printed = {"output_type": "stream", "name": "stdout", "text": ["word " * 40]}
    assert 'class="sentences"' in pages.shown_output(printed)["data"]["text/html"]
    value = {"output_type": "execute_result", "metadata": {}, "data": {"text/plain": "<b>" + "word " * 40}}
    assert "&lt;b&gt;" in pages.shown_output(value)["data"]["text/html"]
    table = {"output_type": "stream", "name": "stdout", "text": "\x1b[1m│ a │" + " " * 90 + "│\x1b[0m\r\n"}
    assert pages.shown_output(table)["text"] == "│ a │" + " " * 90 + "│\n"


def test_what_has_no_place_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(pages.SiteError, match=r"docs/new.md has no kind: add it to KINDS"):
        pages.kind_of("docs/new")
    (tmp_path / "nbs/attic").mkdir(parents=True)
    (tmp_path / "nbs/attic/00_x.ipynb").write_text("{}")
    with pytest.raises(pages.SiteError, match="add the room to ROOMS"):
        pages.notebooks(tmp_path)
    bare = {"cells": [cell("x = 1")], "metadata": {}}
    with pytest.raises(pages.SiteError, match="does not begin with a title"):
        pages.chapter(pages.survey(), "nbs/trading/01_orders.ipynb", bare, None)


def test_preparing_again_changes_no_page_and_drops_the_pages_of_what_is_gone(sources: Path) -> None:
    gone, kept = sources / "chapters/trading/gone.md", sources / "chapters/trading/orders.ipynb"
    gone.write_text("# Gone\n")
    before = kept.stat().st_mtime_ns
    pages.prepare(sources)
    assert not gone.exists() and kept.stat().st_mtime_ns == before


def test_the_front_page_says_what_the_readme_says(sources: Path) -> None:
    front = (sources / "index.md").read_text()
    assert "Same strategy, same orders, explained." in front and "sha256:22e6e504c34" in front
    assert "{PROMISE}" not in front and (sources / "docs/images/paper-session-report.png").exists()


@pytest.mark.slow
def test_a_notebook_runs_once_for_each_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    path = tmp_path / "00_x.ipynb"

    def write(source: str) -> None:
        notebook = {"cells": [cell(source)], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        notebook["cells"][0]["execution_count"] = None
        path.write_text(json.dumps(notebook))

    write("import os; print(os.getpid())")
    first, again = pages.executed(path), pages.executed(path)
    assert first["cells"][0]["outputs"][0]["text"] == again["cells"][0]["outputs"][0]["text"]
    write("print('other')")
    assert pages.executed(path)["cells"][0]["outputs"][0]["text"] == "other\n"
    write("raise ValueError('no')")
    with pytest.raises(Exception, match="ValueError"):
        pages.executed(path)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.fixture(scope="module")
def built(sources: Path) -> Path:
    """The site of this repository, without outputs of notebooks; a warning fails."""
    pytest.importorskip("sphinx", reason="The site's requirements are not installed: make docs")
    words = ["-q", "-W", "--keep-going", "-c", str(ROOT / "docs/site"), "-d", str(sources.parent / "doctrees")]
    html = sources.parent / "html"
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *words, str(sources), str(html)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return html


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and writes no line for each."""

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(built: Path) -> Iterator[str]:
    """The site on a free port of this machine, as `make docs-serve` shows it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(built))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright."""
    yield from launched()


@pytest.mark.slow
def test_search_finds_an_identifier_and_no_request_leaves_the_machine(address: str, chromium: Any) -> None:
    tab, asked, failed = chromium.new_page(), [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: failed.append(str(error)))
    for page in ("index.html", "chapters/trading/orders.html", "api/trading/orders.html", "docs/operations.html"):
        tab.goto(f"{address}/{page}", wait_until="networkidle")
    tab.goto(f"{address}/search.html?q=client_order_id")
    tab.wait_for_selector('#search-results li a[href*="api/trading/orders.html"]', timeout=30_000)
    assert not [url for url in asked if not url.startswith((address, "data:"))] and not failed
    tab.close()


@pytest.mark.slow
def test_a_figure_is_drawn_by_the_sites_own_plotly(built: Path, chromium: Any) -> None:
    """The script of the site on a page that holds what a chapter's figure becomes."""
    figure = {"data": {pages.PLOTLY: {"data": [{"y": [1, 3, 2]}], "layout": {"title": {"text": "Equity"}}}}}
    shown = pages.shown_output({"output_type": "display_data", "metadata": {}, **figure})["data"]["text/html"]
    page = built / "figure.html"
    page.write_text(f'<meta charset="utf-8"><script defer src="_static/figures.js"></script>{shown}')
    tab = chromium.new_page()
    tab.goto(page.as_uri())
    tab.wait_for_selector(".plotly-figure .main-svg", timeout=30_000)
    assert "Equity" in tab.inner_text(".plotly-figure")
    tab.close()
    page.unlink()


@pytest.mark.slow
def test_every_lesson_runs_and_its_page_draws_its_figures(tmp_path: Path, chromium: Any) -> None:
    """Of lessons alone, from the cache where `make docs` has run them; links to other pages lead nowhere here."""
    with ThreadPoolExecutor(1) as apart:  # the browser keeps a loop running in this thread
        broken = apart.submit(
            lambda: asyncio.run(pages.execute_all([ROOT / path for path in pages.lessons()], at_once=2))
        )
    assert broken.result() == []
    site, folder = pages.survey(), tmp_path / "pages"
    for path in pages.lessons():
        read = pages.executed(ROOT / path)
        pages.write(folder / f"{site.pages[path]}.ipynb", json.dumps(pages.chapter(site, path, read, None)))
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes((ROOT / path).read_bytes())
    pages.write(folder / "index.md", "# Lessons\n" + pages.toctree([site.pages[path] for path in pages.lessons()]))
    words = ["-q", "-c", str(ROOT / "docs/site"), "-d", str(tmp_path / "doctrees"), str(folder), str(tmp_path / "html")]
    subprocess.run([sys.executable, "-m", "sphinx", *words], check=True, capture_output=True, timeout=600)
    tab, drawn = chromium.new_page(), 0
    for path in pages.lessons():
        tab.goto((tmp_path / "html" / f"{site.pages[path]}.html").as_uri())
        figures = len(tab.query_selector_all(".plotly-figure"))
        tab.wait_for_function(f"document.querySelectorAll('.plotly-figure .main-svg').length >= {figures}")
        assert not tab.query_selector(".output.traceback, .stderr"), path
        download = tab.query_selector("a.download")
        assert download and download.get_attribute("href").endswith(Path(path).name), path
        drawn += figures
    assert drawn >= 10
    tab.close()


@pytest.mark.slow
def test_a_diagram_is_drawn_by_the_sites_own_mermaid(built: Path, chromium: Any) -> None:
    tab, failed = chromium.new_page(), []
    tab.on("pageerror", lambda error: failed.append(str(error)))
    for page in sorted([*(built / "chapters").glob("*/*.html"), *(built / "docs/concepts").glob("*.html")]):
        diagrams = page.read_text(encoding="utf-8").count('<pre class="diagram">')
        if diagrams:
            tab.goto(page.as_uri())
            tab.wait_for_function(f"document.querySelectorAll('pre.diagram svg').length == {diagrams}", timeout=30_000)
            assert not tab.query_selector("pre.diagram .error-icon") and not failed, page
    tab.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        "index",
        "README",
        "chapters/index",
        "course/own_data",
        "course/limits",
        "docs/concepts/order",
        "docs/how-to/cap-a-loss",
        "tutorials/index",
        "chapters/trading/orders",
        "api/index",
        "api/trading/orders",
        "docs/operations",
    ],
)
def test_nothing_is_wider_than_a_phone(built: Path, chromium: Any, page: str) -> None:
    context = chromium.new_context(viewport=PHONE, is_mobile=True, has_touch=True)
    tab = context.new_page()
    tab.goto((built / f"{page}.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    context.close()
