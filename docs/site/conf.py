"""How Sphinx builds the site from the pages that `pages.py` prepared."""

from __future__ import annotations

import configparser
import importlib
import re
from pathlib import Path
from typing import Any

import plotly
from sphinx.application import Sphinx

HERE = Path(__file__).parent
parser = configparser.ConfigParser(delimiters=["="])
parser.read(HERE.parents[1] / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

project, release, version = settings["title"], settings["version"], settings["version"]
project_copyright, author = settings["copyright"], settings["author"]
extensions = ["myst_nb", "sphinx.ext.autodoc"]
exclude_patterns = ["trader_lib/**"]  # notebooks that pages offer for download
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}

nb_execution_mode = "off"  # pages.py runs the notebooks, once for each content
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "Show the imports", "Hide the imports"
nb_render_text_lexer = "none"
myst_heading_anchors = 6
myst_enable_extensions: list[str] = []
suppress_warnings = ["ref.python"]  # a type hint `type` that might also mean one of our attributes of that name

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "pydata_sphinx_theme"
html_title = settings["title"]
html_baseurl = f"{settings['doc_host']}{settings['doc_baseurl']}/"
html_static_path = [str(HERE / "static"), str(Path(plotly.__file__).parent / "package_data/plotly.min.js")]
html_css_files = ["site.css"]
html_js_files = [("figures.js", {"defer": "defer"})]
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {"index": []}
html_theme_options = {
    "github_url": settings["git_url"],
    "search_as_you_type": True,
    "show_nav_level": 1,
    "navigation_with_keys": True,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-light",
    "pygments_dark_style": "a11y-dark",
}


def as_text(paragraph: list[str]) -> list[str]:
    """Plain words as reStructuredText: what has a meaning there is escaped, names in backticks stay code."""
    parts = re.split(r"(`[^`]+`)", "\n".join(paragraph))
    code = [f"`{part}`" if at % 2 else re.sub(r"([\\*`|_<])", r"\\\1", part) for at, part in enumerate(parts)]
    return "".join(code).split("\n")


def plain_docstrings(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are sentences, not reStructuredText; a paragraph that begins with `Example:` is code."""
    paragraphs = [part.split("\n") for part in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")) if part.strip()]
    lines[:] = []
    for paragraph in paragraphs:
        if re.match(r"\s*(Example:|>>>)|    ", paragraph[0]):
            lines += ["::", "", *("    " + line for line in paragraph), ""]
        else:
            lines += [*as_text([line.strip() for line in paragraph]), ""]


def setup(app: Sphinx) -> None:
    for path in sorted((HERE.parents[1] / "trader_lib").glob("*/[!_]*.py")):
        importlib.import_module(f"trader_lib.{path.parent.name}.{path.stem}")  # else autodoc imports each a second time
    app.connect("autodoc-process-docstring", plain_docstrings)
