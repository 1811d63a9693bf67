"""The verbs and their options for a page of the docs, written from the parsers: python -m retro.cli.reference"""

import re

from cyclopts.docs import generate_markdown_docs

from retro.cli import app


def reference() -> str:
    """Every verb with its options, as Markdown under headings of the second level."""
    text = generate_markdown_docs(app, heading_level=2, no_root_title=True, generate_toc=False)
    sections = re.split(r"(?m)^(?=##+ retro )", text)
    return "\n\n".join(section.strip() + _epilogue(section) for section in sections) + "\n"


def _epilogue(section: str) -> str:
    """What a verb says behind its options: the settings of a recipe."""
    heading = re.match(r"##+ retro (.*)", section)
    verb = app
    for name in heading[1].split() if heading else ():
        verb = verb[name]
    return "\n\n" + verb.help_epilogue.strip() if verb.help_epilogue else ""


if __name__ == "__main__":
    print(reference(), end="")
