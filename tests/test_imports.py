"""The rooms of the house: imports flow one way, no circles, no long files, and `import retro` is quick."""

import ast
import os
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The rooms from the ground up, and what each may import of the house; a room is the longest prefix that matches.
MAY_IMPORT = {
    "retro.version": (),
    "retro.common": (),
    "retro.web": (),
    "retro.modules": (),
    "retro.text": ("retro.common",),
    "retro.retrieval.neighbors": (),
    "retro.retrieval.store": ("retro.common", "retro.text"),
    "retro.retrieval.embedding": ("retro.common", "retro.text"),
    "retro.retrieval.filters": ("retro.common", "retro.text"),
    "retro.retrieval.executors": ("retro.common",),
    "retro.retrieval.search": (
        "retro.common",
        "retro.text",
        "retro.retrieval.store",
        "retro.retrieval.embedding",
        "retro.retrieval.executors",
    ),
    "retro.retrieval.building": (
        "retro.version",
        "retro.common",
        "retro.text",
        "retro.retrieval.store",
        "retro.retrieval.embedding",
        "retro.retrieval.filters",
        "retro.retrieval.search",
        "retro.retrieval.executors",
    ),
    "retro.retrieval.retriever": (
        "retro.text",
        "retro.retrieval.neighbors",
        "retro.retrieval.store",
        "retro.retrieval.embedding",
        "retro.retrieval.filters",
        "retro.retrieval.search",
    ),
    "retro.retrieval.remote": (
        "retro.common",
        "retro.version",
        "retro.web",
        "retro.text",
        "retro.retrieval.neighbors",
        "retro.retrieval.store",
        "retro.retrieval.search",
        "retro.retrieval.retriever",
    ),
    "retro.retrieval": ("retro.common", "retro.text", "retro.retrieval"),
    "retro.model": ("retro.common", "retro.modules", "retro.retrieval.neighbors"),
    "retro.retrofit": ("retro.common", "retro.modules", "retro.model"),
    "retro.provenance": ("retro.version", "retro.common", "retro.retrieval"),
    "retro.loading": ("retro.common", "retro.provenance", "retro.retrieval", "retro.retrofit"),
    "retro.evaluation.scorer": ("retro.common",),
    "retro.sampling": ("retro.common", "retro.text", "retro.retrieval", "retro.model", "retro.evaluation.scorer"),
    "retro.evaluation": (
        "retro.version",
        "retro.common",
        "retro.modules",
        "retro.text",
        "retro.retrieval",
        "retro.model",
        "retro.retrofit",
        "retro.provenance",
        "retro.loading",
        "retro.sampling",
    ),
    "retro.training": (
        "retro.common",
        "retro.retrieval",
        "retro.model",
        "retro.retrofit",
        "retro.provenance",
        "retro.loading",
        "retro.evaluation",
    ),
    "retro.planning": ("retro.common", "retro.text", "retro.retrieval", "retro.model", "retro.evaluation"),
    "retro.serve": (
        "retro.common",
        "retro.version",
        "retro.web",
        "retro.text",
        "retro.retrieval",
        "retro.model",
        "retro.provenance",
        "retro.loading",
        "retro.sampling",
    ),
    "retro.demo": (
        "retro.common",
        "retro.text",
        "retro.retrieval",
        "retro.loading",
        "retro.sampling",
        "retro.evaluation",
        "retro.training",
    ),
    "retro.cli": (
        "retro.version",
        "retro.common",
        "retro.web",
        "retro.text",
        "retro.retrieval",
        "retro.model",
        "retro.retrofit",
        "retro.provenance",
        "retro.loading",
        "retro.sampling",
        "retro.evaluation",
        "retro.training",
        "retro.planning",
        "retro.serve",
        "retro.demo",
    ),
    "retro": (
        "retro.version",
        "retro.text",
        "retro.retrieval",
        "retro.model",
        "retro.retrofit",
        "retro.loading",
        "retro.sampling",
        "retro.evaluation",
    ),
}
ROOMS = list(MAY_IMPORT)
HEAVY = {"torch", "transformers", "scann", "faiss", "datasets", "pyarrow", "accelerate"}
# Where modules are imported by a name: that of a table of names that load on demand, which `imports` reads; that of a
# task, which its maker has from `__name__`; and where wrapt is missing.
BY_NAME = {"retro/__init__.py", "retro/common/lazy.py", "retro/retrieval/executors/tasks.py"}
MOST_LINES = 450


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


