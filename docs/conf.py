"""The documentation: Markdown pages, the API from docstrings, the command line from its own help."""

import sys
from importlib import import_module
from inspect import getdoc, ismodule
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective
from sphinx.util.logging import getLogger

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from retro.cli.reference import reference  # noqa: E402
from retro.version import __version__  # noqa: E402

logger = getLogger(__name__)
project, release = "retro-lm", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme, html_static_path, html_css_files = "furo", ["static"], ["page.css"]
smartquotes = False  # --option stays what it is
html_title = f"retro-lm {release}"
html_show_copyright = html_show_sphinx = html_copy_source = False

myst_heading_anchors = 4
napoleon_custom_sections = [(part, "params_style") for part in ("Matching", "The paper form", "The random start")]
default_role = "literal"  # docstrings write `code`
OF_TRANSFORMERS = (
    "config_class, from_dict, init_weights, tie_weights, validate, validate_architecture, get_input_embeddings"
)
OF_TRANSFORMERS += ", enable_input_require_grads, set_attn_implementation, prepare_inputs_for_generation"
autodoc_default_options = {"members": True, "member-order": "bysource", "exclude-members": OF_TRANSFORMERS}
autodoc_typehints_format, autodoc_preserve_defaults = "short", True
maximum_signature_line_length = 80


class CommandLine(SphinxDirective):
    """`{command-line}`: what each verb says to --help, under a heading of its own."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(reference(), allow_section_headings=True)


PUBLIC = [
    import_module(name) for name in ("retro", "retro.retrofit", "retro.retrieval", "retro.sampling", "retro.evaluation")
]
documented: set[int] = set()


def skip_what_is_there_already(app, what, name, value, skip, options):
    """A name that two packages offer is described once, where it comes first."""
    if what != "module" or skip:
        return None
    seen = id(value) in documented
    documented.add(id(value))
    return seen or None


def check_that_nothing_is_missing(app, env):
    for package in PUBLIC:
        values = {name: getattr(package, name) for name in package.__all__ if name != "__version__"}
        missing = [name for name, value in values.items() if not ismodule(value) and id(value) not in documented]
        if missing:
            logger.warning("docs/api.md has nothing of %s: %s", package.__name__, ", ".join(missing))


def leave_properties(app, what, name, value, options, lines):
    """Napoleon reads "A hash: of what" as a type and its description."""
    if what == "property":
        lines[:] = [*(getdoc(value) or "").splitlines(), ""]


def shorten_signatures(app, what, name, value, options, signature, returned):
    """A default that is made anew for each instance is not Python as it is shown."""
    return signature and signature.replace("<factory>", "..."), returned


def setup(app) -> None:
    app.connect("autodoc-process-signature", shorten_signatures)
    app.connect("autodoc-process-docstring", leave_properties, priority=900)
    app.connect("env-check-consistency", check_that_nothing_is_missing)
    app.add_directive("command-line", CommandLine)
    app.connect("autodoc-skip-member", skip_what_is_there_already)
