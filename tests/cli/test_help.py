"""What the command says of itself: every option once with a whole sentence, its version, the packaged configurations,
and one line for what it refuses.
"""

import ast
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import retro
from retro.cli import app, main
from retro.cli.configs import about
from retro.cli.measuring import ReadingSettings
from retro.cli.reference import reference
from retro.cli.shared import ResultFiles
from retro.cli.tasks import TaskSettings
from retro.common.devices import DeviceSettings
from retro.common.settings import field_docs, packaged_configs
from retro.evaluation.settings import BaselineSettings, ReaderSettings, ScoringSettings
from retro.planning import PlanSettings
from retro.retrieval.building.settings import BuildSettings, ExecutorSettings
from retro.retrieval.building.updates import FIXED
from retro.retrieval.filters.hits import QueryFilters
from retro.retrieval.remote.limits import RetrievalLimits
from retro.sampling.settings import DecodingSettings
from retro.serve.limits import GenerationLimits
from retro.training.settings import FinetuneSettings, RetrofitSettings, TrainSettings

GROUPS = {"sweep": ("neighbors", "datastore", "models", "tokens"), "task": ("lambada", "summaries", "qa", "recall")}
GROUPS["task"] += ("lm-eval", "finetune")
SINGLE = (
    "plan",
    "build",
    "tokenizer",
    "neighbors",
    "search",
    "add",
    "remove",
    "compact",
    "verify",
    "train",
    "retrofit",
)
SINGLE += ("generate", "demo", "evaluate", "leakage", "baselines", "report", "serve", "serve-store", "configs")
VERBS = [*SINGLE, *(f"{group} {verb}" for group, verbs in GROUPS.items() for verb in verbs)]
RECIPES = {"train": TrainSettings, "retrofit": RetrofitSettings, "task finetune": FinetuneSettings}
WITHOUT_MODELS = ("tokenizer", "remove", "compact", "report", "configs", *RECIPES)
# each settings class, the verbs that take all of it, and the fields that Python alone takes
TAKEN = {
    BuildSettings: (["build"], set()),
    PlanSettings: (["plan"], set()),
    ExecutorSettings: (["neighbors"], set()),
    DeviceSettings: ([verb for verb in VERBS if verb not in (*WITHOUT_MODELS, "add")], set()),
    QueryFilters: (["search", "generate", "serve-store"], {"against"}),
    DecodingSettings: (["generate"], set()),
    ReadingSettings: (["leakage"], {"progress"}),
    ScoringSettings: (["evaluate", *(f"sweep {verb}" for verb in GROUPS["sweep"])], {"progress"}),
    ResultFiles: (["leakage", *(f"sweep {verb}" for verb in GROUPS["sweep"])], set()),
    BaselineSettings: (["baselines"], set()),
    TaskSettings: (["task lambada"], {"csv", "plot"}),
    ReaderSettings: (["task lambada"], set()),
    GenerationLimits: (["serve"], set()),
    RetrievalLimits: (["serve-store"], set()),
}
OPTION = {"num_neighbors": "--k", "window_len": "--window", "stop_strings": "--stop"}


def help_of(verb: str, capsys, monkeypatch) -> str:
    """A verb's help, on lines that are not wrapped."""
    monkeypatch.setenv("COLUMNS", "2000")
    monkeypatch.setattr(verb_app(verb), "_fallback_console", None)  # it may know another width from a test before
    capsys.readouterr()
    assert main([*verb.split(), "--help"]) == 0
    return re.sub(r"[│╭╮╰╯─]", "", capsys.readouterr().out)


def verb_app(verb: str):
    found = app
    for name in verb.split():
        found = found[name]
    return found


def test_the_verbs_are_in_groups_with_a_sentence_each(capsys, monkeypatch):
    text = help_of("", capsys, monkeypatch)
    for name in ("Datastore", "Training", "Text", "Measuring", "Serving", "Help"):
        assert re.search(rf"^\s*{name}\s*$", text, re.MULTILINE)
    for verb in (*SINGLE, *GROUPS):
        assert re.search(rf"^\s*{verb}\s+[A-Z][^\n]*\.\s*$", text, re.MULTILINE), verb
    assert sorted(name for name in app if not name.startswith("-")) == sorted([*SINGLE, *GROUPS])


