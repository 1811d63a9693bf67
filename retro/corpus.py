"""Documents in: JSON Lines, Parquet, plain text, a `datasets` name or folder, the documentation of installed packages.

Every record read is accounted for: it becomes a `Document` (with empty text if it has none to offer, as a blank
line), or a `Reject` that names file, line and reason.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import logging
import os
import re
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson.gz": "jsonl",
    ".json.gz": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
}
_BOM = b"\xef\xbb\xbf"
_MOST_GZIP_PIECES = 64  # every piece of a compressed file is decompressed from the file's beginning


@dataclass(frozen=True)
class Document:
    """One document; `place` says where it was read ("file:line")."""

    id: str
    text: str
    title: str = ""
    source: str = ""
    date: str | None = None
    extra: dict = field(default_factory=dict, hash=False)
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class Reject:
    """A record that is no document: where it stands (line from 1), why, and its beginning."""

    file: str
    line: int
    reason: str
    raw: str = ""


@dataclass(frozen=True)
class Input:
    """One input, frozen: a name without absolute paths, what kind it is, how large, and its checksum.

    kind is "jsonl", "parquet", "text", "dataset" or "package"; path is where it is now (for a dataset, what to load).
    """

    name: str
    kind: str
    path: str
    split: str = ""

    def record(self) -> dict[str, Any]:
        """What a manifest keeps: name, kind, bytes and sha256 (of a dataset or package: of its contents)."""
        return split_input(self)[0]


@dataclass(frozen=True)
class Piece:
    """A range of one input's records.

    start, stop: bytes of a plain JSONL file, lines of a compressed one, row groups of a Parquet file, rows of a
    dataset; None is the end. first: the number of the first record. bytes: about how much there is to read.
    """

    item: Input
    start: int = 0
    stop: int | None = None
    first: int = 1
    bytes: int = 0


def read_documents(
    inputs: Sequence[str], on_bad: Literal["error", "reject"] = "error", text_field: str = "text"
) -> Iterator[Document | Reject]:
    """All records of `inputs`, in the order of their frozen names.

    Arguments:
        inputs: files (.jsonl, .json, .ndjson, each also .gz; .parquet; .txt, .md, .rst), folders of those, a
            `datasets` name or saved folder (optionally ":split", else "train"), or "package:NAME" for an installed
            package's documentation.
        on_bad: "error" raises ValueError at the first bad record, naming file and line; "reject" yields it as a
            `Reject`.
        text_field: the field or column that holds the text.

    A document without an id is called "<file>:<line>"; fields other than id, text, title, source and date go to
    `extra`.
    """
    if on_bad not in ("error", "reject"):
        raise ValueError(f"on_bad must be 'error' or 'reject', not {on_bad!r}")
    for item in expand_inputs(inputs):
        for record in read_input(item, text_field):
            if isinstance(record, Reject) and on_bad == "error":
                raise ValueError(f"{record.file}:{record.line}: {record.reason}; mend or remove it")
            yield record


def expand_inputs(inputs: Sequence[str]) -> list[Input]:
    """The frozen list: folders opened, names relative to the files' common folder, sorted; ValueError if empty."""
    if isinstance(inputs, (str, os.PathLike)):
        inputs = [inputs]
    found: list[Input] = []
    for given in map(os.fspath, inputs):
        found += _expand_one(given)
    if not found:
        raise ValueError("no input was given; name at least one file, folder, dataset or package:NAME")
    found = _relative_names(found)
    name, count = Counter(item.name for item in found).most_common(1)[0]
    if count > 1:
        raise ValueError(f"the input {name} is given twice; name it once")
    return sorted(found, key=lambda item: item.name)


def read_input(item: Input, text_field: str = "text") -> Iterator[Document | Reject]:
    """All records of one frozen input."""
    return read_piece(Piece(item), text_field)


def read_piece(piece: Piece, text_field: str = "text") -> Iterator[Document | Reject]:
    """The records of a piece, as `read_input` gives them in their place."""
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text, "dataset": _read_dataset}
    if piece.item.kind == "package":
        return iter(package_documents([piece.item.path]))
    return readers[piece.item.kind](piece, text_field)


