"""Prompts from arguments, a file or standard input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retro.common.files import read_text

STDIN = "-"


def read_prompts(given: Sequence[str], file: str | None, stdin: Any) -> list[str]:
    """The prompts given, or those of a file, or the one that standard input holds.

    Arguments:
        given: prompts; "-" stands for standard input.
        file: .txt with one prompt a line, or .jsonl with the field "prompt"; empty lines are left out.
        stdin: one prompt, the whole text without its last line end; read where nothing is given and it is no terminal.

    Raises ValueError where there is no prompt, or two places to take them from, and for what is no UTF-8 or JSON.
    """
    if given and file:
        raise ValueError("--prompt-file is given beside PROMPT; give one of them.")
    if file:
        return _from_file(Path(file))
    if not given and stdin.isatty():
        raise ValueError("no prompt is given; give PROMPT, --prompt-file FILE or text on standard input.")
    if list(given).count(STDIN) > 1:
        raise ValueError("- is given twice; standard input can be read once.")
    return [_from_stdin(stdin) if prompt == STDIN else prompt for prompt in given or [STDIN]]


def _from_stdin(stdin: Any) -> str:
    try:
        text = stdin.read().removesuffix("\n")
    except UnicodeDecodeError:
        raise ValueError("standard input is no UTF-8 text; give a prompt in UTF-8.") from None
    if not text:
        raise ValueError("no prompt is given and standard input is empty; give at least one character.")
    return text


def _from_file(path: Path) -> list[str]:
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"--prompt-file {path} ends in neither .txt nor .jsonl; write one prompt a line.")
    text = read_text(path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"--prompt-file {path} holds no prompt; give at least one line.")
    if path.suffix == ".txt":
        return [line for _, line in lines]
    return [_field(path, number, line) for number, line in lines]


def _field(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--prompt-file {path}, line {number}: no JSON ({error}).") from None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f'--prompt-file {path}, line {number}: no text in "prompt"; write {{"prompt": "..."}}.')
    return prompt
