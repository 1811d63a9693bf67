"""Imports flow one way, and `import retro` is quick."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# what each room of the house may import of the house; a room is the longest prefix that matches
MAY_IMPORT = {
    "retro.corpus": set(),
    "retro.config": {"retro.settings"},
    "retro.settings": set(),
    "retro.padding": set(),
    "retro.pretrained": set(),
    "retro.products": set(),
    "retro.modules": set(),
    "retro.tokenizer": {"retro.corpus"},
    "retro.retrieval": {"retro.corpus", "retro.tokenizer", "retro.pretrained", "retro.products"},
    "retro.cache": {"retro.modules"},
    "retro.model": {"retro.cache", "retro.config", "retro.modules", "retro.padding", "retro.generation"},
    "retro.generation": {"retro.cache", "retro.retrieval"},
    "retro.retrofit": {
        "retro.cache",
        "retro.config",
        "retro.modules",
        "retro.padding",
        "retro.pretrained",
        "retro.generation",
    },
    "retro.data": {"retro.retrieval"},
    "retro.prompts": set(),
    "retro.scaling": {"retro.evaluation", "retro.model"},
    "retro.attribution": {"retro.retrieval", "retro.evaluation", "retro.generation", "retro.padding"},
    "retro.evaluation": {
        "retro.attribution",
        "retro.corpus",
        "retro.data",
        "retro.modules",
        "retro.padding",
        "retro.products",
        "retro.provenance",
        "retro.retrieval",
        "retro.retrofit",
        "retro.settings",
    },
    "retro.provenance": {"retro.retrieval"},
    "retro.serve": {"retro.attribution", "retro.padding", "retro.provenance", "retro.retrieval"},
}
HEAVY = {"torch", "transformers", "scann", "faiss", "datasets", "pyarrow", "accelerate"}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    return max((r for r in MAY_IMPORT if (module + ".").startswith(r + ".")), key=len, default=module)


@pytest.mark.parametrize("path", sorted((ROOT / "retro").rglob("*.py")), ids=module_name)
def test_imports_flow_one_way(path):
    here = room(module_name(path))
    for name in imports(path):
        assert not name.startswith(("train", "retro.train", "retro.configs")), "the library never imports its recipes"
        if name.startswith("retro.") and here in MAY_IMPORT:
            assert room(name) in MAY_IMPORT[here] | {here}, f"{module_name(path)} imports {name}"


def test_the_command_line_imports_nothing_heavy():
    files = (ROOT / "retro" / "cli").glob("*.py")
    names = {name.split(".")[0] for file in files for name in imports(file, top_level_only=True)}
    assert names and not names & HEAVY


def test_import_retro_is_light():
    code = f"import sys, retro; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