def split_input(item: Input, piece_bytes: int | None = None) -> tuple[dict[str, Any], list[Piece]]:
    """An input's record for a manifest, and its pieces in order; all pieces together hold every record once.

    piece_bytes: a piece ends at the first border between records after so many bytes; None is one piece. Text files
    and packages are one piece always. Reads the whole input once; ValueError if it is damaged.
    """
    size, digest, marks = _SCANS[item.kind](item, piece_bytes or sys.maxsize)
    pieces = [
        Piece(item, start, stop, first, stop_byte - start_byte)
        for (start, first, start_byte), (stop, _, stop_byte) in zip(marks, marks[1:], strict=False)
    ]
    return {"name": item.name, "kind": item.kind, "bytes": size, "sha256": digest}, pieces


# Inputs


def _kind_of_file(path: str) -> str | None:
    name = os.path.basename(path).lower()
    return next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)), None)


def _expand_one(given: str) -> list[Input]:
    if given.startswith("package:"):
        return [Input(given, "package", given.removeprefix("package:"))]
    if os.path.isfile(given):
        kind = _kind_of_file(given)
        if kind is None:
            raise ValueError(f"{given} is of no known kind; known endings are {', '.join(_SUFFIXES)}")
        return [Input(os.path.abspath(given), kind, given)]
    path, _, split = given.partition(":") if not os.path.exists(given) else (given, "", "")
    if os.path.isdir(path):
        if any(os.path.exists(os.path.join(path, name)) for name in ("dataset_info.json", "dataset_dict.json")):
            return [Input(os.path.abspath(given), "dataset", path, split)]
        if not split:
            return _expand_folder(path)
    if _kind_of_file(given) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", given):
        raise FileNotFoundError(f"{given} does not exist")
    return [Input(given, "dataset", path, split)]


def _expand_folder(folder: str) -> list[Input]:
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(parent, name)
            if (kind := _kind_of_file(name)) and not name.startswith("."):
                found.append(Input(os.path.abspath(path), kind, path))
    if not found:
        raise ValueError(f"the folder {folder} holds no document files; known endings are {', '.join(_SUFFIXES)}")
    return found


def _raise(error: OSError) -> None:
    raise error


def _relative_names(found: list[Input]) -> list[Input]:
    """Absolute names cut to what follows their common folder, with forward slashes."""
    local = [item.name for item in found if os.path.isabs(item.name)]
    common = os.path.commonpath([os.path.dirname(name) for name in local]) if local else ""

    def relative(item: Input) -> str:
        return Path(item.name).relative_to(common).as_posix() if os.path.isabs(item.name) else item.name

    return [Input(relative(item), item.kind, item.path, item.split) for item in found]


def _file_digest(paths: Iterable[str], names: Sequence[str] = ()) -> str:
    digest = hashlib.sha256("".join(f"{name}\n" for name in names).encode())
    for path in paths:
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# Pieces: (bytes, sha256, marks) of an input. A mark is where a piece begins, as its `start`, the number of its first
# record and the bytes before it; the last mark is the end.

_Mark = tuple[int | None, int, int]


def _scan_whole(item: Input, piece_bytes: int) -> tuple[int, str, list[_Mark]]:
    size = os.path.getsize(item.path)
    return size, _file_digest([item.path]), [(0, 1, 0), (None, 1, size)]


def _scan_package(item: Input, piece_bytes: int) -> tuple[int, str, list[_Mark]]:
    modules = package_modules(item.path)
    names, paths = [name for name, _ in modules], [str(path) for _, path in modules]
    size = sum(map(os.path.getsize, paths))
    return size, _file_digest(paths, names), [(0, 1, 0), (None, 1, size)]


