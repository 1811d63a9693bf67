"""Settings of a run: typed dataclasses are the only schema; a run = defaults <- one YAML file <- key=value.

    settings = load_settings(TrainSettings, "train_small.yaml", ["lr=1e-3", "model.hidden_size=256"])
    save_settings(settings, "out/config.yaml")

Any dataclass will do, nested ones included; a field of type `dict[str, Any]` takes whatever keys it is given.
"""

import argparse
import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

Settings = TypeVar("Settings")
_INT, _DECIMAL, _MOST_DEPTH = "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)"), 20
_NOT_DECIMAL = re.compile(r"\s*[-+]?(0[0-9_]+|0[xob][0-9a-f_]+|[0-9]+(:[0-9]+)+)(\.[0-9]*)?\s*", re.IGNORECASE)
_PACKAGE = Path(__file__).resolve().parents[1]


def load_settings(
    settings_class: type[Settings], path: str | Path | None = None, overrides: Sequence[str] = ()
) -> Settings:
    """An instance of `settings_class` from its defaults, one YAML file and `key=value` strings with dotted keys.

    Raises ValueError, in one sentence, for an unknown key (the nearest name is suggested), a value of the wrong type
    (field, value and type are named), a missing required field and a file that is not a YAML mapping.
    """
    values = read_yaml(path) if path is not None else {}
    for override in overrides:
        _put(values, override)
    return _build(settings_class, values, "")


def save_settings(settings: Any, path: str | Path) -> None:
    """Write the resolved settings as YAML, aside and then renamed; `load_settings` reads them back equal."""
    from retro.common.files import write_with

    text = yaml.safe_dump(to_plain(settings), sort_keys=False)
    write_with(Path(path), lambda handle: handle.write(text.encode("utf-8")) and None)


