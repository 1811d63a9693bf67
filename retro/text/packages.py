"""The documentation of installed packages as documents; nothing of them is imported."""

from __future__ import annotations

import ast
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from retro.text.documents import Document, has_surrogates

log = logging.getLogger(__name__)


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
    if has_surrogates(docstring):
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