def test_help_loads_nothing_heavy():
    heavy = ["torch", "transformers", "scann", "faiss", "datasets", "pyarrow"]
    code = f"""import sys; from retro.cli import main
codes = [main([*verb.split(), "--help"]) for verb in {["", *GROUPS, *VERBS]!r}]
print(set(codes), sorted({set(heavy)!r} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("{0} []")
    for verb in VERBS:
        assert f"Usage: retro {verb} " in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_a_verb_has_a_sentence(verb):
    for argument in verb_app(verb).assemble_argument_collection(parse_docstring=True):
        if argument.show:
            said = argument.parameter.help or ""
            assert re.match(r'(?s)["A-Z0-9].*\.$', said), f"{verb} {argument.name}: {said!r}"


@pytest.mark.parametrize("settings", TAKEN, ids=lambda one: one.__name__)
def test_every_setting_is_an_option_of_its_verbs_once(settings, capsys, monkeypatch):
    verbs, of_python = TAKEN[settings]
    docs = field_docs(settings)
    for verb in verbs:
        text = help_of(verb, capsys, monkeypatch)
        for field in fields(settings):
            option = OPTION.get(field.name, f"--{field.name.replace('_', '-')}")
            if verb == "build" and field.name in ("store", "inputs") or (verb, field.name) == ("plan", "inputs"):
                option = field.name.upper()
            times = len(re.findall(rf"^[ *]*{option}(?![-\w])", text, re.MULTILINE))
            assert times == (field.name not in of_python), f"{verb} {option}: {times} times"
            if times and field.name in docs:
                assert docs[field.name].replace("`", "") in text, f"{verb} {option}"


def test_an_addition_takes_what_its_store_has_not_settled_and_names_no_defaults(capsys, monkeypatch):
    text = help_of("add", capsys, monkeypatch)
    for field in fields(BuildSettings):
        there = re.search(rf"^[ *]*--{field.name.replace('_', '-')}(?![-\w])", text, re.MULTILINE)
        assert bool(there) == (field.name not in FIXED), field.name
    assert "Default:" not in text and "[default" not in text


@pytest.mark.parametrize("verb", RECIPES)
def test_every_setting_of_a_recipe_is_listed_with_type_sentence_and_default(verb, capsys, monkeypatch):
    text, docs = help_of(verb, capsys, monkeypatch), field_docs(RECIPES[verb])
    for field in fields(RECIPES[verb]):
        (line,) = re.findall(rf"^ *• {field.name} \((.*)$", text, re.MULTILINE)
        assert re.match(r"[A-Z\"].*\.$", docs[field.name]), field.name
        assert docs[field.name].replace("`", "") in line
        assert "[default: " in line or "[required]" in line or "Default: " in line, line


def test_no_settings_class_is_forgotten():
    known = {base for one in (*TAKEN, *RECIPES.values()) for base in one.__mro__}
    root = Path(retro.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Settings", "Limits", "Filters")):
                assert node.name in {one.__name__ for one in known}, f"{path}: {node.name}"


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == retro.__version__


def test_the_packaged_configurations(capsys):
    assert main(["configs"]) == 0
    listed = capsys.readouterr().out
    for file in packaged_configs():
        verb = {"finetune": "task finetune"}.get(file.stem.split("_")[0], file.stem.split("_")[0])
        purpose, cost = about(file)
        assert f"retro {verb} {file.stem}\n    {purpose}\n" in listed and re.match(r"[A-Z].{20,250}\.$", purpose), (
            purpose
        )
        assert ("Costs:" in file.read_text()) == bool(cost) and (not cost or f"Cost: {cost}\n" in listed)
    assert main(["configs", "train_small"]) == 0
    assert "hidden_size: 128\n" in capsys.readouterr().out


def test_the_reference_has_every_verb_and_every_setting_of_a_recipe():
    text = reference()
    for verb in (*VERBS, *GROUPS):
        assert re.search(rf"^##+ retro {verb}$", text, re.MULTILINE), verb
    assert "[`build`](#retro-build)" in text and "`--chunk-len INT`" in text
    for verb, settings in RECIPES.items():
        section = re.split(rf"(?m)^##+ retro {verb}$", text)[1].partition("\n## ")[0]
        assert all(f"- `{field.name}` (" in section for field in fields(settings))


REFUSED = {
    "a verb": (["biuld"], ['"biuld"', 'Did you mean "build"?', "See retro --help."]),
    "a verb of a group": (["task", "lambda"], ['"lambda"', 'Did you mean "lambada"?', "See retro task --help."]),
    "an option": (["build", "s", "i", "--tokenizr", "t"], ["--tokenizr", "Did you mean --tokenizer?"]),
    "a choice": (
        ["build", "s", "i", "--tokenizer", "t", "--key-dtype", "int8"],
        ['"int8"', "--key-dtype", '"float16"'],
    ),
    "a type": (["build", "s", "i", "--tokenizer", "t", "--chunk-len", "x"], ['"x"', "--chunk-len", "int"]),
    "a missing option": (["build", "s", "i"], ["--tokenizer", "See retro build --help."]),
    "a missing argument": (["train"], ["CONFIG", "See retro train --help."]),
    "a missing value": (["evaluate", "m", "--store", "s", "--data"], ["--data", "at least 1"]),
    "a setting's own check": (["build", "s", "i", "--tokenizer", "t", "--chunk-len", "0"], ["chunk_len", "is 0"]),
    "a configuration": (["configs", "train_smal"], ["train_smal", "train_small"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_one_line_with_option_value_and_remedy(case, capsys):
    argv, said = REFUSED[case]
    assert main(argv) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and error.startswith("retro: error: ")
    assert all(words in error for words in said), error


BUILD = {"store": "s", "inputs": ["a", "b"]}
GIVEN = {
    "build s a b --tokenizer t": BUILD | {"settings": {"tokenizer": "t"}},
    "build --tokenizer=t s a b --no-pool-prefix --deduplicate exact": BUILD
    | {"settings": {"tokenizer": "t", "pool_prefix": False, "deduplicate": "exact"}},
    "build s a b --tokenizer t --decontaminate x y --subsample 0.5 3 --quality 'p>1' --quality q==en": BUILD
    | {"settings": {"tokenizer": "t", "decontaminate": ["x", "y"], "subsample": (0.5, 3), "quality": ["p>1", "q==en"]}},
    "build s a b --tokenizer t --query-prefix 'query: ' --passage-prefix ''": BUILD
    | {"settings": {"tokenizer": "t", "query_prefix": "query: ", "passage_prefix": ""}},
    "add s a --text-field body --no-index": {
        "store": "s",
        "inputs": ["a"],
        "no_index": True,
        "settings": {"text_field": "body"},
    },
    "generate m '[\"a\"]' - --stop x --stop '[1]' --seed -1 --no-retrieval": {
        "model": "m",
        "prompts": ['["a"]', "-"],
        "no_retrieval": True,
        "given": {"stop_strings": ["x", "[1]"], "seed": -1},
    },
    "sweep neighbors m --ks 0 1 --store s --data a b --window 64": {
        "model": "m",
        "ks": (0, 1),
        "given": {"store": "s", "data": ["a", "b"], "window_len": 64},
    },
    "train c lr=1e-3 'model.cca_layers=[2, 4]'": {"config": "c", "settings": ("lr=1e-3", "model.cca_layers=[2, 4]")},
    "serve m --store a --store n=b --max-batch 2": {"model": "m", "store": ["a", "n=b"], "limits": {"max_batch": 2}},
}


@pytest.mark.parametrize("command", GIVEN)
def test_a_verb_is_given_what_was_typed_and_nothing_else(command):
    assert dict(app.parse_args(shlex.split(command))[1].arguments) == GIVEN[command]