LIBRARY = sorted((ROOT / "retro").rglob("*.py"))
MODULES = {module_name(path): path for path in LIBRARY}
SCRIPTS = sorted([*(ROOT / "train").glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """The modules that a file imports, wherever it does, and those of its table of names that load on demand."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name in MODULES} or {node.module}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME" and not top_level_only:
            found |= set(ast.literal_eval(node.value).values())
    return found


def room(module: str) -> str:
    return max((r for r in ROOMS if f"{module}.".startswith(f"{r}.")), key=len)


def test_no_room_imports_one_above_it():
    for number, (here, names) in enumerate(MAY_IMPORT.items()):
        for name in set(names) - {here}:
            assert ROOMS.index(name) < number, f"{here} may import {name}, above it"


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_imports_flow_one_way(path):
    here = room(module_name(path))
    for name in imports(path):
        assert not name.startswith(("train.", "benchmarks.", "tests.")), "the library never imports its scripts"
        if name.split(".")[0] == "retro":
            assert name in MODULES, f"{module_name(path)} imports {name}, which is no file"
            there = room(name)
            allowed = (here, *MAY_IMPORT[here])
            assert any(f"{there}.".startswith(f"{a}.") for a in allowed), f"{module_name(path)} imports {name}"
            assert ROOMS.index(there) <= ROOMS.index(here), f"{module_name(path)} imports {name}, above it"


def test_no_files_import_each_other_in_a_circle():
    graph = {name: {other for other in imports(path) if other in MODULES} for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_nothing_is_imported_by_a_name_that_this_test_does_not_read():
    for path in LIBRARY:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(tree)}
        by_name = {"import_module", "__import__", "resolve_name"} & names
        assert not by_name or path.relative_to(ROOT).as_posix() in BY_NAME, f"{path} imports by name"
        tables = [
            node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME"
        ]
        read = {id(node) for table in tables for node in ast.walk(table)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in read:
                named = node.value.partition(":")[0]
                assert named == "retro" or named not in MODULES, f"{path}:{node.lineno} names a module in a string"


@pytest.mark.parametrize("path", [*LIBRARY, *SCRIPTS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_no_class_name_stands_twice():
    """Nor as `X` and `_X`: whoever reads a name knows which class is meant."""
    homes = defaultdict(list)
    for path in [*LIBRARY, *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes[node.name.lstrip("_")].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert len(homes) > 100 and not {name: places for name, places in homes.items() if len(places) > 1}


def test_no_part_of_retrieval_is_large():
    def num_lines(folder: Path) -> int:
        return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.rglob("*.py"))

    total = num_lines(ROOT / "retro")
    for folder in (ROOT / "retro" / "retrieval").iterdir():
        assert num_lines(folder) < 0.15 * total, folder.name


def test_the_command_line_imports_nothing_heavy():
    files = (ROOT / "retro" / "cli").glob("*.py")
    names = {name.split(".")[0] for file in files for name in imports(file, top_level_only=True)}
    assert names and not names & HEAVY


def test_every_name_that_loads_on_demand_is_where_its_table_says():
    tables = [name for name, path in MODULES.items() if "_HOME = {" in path.read_text(encoding="utf-8")]
    for table in map(import_module, tables):
        assert [name for name in table._HOME if not hasattr(table, name)] == [] != list(table._HOME)


def test_import_retro_is_light():
    code = f"import sys, retro; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_a_search_by_words_loads_no_models(tmp_path, words_tokenizer):
    """Nor is a setting that is wrong told only after they are loaded."""
    from tests.stand_ins import make_store

    store = make_store(tmp_path, ["w1 w2 w3", "w4 w5"], words_tokenizer)
    for index in ("tfidf", "ivf"):
        asked = ["search", str(store.path), "w1 w2", "--index", index, "--json", str(tmp_path / "found.json")]
        code = (
            f"import sys; from retro.cli import main; print(main({asked!r}), {{'torch', 'faiss'}} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.strip().endswith(f"{2 if index == 'ivf' else 0} set()"), done.stderr


def test_one_checkout_is_all_of_the_library(tmp_path):
    """Whatever else is installed: modules and configurations come from the folder of `retro` itself."""
    code = """
import sys
from pathlib import Path
import retro, retro.cli, retro.evaluation.bits
import retro.training.finetune, retro.training.pretrain, retro.training.retrofit
from retro.common.settings import find_config

root = Path(retro.__file__).parents[1]
files = [getattr(module, "__file__", None) for name, module in sys.modules.items() if name.split(".")[0] == "retro"]
assert all(root in Path(file).parents for file in files if file), files
assert find_config("train_small", "train").parent == root / "configs"
print(root)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT
