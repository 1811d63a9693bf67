"""Options from settings: the fields of a dataclass, their types, defaults and docstrings are their only declaration.

    BuildOptions = options(BuildSettings, without=["store", "inputs"])

    def build(store: str, inputs: list[str], /, **given: Unpack[BuildOptions]): ...

`given` holds what the user typed and nothing else, so that every default stays where it is declared. The classes that a
dataclass inherits from are the sections of the help.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, Required, TypedDict

from cyclopts import Group, Parameter

from retro.common.settings import default_of, field_docs, is_required, sections, to_plain, type_name

SHORT = {"num_neighbors": "--k", "window_len": "--window", "stop_strings": "--stop"}  # the fields that users type most


def options(*settings: type, without: Iterable[str] = (), defaults: bool = True) -> Any:
    """The options of settings dataclasses, for `**given: Unpack[...]` in the signature of a verb.

    defaults: false says nothing of the defaults, where a verb has others.
    """
    found: dict[str, Any] = {}
    for settings_class, (section, fields) in [(one, part) for one in settings for part in sections(one)]:
        docs, hints = field_docs(settings_class), typing.get_type_hints(settings_class)
        annotated = typing.get_type_hints(settings_class, include_extras=True)
        group = Group(*section_title(section), sort_key=len(found) + 1)
        for field in fields:
            if field.name in without:
                continue
            hint, own = _first(hints[field.name]), getattr(annotated[field.name], "__metadata__", ())
            about = {"group": group, "help": docs.get(field.name), "name": SHORT.get(field.name)}
            if not defaults:
                about["help"] = about["help"].partition(" Default: ")[0]
            if not is_required(field):
                about["show_default"] = (defaults and shown_default(default_of(field))) or False
            if hint == bool | None:
                about["negative"] = f"--no-{field.name.replace('_', '-')}"
            given = Parameter(**{key: value for key, value in about.items() if value is not None})
            found[field.name] = Annotated[Required[hint] if is_required(field) else hint, *own, given]
    return TypedDict("Options", found, total=False)


def taken(given: dict[str, Any], settings: type) -> dict[str, Any]:
    """What was given of one of several settings, taken out of `given`."""
    return {field.name: given.pop(field.name) for field in dataclasses.fields(settings) if field.name in given}


def argument(settings: type, name: str) -> Any:
    """A field of a settings dataclass as a positional argument of a verb."""
    return Annotated[typing.get_type_hints(settings)[name], Parameter(help=field_docs(settings)[name])]


def section_title(settings: type) -> tuple[str, str]:
    """The name of a section and what it holds: ExecutorSettings -> Executor settings."""
    words = re.findall("[A-Z][a-z]*", settings.__name__)
    return " ".join([words[0], *(word.lower() for word in words[1:])]), (settings.__doc__ or "").partition("\n")[0]


def recipe_help(settings: type) -> str:
    """Every setting of a recipe by sections, as Markdown: name, type, sentence and default."""
    docs, hints, lines = field_docs(settings), typing.get_type_hints(settings), []
    for section, fields in sections(settings):
        title, about = section_title(section)
        lines += [f"**{title}.** {about}", ""]
        for field in fields:
            kind = type_name(hints[field.name])
            default = "required" if is_required(field) else f"default: {json.dumps(to_plain(default_of(field)))}"
            told = default == "default: null" and "Default: " in docs[field.name]
            lines.append(f"- `{field.name}` ({kind}): {docs[field.name]}" + (not told) * f" [{default}]")
        lines.append("")
    return "\n".join(lines)


def _first(hint: Any) -> Any:
    """Of several types that Python takes, the first, which is the one of the command line."""
    types = [one for one in typing.get_args(hint) if one is not type(None)]
    return types[0] if isinstance(hint, UnionType) and len(types) > 1 else hint


def shown_default(value: Any) -> str | None:
    """A default as one would type it, such as "1 5 20"; None for what the sentence of an option tells."""
    if value is None or isinstance(value, bool) or value in ([], ()):
        return None
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