def _scan_jsonl(item: Input, piece_bytes: int) -> tuple[int, str, list[_Mark]]:
    if _is_gzip(item.path):
        return _scan_gzip(item, piece_bytes)
    digest, size, line = hashlib.sha256(), 0, 1
    marks: list[_Mark] = [(0, 1, 0)]
    with open(item.path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
            begin = 0
            while (end := block.find(b"\n", max(marks[-1][2] + piece_bytes - size - 1, begin))) >= 0:
                line += block.count(b"\n", begin, end + 1)
                begin = end + 1
                marks.append((size + begin, line, size + begin))
            line += block.count(b"\n", begin)
            size += len(block)
    return size, digest.hexdigest(), _ended(marks, size, line, size)


def _scan_gzip(item: Input, piece_bytes: int) -> tuple[int, str, list[_Mark]]:
    marks: list[_Mark] = [(0, 1, 0)]
    line = size = 0
    try:
        with gzip.open(item.path, "rb") as handle:
            for line, raw in enumerate(handle, start=1):
                size += len(raw)
                if size - marks[-1][2] >= piece_bytes:
                    marks.append((line, line + 1, size))
    except _GZIP_ERRORS as error:
        raise _damaged(item, line + 1, error) from None
    step = -(-len(marks) // _MOST_GZIP_PIECES)
    marks = _ended(marks[::step], line, line + 1, size)
    return os.path.getsize(item.path), _file_digest([item.path]), marks


def _scan_parquet(item: Input, piece_bytes: int) -> tuple[int, str, list[_Mark]]:
    import pyarrow.parquet as pq

    marks: list[_Mark] = [(0, 1, 0)]
    group, row, size = 0, 1, 0
    with _readable_parquet(item):
        metadata = pq.ParquetFile(item.path).metadata
        for group in range(1, metadata.num_row_groups + 1):
            row += metadata.row_group(group - 1).num_rows
            size += metadata.row_group(group - 1).total_byte_size
            if size - marks[-1][2] >= piece_bytes:
                marks.append((group, row, size))
    return os.path.getsize(item.path), _file_digest([item.path]), _ended(marks, group, row, size)


def _scan_dataset(item: Input, piece_bytes: int) -> tuple[int, str, list[_Mark]]:
    digest, size, row = hashlib.sha256(), 0, 0
    marks: list[_Mark] = [(0, 1, 0)]
    for row, record in enumerate(_load_dataset(item), start=1):
        line = json.dumps(record, sort_keys=True, default=str).encode("ascii")
        digest.update(line + b"\n")
        size += len(line) + 1
        if size - marks[-1][2] >= piece_bytes:
            marks.append((row, row + 1, size))
    return size, digest.hexdigest(), _ended(marks, row, row + 1, size)


def _ended(marks: list[_Mark], stop: int, number: int, size: int) -> list[_Mark]:
    """Marks with the end of the input, unless the last piece ends there."""
    return marks if len(marks) > 1 and marks[-1][0] == stop else [*marks, (stop, number, size)]


_SCANS = {
    "jsonl": _scan_jsonl,
    "parquet": _scan_parquet,
    "text": _scan_whole,
    "dataset": _scan_dataset,
    "package": _scan_package,
}


# Records


def document_of(record: Any, place: tuple[str, int], text_field: str = "text") -> Document | Reject:
    """One record (a mapping) to a document, or the reason why not."""
    file, line = place
    if not isinstance(record, dict):
        return Reject(
            file, line, f"the record is a {type(record).__name__}, not an object with the field {text_field!r}"
        )
    if text_field not in record:
        return Reject(
            file, line, f"the record has no field {text_field!r} (it has {', '.join(sorted(record)) or 'none'})"
        )
    text = record[text_field]
    if not isinstance(text, str):
        return Reject(file, line, f"the field {text_field!r} is a {type(text).__name__}, not a string")
    if _has_surrogates(text):
        return Reject(file, line, f"the field {text_field!r} is invalid UTF-8 (it holds a lone surrogate)")

    def read(name: str) -> str:
        value = record.get(name)
        return "" if value is None else str(value).encode("utf-8", "replace").decode("utf-8")

    known = {text_field, "id", "title", "source", "date"}
    extra = {key: value for key, value in record.items() if key not in known}
    where = f"{file}:{line}"
    return Document(
        read("id") or where, text, read("title"), read("source"), read("date") or None, json_safe(extra), place=where
    )


def json_safe(value: Any) -> Any:
    """A copy of `value` that JSON can hold; what it cannot (dates, bytes) becomes its string."""
    return json.loads(json.dumps(value, default=str))


def _has_surrogates(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


_GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)


def _is_gzip(path: str) -> bool:
    return path.lower().endswith(".gz")


def _damaged(item: Input, line: int, error: Exception) -> ValueError:
    return ValueError(f"{item.name}:{line}: the compressed file is damaged ({error}); restore it from a copy")


def _read_jsonl(piece: Piece, text_field: str) -> Iterator[Document | Reject]:
    item, line = piece.item, piece.first - 1
    try:
        for line, raw in enumerate(_lines(piece), start=piece.first):
            yield _record_of_line(raw.removeprefix(_BOM) if line == 1 else raw, (item.name, line), text_field)
    except _GZIP_ERRORS as error:
        raise _damaged(item, line + 1, error) from None


def _lines(piece: Piece) -> Iterator[bytes]:
    """The lines of a piece; ValueError if it does not end where it ended when the input was split."""
    path, at, stop = piece.item.path, piece.start, piece.stop
    with gzip.open(path, "rb") if _is_gzip(path) else open(path, "rb") as handle:
        if _is_gzip(path):
            for raw in islice(handle, at, stop):
                at += 1
                yield raw
        else:
            handle.seek(at)
            while (stop is None or at < stop) and (raw := handle.readline()):
                at += len(raw)
                yield raw
    if stop not in (None, at):
        raise ValueError(f"{piece.item.name} has changed since the work began; start again")


def _record_of_line(raw: bytes, place: tuple[str, int], text_field: str) -> Document | Reject:
    file, line = place
    shown = raw[:200].decode("utf-8", "replace").rstrip("\r\n")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Reject(file, line, f"the line is invalid UTF-8 (byte {error.start + 1})", shown)
    if not text.strip():
        return Document(f"{file}:{line}", "", place=f"{file}:{line}")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of more than 4300 digits is a plain ValueError
        return Reject(file, line, f"the line is not JSON ({error})", shown)
    found = document_of(record, place, text_field)
    return Reject(found.file, found.line, found.reason, shown) if isinstance(found, Reject) else found


def _read_parquet(piece: Piece, text_field: str) -> Iterator[Document | Reject]:
    import pyarrow.parquet as pq

    item, row = piece.item, piece.first - 1
    with _readable_parquet(item):
        file = pq.ParquetFile(item.path)
        groups = list(range(file.num_row_groups))[piece.start : piece.stop]
        for batch in file.iter_batches(batch_size=1024, row_groups=groups):
            for record in _records_of_batch(batch):
                row += 1
                if isinstance(record, UnicodeDecodeError):
                    yield Reject(item.name, row, "the row is invalid UTF-8")
                else:
                    yield document_of(record, (item.name, row), text_field)


@contextmanager
def _readable_parquet(item: Input) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:  # a damaged page or footer is an OSError that names no file
        raise ValueError(f"{item.name} is not a readable Parquet file ({error}); restore it from a copy") from None


def _records_of_batch(batch: Any) -> list[Any]:
    """The rows of an Arrow batch; in place of a row that is invalid UTF-8, its error."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [error]
        return [record for row in range(batch.num_rows) for record in _records_of_batch(batch.slice(row, 1))]


def _read_text(piece: Piece, text_field: str) -> Iterator[Document | Reject]:
    item = piece.item
    raw = Path(item.path).read_bytes().removeprefix(_BOM)
    try:
        yield Document(item.name, raw.decode("utf-8"), place=item.name)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        yield Reject(item.name, line, f"the line is invalid UTF-8 (byte {error.start + 1} of the file)")


def _load_dataset(item: Input) -> Any:
    import datasets

    try:
        saved = os.path.isdir(item.path)
        found = datasets.load_from_disk(item.path) if saved else datasets.load_dataset(item.path)
    except Exception as error:  # datasets raises many kinds: not found, offline, no permission, bad script
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{item.path} is no file or folder, and no dataset that can be loaded ({reason})") from None
    if isinstance(found, dict):
        split = item.split or "train"
        if split not in found:
            raise ValueError(
                f"the dataset {item.path} has no split {split!r}; it has {', '.join(found)}: write name:split"
            )
        return found[split]
    return found


def _read_dataset(piece: Piece, text_field: str) -> Iterator[Document | Reject]:
    found = _load_dataset(piece.item)
    rows = range(len(found))[piece.start : piece.stop]
    for row, record in enumerate(found.select(rows), start=piece.first):
        yield document_of(dict(record), (piece.item.name, row), text_field)


# The documentation of installed packages


def package_documents(packages: Sequence[str], min_chars: int = 200) -> Iterator[Document]:
    """Docstrings of installed packages, read with `ast` from their files; nothing is imported.

    One module is one document, except in transformers, where one model family (transformers.models.<family>) is
    one. Title and id are the qualified name. A document lists, in the order of the file, each module, class, function
    and method that has a docstring, with its signature. Tests and documents below `min_chars` characters are left out.

    Raises ValueError if a package is not installed.
    """
    for package in packages:
        groups: dict[str, list[tuple[str, Path]]] = {}
        for name, path in package_modules(package):
            groups.setdefault(_document_name(name), []).append((name, path))
        for title in sorted(groups):
            text = "\n\n".join(part for name, path in groups[title] if (part := _module_text(name, path)))
            if len(text) >= min_chars:
                yield Document(title, text, title=title, source=package, place=f"package:{title}")


def package_modules(package: str) -> list[tuple[str, Path]]:
    """Qualified names and files of a package's modules, sorted, tests left out; nothing is imported."""
    root = _package_root(package)
    if root.is_file():
        return [(package, root)]
    modules = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if any(
            re.fullmatch(r"tests?|testing|_?test_.*|.*_tests?|conftest|_vendor|__pycache__", part) for part in parts
        ):
            continue
        modules.append((".".join([package, *(part for part in parts if part != "__init__")]), path))
    return sorted(modules)


def _package_root(package: str) -> Path:
    """Where a top-level package or module lies on sys.path, without importing it."""
    from importlib.machinery import PathFinder

    spec = PathFinder.find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise ValueError(f"the package {package!r} is not installed (give its import name, as in package:transformers)")
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    if spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"the package {package!r} has no Python source to read; name another one")
    return Path(spec.origin)


def _document_name(module: str) -> str:
    """The document a module belongs to: its model family in transformers.models, else itself."""
    parts = module.split(".")
    family = parts[:2] == ["transformers", "models"] and len(parts) > 2
    return ".".join(parts[:3]) if family else module


def _module_text(name: str, path: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError) as error:
        log.warning("%s is left out: it cannot be parsed (%s)", path.name, error)
        return ""
    parts = [part for node in _documented(tree) if (part := _node_text(node, name))]
    return "\n\n".join(parts)


def _documented(node: ast.AST, prefix: str = "") -> Iterator[tuple[ast.AST, str]]:
    """The module, then its classes and functions in the order of the file, with their dotted names inside it."""
    yield node, prefix
    for child in getattr(node, "body", []):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = f"{prefix}.{child.name}" if prefix else child.name
            yield from _documented(child, inner) if isinstance(child, ast.ClassDef) else [(child, inner)]


def _node_text(documented: tuple[ast.AST, str], module: str) -> str:
    node, name = documented
    docstring = ast.get_docstring(node) or ""  # type: ignore[arg-type]
    if _has_surrogates(docstring):
        docstring = docstring.encode("utf-8", "replace").decode("utf-8")
    if isinstance(node, ast.Module):
        return f"{module}\n\n{docstring}".strip() if docstring else ""
    if not docstring:
        return ""
    return f"{_signature(node, name)}\n\n{docstring}"


def _signature(node: Any, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {name}({ast.unparse(node.args)}){returns}"