def to_plain(settings: Any) -> Any:
    """Settings as dicts, lists, strings and numbers, in the order of the fields."""
    if dataclasses.is_dataclass(settings):
        return {field.name: to_plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}
    if isinstance(settings, Mapping):
        return {str(key): to_plain(value) for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [to_plain(value) for value in settings]
    return str(settings) if isinstance(settings, Path) else settings


def differing(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted names under which two plain settings differ, sorted."""
    names: list[str] = []
    for key in sorted({*one, *other}):
        left, right = one.get(key), other.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            names += differing(left, right, f"{prefix}{key}.")
        elif left != right:
            names.append(f"{prefix}{key}")
    return names


def sections(settings_class: type) -> list[tuple[type, list[dataclasses.Field]]]:
    """The fields of a dataclass below the class that declares each: its own first, then those it inherits."""
    found: dict[type, list[dataclasses.Field]] = {}
    for field in dataclasses.fields(settings_class):
        owner = next(one for one in settings_class.__mro__ if field.name in one.__dict__.get("__annotations__", {}))
        found.setdefault(owner, []).append(field)
    return sorted(found.items(), key=lambda item: item[0] is not settings_class)


def field_docs(settings_class: type) -> dict[str, str]:
    """What the docstrings of a dataclass, and of those it inherits from, say of each field, on one line."""
    from docstring_parser import DocstringStyle, parse

    docs: dict[str, str] = {}
    for one in reversed(settings_class.__mro__[:-1]):
        params = parse(one.__doc__ or "", DocstringStyle.GOOGLE).params
        docs |= {param.arg_name: " ".join((param.description or "").split()) for param in params}
    return docs


def is_required(field: dataclasses.Field) -> bool:
    """Whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field that has one."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def packaged_configs() -> list[Path]:
    """The configurations of this very copy of the library: inside the package where it is installed, else beside it."""
    folder = next((one for one in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if one.is_dir()), None)
    return [] if folder is None else sorted(folder.glob("*.yaml"))


def find_config(name: str | Path, verb: str = "") -> Path:
    """The file of a configuration given by path, or by the name of one that comes with the library (`train_small`).

    The first word of a packaged configuration is the verb that reads it: with `verb`, only those are offered.
    Raises FileNotFoundError that lists the packaged names.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = {file.stem: file for file in packaged_configs() if file.stem.startswith(verb)}
    key = str(name).removesuffix(".yaml")
    if key not in packaged:
        raise FileNotFoundError(
            f"{name}: no such file, and no packaged configuration; these are packaged: {', '.join(packaged)}"
        )
    return packaged[key]


def unknown_name(name: str, known: Iterable[str], what: str = "setting") -> str:
    """The sentence for a name that nobody knows, with the nearest known one."""
    known = sorted(known)
    near = difflib.get_close_matches(
        name.rpartition(".")[2], [key.rpartition(".")[2] for key in known], n=1, cutoff=0.5
    )
    prefix = name[: len(name) - len(name.rpartition(".")[2])]
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
    return f"{name}: unknown {what}; {hint}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file (empty for an empty file); ValueError names the file and the line that is wrong."""
    from retro.common.files import read_text

    text = read_text(path)
    try:
        values = yaml.load(text, _StrictYaml)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(
            f"{path}{line}: not YAML ({getattr(error, 'problem', None) or 'unreadable'}); mend the file"
        ) from None
    except ValueError as error:  # a number of too many digits, a date that is none
        raise ValueError(f"{path}: not YAML ({error}); mend the file") from None
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not a mapping; write lines such as 'lr: 1e-3'")
    return values or {}


class _StrictYaml(yaml.SafeLoader):
    """Refuses what would be read as something else than it seems: names given twice, numbers that are not decimal,
    aliases; and values nested out of all measure."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self.depth += 1
        if isinstance(event, yaml.AliasEvent):
            raise _refused(event, f"*{event.anchor} is an alias; write the value itself")
        if self.depth > _MOST_DEPTH:
            raise _refused(event, f"values are nested more than {_MOST_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode) and node.tag == _INT and not _DECIMAL.fullmatch(node.value):
            raise _refused(node, f"{node.value} is no decimal number; write one, without zeros in front")
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, _ in node.value:
                if key.tag != "tag:yaml.org,2002:str":
                    raise _refused(key, "a name is no text; quote it")
                if str(key.value) in seen:
                    raise _refused(key, f"{key.value} is given twice; leave one out")
                seen.add(str(key.value))
        return node


def _refused(at: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _put(values: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value` in nested dicts; the value stays text, the field's type reads it later."""
    key, equals, value = override.partition("=")
    key = key.strip().removeprefix("--")
    if not equals or not key:
        raise ValueError(f"{override!r} is not key=value; write for example lr=1e-3")
    *path, last = key.split(".")
    for name in path:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            inner = values[name] = {}
        values = inner
    values[last] = value


def _build(settings_class: type, values: Mapping[str, Any], prefix: str) -> Any:
    """An instance of a (nested) dataclass from a mapping, every field read by its type."""
    hints = typing.get_type_hints(settings_class)
    fields = {field.name: field for field in dataclasses.fields(settings_class) if field.init}
    for key in values:
        if key not in fields:
            raise ValueError(unknown_name(f"{prefix}{key}", [f"{prefix}{name}" for name in fields]))
    given = {name: _read(hints[name], value, f"{prefix}{name}") for name, value in values.items()}
    for name, field in fields.items():
        if is_required(field) and name not in given:
            raise ValueError(f"{prefix}{name} is required; add {prefix}{name}=... or a line in the configuration file")
    return settings_class(**given)


def _read(hint: Any, value: Any, name: str) -> Any:
    """`value` as the type of the field `name`."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    nested = next((option for option in options if dataclasses.is_dataclass(option)), None)
    if nested is not None and isinstance(value, Mapping):
        return _build(nested, value, f"{name}.")
    if value is None and not {type(None), Any} & set(options):
        raise ValueError(f"{name}: null is not {type_name(hint)}; leave it out for the default")
    for text in _texts(value) if {int, float, dict} & {typing.get_origin(one) or one for one in options} else ():
        if _NOT_DECIMAL.fullmatch(text):
            raise ValueError(f"{name}: {text!r} is no decimal number; write one, without zeros in front")
    try:
        return _parser(hint).parse_object({"value": value}).value
    except argparse.ArgumentError:
        example = _example(hint, name)
        raise ValueError(f"{name}: {value!r} is not {type_name(hint)}; write for example {example}") from None


def _texts(value: Any) -> list[str]:
    """The texts in a value that is to be numbers."""
    if isinstance(value, Mapping):
        return [text for one in value.values() for text in _texts(one)]
    return [value] if isinstance(value, str) else []


@functools.cache
def _parser(hint: Any) -> Any:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    Path: "a path",
}
_EXAMPLES = {int: "4", float: "1e-3", bool: "true", str: "text", dict: "{key: value}", list: "[1, 2]", tuple: "[1, 2]"}


def type_name(hint: Any) -> str:
    """A type in words: int -> a whole number, Literal -> its choices."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(arg) for arg in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)} values, each {' / '.join(dict.fromkeys(type_name(arg) for arg in args))}"
    if origin in (list, tuple, Sequence):
        return f"a list of values, each {type_name(args[0])}"
    if origin is dict or hint is dict:
        return "a mapping"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _example(hint: Any, name: str) -> str:
    """`field=value` with a value that the type accepts."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _example(next(arg for arg in args if arg is not type(None)), name)
    if typing.get_origin(hint) is typing.Literal:
        return f"{name}={args[0]}"
    if typing.get_origin(hint) is tuple:
        return f"{name}={json.dumps([1] * len(args))}"
    return f"{name}={_EXAMPLES.get(typing.get_origin(hint) or hint, '...')}"
