"""The documentation: Markdown pages, the API from docstrings, the command line from its own help."""

import sys
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from retro.cli.reference import reference  # noqa: E402
from retro.version import __version__  # noqa: E402

project, release = "retro-lm", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme, html_static_path, html_css_files = "furo", ["static"], ["page.css"]
smartquotes = False  # --option stays what it is
html_title = f"retro-lm {release}"
html_show_copyright = html_show_sphinx = html_copy_source = False

myst_heading_anchors = 4
napoleon_custom_sections = [("The pointer", "params_style"), ("The paper form", "params_style")]
default_role = "literal"  # docstrings write `code`
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
maximum_signature_line_length = 80


class CommandLine(SphinxDirective):
    """`{command-line}`: what each verb says to --help, under a heading of its own."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(reference(), allow_section_headings=True)


documented: set[int] = set()


def skip_what_is_there_already(app, what, name, value, skip, options):
    """A name that two packages offer is described once, where it comes first."""
    if what != "module" or skip:
        return None
    seen = id(value) in documented
    documented.add(id(value))
    return seen or None


def setup(app) -> None:
    app.add_directive("command-line", CommandLine)
    app.connect("autodoc-skip-member", skip_what_is_there_already)
