"""The page of promises names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/promises.md").read_text(encoding="utf-8")


def test_each_promise_names_its_test():
    lines = [line for line in PAGE.splitlines() if line.startswith("|") and not line.startswith(("|---", "| promise"))]
    named = [re.fullmatch(r"\| \S.* \| `(tests/\S+\.py)::(test_\w+)` \|", line) for line in lines]
    assert len(lines) > 30 and all(named), [line for line, found in zip(lines, named, strict=True) if not found]
    for found in named:
        tree = ast.parse((ROOT / found[1]).read_text(encoding="utf-8"))
        assert found[2] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, found[0]
